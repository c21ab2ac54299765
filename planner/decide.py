"""`make_plan`: workload, budgets and hardware in, a `Plan` out.

Greedy candidates are ranked by the two-stage estimate, the best of them and the MIP's answer by the simulator.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from offload.planner.activation_bytes import saved_room
from offload.planner.activations import candidates
from offload.planner.choice import Choice, UnitChoice, nothing_in_ram, without_homes
from offload.planner.device_homes import offered, with_units_there
from offload.planner.layout_arena import arena_layout
from offload.planner.memory import lower_bound, moments
from offload.planner.placement import Problem, fillings, leanest, top_up
from offload.planner.plan import Budgets, Hardware, Plan, UnitPlan, UnitProfile, Workload
from offload.planner.prediction import Prediction, predict
from offload.planner.suggest import suggestions

MOST_HEAD_CHUNKS = 64
SIMULATED = 3  # of the greedy candidates at least, the best by estimate ...
SIMULATED_UNITS = 160  # ... and more of them where models are small: so many units in all
WORTH = 0.015  # share of a step that traffic over NVMe has to save to be worth its wear
PAYS = 0.998  # one more block slot has to bring the step below this share of its time ...
EASILY = 0.9  # ... but the third, which smooths what the simulator does not see, only to stay under this of the budget
MANY_SLOTS = 4  # with more, activations are taken as the best plan so far has them
SOLVERS = ("auto", "mip", "greedy")


@contextmanager
def _without_collections() -> Iterator[None]:
    """Candidates are many and refer to nothing in circles: to look for that would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collections()
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
    if solver not in SOLVERS:
        raise ValueError(f"planner.solver is {solver!r}; accepted: {', '.join(SOLVERS)}")
    begin = time.perf_counter()
    for tried in head_chunks(workload):
        if fits(tried, budgets, hardware):
            break
    found = decide(tried, budgets, hardware, solver, time_limit)
    plan = as_plan(found, time.perf_counter() - begin)
    if plan.fits:
        return plan
    return replace(plan, suggestions=tuple(suggestions(tried, budgets, hardware, plan.shortfall_bytes, fits)))


def head_chunks(w: Workload) -> Iterator[Workload]:
    """The workload with head and loss in one chunk, then in ever more while the head's workspace is the step's peak.

    More than one chunk costs a second product with the head's weights, so it is for what does not fit otherwise.
    """
    if w.head_chunks != "auto":
        yield w
        return
    w = w.in_chunks(1)
    yield w
    count = 1
    while w.logits_bytes and _head_is_the_peak(w) and count < MOST_HEAD_CHUNKS:
        count *= 2
        w = w.in_chunks(count)
        yield w


def _head_is_the_peak(w: Workload) -> bool:
    others = max((u.workspace_backward for u in w.units if not u.kept), default=0)
    return any(u.workspace_backward > others for u in w.units if u.kept)


@dataclass(frozen=True)
class Decision:
    """A choice for a problem with its simulated step, and how it was found."""

    problem: Problem
    choice: Choice
    prediction: Prediction
    solver: str
    status: str
    gap: float | None
    notes: tuple[str, ...] = ()


@_without_collections()
def decide(w: Workload, budgets: Budgets, hw: Hardware, solver: str = "auto", time_limit: float = 10.0) -> Decision:
    """The fastest choice within the budgets, with the fewest slots that reach it; where nothing fits, the nearest."""
    best: Decision | None = None
    fewest: Decision | None = None
    for slots in _slot_counts(w):
        p = Problem(w, hw, budgets, slots)
        found = greedy(p, best.choice if best and slots > MANY_SLOTS else None)
        if best is not None and not _fits(p, found.choice):
            break
        if best is None or _pays(found, best):
            best = found
        fewest = fewest or found
    assert best is not None and fewest is not None
    if offered(best.problem, best.choice) and _fits(best.problem, best.choice):
        best = _with_units_on_device(best, fewest)
    if solver == "greedy" or not _fits(best.problem, best.choice):
        return best
    if _nothing_to_choose(best):
        return replace(best, status="optimal", gap=0.0)
    return _improved(best, time_limit)


def _pays(more: Decision, best: Decision) -> bool:
    """Whether the decision with more block slots is worth its memory."""
    seconds, known = more.prediction.step_seconds, best.prediction.step_seconds
    if seconds < PAYS * known:
        return True
    peak, limit = more.problem.peak(more.choice), more.problem.limit
    tiers = ("gpu", "cpu") if more.problem.w.device == "cpu" else ("gpu",)
    return more.problem.block_slots == 3 and seconds <= known and all(peak[t] <= EASILY * limit[t] for t in tiers)


