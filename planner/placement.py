"""Which units' state and waiting gradients live in RAM: greedy by prefix, and the knapsack as a MIP.

Everything durable also has its extents in the store; a home in RAM saves the traffic. Both solvers minimise the step
time of `timing.estimate` under the bytes of RAM (and of NVMe, which unplaced gradients spill to) that are left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from offload.planner.memory import gradient_home, home_bytes
from offload.planner.plan import Hardware, UnitProfile, Workload
from offload.planner.timing import (
    Estimate,
    Step,
    Traffic,
    estimate,
    lanes,
    stage_resources,
    unit_step,
    whole_step,
)

Item = tuple[int, str]  # (unit index, "state" | "gradient")


@dataclass(frozen=True)
class Choice:
    """Indices of the units whose state, and whose waiting gradients, live in RAM."""

    state: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Solved:
    """A choice with its predicted step, and how it was found."""

    choice: Choice
    estimate: Estimate
    name: str
    status: str
    gap: float | None
    seconds: float
    notes: tuple[str, ...] = ()


def item_bytes(item: Item, w: Workload) -> int:
    """RAM that the item's home takes."""
    unit = w.units[item[0]]
    return gradient_home(unit, w) if item[1] == "gradient" else sum(home_bytes(unit, w).values())


def everything(w: Workload) -> Choice:
    """All homes in RAM."""
    indices = frozenset(range(len(w.units)))
    return Choice(indices, indices)


def _orders(w: Workload) -> Iterator[list[Item]]:
    """Fixed orders to fill RAM in. The longest prefix that fits only grows with RAM: more RAM never predicts slower."""
    backwards = range(len(w.units) - 1, -1, -1)
    blocks = [i for i in backwards if w.units[i].kind in ("block", "other")]
    rest = [i for i in backwards if i not in set(blocks)]
    # small leftovers before the large embedding and head, so that a large one blocks nothing behind it
    rest.sort(key=lambda i: item_bytes((i, "state"), w))
    for units in (blocks + rest, rest + blocks):
        gradients: list[Item] = [(i, "gradient") for i in units]
        state: list[Item] = [(i, "state") for i in units]
        yield gradients + state
        yield state + gradients
        yield [item for pair in zip(gradients, state, strict=True) for item in pair]


def _choice(items: Iterable[Item]) -> Choice:
    chosen = list(items)
    return Choice(
        frozenset(i for i, what in chosen if what == "state"), frozenset(i for i, what in chosen if what == "gradient")
    )


def greedy(w: Workload, hw: Hardware, ram: int) -> Solved:
    """The best of a few fixed orders, each filled as far as `ram` bytes allow.

    Prefers the faster choice, then the one that moves fewer bytes over NVMe.
    """
    begin = time.perf_counter()
    best: tuple[tuple[float, float], Choice, Estimate] | None = None
    for order in _orders(w):
        left, taken = ram, []
        for item in order:
            need = item_bytes(item, w)
            if need > left:
                break
            left -= need
            taken.append(item)
        choice = _choice(taken)
        predicted = estimate(w, hw, whole_step(w, choice.state, choice.gradients))
        score = (predicted.step_seconds, predicted.nvme_bytes)
        if best is None or score < best[0]:
            best = (score, choice, predicted)
    assert best is not None
    return Solved(best[1], best[2], "greedy", "feasible", None, time.perf_counter() - begin)


@dataclass
class _Group:
    """Units that cost and save the same; solved by counts, so that 80 equal blocks are two integers."""

    members: list[int]
    state_bytes: int
    gradient_bytes: int
    state: Step  # how a step's traffic changes when the state of one member moves to RAM
    gradient: Step


def _difference(new: Step, old: Step) -> Step:
    def minus(a: Traffic, b: Traffic) -> Traffic:
        return Traffic(**{name: getattr(a, name) - getattr(b, name) for name in vars(a)})

    return Step(minus(new.forward, old.forward), minus(new.backward, old.backward), new.state_in_ram - old.state_in_ram)


def _groups(w: Workload) -> list[_Group]:
    groups: dict[UnitProfile, _Group] = {}
    for i, unit in enumerate(w.units):
        key = replace(unit, name="", boundary_bytes=0, workspace_forward=0, workspace_backward=0)
        if key not in groups:
            base = unit_step(unit, w, False, False)
            groups[key] = _Group(
                [],
                item_bytes((i, "state"), w),
                item_bytes((i, "gradient"), w),
                _difference(unit_step(unit, w, True, False), base),
                _difference(unit_step(unit, w, False, True), base),
            )
        groups[key].members.append(i)
    return list(groups.values())


def _fill(items: list[Item], w: Workload, ram: int) -> list[Item]:
    """`items` and, in the first greedy order, whatever else fits: it costs no time and spares the drive."""
    left = ram - sum(item_bytes(item, w) for item in items)
    filled = set(items)
    for item in next(_orders(w)):
        if item not in filled and item_bytes(item, w) <= left:
            left -= item_bytes(item, w)
            filled.add(item)
    return sorted(filled)


