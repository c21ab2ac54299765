"""Bytes that cross between memory and the store: weights are read once per direction, not again for their update."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import torch
import zoo

import offload
from offload.engine import prepare

STEPS = 4


@pytest.mark.parametrize(
    ("clips", "micro_batches", "read", "written"),
    [(False, 1, 14.1, 12.1), (False, 3, 14.1, 12.1), (True, 1, 16.1, 14.1), (True, 3, 18.1, 16.1)],
)
def test_bytes_per_parameter_and_step(
    clips: bool, micro_batches: int, read: float, written: float, fast_path: Path
) -> None:
    """DESIGN: 2 + 2 weights, 2 low half, 8 moments read; 12 written; with clipping the gradients that wait as well."""
    model = zoo.make("llama", hidden_size=256, intermediate_size=512, vocab_size=512, head_dim=64)
    cfg = reference.config(fast_path / "run", 1, micro_batches, **{"model.dtype": "bfloat16", "train.steps": STEPS})
    cfg["train"]["max_grad_norm"] = 1.0 if clips else None
    plan = prepare(offload.Config.load(cfg), model).plan
    categories = plan.categories["cpu"]
    cfg["memory"]["cpu"] = plan.peak_bytes["cpu"] - categories.get("state", 0) - categories.get("gradient homes", 0)
    with offload.wrap(model, cfg) as engine:
        parameters = sum(unit.layout.parameters for unit in engine._units)
        before = engine.store.bytes_read, engine.store.bytes_written
        for _ in range(STEPS):
            ids = torch.randint(0, 512, (micro_batches, 16))
            engine.step({"input_ids": ids, "labels": ids})
        engine.flush()
        moved = engine.store.bytes_read - before[0], engine.store.bytes_written - before[1]
    per_step = [n / parameters / STEPS for n in moved]
    # What the last step leaves behind for a forward that never comes: its update is read on its own account.
    assert per_step[0] <= read + (2 / STEPS if clips else 0), per_step
    assert per_step[1] <= written, per_step
    assert per_step[1] >= 12, per_step
