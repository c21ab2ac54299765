"""What a unit's activations take under one choice: in the tiers they wait in, and on the device as it runs."""

from __future__ import annotations

from offload.planner.choice import UnitChoice, swaps
from offload.planner.pages import PAGE, round_up
from offload.planner.plan import UnitProfile, Workload


def away_bytes(unit: UnitProfile, c: UnitChoice, tier: str, w: Workload) -> int:
    """Bytes of all micro-batches' activations of the unit that wait in `tier`, each piece in whole pages."""
    boundary = w.micro_batches * round_up(unit.boundary_bytes) if c.boundary == tier else 0
    share = c.swapped.get(tier, 0.0)
    swapping = w.micro_batches - round(c.recompute * w.micro_batches)
    if not share or unit.kept or not swapping:
        return boundary
    # a page more for every tensor, since pieces begin on pages
    return boundary + swapping * (round_up(round(share * w.micro_batches / swapping * unit.saved_bytes))
                                  + PAGE * len(unit.saved))  # fmt: skip


def per_micro_batch_away(unit: UnitProfile, c: UnitChoice, w: Workload) -> int:
    """Bytes of one micro-batch of the unit that come back to the device for its backward."""
    boundary = unit.boundary_bytes if c.boundary != "gpu" else 0
    swapping = w.micro_batches - round(c.recompute * w.micro_batches)
    if not swaps(c) or unit.kept or not swapping:
        return boundary
    share = sum(c.swapped.values()) * w.micro_batches / swapping
    return boundary + round(share * unit.saved_bytes) + PAGE * len(unit.saved)


def kept_workspace(unit: UnitProfile) -> int:
    """Peak bytes of the framework in a backward of the unit that runs nothing again."""
    return unit.workspace_kept or max(0, unit.workspace_backward - unit.saved_bytes)


def kept_bytes(unit: UnitProfile, c: UnitChoice, w: Workload) -> int:
    """What of the unit's saved tensors stays on the device from forward to backward, all micro-batches."""
    return 0 if unit.kept else round(c.keep * w.micro_batches * unit.saved_bytes)


def kept_room(unit: UnitProfile, passes: float) -> int:
    """Room for what the unit saves in so many passes of a micro-batch; a page more for every tensor, which suffices
    where one is divided."""
    return 0 if unit.kept else round(passes * (unit.saved_bytes + PAGE * len(unit.saved)))


def forward_workspace(unit: UnitProfile, c: UnitChoice, w: Workload) -> int:
    """Peak bytes of the framework while one micro-batch passes the unit in forward, beside what waits for backward.

    What autograd saves in the pass is part of it, even where it is to stay on a CPU: it is copied into the engine's own
    memory when the pass is over. Saved tensors of earlier passes on their way out take the place of those that this one
    has not saved yet, as far as they leave in time (`saved_room`); a GPU is given its next pass before they have begun
    to leave, so that a pass's lie beside the next one's.
    """
    if unit.kept or c.recompute >= 1.0 or not unit.saved:
        return unit.workspace_forward
    graph = unit.workspace_graph or unit.workspace_forward + unit.saved_bytes
    if w.device != "cpu":
        waiting = round(c.keep / (1.0 - c.recompute) * unit.saved_bytes)  # counted there already
        return max(unit.workspace_forward, graph - waiting + unit.saved_bytes * swaps(c))
    if swaps(c):
        graph = max(graph, unit.saved_bytes + _beside_saved(unit, c))
    return max(unit.workspace_forward, graph)


def saved_room(unit: UnitProfile, c: UnitChoice, w: Workload) -> int:
    """How much of `forward_workspace` is for saved tensors that leave the device or may make room for others: what
    earlier passes saved and is still leaving has this room when the pass begins. On a CPU, where a pass can be held up
    at any moment, both have it together; on a GPU it is theirs alone."""
    if unit.kept or c.recompute >= 1.0 or not unit.saved:
        return 0
    if w.device != "cpu":
        return unit.saved_bytes * swaps(c)
    return max(0, forward_workspace(unit, c, w) - _beside_saved(unit, c))


def _beside_saved(unit: UnitProfile, c: UnitChoice) -> int:
    """The most that the framework holds beside what autograd has saved so far, in a pass that is run again too."""
    unsaved = unit.workspace_unsaved or unit.workspace_forward
    return max(unsaved, unit.workspace_forward) if c.recompute else unsaved