class SolverFailed(Exception):
    """The MIP gave no usable answer; the message says what the solver reported."""


def mip(w: Workload, hw: Hardware, ram: int, time_limit: float = 10.0) -> Solved:
    """The placement knapsack through PuLP (HiGHS if importable, else CBC); never worse than `greedy`.

    Write-behind is priced only for a given commit interval ("auto" keeps it under a tenth of the step).
    Raises SolverFailed when the solver crashes or ends with no incumbent.
    """
    import pulp

    begin = time.perf_counter()
    fallback = greedy(w, hw, ram)
    groups = _groups(w)
    base = whole_step(w, (), ())
    scale = estimate(w, hw, base).step_seconds or 1.0  # step times in units of the worst, bytes in units of RAM
    room = float(max(ram, 1))
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    state = [problem.add_variable(f"state_{g}", 0, len(x.members), "Integer") for g, x in enumerate(groups)]
    gradient = [problem.add_variable(f"gradient_{g}", 0, len(x.members), "Integer") for g, x in enumerate(groups)]
    times = {name: problem.add_variable(f"seconds_{name}", 0) for name in ("forward", "backward")}

    behind = 0.0 if w.commit_every == "auto" else 0.5 / w.commit_every / hw.nvme_write

    def seconds(step: Step, stage: str, names: list[str]) -> float:
        lane = lanes(getattr(step, stage), w, hw)
        lane["nvme_write"] += step.state_in_ram * behind
        return sum(lane[name] for name in names) / scale

    for stage, longest in times.items():
        for names in stage_resources(w.device):
            load = pulp.lpSum(
                [seconds(x.state, stage, names) * state[g] for g, x in enumerate(groups)]
                + [seconds(x.gradient, stage, names) * gradient[g] for g, x in enumerate(groups)]
            ) + seconds(base, stage, names)
            problem += longest >= load
    used = [x.state_bytes / room * state[g] for g, x in enumerate(groups)]
    used += [x.gradient_bytes / room * gradient[g] for g, x in enumerate(groups)]
    problem += pulp.lpSum(used) <= ram / room
    problem.setObjective(pulp.lpSum(times.values()))

    gap = 1e-6
    try:
        solver = pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=gap)
        if not solver.available():
            solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap)
        problem.solve(solver)
    except Exception as error:  # a solver is foreign code: whatever it raises, the greedy answer stands
        raise SolverFailed(f"{type(error).__name__}: {error}") from error
    # a time-out may report "Optimal" (then sol_status is 2), or leave values of no solution in the variables
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise SolverFailed(f"{pulp.LpStatus[problem.status]}, no solution within {time_limit:g} s")
    optimal = problem.sol_status == pulp.LpSolutionOptimal
    items: list[Item] = []
    for g, x in enumerate(groups):
        last_first = sorted(x.members, reverse=True)
        items += [(i, "state") for i in last_first[: round(state[g].value() or 0)]]
        items += [(i, "gradient") for i in last_first[: round(gradient[g].value() or 0)]]
    items = _fill(items, w, ram)
    choice = _choice(items)
    predicted = estimate(w, hw, whole_step(w, choice.state, choice.gradients))
    too_big = sum(item_bytes(item, w) for item in items) > ram  # a violation within the solver's tolerance
    known = fallback.estimate
    if too_big or (known.step_seconds, known.nvme_bytes) < (predicted.step_seconds, predicted.nvme_bytes):
        choice, predicted = fallback.choice, fallback.estimate
    status = "optimal" if optimal else "feasible"
    return Solved(choice, predicted, "mip", status, gap if optimal else None, time.perf_counter() - begin)


def place(w: Workload, hw: Hardware, ram: int, solver: str = "auto", time_limit: float = 10.0) -> Solved:
    """Place by `solver`: "greedy", "mip", or "auto" (mip). A solver that fails falls back to greedy and says so."""
    if solver not in ("auto", "mip", "greedy"):
        raise ValueError(f"planner.solver is {solver!r}; accepted: auto, mip, greedy")
    if solver == "greedy":
        return greedy(w, hw, ram)
    begin = time.perf_counter()
    full = everything(w)
    if sum(item_bytes((i, what), w) for i in full.state for what in ("state", "gradient")) <= ram:
        best = greedy(w, hw, ram)  # nothing to choose
        return replace(best, status="optimal", gap=0.0)
    try:
        return mip(w, hw, ram, time_limit)
    except SolverFailed as error:
        best = greedy(w, hw, ram)
        note = f"solver: the MIP failed ({error}); the greedy placement is used"
        return replace(best, status="fallback", seconds=time.perf_counter() - begin, notes=(note,))
