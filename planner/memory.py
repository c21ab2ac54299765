"""The peak model: every byte a run takes, by tier and category, from the workload and where its state lives.

What the engine reserves (`reserve`, `home_bytes`, `gradient_home`) is exact. What the framework allocates inside a unit
is the traced peak of one micro-batch times `FRAMEWORK_MARGIN`, the one place where measurement corrects the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from offload.planner.activation_bytes import (
    away_bytes,
    forward_workspace,
    kept_bytes,
    kept_room,
    kept_workspace,
    per_micro_batch_away,
)
from offload.planner.choice import Choice, Role, UnitChoice, nothing_in_ram, runs
from offload.planner.pages import PAGE, round_up
from offload.planner.plan import TIERS, Buffers, Plan, UnitProfile, Workload, ZerothOrder
from offload.planner.unit_bytes import gradient_bytes, gradient_home, home_bytes, item_sizes, store_bytes, weight_bytes

MIB = 1 << 20

STAGING_BYTES = 8 * MIB
STAGING_COUNT = 4
STAGING_IN_PLACE = (2, 4 * MIB)  # count and bytes (a block of the store) where the store reads into slots and no
# activations go to it
CHUNK_ELEMENTS = 2 * MIB  # elements of one optimizer chunk
UPDATE_COUNT = 3  # read ahead, update, write behind
DEVICE_SCRATCH = 20 * MIB  # of AdamW where units live on the device: 20 bytes for each of a million elements at a time
# What a run's process has beyond its footprint: what planning leaves (17 MiB on one machine, up to 50 on another, most
# of which a run uses again), libraries loaded late (15 MiB), kernels that oneDNN compiled and their scratch, stacks and
# heaps of threads, and objects of tape, trace and requests. Between steps of four families it was 25 to 47 MiB.
# `Workload.program_bytes` is this at least; the part that is not left by planning is PROGRAM_RUN.
PROGRAM_RUN = 35 * MIB
# The part of it that is not seen when the engine looks whether a pass still fits: files (14 to 20 MiB), and what comes
# later.
PROGRAM_LATE = 38 * MIB
STRIPE_BYTES = 8 * MIB  # the store's stripe: each path may hold one more than its exact share

# The traced peak of a unit was compared with the real one (resident memory, its maximum reset before each pass) for
# llama, qwen3, gemma3, gpt2, gpt-neox and qwen3-moe, hidden 256 to 4096, 256 to 2048 tokens, bfloat16 and float32 on
# the CPU: what the kernels' own code and scratch did not explain was at most 5 %. Conditions, which the engine sets up:
# - glibc maps tensors of MMAP_THRESHOLD bytes and more one by one and gives them back at once. At 1 MiB the fresh pages
#   of a 271M model's step cost 0.9 M page faults and 1.6 s of the kernel's time, at 4 MiB 0.08 M and 0.5 s;
# - what smaller ones leave free in the heap is kept within HEAP_KEEPS when a pass begins (`offload.heap`); holes of the
#   pass itself add as much again at most;
# - oneDNN's caches hold at most KERNEL_CACHE_CAPACITY shapes (ONEDNN_PRIMITIVE_CACHE_CAPACITY, LRU_CACHE_CAPACITY;
#   without them, experts' ever new shapes grew to 0.9 GB), part of the program.
# CUDA's numbers are not measured yet: the caching allocator rounds blocks up, and cuBLAS keeps a workspace.
MMAP_THRESHOLD = 4 * MIB
HEAP_KEEPS = 16 * MIB
KERNEL_CACHE_CAPACITY = 32
FRAMEWORK_MARGIN = {"cpu": 1.05, "cuda": 1.10}
FRAMEWORK_FIXED = {"cpu": 2 * HEAP_KEEPS, "cuda": 64 * MIB}
# Noise and float32 copies of the pieces of weights that are perturbed or updated at one time (offload/zo_pieces.py).
ZO_SCRATCH = {"cpu": 16 * MIB, "cuda": 32 * MIB}


def streamed_bytes(w: Workload, choice: Choice | None = None) -> dict[Role, int]:
    """Bytes per parameter that an optimizer chunk has to hold of each role: of those that any unit has on NVMe, or
    without a choice of all. What has a home is updated there."""
    stored: dict[Role, int] = {
        "weights": w.itemsize,
        "state": 8 + (2 if w.dtype == "bfloat16" else 0),
        "gradient": w.gradient_itemsize if w.clipping else 0,
    }
    if choice is None:
        return stored
    units = {c for i, c, _ in runs(w, choice) if w.units[i].trainable}
    return {role: n for role, n in stored.items() if any(c.tier(role) == "nvme" for c in units)}


def device_home(unit: UnitProfile, w: Workload) -> int:
    """Bytes on the device of a unit that lives there: its weights as in a slot (trainable ones, then frozen ones), then
    master (bfloat16 only), exp_avg and exp_avg_sq; each of these begins on a page."""
    state = sum(n for role, n in home_bytes(unit, w).items() if role not in ("param", "frozen"))
    return round_up(weight_bytes(unit, w)) + state


def filled_bytes(w: Workload) -> int:
    """Bytes per parameter that a chunk of weights and state passes through the buffers with, where it lives on the
    device: its first values are made on the host."""
    sizes = streamed_bytes(w)
    return sizes["weights"] + sizes["state"]


def is_large(unit: UnitProfile, w: Workload) -> bool:
    """Whether the unit is streamed through the "large" slot because a block slot is too small for its weights."""
    return unit.kind != "resident" and unit.trainable + unit.frozen > w.widest_block


def reserve(w: Workload, block_slots: int = 2, choice: Choice | None = None) -> tuple[Buffers, ...]:
    """The buffers reserved at start-up, homes not included. Names that need no bytes are left out.

    weights.block, weights.large, gradients.block, gradients.large, gradients.held/<unit> (one per held unit), resident
    in the gpu tier; staging, landing (cuda only), update in the cpu tier. A unit uses the "large" slots exactly if
    `is_large`.
    Of each unit that lives on the device state.<unit> (`device_home`), which it has in place of weight slots, and with
    clipping gradients.held/<unit>; and once update.device, the scratch of AdamW there.
    With activations off the device also activations.cpu, .cxl, .nvme (all such bytes alive at once) and
    activations.staging (gpu: the largest (unit, micro-batch) on its way back; one in use, one prefetched). Where the
    device is a CPU, activations.kept (gpu) for the inner activations that stay on it.
    """
    if w.zo:
        return _reserve_zeroth_order(w, w.zo, block_slots)
    most_trainable = max((u.trainable for u in w.units), default=0)
    chunk = min(CHUNK_ELEMENTS, round_up(most_trainable))
    on_device = frozenset[int]()
    if choice is not None and any(c.on_device for _, c, _ in runs(w, choice)):
        on_device = choice.placed("state", "gpu")
    least = max(min(chunk, PAGE), chunk * filled_bytes(w) if on_device else 0)
    if ("slots", block_slots, on_device) not in w.worked_out:
        w.worked_out["slots", block_slots, on_device] = _device_slots(w, block_slots, on_device)
    buffers: list[Buffers] = [
        *w.worked_out["slots", block_slots, on_device],
        Buffers("staging", "cpu", *_staging(w, choice)),
        # On a CPU the gradient slots are host memory themselves.
        *([Buffers("landing", "cpu", 1, round_up(most_trainable * w.gradient_itemsize))] if w.device == "cuda" else []),
        Buffers("update", "cpu", UPDATE_COUNT, max(least, chunk * sum(streamed_bytes(w, choice).values()))),
    ]
    if choice is not None:
        needs = _needs(w, choice)
        buffers += [
            Buffers(f"activations.{tier}", tier, 1, sum(n.away[i] * count for n, _, count in needs))
            for i, tier in enumerate(("cpu", "cxl", "nvme"))
        ]
        buffers.append(Buffers("activations.staging", "gpu", 2, max((n.coming_back for n, *_ in needs), default=0)))
        if w.device == "cpu":
            kept = sum(n.kept * count for n, _, count in needs)
            buffers.append(Buffers("activations.kept", "gpu", 1, kept // PAGE * PAGE))
    return tuple(b for b in buffers if b.nbytes)


def _device_slots(w: Workload, block_slots: int, on_device: frozenset[int]) -> list[Buffers]:
    """What does not depend on the choice but for the units that live on the device."""
    there = [u for i, u in enumerate(w.units) if i in on_device]
    streamed = [u for i, u in enumerate(w.units) if u.kind != "resident" and i not in on_device]
    held = [u for i, u in enumerate(w.units) if u.kind != "resident" and (u.held or (i in on_device and w.clipping))]
    unheld = [u for u in (streamed if w.clipping else (*streamed, *there)) if not u.held]

    def widest(units: list[UnitProfile], size: Callable[[UnitProfile, Workload], int], large: bool) -> int:
        return round_up(max((size(u, w) for u in units if is_large(u, w) == large), default=0))

    resident = sum(
        round_up(weight_bytes(u, w)) + round_up(gradient_bytes(u, w)) for u in w.units if u.kind == "resident"
    )
    return [
        Buffers("weights.block", "gpu", block_slots, widest(streamed, weight_bytes, False)),
        Buffers("weights.large", "gpu", 1, widest(streamed, weight_bytes, True)),
        Buffers("gradients.block", "gpu", 2, widest(unheld, gradient_bytes, False)),
        Buffers("gradients.large", "gpu", 1, widest(unheld, gradient_bytes, True)),
        *(Buffers(f"gradients.held/{u.name}", "gpu", 1, round_up(gradient_bytes(u, w))) for u in held),
        Buffers("resident", "gpu", 1, resident),
        *(Buffers(f"state.{u.name}", "gpu", 1, device_home(u, w)) for u in there),
        Buffers("update.device", "gpu", 1, DEVICE_SCRATCH if there else 0),
    ]


def _staging(w: Workload, choice: Choice | None) -> tuple[int, int]:
    stores = choice is not None and any(c.boundary == "nvme" or c.swap_nvme for c in choice.units)
    return STAGING_IN_PLACE if w.device == "cpu" and not stores else (STAGING_COUNT, STAGING_BYTES)


def store_staging(w: Workload) -> int:
    """Bytes of staging that activations on their way to the store add."""
    count, nbytes = STAGING_IN_PLACE
    return STAGING_COUNT * STAGING_BYTES - count * nbytes if w.device == "cpu" else 0


def _reserve_zeroth_order(w: Workload, zo: ZerothOrder, block_slots: int) -> tuple[Buffers, ...]:
    """Slots that any unit fits into, perturbed leftovers included, and a copy of those for each forward under way."""
    leftovers = [u for u in w.units if u.kind == "resident"]
    buffers = (
        Buffers("weights.block", "gpu", block_slots, round_up(max((weight_bytes(u, w) for u in w.units), default=0))),
        Buffers("resident", "gpu", 1, zo.together * sum(round_up(weight_bytes(u, w)) for u in leftovers)),
        Buffers("staging", "cpu", STAGING_COUNT, STAGING_BYTES),
        Buffers("update", "cpu", UPDATE_COUNT, STAGING_BYTES),
    )
    return tuple(b for b in buffers if b.nbytes)


@dataclass(frozen=True)
class _Needs:
    """What one unit asks for under one choice: all that the peaks are made of."""

    away: tuple[int, int, int]  # activations in RAM, CXL memory and on NVMe
    coming_back: int  # of one micro-batch, whole pages
    homes: Mapping[str, int]  # weights and optimizer state by tier
    waits: Mapping[str, int]  # the gradient, by tier
    kept: int  # reserved on the device for inner activations
    waiting: int  # other activations on the device from forward to backward
    forward: int  # the framework's bytes
    backward: int


def _needs(w: Workload, choice: Choice) -> list[tuple[_Needs, UnitProfile, int]]:
    """Of every unit, neighbours that are alike together: (each one's, one of them, how many)."""
    known: dict[tuple[int, UnitChoice], _Needs] = w.worked_out.setdefault("needs", {})
    found = []
    for i, c, count in runs(w, choice):
        needs = known.get((i, c))
        if needs is None:
            needs = known[i, c] = _needs_of(w, i, c)
        found.append((needs, w.units[i], count))
    return found


def _needs_of(w: Workload, i: int, c: UnitChoice) -> _Needs:
    unit, m, sizes = w.units[i], w.micro_batches, item_sizes(w)[i]
    homes = {c.weights: sizes["weights"]}
    homes[c.state] = homes.get(c.state, 0) + sizes["state"]
    workspace = unit.workspace_backward if c.recompute or unit.kept else kept_workspace(unit)
    return _Needs(
        away=(away_bytes(unit, c, "cpu", w), away_bytes(unit, c, "cxl", w), away_bytes(unit, c, "nvme", w)),
        coming_back=round_up(per_micro_batch_away(unit, c, w)),
        homes=homes,
        waits={c.gradient: sizes["gradient"]},
        kept=kept_room(unit, c.keep * m) if w.device == "cpu" else 0,
        waiting=(0 if w.device == "cpu" else kept_bytes(unit, c, w))
        + (m * unit.boundary_bytes if c.boundary == "gpu" else 0),
        forward=_framework(forward_workspace(unit, c, w), w),
        backward=_framework(workspace + (m + 1) * _widest(w), w),
    )


def _framework(nbytes: int, w: Workload) -> int:
    return round(nbytes * FRAMEWORK_MARGIN[w.device]) + FRAMEWORK_FIXED[w.device]


def _widest(w: Workload) -> int:
    """The largest output of one visit."""
    if "widest" not in w.worked_out:
        w.worked_out["widest"] = max((u.boundary_bytes // max(1, u.visits) for u in w.units), default=0)
    return int(w.worked_out["widest"])


class Moment(NamedTuple):
    """Bytes on the device that come and go, while one unit runs: what waits for backward, and the framework's own."""

    unit: int
    backward: bool
    activations: int
    framework: int


def moments(w: Workload, choice: Choice) -> Iterator[Moment]:
    """The device's changing bytes at every unit, forward and backward, in order.

    Activations are those made so far and not yet used. The framework's part is the unit's traced workspace with the
    boundary gradients of all micro-batches that exist beside it (one more than M: a unit's input gradient is made
    before its output gradient goes). What autograd saves of one micro-batch is part of the workspace of the pass that
    makes it: of backward, by running again, or of forward.

    Zeroth-order: nothing waits for a backward, so each pass under way holds what enters and what leaves one unit.
    """
    m = w.micro_batches
    if w.zo:
        passing = m * w.zo.together * (2 * _widest(w) + w.shared_bytes)
        for i, unit in enumerate(w.units):
            workspace = max(unit.workspace_forward, unit.workspace_backward)
            yield Moment(i, False, passing, _framework(workspace, w) + ZO_SCRATCH[w.device])
        return

    needs = [n for n, _, count in _needs(w, choice) for _ in range(count)]
    alive = m * w.shared_bytes
    for i, n in enumerate(needs):
        alive += n.waiting
        yield Moment(i, False, alive, n.forward)
    # The last visit runs backward from the loss while everything waits; a unit visited again frees nothing before.
    yield from (Moment(i, True, alive, needs[i].backward) for i, unit in enumerate(w.units) if unit.kept)
    for i in range(len(needs) - 1, -1, -1):
        unit = w.units[i]
        if not unit.kept:
            yield Moment(i, True, alive, needs[i].backward)
            alive -= needs[i].waiting if unit.visits == 1 else 0


def _worst(w: Workload, choice: Choice) -> tuple[int, int]:
    """(activations, framework) of the worst of `moments`. Of neighbours that are alike it is the last in forward, where
    most waits, and the first in backward."""
    if w.zo:
        found = max(moments(w, choice), key=lambda moment: moment.activations + moment.framework, default=None)
        return (found.activations, found.framework) if found else (0, FRAMEWORK_FIXED[w.device])
    needs, alive = _needs(w, choice), w.micro_batches * w.shared_bytes
    pairs = []
    for n, _, count in needs:
        alive += count * n.waiting
        pairs.append((alive, n.forward))
    pairs += [(alive, n.backward) for n, unit, _ in needs if unit.kept]
    for n, unit, count in reversed(needs):
        if not unit.kept:
            pairs.append((alive, n.backward))
            alive -= count * n.waiting if unit.visits == 1 else 0
    return max(pairs, key=sum, default=(0, FRAMEWORK_FIXED[w.device]))


def bare_ram(w: Workload, plan: Plan) -> int:
    """Bytes of RAM that the plan takes, with its slots and activations, when no state, gradient or swapped activation
    has a home there or on the device: with this budget everything is streamed."""
    slots = plan.buffer("weights.block")
    shares: list[Any] = [{**u.activations, "boundary": u.placement["activation"]} for u in plan.units]
    units = tuple(UnitChoice(**share) for share in shares)
    choice = Choice(units, slots.count if slots else 2)
    sizes = peaks(w, reserve(w, choice.block_slots, choice), choice)["cpu"]
    return sum(sizes.values()) - sizes.get("swapped activations", 0)


def lower_bound(w: Workload) -> int:
    """The least any plan needs on the device: one unit's weights and gradient beside what lives all through."""
    always = sum(weight_bytes(u, w) + gradient_bytes(u, w) for u in w.units if u.kind == "resident")
    always += sum(gradient_bytes(u, w) for u in w.units if u.held and u.kind != "resident")
    return always + max(
        (weight_bytes(u, w) + (0 if u.held else gradient_bytes(u, w)) for u in w.units if u.kind != "resident"),
        default=0,
    )


def peaks(
    w: Workload, buffers: Collection[Buffers], choice: Choice | None = None, nvme_paths: int = 1
) -> dict[str, dict[str, int]]:
    """Peak bytes by tier and category; without a choice, of the one that streams everything.

    On device "cpu" the cpu tier has a category "device": everything of the gpu tier, which is then RAM.
    """
    choice = choice or nothing_in_ram(w)
    found: dict[str, dict[str, int]] = {tier: {} for tier in TIERS}
    for b in buffers:
        found[b.tier][b.category] = found[b.tier].get(b.category, 0) + b.total
    gpu, cpu, nvme = found["gpu"], found["cpu"], found["nvme"]
    activations, gpu["framework"] = _worst(w, choice)
    gpu["activations"] = gpu.get("activations", 0) + activations
    cpu["program"] = w.program_bytes
    needs = _needs(w, choice)
    for tier in ("cpu", "cxl"):
        found[tier]["state"] = sum(n.homes.get(tier, 0) * count for n, _, count in needs)
        found[tier]["gradient homes"] = sum(n.waits.get(tier, 0) * count for n, _, count in needs)
    if w.device == "cpu":
        cpu["device"] = sum(gpu.values())
    if "store" not in w.worked_out:
        w.worked_out["store"] = sum(store_bytes(u, w) for u in w.units), sum(gradient_home(u, w) for u in w.units)
    # reserved wherever gradients wait today, so that a run can go on with another RAM budget
    nvme["state"], nvme["gradients"] = w.worked_out["store"]
    nvme["striping"] = STRIPE_BYTES * nvme_paths if nvme_paths > 1 else 0
    return {tier: {category: n for category, n in sizes.items() if n} for tier, sizes in found.items()}
