"""What a step moves and computes, and the two-stage estimate of its seconds: the longest resource of each stage.

`Work` says what one unit asks of every lane; the simulator schedules it, the estimate only adds it up: forward and
backward are one stage each, and a stage takes as long as its busiest resource. The estimate is what the MIP minimises
and what a search can afford; the simulator's time is what is promised.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from offload.planner.activation_bytes import away_bytes, kept_bytes
from offload.planner.choice import Choice, UnitChoice, runs
from offload.planner.plan import LANES, Hardware, UnitProfile, Workload, ZerothOrder
from offload.planner.unit_bytes import gradient_bytes, home_bytes, item_bytes, weight_bytes

# Standard normals that two CPU cores, or a GPU with torch's own operators, make (offload/zo_noise.py). The first was
# measured on two cores; the second follows from about 600 bytes of traffic for each at 1 TB/s. Reading the weights and
# writing them is part of it. Quantized weights take less noise, but unpacking them takes about as long.
NORMALS_PER_SECOND = {"cpu": 1.2e9, "cuda": 1.6e9}
WRITE_BEHIND_SHARE = 0.1  # share of a step that writing RAM-resident state behind may take

# Seconds by which a second of a lane's work on device "cpu" (a copy, an update: bound by memory) delays what all cores
# compute beside it: it has a core, and bandwidth that compute wants too. In steps on two cores of a Zen 5 it was 1.2 to
# 1.7.
BESIDE = 1.5
# Speed of what the store moves on device "cpu" while compute has all cores: its threads yield to compute
# (`io/scheduling.py`), so that the drive waits for them. Lanes were busy 1.5 times as long as the drive alone needs.
YIELDING = {"nvme_read": 0.67, "nvme_write": 0.67}

# Bytes that a copy moves while the norm of one element is taken. Norms are summed in torch's order, to the bit, eight
# floats at a time of which each addition waits for the one before: slower than memory. As measured on a Zen 5.
NORM_BYTES = {"bfloat16": 6.8, "float32": 3.1}


@dataclass(frozen=True)
class Work:
    """One unit's share of a step: bytes, parameters, and seconds of compute; per step unless it says per visit."""

    forward_seconds: float  # all micro-batches and visits
    backward_seconds: float  # recomputation included
    fill: int  # bytes of weights copied into a slot, per visit; from NVMe they are read into it on device "cpu"
    place: int  # bytes of new weights that an update copies into a slot
    fill_read: int  # of them from NVMe
    fill_cxl: int  # of them from CXL memory
    state_read: int  # optimizer state from NVMe, without the weights
    state_write: int  # everything an update writes to NVMe
    behind: int  # bytes in RAM that a commit writes
    copied_out: int  # bytes of it that are on the device, from which a commit copies them first
    updated: int  # parameters, on the CPU
    device_seconds: float  # of compute: the update, where the unit lives on the device
    state_cxl: int  # bytes between the optimizer and CXL memory, both ways, weights included
    drain_seconds: float  # of the gradient's way out: copied to the host, its norm taken, copied to its home
    gradient_nvme: int  # bytes spilled, and read again by the update
    gradient_cxl: int
    out_cpu: int  # activations to RAM: boundary and swapped, all micro-batches
    out_cxl: int  # the same to CXL memory
    out_nvme: int  # the same to NVMe, through host memory

    @property
    def out(self) -> int:
        """Bytes of activations that leave the device."""
        return self.out_cpu + self.out_cxl + self.out_nvme

    @property
    def summed(self) -> int:
        """Bytes whose checksums the optimizer takes, on their way from NVMe and to it."""
        return self.state_read + self.gradient_nvme + self.state_write


def compute_seconds(unit: UnitProfile, w: Workload, hw: Hardware) -> tuple[float, float]:
    """(forward, backward) seconds of one micro-batch: as measured, else from its floating point operations."""
    rate = hw.matrix_rate(w.dtype)
    forward = unit.forward_seconds or unit.forward_flops / rate
    return forward, unit.backward_seconds or 2 * unit.forward_flops / rate


def accumulate_seconds(unit: UnitProfile, w: Workload, hw: Hardware) -> float:
    """Seconds to add all micro-batches' gradients into the unit's slot; on CUDA they hide in device bandwidth."""
    if w.device == "cuda":
        return 0.0
    read_and_written = w.itemsize + 2 * w.gradient_itemsize
    return w.micro_batches * unit.trainable * read_and_written / (2 * hw.ram)


