"""Plans that say what a test wants to see, whatever the planner would choose."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import reference
from offload.planner import Buffers, Hardware, Plan
from offload.planner.choice import everything_in_ram, may_live_on_device, nothing_in_ram, to_device
from offload.planner.decide import Decision, as_plan
from offload.planner.memory import reserve
from offload.planner.placement import Problem
from offload.planner.prediction import predict
from torch import nn

import offload
from offload.engine import Engine, Prepared, prepare

ROOM = 32 << 20
# Planned for instead of the machine at hand, which takes seconds to measure.
MACHINE = Hardware("test", 0, 4 << 30, {"bfloat16": 1e10, "float32": 1e10}, 1e10, 1e10, 1e10, 1e9, 1e9, 1e9)


def fractions(keep: float = 0.0, cpu: float = 0.0, nvme: float = 0.0, cxl: float = 0.0) -> dict[str, float]:
    """A unit's `activations`; what is left is recomputed."""
    again = 1.0 - keep - cpu - nvme - cxl
    return {"keep": keep, "recompute": again, "swap_cpu": cpu, "swap_cxl": cxl, "swap_nvme": nvme}


def forced(
    plan: Plan,
    activations: dict[str, float] | None = None,
    boundary: str = "gpu",
    *,
    homes: dict[str, str] | None = None,
    cpu: int = ROOM,
    cxl: int = 0,
    nvme: int = ROOM,
    staging: int = ROOM,
    kept: int = ROOM,
    update: int = 0,
) -> Plan:
    """The plan with these fractions and this boundary tier for every unit, and room (bytes) for them; and with `homes`
    (role to tier) for every unit that has the role, which may take larger chunk buffers than planned (`update`). The
    last unit, which the planner keeps, stays as it is.
    """
    last = max(i for i, u in enumerate(plan.units) if u.activations["keep"] == 1.0 and u.name != "resident")
    units = []
    for i, unit in enumerate(plan.units):
        if i != last and unit.name != "resident":
            placement = {**unit.placement, "activation": boundary}
            unit = replace(unit, activations=activations or unit.activations, placement=placement)
        if homes:
            moved = {role: homes.get(role, tier) if tier != "gpu" else tier for role, tier in unit.placement.items()}
            unit = replace(unit, placement=moved)
        units.append(unit)
    buffers = [
        Buffers("activations.cpu", "cpu", 1, cpu),
        Buffers("activations.cxl", "cxl", 1, cxl),
        Buffers("activations.nvme", "nvme", 1, nvme),
        Buffers("activations.staging", "gpu", 2, staging),
        Buffers("activations.kept", "gpu", 1, kept),
    ]
    planned = [b for b in plan.buffers if b.name != "activations.kept"]
    more = sum(b.count * max(0, update - b.nbytes) for b in planned if b.name == "update")
    categories = {tier: dict(sizes) for tier, sizes in plan.categories.items()}
    for tier, name, nbytes in (
        ("gpu", "activations", kept),
        ("gpu", "swapped activations", 2 * staging),
        ("cpu", "device", kept + 2 * staging),
        ("cpu", "swapped activations", cpu),
        ("cpu", "update", more),
        ("cxl", "swapped activations", cxl),
        ("nvme", "swapped activations", nvme),
    ):
        categories[tier][name] = categories[tier].get(name, 0) + nbytes
    end = plan.layout["arena_bytes"]
    offsets = {
        **plan.layout["offsets"], "activations.staging": [end, end + staging], "activations.kept": [end + 2 * staging]
    }  # fmt: skip
    peak = {tier: sum(sizes.values()) for tier, sizes in categories.items()}
    return replace(
        plan,
        units=tuple(units),
        buffers=(
            *(replace(b, nbytes=max(update, b.nbytes)) if b.name == "update" else b for b in planned),
            *(b for b in buffers if b.nbytes),
        ),
        categories=categories,
        peak_bytes={**plan.peak_bytes, **peak},
        layout={**plan.layout, "arena_bytes": end + 2 * staging + kept, "offsets": offsets},
    )


def prepared(
    path: Path, model: nn.Module, rows: int, total: int, changes: dict[str, Any] | None = None, **plan: Any
) -> Prepared:
    """A copy of `model` under a forced plan (arguments of `forced`); nothing is written yet."""
    cfg = offload.Config.load(reference.config(path, rows, total, **(changes or {})))
    made: Prepared = prepare(cfg, copy.deepcopy(model), MACHINE)
    w, kept = made.workload, plan.get("kept", ROOM)
    # as if the profile had found that this is what autograd saves
    units = tuple(replace(u, saved=(kept // (len(w.units) * w.micro_batches),)) for u in w.units)
    update = next(b.nbytes for b in reserve(w) if b.name == "update")
    return replace(made, plan=forced(made.plan, update=update, **plan), workload=replace(w, units=units))


def engine(*arguments: Any, **plan: Any) -> Engine:
    """An engine for what `prepared` makes of the same arguments."""
    made = prepared(*arguments, **plan)
    return Engine.create(made.config, prepared=made)


def living_on_device(
    cfg: dict[str, Any], model: nn.Module, names: Collection[str] | None = None, rest: str = "nvme"
) -> Prepared:
    """A copy of `model` under a plan in which the named units live on the device, by default all that may; the state of
    the others is in tier `rest`."""
    hardware = replace(MACHINE, adamw_device=1e9)
    made = prepare(offload.Config.load(cfg), copy.deepcopy(model), hardware)
    w = made.workload
    base = nothing_in_ram(w) if rest == "nvme" else everything_in_ram(w)
    units = tuple(
        to_device(c) if may_live_on_device(u, w, hardware) and (names is None or u.name in names) else c
        for u, c in zip(w.units, base.units, strict=True)
    )
    choice = replace(base, units=units)
    problem = Problem(w, hardware, made.budgets, choice.block_slots)
    decision = Decision(problem, choice, predict(w, hardware, choice), "forced", "forced", None)
    return replace(made, plan=as_plan(decision, 0.0))
