"""`make_plan`: workload, budgets and hardware in, a `Plan` out; and what would fit when this does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.planner.memory import gradient_home, lower_bound, peaks, reserve
from offload.planner.placement import Solved, everything, place
from offload.planner.plan import Budgets, Buffers, Hardware, Plan, UnitPlan, UnitProfile, Workload

EASILY = 0.9  # a third block slot is taken when the peak with it stays under this share of the budget


def make_plan(
    workload: Workload,
    budgets: Budgets,
    hardware: Hardware,
    solver: str = "auto",
    time_limit: float = 10.0,
) -> Plan:
    """Decide where everything lives, and predict every tier's peak and the step time.

    A plan that does not fit has `fits` false, the bytes short per tier, and suggestions that were checked to fit.
    Raises ValueError for an unknown solver.
    """
    decided = _decide(workload, budgets, hardware, solver, time_limit)
    plan = _plan(workload, budgets, hardware, decided)
    if plan.fits:
        return plan
    return replace(plan, suggestions=tuple(_suggestions(workload, budgets, hardware, plan.shortfall_bytes)))


@dataclass(frozen=True)
class _Decision:
    buffers: tuple[Buffers, ...]
    solved: Solved
    categories: dict[str, dict[str, int]]

    @property
    def peak(self) -> dict[str, int]:
        return {tier: sum(sizes.values()) for tier, sizes in self.categories.items()}


def _decide(w: Workload, budgets: Budgets, hw: Hardware, solver: str, time_limit: float) -> _Decision:
    paths = len(budgets.nvme)
    limit = budgets.by_tier()
    buffers = reserve(w, _block_slots(w, budgets))
    indices = range(len(w.units))
    without_homes = {t: sum(s.values()) for t, s in peaks(w, buffers, (), indices, paths).items()}
    homes_of_gradients = sum(gradient_home(u, w) for u in w.units)
    ram = max(0, limit["cpu"] - (without_homes["cpu"] - homes_of_gradients))
    solved = place(w, hw, ram, solver, time_limit)
    categories = peaks(w, buffers, solved.choice.state, solved.choice.gradients, paths)
    return _Decision(buffers, solved, categories)


def _block_slots(w: Workload, budgets: Budgets) -> int:
    """Three block slots where the peak with them, everything at home in RAM, is well inside the budget; else two."""
    full = everything(w)
    peak = {t: sum(s.values()) for t, s in peaks(w, reserve(w, 3), full.state, full.gradients).items()}
    tiers = ("gpu", "cpu") if w.device == "cpu" else ("gpu",)
    limit = budgets.by_tier()
    return 3 if all(peak[t] <= EASILY * limit[t] for t in tiers) else 2


def _plan(w: Workload, budgets: Budgets, hw: Hardware, decided: _Decision) -> Plan:
    limit, peak = budgets.by_tier(), decided.peak
    solved, choice = decided.solved, decided.solved.choice
    shortfall = {tier: peak[tier] - limit[tier] for tier in peak if peak[tier] > limit[tier]}
    units = tuple(_unit_plan(u, w, i in choice.state, i in choice.gradients) for i, u in enumerate(w.units))
    return Plan(
        fits=not shortfall,
        budget_bytes=limit,
        peak_bytes=peak,
        categories=decided.categories,
        step_seconds=solved.estimate.step_seconds,
        tokens_per_second=w.tokens / solved.estimate.step_seconds if solved.estimate.step_seconds else 0.0,
        lane_seconds=solved.estimate.lane_seconds,
        busiest_lane=solved.estimate.busiest_lane,
        solver={"name": solved.name, "status": solved.status, "gap": solved.gap, "seconds": solved.seconds},
        units=units,
        layout={
            "arena_bytes": sum(b.total for b in decided.buffers if b.tier == "gpu"),
            "lower_bound_bytes": lower_bound(w),
        },
        buffers=decided.buffers,
        commit_every=solved.estimate.commit_every,
        spill_gradients=any(u.placement["grad"] == "nvme" for u in units),
        hardware=hw.name,
        notes=w.notes + solved.notes,
        shortfall_bytes=shortfall,
    )


def _unit_plan(unit: UnitProfile, w: Workload, state_in_ram: bool, gradient_in_ram: bool) -> UnitPlan:
    home = "cpu" if state_in_ram else "nvme"
    placement = {role: home for role in ("param", "master", "exp_avg", "exp_avg_sq")}
    waits = w.clipping and unit.trainable
    placement["grad"] = ("cpu" if gradient_in_ram else "nvme") if waits else "gpu"
    placement["activation"] = "gpu"
    kept = float(unit.kept or unit.kind == "resident")
    activations = {"keep": kept, "recompute": 1.0 - kept, "swap_cpu": 0.0, "swap_nvme": 0.0}
    return UnitPlan(unit.name, unit.parameters, placement, activations)


def with_batch(w: Workload, micro_batch: int, sequence_length: int) -> Workload:
    """The workload at another micro-batch or sequence length, the rows of a global batch unchanged.

    An estimate from above when sizes shrink: of a backward workspace, up to one gradient of the unit's parameters does
    not scale; the rest, and everything else, scales with tokens.
    """
    ratio = micro_batch * sequence_length / (w.micro_batch * w.sequence_length)

    def scaled(unit: UnitProfile) -> UnitProfile:
        fixed = min(unit.workspace_backward, unit.trainable * w.itemsize)
        return replace(
            unit,
            forward_flops=round(unit.forward_flops * ratio),
            boundary_bytes=round(unit.boundary_bytes * ratio),
            workspace_forward=round(unit.workspace_forward * ratio),
            workspace_backward=fixed + round((unit.workspace_backward - fixed) * ratio),
        )

    return replace(
        w,
        units=tuple(scaled(u) for u in w.units),
        micro_batch=micro_batch,
        micro_batches=-(-w.micro_batches * w.micro_batch // micro_batch),
        sequence_length=sequence_length,
        shared_bytes=round(w.shared_bytes * ratio),
    )


def _raised(budgets: Budgets, shortfall: dict[str, int]) -> Budgets:
    """The budgets with exactly the missing bytes added, NVMe's to its first path."""
    nvme = budgets.nvme or (("", 0),)
    missing = shortfall.get("nvme", 0)
    return replace(
        budgets,
        gpu=budgets.gpu + shortfall.get("gpu", 0),
        cpu=budgets.cpu + shortfall.get("cpu", 0),
        nvme=((nvme[0][0], nvme[0][1] + missing), *nvme[1:]) if missing else budgets.nvme,
    )