def unit_work(unit: UnitProfile, c: UnitChoice, w: Workload, hw: Hardware) -> Work:
    """What the unit asks of every lane under this choice."""
    m = w.micro_batches
    forward, backward = compute_seconds(unit, w, hw)
    again = 0.0 if unit.kept or unit.kind == "resident" else c.recompute * forward
    weights, gradient = weight_bytes(unit, w), gradient_bytes(unit, w)
    stored = item_bytes(unit, "weights", w) if weights else 0
    state = item_bytes(unit, "state", w)
    updated_weights = stored if unit.trainable else 0
    waits = w.clipping and unit.trainable > 0
    on_nvme = (state if c.state == "nvme" else 0) + (updated_weights if c.weights == "nvme" else 0)
    in_cxl = (state if c.state == "cxl" else 0) + (updated_weights if c.weights == "cxl" else 0)
    on_cpu = w.device == "cpu"
    drain = unit.trainable * NORM_BYTES[w.dtype] / hw.ram + (0.0 if on_cpu else gradient / hw.d2h)
    if waits and c.gradient in ("cpu", "cxl"):
        drain += gradient / hw.ram
    return Work(
        # on a CPU what is kept is copied out of the framework's heap
        forward_seconds=m * forward + (kept_bytes(unit, c, w) / hw.ram if on_cpu else 0.0),
        backward_seconds=m * (backward + again) + accumulate_seconds(unit, w, hw),
        fill=0 if c.on_device or (on_cpu and c.weights == "nvme") else weights,
        place=0 if c.on_device else unit.trainable * w.itemsize,
        fill_read=stored if c.weights == "nvme" else 0,
        fill_cxl=stored if c.weights == "cxl" else 0,
        state_read=state if c.state == "nvme" else 0,
        state_write=on_nvme,
        behind=state + updated_weights - on_nvme,
        copied_out=state + updated_weights if c.on_device else 0,
        updated=0 if c.on_device else unit.trainable,
        device_seconds=unit.trainable / hw.adamw_device if c.on_device else 0.0,
        state_cxl=2 * in_cxl,
        drain_seconds=drain,
        gradient_nvme=gradient if waits and c.gradient == "nvme" else 0,
        gradient_cxl=gradient if waits and c.gradient == "cxl" else 0,
        out_cpu=away_bytes(unit, c, "cpu", w),
        out_cxl=away_bytes(unit, c, "cxl", w),
        out_nvme=away_bytes(unit, c, "nvme", w),
    )


@dataclass
class Traffic:
    """Work of one stage in one step: seconds of compute, parameters updated, bytes whose checksums the optimizer takes,
    seconds of perturbing weights and updating them along directions (zeroth-order), bytes per lane."""

    compute: float = 0.0
    updated: float = 0.0
    summed: float = 0.0
    directions: float = 0.0
    h2d: float = 0.0
    d2h: float = 0.0
    nvme_read: float = 0.0
    nvme_write: float = 0.0
    cxl: float = 0.0

    def add(self, other: Traffic, factor: float = 1.0) -> None:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + factor * getattr(other, name))


@dataclass
class Step:
    """One step's traffic: forward and backward stage, and the state written behind when a commit is due."""

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    behind: float = 0.0  # bytes that each commit writes
    copied_out: float = 0.0  # of them from the device

    def add(self, other: Step, factor: float = 1.0) -> None:
        self.forward.add(other.forward, factor)
        self.backward.add(other.backward, factor)
        self.behind += factor * other.behind
        self.copied_out += factor * other.copied_out


