"""Running a program of PuLP: HiGHS if importable, else CBC; and what its answer is worth."""

from __future__ import annotations

import numpy as np
import pulp


class _Started(pulp.HiGHS):
    """HiGHS that begins from the values that integer variables have, which PuLP does not hand over.

    It works out the other variables, and goes on without a start where it finds no values for them.
    """

    def buildSolverModel(self, lp: pulp.LpProblem) -> None:
        super().buildSolverModel(lp)
        start = {v.index: float(v.varValue) for v in lp.variables() if v.cat == "Integer" and v.varValue is not None}
        if start:
            numbers, values = np.array(list(start), np.int32), np.array(list(start.values()))
            lp.solverModel.setSolution(len(start), numbers, values)


class SolverFailed(Exception):
    """The MIP gave no usable answer; the message says what the solver reported."""


def run(problem: pulp.LpProblem, time_limit: float, gap: float) -> bool:
    """Solve within `time_limit` seconds to a relative gap; the values are in the variables, which may hold a start.

    Returns whether they are proven to be optimal. Raises SolverFailed when the solver crashes or has no solution.
    """
    try:
        solver = _Started(msg=False, timeLimit=time_limit, gapRel=gap)
        if not solver.available():
            solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap, warmStart=True)
        problem.solve(solver)
    except Exception as error:  # a solver is foreign code: whatever it raises, the caller's own answer stands
        raise SolverFailed(f"{type(error).__name__}: {error}") from error
    # a time-out may report "Optimal" (then sol_status is 2), or leave values of no solution in the variables
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise SolverFailed(f"{pulp.LpStatus[problem.status]}, no solution within {time_limit:g} s")
    return bool(problem.sol_status == pulp.LpSolutionOptimal)