def _fits(w: Workload, budgets: Budgets, hw: Hardware) -> bool:
    decided = _decide(w, budgets, hw, "greedy", 0.0)
    limit = budgets.by_tier()
    return all(n <= limit[tier] for tier, n in decided.peak.items())


def readable(nbytes: int) -> str:
    """Bytes in the largest binary unit under which the number is at least 1, and exactly."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f}{unit} ({nbytes} bytes)"
    return f"{nbytes} bytes"


def _smaller(w: Workload) -> Iterator[tuple[str, Workload]]:
    """Settings that need less, nearest first: each a message and its workload."""
    micro, length = w.micro_batch // 2, w.sequence_length // 2
    while micro >= 1:
        yield f"set train.micro_batch_size to {micro}", with_batch(w, micro, w.sequence_length)
        micro //= 2
    while length >= 64:
        batch = ", train.micro_batch_size to 1" if w.micro_batch > 1 else ""
        yield f"set data.sequence_length to {length}{batch}", with_batch(w, 1, length)
        length //= 2


def _suggestions(w: Workload, budgets: Budgets, hw: Hardware, shortfall: dict[str, int]) -> list[str]:
    """Nearest settings that fit, each planned before it is offered."""
    found: list[str] = []
    raised = _raised(budgets, shortfall)
    if _fits(w, raised, hw):
        changes = []
        for tier in shortfall:
            if tier == "nvme":
                where = f" at {raised.nvme[0][0]}" if raised.nvme[0][0] else ""
                changes.append(f"memory.nvme{where} to {readable(raised.nvme[0][1])}")
            else:
                changes.append(f"memory.{tier} to {readable(raised.by_tier()[tier])}")
        found.append("set " + " and ".join(changes))
    for text, smaller in _smaller(w):
        if _fits(smaller, budgets, hw):
            found.append(text)
            break
    return found