def unit_step(unit: UnitProfile, c: UnitChoice, w: Workload, hw: Hardware) -> Step:
    """One unit's share of a step, added up by stage.

    With clipping the update runs at the next forward's fill, whose weights are then the update's, or on the device
    before it; else in backward, where it takes them from the device slot.
    """
    if w.zo:
        return _zeroth_order_step(unit, c, w, w.zo, hw)
    k, step = unit_work(unit, c, w, hw), Step()
    resident = unit.kind == "resident"
    again = 0 if resident else unit.visits - unit.kept  # visits in backward
    there = 1 if resident else unit.visits
    first = w.clipping and unit.trainable > 0  # the first fill of forward is the update's
    copy_out = copy_rates(w, hw)[1]
    step.forward = Traffic(
        compute=k.forward_seconds + (k.backward_seconds if unit.kept else 0.0),
        h2d=k.fill * (there - first) + (k.place if first else 0),
        d2h=k.out,
        nvme_read=k.fill_read * there,
        nvme_write=k.out_nvme,
        cxl=k.fill_cxl * (there - first) + k.out_cxl,
    )
    step.backward = Traffic(
        compute=0.0 if unit.kept else k.backward_seconds,
        h2d=k.fill * again + k.out + (0 if first else k.place),
        d2h=k.drain_seconds * copy_out,
        nvme_read=k.fill_read * again + k.out_nvme,
        cxl=k.fill_cxl * again + k.out_cxl,
    )
    update = step.forward if w.clipping else step.backward
    update.compute += k.device_seconds
    update.updated = k.updated
    update.summed = k.summed
    update.nvme_read += k.state_read + k.gradient_nvme
    update.nvme_write += k.state_write
    update.cxl += k.state_cxl + k.gradient_cxl
    step.backward.nvme_write += k.gradient_nvme
    step.backward.cxl += k.gradient_cxl
    step.behind, step.copied_out = k.behind, k.copied_out
    return step


def _zeroth_order_step(unit: UnitProfile, c: UnitChoice, w: Workload, zo: ZerothOrder, hw: Hardware) -> Step:
    """Every walk brings a unit's weights in; the first of them writes the last step's update back.

    Each visit perturbs them both ways along every direction, and the update goes along all of them once more.
    """
    step, home = Step(), home_bytes(unit, w)
    written = {role for role, _, _, written in zo.roles if written}
    stored, changed = sum(home.values()), sum(n for role, n in home.items() if role in written)
    visits = zo.walks * (1 if unit.kind == "resident" else unit.visits)
    normals = zo.active * (1 + 2 * visits) * zo.samples * unit.trainable
    # measured backward seconds are those of the loss alone
    forward = compute_seconds(unit, w, hw)[0] + unit.backward_seconds
    step.forward.compute = w.micro_batches * zo.forwards * forward
    step.forward.directions = normals / NORMALS_PER_SECOND[w.device]
    step.forward.h2d = visits * stored
    sent = zo.active * changed
    step.forward.d2h = sent
    if c.weights == "nvme":
        step.forward.nvme_read, step.forward.nvme_write = visits * stored, sent
        return step
    step.behind = changed
    if c.weights == "cxl":
        step.forward.cxl = visits * stored + sent
    return step


def whole_step(w: Workload, hw: Hardware, choice: Choice) -> Step:
    """The step's traffic; equal units are worked out once."""
    counts: Counter[tuple[int, UnitChoice]] = Counter()
    for i, c, count in runs(w, choice):
        counts[i, c] += count
    # `hw` is kept with its steps, so that no other machine can get its id
    known: dict[tuple[int, UnitChoice], Step] = w.worked_out.setdefault(("steps", id(hw)), (hw, {}))[1]
    total = Step()
    for key, count in counts.items():
        if key not in known:
            known[key] = unit_step(w.units[key[0]], key[1], w, hw)
        total.add(known[key], count)
    return total


def adamw_rate(w: Workload, hw: Hardware) -> float:
    """Parameters per second of the optimizer on this workload's state format."""
    return hw.adamw_parameters_per_second * (hw.adamw_split_ratio if w.dtype == "bfloat16" else 1.0)


def copy_rates(w: Workload, hw: Hardware) -> tuple[float, float]:
    """Bytes per second (to the device, from it); on device "cpu" both are copies within RAM."""
    return (hw.ram, hw.ram) if w.device == "cpu" else (hw.h2d, hw.d2h)


# Beside a GPU each role of a chunk is summed on a thread of its own; the largest, a moment, is 4 of 10 to 12 bytes.
_LARGEST_ROLE = 0.4


def sum_seconds(nbytes: float, w: Workload, hw: Hardware) -> float:
    """Seconds of taking the checksums of so many bytes: they are read, which is half of what a copy of them takes."""
    return nbytes / (2 * hw.ram) * (1.0 if w.device == "cpu" else _LARGEST_ROLE)


