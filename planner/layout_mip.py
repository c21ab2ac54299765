"""The pairwise MIP of buffer layout: no two buffers that live at one time may overlap, one binary per pair.

After MEMO (arXiv 2407.12117). Through PuLP (HiGHS if importable, else CBC); OR-tools' CP-SAT instead where that is
installed, because it proves three times as many buffers in the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def provable() -> int:
    """About how many buffers are proven in ten seconds."""
    return 100 if _has_cp_sat() else 30


@cache
def _has_cp_sat() -> bool:
    if find_spec("ortools") is None:
        return False
    try:
        import_module("ortools.sat.python.cp_model")
    except ImportError:  # one that does not fit the libraries beside it
        return False
    return True


@dataclass(frozen=True)
class Solved:
    """`optimal`: no layout is lower than `height`, or than the target."""

    offsets: list[int]
    height: int
    optimal: bool


def solve(
    buffers: Sequence[tuple[int, int, int]],
    start: Sequence[int],
    target: int,
    time_limit: float,
    free: Collection[int] | None = None,
    cp_sat: bool | None = None,
) -> Solved | None:
    """Least height of `buffers` (lower, upper, size), never worse than the layout `start`; None if a solver failed.

    Only the buffers of the indices `free` move, the others stay where `start` has them. A height under `target` is not
    asked for. The heights of `start` are the big-M. `cp_sat`: default, if it is installed.
    """
    moving = sorted(range(len(buffers)) if free is None else free)
    tops = [offset + b[2] for offset, b in zip(start, buffers, strict=True)]
    height = max(tops)
    still = set(range(len(buffers))) - set(moving)
    least = max(target, max((tops[i] for i in still), default=0))
    pairs = [
        (i, j)
        for i in moving
        for j in (*moving, *still)
        if (j in still or i < j) and buffers[i][0] < buffers[j][1] and buffers[j][0] < buffers[i][1]
    ]
    use_cp_sat = _has_cp_sat() if cp_sat is None else cp_sat
    answer = (_cp_sat if use_cp_sat else _mip)(buffers, start, moving, pairs, least, height, time_limit)
    if answer is None:
        return None
    found, optimal = answer
    offsets = list(start)
    for i, offset in found.items():
        offsets[i] = offset
    if not _valid(buffers, offsets, pairs):  # a solver's tolerance
        offsets, optimal = list(start), False
    reached = max(o + b[2] for o, b in zip(offsets, buffers, strict=True))
    if reached > height:
        offsets, reached, optimal = list(start), height, False
    return Solved(offsets, reached, optimal and free is None)


def _valid(buffers: Sequence[tuple[int, int, int]], offsets: Sequence[int], pairs: Sequence[tuple[int, int]]) -> bool:
    return all(offset >= 0 for offset in offsets) and all(
        offsets[i] + buffers[i][2] <= offsets[j] or offsets[j] + buffers[j][2] <= offsets[i] for i, j in pairs
    )


def _mip(
    buffers: Sequence[tuple[int, int, int]],
    start: Sequence[int],
    moving: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    least: int,
    height: int,
    time_limit: float,
) -> tuple[dict[int, int], bool] | None:
    try:
        import pulp
        from offload.planner.solver import SolverFailed, run
    except ImportError:  # planning needs no solver
        return None
    problem = pulp.LpProblem("layout", pulp.LpMinimize)
    scale = float(max(1, height))  # offsets as fractions of the start's height: raw bytes break the solvers
    size = [b[2] / scale for b in buffers]
    movable = set(moving)
    at: dict[int, Any] = {i: problem.add_variable(f"at_{i}", 0, 1 - size[i]) for i in moving}
    peak = problem.add_variable("peak", least / scale, 1)
    for i in moving:
        problem += at[i] + size[i] <= peak
    same: dict[tuple[int, int, int], int] = {}
    for i in moving:  # of buffers that are equal in all, the earlier lies lower
        if (twin := same.get(buffers[i])) is not None:
            problem += at[twin] + size[i] <= at[i]
        same[buffers[i]] = i
    below: dict[tuple[int, int], Any] = {}
    for i, j in pairs:
        if buffers[i] == buffers[j] and j in movable:
            continue
        lower = below[i, j] = problem.add_variable(f"below_{i}_{j}", 0, 1, "Binary")
        lower.setInitialValue(int(start[i] < start[j]))
        other = at[j] if j in movable else start[j] / scale
        problem += at[i] + size[i] <= other + (1 - lower)
        problem += other + size[j] <= at[i] + lower
    for i in moving:
        at[i].setInitialValue(start[i] / scale)
    problem.setObjective(peak)
    try:
        optimal = run(problem, time_limit, 0.0)
    except SolverFailed:
        return None
    found = _settled(buffers, start, moving, {p: (v.value() or 0) > 0.5 for p, v in below.items()}, at)
    return found, optimal


def _settled(
    buffers: Sequence[tuple[int, int, int]],
    start: Sequence[int],
    moving: Sequence[int],
    below: dict[tuple[int, int], bool],
    at: dict[int, Any],
) -> dict[int, int]:
    """Whole offsets from the solver's order: each buffer as low as those that lie below it let it."""
    found: dict[int, int] = {}
    for i in sorted(moving, key=lambda i: (at[i].value() or 0.0, i)):
        low = 0
        for j, b in enumerate(buffers):
            if j == i or b[0] >= buffers[i][1] or buffers[i][0] >= b[1]:
                continue
            under = j in found if j in at else not below.get((i, j), True)
            if under:
                low = max(low, (found[j] if j in found else start[j]) + b[2])
        found[i] = low
    return found


def _cp_sat(
    buffers: Sequence[tuple[int, int, int]],
    start: Sequence[int],
    moving: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    least: int,
    height: int,
    time_limit: float,
) -> tuple[dict[int, int], bool] | None:
    from ortools.sat.python import cp_model

    model: Any = cp_model.CpModel()
    peak = model.new_int_var(least, height, "peak")
    at = {i: model.new_int_var(0, height - buffers[i][2], f"at_{i}") for i in moving}
    times: list[Any] = []
    places: list[Any] = []
    for i in {*moving, *(j for _, j in pairs)}:
        lower, upper, size = buffers[i]
        times.append(model.new_fixed_size_interval_var(lower, upper - lower, f"life_{i}"))
        places.append(model.new_fixed_size_interval_var(at[i] if i in at else start[i], size, f"place_{i}"))
    model.add_no_overlap_2d(times, places)
    for i in moving:
        model.add(at[i] + buffers[i][2] <= peak)
        model.add_hint(at[i], start[i])
    model.minimize(peak)
    solver: Any = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return {i: int(solver.value(v)) for i, v in at.items()}, status == cp_model.OPTIMAL
