"""The device arena over one training step: what the engine owns there, when it lives, and at which offset.

Weight slots and the resident unit live always: weights of the next unit, and of the next step, are on their way while
the last ones compute. Gradient slots live in backward only: the first from the first backward, the second from the next
one, while the first is on its way out. A unit's outputs live from its forward until all micro-batches have passed its
backward, whose gradient slot is filled meanwhile. Hence boundary activations share bytes with later gradient slots at
most, and the slots alone with nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from offload.planner.layout import Layout, Lifetime, solve
from offload.planner.memory import is_large
from offload.planner.pages import PAGE, round_up
from offload.planner.plan import Buffers, Workload


@dataclass(frozen=True)
class Arena:
    """`places`: of each owned buffer (name, number) its offset and bytes, whole pages, in an arena of `arena_bytes`."""

    places: dict[tuple[str, int], tuple[int, int]]
    arena_bytes: int
    lower_bound_bytes: int
    layout: Layout

    def to_json(self) -> dict[str, Any]:
        """`layout` of plan.json, from which the engine hands out its slots: `offsets` by name, in order of number."""
        offsets: dict[str, list[int]] = {}
        for (name, _), (offset, _) in sorted(self.places.items()):
            offsets.setdefault(name, []).append(offset)
        return {"arena_bytes": self.arena_bytes, "lower_bound_bytes": self.lower_bound_bytes, "offsets": offsets}


def step_lifetimes(
    w: Workload, buffers: Collection[Buffers], boundaries: bool = False
) -> dict[tuple[str, int], Lifetime]:
    """When each device buffer lives within a step of 2 U stages, U forward then U backward.

    `boundaries`: also one buffer per unit for its outputs of all micro-batches, "activations/<unit>". Slots of one name
    are numbered, to be taken first in this order; each lives from its first use to the end of the step.
    """
    units = [u for u in w.units if u.kind != "resident"]
    count = len(units)
    end = 2 * count
    index = {u.name: i for i, u in enumerate(units)}

    def backward(i: int) -> int:
        # a unit that keeps its graph runs backward as soon as the loss is there, micro-batch by micro-batch
        return count - 1 if units[i].kept else end - 1 - i

    held = {b.name.partition("/")[2] for b in buffers if b.name.startswith("gradients.held/")}
    large = [i for i, u in enumerate(units) if u.trainable and u.name not in held and is_large(u, w)]
    small = [i for i, u in enumerate(units) if u.trainable and u.name not in held and not is_large(u, w)]
    lives: dict[tuple[str, int], Lifetime] = {}
    for b in buffers:
        if b.tier != "gpu":
            continue
        users = {"gradients.block": small, "gradients.large": large}.get(b.name)
        if users:
            uses = sorted(backward(i) for i in users)
        elif b.name.startswith("gradients.held/"):
            i = index[b.name.partition("/")[2]]
            # one that is used last of all, too, by the head's loss, or else one that lives on the device
            uses = [min(count - 1, backward(i)) if units[i].held else backward(i)]
        else:
            uses = [0]
        for k in range(b.count):
            lives[b.name, k] = Lifetime(uses[min(k, len(uses) - 1)], end, round_up(b.nbytes))
    if boundaries:
        for i, u in enumerate(units):
            if nbytes := round_up(w.micro_batches * u.boundary_bytes):
                lives[f"activations/{u.name}", 0] = Lifetime(i, max(backward(i), i) + 1, nbytes)
    return lives


def arena_layout(w: Workload, buffers: Collection[Buffers], boundaries: bool = False, time_limit: float = 1.0) -> Arena:
    """Offsets for what the engine owns on the device, in one arena; checked for overlap.

    Without `boundaries` all slots live at the end of backward, so that the arena is the sum of its slots and equals the
    lower bound: no layout could do with less.
    """
    lives = step_lifetimes(w, buffers, boundaries)
    pages = [Lifetime(b.lower, b.upper, b.size // PAGE) for b in lives.values()]
    found = solve(pages, time_limit)
    places = {
        name: (offset * PAGE, life.size) for (name, life), offset in zip(lives.items(), found.offsets, strict=True)
    }
    return Arena(places, found.height * PAGE, found.lower_bound * PAGE, found)
