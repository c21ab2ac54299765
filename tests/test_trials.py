"""Updates tried in backward before the clipping coefficient is known: kept or taken back, the numbers are the same."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import zoo
from offload.planner.memory import bare_ram

import offload
from offload import full_step
from offload.engine import prepare
from offload.update_stream import UpdateStream

STEPS = 6


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_and_taken_back(dtype: str, micro_batches: int, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama")
    batches = zoo.batches("llama", STEPS, micro_batches)
    loose = reference.train(model, batches, 1, max_grad_norm=None, dtype=getattr(torch, dtype))
    limit = sorted(loose.norms)[STEPS // 2]  # about half of the steps are clipped
    want = reference.train(model, batches, 1, max_grad_norm=limit, dtype=getattr(torch, dtype))
    assert any(n > limit for n in want.norms) and any(n < limit for n in want.norms)

    monkeypatch.setattr(full_step, "TRIAL_AFTER", 0)
    taken_back = []
    defer = UpdateStream.defer
    monkeypatch.setattr(UpdateStream, "defer", lambda self, unit, *a: (taken_back.append(unit), defer(self, unit, *a)))
    cfg = reference.config(fast_path / "run", 1, micro_batches, **{"model.dtype": dtype, "train.max_grad_norm": limit})
    prepared = prepare(offload.Config.load(cfg), copy.deepcopy(model))
    cfg["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    got = reference.Outcome()
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        engine._method._weights._poison = True
        for step, batch in enumerate(batches):
            if step == STEPS - 1:
                assert engine.evaluate(batch) == pytest.approx(want.losses[-1], rel=1e-3)
            result = engine.step(batch)
            got.losses.append(result.loss)
            got.norms.append(result.grad_norm)
        got.weights = reference.weights(engine)
        units = len(engine._units)
    assert got.losses == want.losses
    assert got.norms == want.norms
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)
    clipped = sum(n > limit for n in want.norms)
    assert clipped <= len(taken_back) / units < STEPS  # of unclipped steps only what lives in RAM is deferred


@pytest.mark.timeout(120)
def test_a_unit_is_not_loaded_while_its_trial_is_undecided(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step expects its last unit once more than it visits it. With the trial of that unit over before its
    slot is free, its weights, which are only known after backward, were loaded before those that backward needs."""
    monkeypatch.setattr(full_step, "TRIAL_AFTER", 0)
    drain = full_step.FullStep._drain_if_done

    def drain_slowly(self: full_step.FullStep, *args: Any, **options: Any) -> None:
        drain(self, *args, **options)
        time.sleep(0.2)

    monkeypatch.setattr(full_step.FullStep, "_drain_if_done", drain_slowly)
    model = zoo.make("llama")
    cfg = reference.config(fast_path / "run", 1, 1, **{"train.max_grad_norm": 1e6})
    prepared = prepare(offload.Config.load(cfg), copy.deepcopy(model))
    cfg["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        engine._method._weights._poison = True
        losses = [engine.step(batch).loss for batch in zoo.batches("llama", 2, 1)]
    assert losses == reference.train(model, zoo.batches("llama", 2, 1), 1, max_grad_norm=1e6).losses


def test_a_trial_follows_a_few_unclipped_steps(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama")
    batches = zoo.batches("llama", STEPS, 1)
    deferred: list[int] = []
    defer = UpdateStream.defer
    cfg = reference.config(fast_path / "run", 1, 1, **{"train.max_grad_norm": 1e6})
    prepared = prepare(offload.Config.load(cfg), copy.deepcopy(model))
    cfg["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    with offload.wrap(copy.deepcopy(model), cfg) as engine:

        def noted(self: UpdateStream, *args: Any) -> None:
            deferred.append(engine.completed_steps)
            defer(self, *args)

        monkeypatch.setattr(UpdateStream, "defer", noted)
        for batch in batches:
            engine.step(batch)
    per_step = [deferred.count(step) for step in range(STEPS)]
    assert per_step[0] == per_step[1] == per_step[2] > max(per_step[full_step.TRIAL_AFTER :])
