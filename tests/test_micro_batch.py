"""`train.micro_batch_size: auto`: what the planner chooses, and that the run computes with it and keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from offload.planner import Budgets, Plan, UnitProfile, Workload, load_hardware, make_plan
from offload.planner.micro_batch import largest_that_pays, sizes
from offload.planner.suggest import with_batch

from offload.config import Config
from offload.engine import Engine
from offload.errors import ConfigError
from offload.prepare import prepare
from offload.resumable import check_resumable
from tests import reference, zoo

GIB = 1 << 30
BLOCK = UnitProfile(
    "block", "block", 12_582_912, 12_582_912, 0, forward_flops=25 << 30, boundary_bytes=2 << 20,
    workspace_forward=24 << 20, workspace_backward=60 << 20,
)  # fmt: skip


def workload(rows: int) -> Workload:
    """One step of 16 rows through eight blocks; larger micro-batches take more memory, and less time for each row."""
    w = Workload(tuple(replace(BLOCK, name=str(i)) for i in range(8)), 16, 1, 1024, "bfloat16", True, 1, "cuda")
    return with_batch(w, rows, 1024)


def test_sizes_divide_the_global_batch_and_double() -> None:
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(12) == [1, 2, 4, 12]
    assert sizes(1) == [1] and sizes(7) == [1, 7]


@pytest.mark.parametrize(
    ("seconds", "chosen", "looked_at"),
    [
        ({1: 4.0, 2: 3.0, 4: 2.5, 8: 2.5, 16: 2.6}, 8, [1, 2, 4, 8, 16]),  # of equals the largest
        ({1: 4.0, 2: 3.0, 4: None}, 2, [1, 2, 4]),  # larger ones need more memory still
        ({1: 2.0, 2: 2.5, 4: 2.5}, 1, [1, 2, 4]),  # two in a row that are slower
        ({1: 2.0, 2: 2.5, 4: 1.5, 8: 1.6, 16: 1.7}, 4, [1, 2, 4, 8, 16]),
        ({1: None}, 1, [1]),
    ],
)
def test_the_largest_that_pays(seconds: dict[int, float | None], chosen: int, looked_at: list[int]) -> None:
    base = make_plan(workload(1), Budgets(GIB, GIB), load_hardware("rtx4090"), "greedy")
    seen: list[int] = []

    def planned(rows: int) -> Plan:
        seen.append(rows)
        step = seconds[rows]
        return replace(base, fits=step is not None, step_seconds=step or 0.0)

    assert largest_that_pays(16, planned) == chosen
    assert seen == looked_at


def test_more_device_memory_never_chooses_a_smaller_one() -> None:
    hw = load_hardware("rtx4090")
    chosen = []
    for share in (1, 2, 4, 8, 16):
        budgets = Budgets(share * GIB // 4, 64 * GIB, 0, (("/a", 500 * GIB),))
        chosen.append(largest_that_pays(16, lambda n, b=budgets: make_plan(workload(n), b, hw, "greedy")))
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1]


def test_a_run_computes_with_what_was_chosen(fast_path: Path) -> None:
    """Equal, to the bit, to a run whose config names the size; `config.yaml` and the plan tell it, resume keeps it."""
    rows, total = 2, 4
    batches = zoo.batches("llama", 2, total)
    losses = []
    for name in ("auto", "named"):
        path = fast_path / name
        cfg = reference.config(path, rows, total)
        cfg["train"]["micro_batch_size"] = "auto" if name == "auto" else rows
        prepared = prepare(Config.load(cfg), zoo.make("llama"))
        rows = prepared.config.train.micro_batch_size
        assert isinstance(rows, int) and rows == prepared.workload.micro_batch and total % rows == 0
        with Engine.create(Config.load(cfg), prepared=prepared) as engine:
            losses.append([engine.step(batch).loss for batch in batches])
            if name == "auto":
                assert any(f"micro_batch_size: {rows} chosen" in note for note in engine.plan.notes)
                saved = engine.run.config()
                assert saved.train.micro_batch_size == rows
                check_resumable(saved, Config.load(cfg).with_micro_batch_size(rows))
                other = Config.load(cfg, [f"train.micro_batch_size={4 if rows != 4 else 1}"])
                with pytest.raises(ConfigError, match="micro_batch_size"):
                    check_resumable(saved, other)
    assert losses[0] == losses[1]
