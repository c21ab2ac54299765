"""The lanes under a slow drive: no lane waits in a circle, numbers stay exact, and work overlaps as the design says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import zoo
from offload.planner.memory import bare_ram

import offload
from offload.engine import prepare

STEPS, TOTAL = 4, 2


def run(path: Path, model: Any, batches: list[dict[str, torch.Tensor]], clips: bool) -> tuple[Any, Any]:
    """The outcome, and for each step what compute waited for."""
    cfg = reference.config(path, 1, TOTAL)
    cfg["train"]["max_grad_norm"] = reference.NORM if clips else None
    prepared = prepare(offload.Config.load(cfg), copy.deepcopy(model))
    cfg["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    got, stalls = reference.Outcome(), []
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        assert engine.plan.buffer("weights.block").count == 2  # the fewest: every wait for a slot happens
        for batch in batches:
            result = engine.step(batch)
            got.losses.append(result.loss)
            got.norms.append(result.grad_norm)
            stalls.append(engine.stalls)
        got.weights = reference.weights(engine)
    return got, stalls


def overlaps(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Whether something of `a` runs while something of `b` does."""
    return any(x["ts"] < y["ts"] + y["dur"] and y["ts"] < x["ts"] + x["dur"] for x in a for y in b)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("faults", ["read:delay=0.016", "read:delay=0.004;write:delay=0.024"])
def test_a_slow_drive(clips: bool, faults: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama", num_hidden_layers=4)
    batches = zoo.batches("llama", STEPS, TOTAL)
    want = reference.train(model, batches, 1, max_grad_norm=reference.NORM if clips else None)
    monkeypatch.setenv("OFFLOAD_FAULTS", faults)
    got, stalls = run(fast_path / "run", model, batches, clips)
    assert got.losses == want.losses
    assert got.norms == want.norms
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)

    events = [e for e in json.loads((fast_path / "run" / "trace.json").read_text()) if e["ph"] == "X"]
    lanes = {
        lane: [e for e in events if e["tid"] == tid]
        for tid, lane in enumerate(("compute", "h2d", "d2h", "nvme_read", "nvme_write", "optimizer", "stall"))
    }
    forward = [e for e in lanes["compute"] if e["name"].startswith("forward")]
    backward = [e for e in lanes["compute"] if e["name"].startswith("backward")]
    if "write" in faults:  # writes trail behind compute
        assert overlaps(lanes["nvme_write"], lanes["compute"])
    if clips:  # units are updated ahead of the next forward
        assert overlaps(lanes["nvme_read"], forward)
    else:  # units are updated while others run backward
        assert overlaps(lanes["nvme_read"], backward)
    assert all(waited.get("weights", 0) > 0 for waited in stalls[1:])  # what compute waited for is told
    memory = json.loads((fast_path / "run" / "memory.json").read_text())
    mean = sum(waited["weights"] for waited in stalls[1:]) / (STEPS - 1)
    assert memory["stall_seconds"]["weights"] == pytest.approx(mean, rel=0.01)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("commit_every", [1, 2])
@pytest.mark.parametrize("clips", [True, False])
def test_moments_on_a_slow_drive_behind_weights_in_ram(
    clips: bool, commit_every: int, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights in RAM are ready while the moments are still being written: these are not to be read before that.
    One unit is trained, so that its state is wanted again with chunk buffers to spare."""
    model = zoo.make("llama", num_hidden_layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1." in name)
    batches = zoo.batches("llama", STEPS, TOTAL)
    limit = reference.NORM if clips else None
    want = reference.train(model, batches, TOTAL, max_grad_norm=limit, dtype=torch.bfloat16)
    monkeypatch.setenv("OFFLOAD_FAULTS", "write:delay=0.1")
    changes = {"model.dtype": "bfloat16", "train.max_grad_norm": limit, "train.commit_every": commit_every}
    homes = {"param": "cpu", "master": "nvme", "exp_avg": "nvme", "exp_avg_sq": "nvme"}
    with forcing.engine(fast_path / "run", model, TOTAL, TOTAL, changes, homes=homes) as engine:
        assert [engine.step(batch).loss for batch in batches] == want.losses
        got = reference.weights(engine)
    assert all(torch.equal(got[name], want.weights[name]) for name in want.weights)


def test_announcements_may_change_while_one_is_followed(fast_path: Path) -> None:
    """The main thread announces the next updates while the lane goes through those of before."""
    model = zoo.make("llama", num_hidden_layers=2)
    with forcing.engine(fast_path / "run", model, TOTAL, TOTAL, homes={"exp_avg": "nvme"}) as engine:
        updates, units = engine._method._updates, engine._units
        updates.expect(units, ["exp_avg"])
        followed = updates._to_come(None, 0)
        found = [next(followed)]
        updates.expect([], ["grad"])
        found += followed
        assert [(state.unit.name, roles) for state, _, roles in found] == [(u.name, ["exp_avg"]) for u in units]
