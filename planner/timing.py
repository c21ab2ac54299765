"""Seconds of each lane and of a step, from bytes and rates: the two-stage estimate (the longest lane of each stage).

Forward and backward are one stage each, and a stage takes as long as its busiest resource. Reads and writes of NVMe
add up (half duplex fits published SSD systems better than full duplex). On device "cpu" compute, slot copies and the
optimizer share the same cores and add up too. Latency of the first and last unit is not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from offload.planner.memory import gradient_bytes, home_bytes, weight_bytes
from offload.planner.plan import LANES, Hardware, UnitProfile, Workload

SPLIT_ADAMW_RATIO = 0.45  # rate of AdamW on the split bfloat16 state over that of fused float32 AdamW (0.8 / 1.9 G/s)
WRITE_BEHIND_SHARE = 0.1  # share of a step that writing RAM-resident state behind may take


@dataclass
class Traffic:
    """Work of one stage in one step: floating point operations, parameters updated, bytes per lane."""

    flops: float = 0.0
    updated: int = 0
    h2d: float = 0.0
    d2h: float = 0.0
    nvme_read: float = 0.0
    nvme_write: float = 0.0

    def add(self, other: Traffic) -> None:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Step:
    """One step's traffic: forward and backward stage, and the state written behind when a commit is due."""

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    state_in_ram: int = 0  # bytes that each commit writes

    def add(self, other: Step) -> None:
        self.forward.add(other.forward)
        self.backward.add(other.backward)
        self.state_in_ram += other.state_in_ram


def unit_step(unit: UnitProfile, w: Workload, state_in_ram: bool, gradient_in_ram: bool) -> Step:
    """One unit's share of a step.

    With clipping the update runs at the next forward (its weight read there is the update's), else in backward.
    """
    step, home = Step(), home_bytes(unit, w)
    weights, flops = weight_bytes(unit, w), unit.forward_flops * w.micro_batches
    step.forward.flops = flops
    step.backward.flops = flops * (2 if unit.kept else 3)
    if unit.kind == "resident":
        step.forward.h2d = unit.trainable * w.itemsize
    else:
        step.forward.h2d = weights * unit.visits
        step.backward.h2d = weights * (unit.visits - unit.kept)
    step.backward.d2h = gradient_bytes(unit, w)
    update = step.forward if w.clipping else step.backward
    update.updated = unit.trainable
    state = sum(n for role, n in home.items() if role != "frozen")
    if state_in_ram:
        step.state_in_ram = state
    else:
        per_pass = home.get("param", 0) + home.get("frozen", 0)
        step.forward.nvme_read += per_pass
        if unit.kind != "resident" and not (unit.kept and unit.visits == 1):
            step.backward.nvme_read += per_pass
        update.nvme_read += state - home.get("param", 0)
        update.nvme_write += state
    if w.clipping and not gradient_in_ram:
        step.backward.nvme_write += gradient_bytes(unit, w)
        step.forward.nvme_read += gradient_bytes(unit, w)
    return step


def whole_step(w: Workload, state_in_ram: Collection[int], gradients_in_ram: Collection[int]) -> Step:
    """The step's traffic with the state, and the waiting gradients, of these units (by index) in RAM."""
    total = Step()
    for i, unit in enumerate(w.units):
        total.add(unit_step(unit, w, i in state_in_ram, i in gradients_in_ram))
    return total


def adamw_rate(w: Workload, hw: Hardware) -> float:
    """Parameters per second of the optimizer on this workload's state format."""
    return hw.adamw_parameters_per_second * (SPLIT_ADAMW_RATIO if w.dtype == "bfloat16" else 1.0)


def lanes(t: Traffic, w: Workload, hw: Hardware) -> dict[str, float]:
    """Busy seconds of each lane for this traffic."""
    copy_in, copy_out = (hw.ram, hw.ram) if w.device == "cpu" else (hw.h2d, hw.d2h)
    return {
        "compute": t.flops / hw.matrix_flops[w.dtype],
        "h2d": t.h2d / copy_in,
        "d2h": t.d2h / copy_out,
        "nvme_read": t.nvme_read / hw.nvme_read,
        "nvme_write": t.nvme_write / hw.nvme_write,
        "optimizer": t.updated / adamw_rate(w, hw),
    }


def stage_resources(device: str) -> list[list[str]]:
    """Which lanes share one resource and therefore add up."""
    nvme = ["nvme_read", "nvme_write"]
    if device == "cpu":
        return [["compute", "h2d", "d2h", "optimizer"], nvme]
    return [["compute"], ["h2d"], ["d2h"], ["optimizer"], nvme]


def stage_seconds(t: Traffic, w: Workload, hw: Hardware) -> float:
    """Seconds of one stage: its busiest resource."""
    lane = lanes(t, w, hw)
    return max(sum(lane[name] for name in group) for group in stage_resources(w.device))


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds of one step and what they are made of; `nvme_bytes` is what a step moves, commits included."""

    step_seconds: float
    lane_seconds: dict[str, float]
    busiest_lane: str
    commit_every: int
    nvme_bytes: float


def commit_interval(w: Workload, hw: Hardware, step: Step, seconds: float) -> int:
    """Steps between commits: as asked; "auto" is 1 with all state on NVMe, else what writing behind keeps up with."""
    if w.commit_every != "auto":
        return w.commit_every
    if not step.state_in_ram or seconds <= 0:
        return 1
    every = math.ceil(step.state_in_ram / hw.nvme_write / (WRITE_BEHIND_SHARE * seconds))
    return max(1, min(every, w.steps))


def estimate(w: Workload, hw: Hardware, step: Step) -> Estimate:
    """Step time from its traffic; commits of RAM-resident state are spread over their interval, half in each stage."""
    stages = (step.forward, step.backward)
    every = commit_interval(w, hw, step, sum(stage_seconds(t, w, hw) for t in stages))
    behind = step.state_in_ram / every / 2
    total, lane = 0.0, dict.fromkeys(LANES, 0.0)
    for stage in stages:
        full = Traffic(**vars(stage))
        full.nvme_write += behind
        total += stage_seconds(full, w, hw)
        for name, seconds in lanes(full, w, hw).items():
            lane[name] += seconds
    nvme_bytes = 2 * behind + sum(t.nvme_read + t.nvme_write for t in stages)
    return Estimate(total, lane, max(lane, key=lambda name: lane[name]), every, nvme_bytes)