def greedy(p: Problem, known: Choice | None = None) -> Decision:
    """The best greedy candidate: homes in fixed orders, activations swept, or as in the choice that is `known`."""
    bases = [nothing_in_ram(p.w, p.block_slots)]
    bases = candidates(p) if known is None else [*bases, replace(without_homes(known), block_slots=p.block_slots)]
    short = {c: p.shortage(c) for c in bases}
    found = [c for base in bases if short[base] == 0.0 for c in fillings(p, base)]
    if not found:  # some fit without chunk buffers, perhaps
        lean = {c: p.shortage(c) for base in bases for c in leanest(p, base)}
        found = [c for base in bases for c in (*fillings(p, base), *leanest(p, base)) if p.shortage(c) == 0.0]
        # where nothing fits, what comes nearest is shown and its shortfall told
        found = found or [min(lean, key=lean.__getitem__)]
    ranked = sorted({c: p.score(c) for c in found}.items(), key=lambda pair: pair[1])
    return _best(p, [choice for choice, _ in ranked[: _simulated(p.w)]], "greedy", "feasible")


def _simulated(w: Workload) -> int:
    """How many candidates the simulator judges."""
    return max(SIMULATED, SIMULATED_UNITS // max(1, len(w.units)))


def _best(
    p: Problem, choices: Iterable[Choice], solver: str, status: str, at_most: float = float("inf")
) -> Decision:
    """The fastest; of those within WORTH of it, and `at_most` so many seconds, the one that moves the fewest bytes over
    NVMe, which wears. Where those bytes are as good as the same, the optimizer's part of CXL memory decides."""
    looked_at = dict.fromkeys(c for choice in choices for c in (choice, top_up(p, choice)))
    made = [Decision(p, c, predict(p.w, p.hw, c), solver, status, None) for c in looked_at]
    enough = min(at_most, (1 + WORTH) * min(d.prediction.step_seconds for d in made))
    fast = [d for d in made if d.prediction.step_seconds <= enough]
    few = (1 + WORTH) * min(d.prediction.nvme_bytes for d in fast)
    mild = [d for d in fast if d.prediction.nvme_bytes <= few]
    return min(mild, key=lambda d: (p.misplaced(d.choice), d.prediction.nvme_bytes, d.prediction.step_seconds))


def _with_units_on_device(best: Decision, fewest: Decision) -> Decision:
    """`best` with units on the device where that pays; also looked for with the `fewest` slots, which leave it room."""
    found = _moved_to_device(best)
    if fewest is best:
        return found
    other = _moved_to_device(fewest)
    return found if other is fewest or _pays(found, other) else other


def _moved_to_device(d: Decision) -> Decision:
    """The decision, or a faster one with units on the device, or one as fast that spares the drive."""
    p = d.problem
    ranked = sorted(with_units_there(p, d.choice), key=p.score)
    if not ranked:
        return d
    found = _best(p, [d.choice, *ranked[: _simulated(p.w)]], d.solver, d.status, d.prediction.step_seconds)
    return found if _gains(found, d) else d


def _gains(found: Decision, known: Decision) -> bool:
    """Whether it is faster, or, where it is as fast, spares the drive: what has to be for more units on the device."""
    faster = found.prediction.step_seconds < PAYS * known.prediction.step_seconds
    return faster or (1 + WORTH) * found.prediction.nvme_bytes < known.prediction.nvme_bytes


def _improved(best: Decision, time_limit: float) -> Decision:
    """The MIP's answer if the simulator finds it faster, else the greedy one; a solver that fails is told."""
    p = best.problem

    def fall_back(reason: Exception) -> Decision:
        note = f"solver: the MIP failed ({reason}); the greedy choice is used"
        return replace(best, status="fallback", notes=(note,))

    try:
        from offload.planner.mip import GAP, solve
        from offload.planner.solver import SolverFailed
    except ImportError as error:  # the greedy choice needs no PuLP
        return fall_back(error)
    try:
        solution = solve(p, time_limit, best.choice)
    except SolverFailed as error:
        return fall_back(error)
    status = "optimal" if solution.optimal else "feasible"
    found = _best(p, [best.choice, solution.choice], "mip", status, best.prediction.step_seconds)
    more = len(found.choice.placed("state", "gpu")) > len(best.choice.placed("state", "gpu"))
    if more and not _gains(found, best):
        found = replace(best, solver="mip", status=status)
    return replace(found, gap=GAP if solution.optimal else None)


def _slot_counts(w: Workload) -> list[int]:
    """Numbers of block slots worth a look: two to overlap, three to smooth, more to keep weights on the device."""
    if w.zo:  # a slot holds perturbed weights, which nobody needs a second time
        return [2, 3]
    blocks = sum(u.kind in ("block", "other") for u in w.units)
    counts = [2, 3, 4]
    while counts[-1] < blocks:
        counts.append(min(blocks, 2 * counts[-1]))
    return [n for n in counts if n <= max(2, blocks)]


def _fits(p: Problem, choice: Choice) -> bool:
    return all(room >= 0 for room in p.room(choice).values())


def _nothing_to_choose(d: Decision) -> bool:
    if offered(d.problem, d.choice) and PAYS * d.prediction.step_seconds > d.prediction.lane_seconds["compute"]:
        return False
    homes = all(c.on_device or c.weights == c.state == c.gradient == "cpu" for c in d.choice.units)
    busy = all(c.recompute == 0.0 or u.saved_bytes == 0 for u, c in zip(d.problem.w.units, d.choice.units, strict=True))
    return homes and (d.problem.w.activations == "recompute" or busy)


def fits(w: Workload, budgets: Budgets, hw: Hardware) -> bool:
    """Whether any choice keeps the budgets."""
    p = Problem(w, hw, budgets)
    return any(_fits(p, choice) for choice in leanest(p, nothing_in_ram(w))) or any(
        _fits(p, choice) for base in candidates(p) for choice in leanest(p, base)
    )


def as_plan(d: Decision, seconds: float) -> Plan:
    """The decision, which took `seconds`, as a plan: its buffers, peaks and times."""
    p, w = d.problem, d.problem.w
    buffers, categories = p.buffers(d.choice), p.categories(d.choice)
    peak = {tier: sum(sizes.values()) for tier, sizes in categories.items()}
    shortfall = {tier: peak[tier] - p.limit[tier] for tier in peak if peak[tier] > p.limit[tier]}
    framework: dict[int, dict[str, int]] = {}
    for moment in moments(w, d.choice):
        framework.setdefault(moment.unit, {})["backward" if moment.backward else "forward"] = moment.framework
    for i, (u, c) in enumerate(zip(w.units, d.choice.units, strict=True)):
        if room := saved_room(u, c, w):
            framework[i]["saved"] = room
    units = tuple(
        replace(_unit_plan(u, c, w), framework=framework.get(i, {}))
        for i, (u, c) in enumerate(zip(w.units, d.choice.units, strict=True))
    )
    step = d.prediction.step_seconds
    return Plan(
        fits=not shortfall,
        budget_bytes=p.limit,
        peak_bytes=peak,
        categories=categories,
        step_seconds=step,
        tokens_per_second=w.tokens / step if step else 0.0,
        lane_seconds=d.prediction.lane_seconds,
        busiest_lane=d.prediction.busiest_lane,
        solver={"name": d.solver, "status": d.status, "gap": d.gap, "seconds": seconds},
        units=units,
        head_chunks=int(w.head_chunks) if w.logits_bytes else 0,
        layout=arena_layout(w, buffers).to_json() | {"one_unit_bytes": lower_bound(w)},
        buffers=buffers,
        commit_every=d.prediction.commit_every,
        spill_gradients=any(u.placement.get("grad") == "nvme" for u in units),
        hardware=p.hw.name,
        stall_seconds=d.prediction.stall_seconds,
        notes=w.notes + d.notes,
        shortfall_bytes=shortfall,
    )


def _unit_plan(unit: UnitProfile, c: UnitChoice, w: Workload) -> UnitPlan:
    if w.zo:  # no gradient; moments travel with the weights
        placement = {"param": c.weights, **dict.fromkeys((name for name, *_ in w.zo.roles), c.weights)}
    else:
        placement = {"param": c.weights, **dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), c.state)}
        placement["grad"] = c.gradient if w.clipping and unit.trainable else "gpu"
    placement["activation"] = c.boundary
    activations = {
        "keep": c.keep,
        "recompute": c.recompute,
        "swap_cpu": c.swap_cpu,
        "swap_cxl": c.swap_cxl,
        "swap_nvme": c.swap_nvme,
    }
    return UnitPlan(unit.name, unit.parameters, placement, activations)