def lanes(t: Traffic, w: Workload, hw: Hardware) -> dict[str, float]:
    """Busy seconds of each lane for this traffic, and of CXL memory."""
    copy_in, copy_out = copy_rates(w, hw)
    return {
        "compute": t.compute,
        "h2d": t.h2d / copy_in,
        "d2h": t.d2h / copy_out,
        "nvme_read": t.nvme_read / hw.nvme_read,
        "nvme_write": t.nvme_write / hw.nvme_write,
        "optimizer": t.updated / adamw_rate(w, hw) + sum_seconds(t.summed, w, hw) + t.directions,
        "cxl": t.cxl / hw.cxl,
    }


def stage_resources(w: Workload, hw: Hardware) -> list[dict[str, float]]:
    """Resources as the share of each that a lane takes while it runs; a stage lasts as long as the sum on each.

    On device "cpu" compute takes all cores, every copy and the optimizer one of them; and a parallel operation is done
    when its slowest thread is, so compute waits for as long as a lane has a core. A zeroth-order step forms weights and
    computes with them in turn, both on the whole device.
    """
    drive = {"nvme_read": 1 / hw.nvme_duplex, "nvme_write": 1 / hw.nvme_duplex}
    single: list[dict[str, float]] = [{name: 1.0} for name in (*LANES, "cxl")]
    if w.device == "cpu":
        one = 1 / max(1, hw.cores)
        cores = {"compute": 1.0, "h2d": one, "d2h": one, "optimizer": 1.0 if w.zo else one}
        return [*single, drive, cores, *({"compute": 1.0, lane: 1.0} for lane in ("h2d", "d2h", "optimizer"))]
    link = {"h2d": 1 / hw.link_duplex, "d2h": 1 / hw.link_duplex}
    return [*single, drive, link, *([{"compute": 1.0, "optimizer": 1.0}] if w.zo else [])]


def simulated_resources(w: Workload, hw: Hardware) -> list[dict[str, float]]:
    """`stage_resources`, and on device "cpu" two things more: the memory that lanes take from compute beside their core
    (`BESIDE`), and the core that what the store moves takes: calls, interrupts, checksums of weights; 0.01 to 0.02
    seconds per GB were measured, about as a checksum takes.

    The estimate leaves the one out, because it would count it where nothing is computed beside, and the other, because
    the MIP cannot price what is written behind.
    """
    resources = stage_resources(w, hw)
    if w.device == "cpu":
        resources += [{"compute": 1.0, lane: BESIDE} for lane in ("h2d", "d2h", "optimizer")]
        rates = {"nvme_read": hw.nvme_read, "nvme_write": hw.nvme_write}
        resources += [{"compute": 1.0, lane: min(1.0, sum_seconds(rate, w, hw))} for lane, rate in rates.items()]
    return resources


def stage_seconds(t: Traffic, w: Workload, hw: Hardware) -> float:
    """Seconds of one stage: its busiest resource."""
    lane = lanes(t, w, hw)
    return max(sum(share * lane[name] for name, share in r.items()) for r in stage_resources(w, hw))


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds of one step and what they are made of; `nvme_bytes` is what a step moves, commits included."""

    step_seconds: float
    commit_every: int
    nvme_bytes: float


def commit_interval(w: Workload, hw: Hardware, behind: float, seconds: float) -> int:
    """Steps between commits: as asked; "auto" is 1 with all state on NVMe, else what writing behind keeps up with."""
    if w.commit_every != "auto":
        return w.commit_every
    if not behind or seconds <= 0:
        return 1
    every = math.ceil(behind / hw.nvme_write / (WRITE_BEHIND_SHARE * seconds))
    return max(1, min(every, w.steps))


def estimate(w: Workload, hw: Hardware, step: Step) -> Estimate:
    """Step time from its traffic; commits of RAM-resident state are spread over their interval and over the stages."""
    stages = (step.forward,) if w.zo else (step.forward, step.backward)
    every = commit_interval(w, hw, step.behind, sum(stage_seconds(t, w, hw) for t in stages))
    behind = step.behind / every / len(stages)
    copied_out = step.copied_out / every / len(stages)
    total = 0.0
    for stage in stages:
        full = Traffic(**vars(stage))
        full.nvme_write += behind
        full.d2h += copied_out
        total += stage_seconds(full, w, hw)
    nvme_bytes = len(stages) * behind + sum(t.nvme_read + t.nvme_write for t in stages)
    return Estimate(total, every, nvme_bytes)
