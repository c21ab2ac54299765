"""The placement knapsack against brute force, and what happens when a solver fails."""

from __future__ import annotations

import itertools
import random

import pulp
import pytest
from offload.planner import Hardware, UnitProfile, Workload
from offload.planner.placement import Choice, greedy, item_bytes, mip, place
from offload.planner.timing import estimate, whole_step

MACHINE = Hardware("test", 0, 0, {"bfloat16": 1e13, "float32": 1e13}, 2e10, 2e10, 1e10, 2e9, 1e9, 2e9)


def instance(seed: int, units: int) -> Workload:
    rng = random.Random(seed)
    kinds = ["block"] * (units - 1) + ["embedding"]
    made = []
    for i, kind in enumerate(kinds):
        trainable = 64 * rng.randrange(1, 60_000)
        made.append(
            UnitProfile(f"u{i}", kind, trainable, trainable, 64 * rng.randrange(0, 20_000), False,
                        int(rng.uniform(0, 2e11)))
        )  # fmt: skip
    dtype = rng.choice(["bfloat16", "float32"])
    return Workload(tuple(made), rng.choice([1, 3]), 1, 128, dtype, rng.random() < 0.7, 5, rng.choice(["cpu", "cuda"]))


def size(choice: Choice, w: Workload) -> int:
    return sum(item_bytes((i, "state"), w) for i in choice.state) + sum(
        item_bytes((i, "gradient"), w) for i in choice.gradients
    )


def subsets(n: int) -> list[frozenset[int]]:
    return [frozenset(s) for k in range(n + 1) for s in itertools.combinations(range(n), k)]


@pytest.mark.parametrize("seed", range(12))
def test_the_mip_finds_the_optimum_and_greedy_is_never_better(seed: int) -> None:
    n = 4
    w = instance(seed, n)
    everything = size(Choice(frozenset(range(n)), frozenset(range(n))), w)
    ram = int(everything * random.Random(seed + 100).uniform(0.1, 0.9))
    best = min(
        estimate(w, MACHINE, whole_step(w, state, gradients)).step_seconds
        for state in subsets(n)
        for gradients in (subsets(n) if w.clipping else [frozenset(range(n))])
        if size(Choice(state, gradients), w) <= ram
    )
    found = mip(w, MACHINE, ram)
    assert found.status == "optimal" and size(found.choice, w) <= ram
    assert found.estimate.step_seconds == pytest.approx(best, rel=1e-5)
    quick = greedy(w, MACHINE, ram)
    assert size(quick.choice, w) <= ram
    assert found.estimate.step_seconds <= quick.estimate.step_seconds * (1 + 1e-12)


def test_equal_units_are_solved_by_counts() -> None:
    blocks = tuple(UnitProfile(f"b{i}", "block", 200_000_000, 200_000_000, 0, False, 10**13) for i in range(126))
    w = Workload(blocks, 4, 1, 1024, "bfloat16", True, 1)
    found = place(w, MACHINE, 40 * item_bytes((0, "state"), w), "mip")
    assert found.name == "mip" and found.status == "optimal" and found.seconds < 3


def test_a_solver_that_crashes_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise OSError("the solver's library is broken")

    monkeypatch.setattr(pulp.LpProblem, "solve", crash)
    w = instance(1, 6)
    ram = 20 << 20
    found = place(w, MACHINE, ram, "auto")
    assert found.name == "greedy" and found.status == "fallback"
    assert "library is broken" in found.notes[0]
    assert found.choice == greedy(w, MACHINE, ram).choice


def test_values_of_a_solver_without_a_solution_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(self: pulp.LpProblem, *_: object) -> int:
        self.sol_status = pulp.LpSolutionNoSolutionFound
        for variable in self.variables():
            variable.varValue = 1
        return 1

    monkeypatch.setattr(pulp.LpProblem, "solve", time_out)
    found = place(instance(2, 6), MACHINE, 20 << 20, "mip")
    assert found.name == "greedy" and "no solution" in found.notes[0]


def test_cbc_takes_over_without_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    if not pulp.PULP_CBC_CMD(msg=False).available():
        pytest.skip("PuLP ships no CBC for this machine")
    w = instance(3, 6)
    found = mip(w, MACHINE, 20 << 20)
    monkeypatch.undo()
    assert found.estimate.step_seconds == pytest.approx(mip(w, MACHINE, 20 << 20).estimate.step_seconds)
