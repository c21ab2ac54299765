"""bfloat16: two hundred steps on the shipped text against the in-memory reference, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import reference
import torch
import zoo
from offload.planner.memory import bare_ram

import offload
from offload.data import open_dataset

TEXT = Path(__file__).parent.parent / "examples" / "quickstart.txt"
ROWS, STEPS = 2, 200


@pytest.mark.parametrize(("micro_batches", "placement"), [(2, "nvme"), (1, "cpu")])
def test_two_hundred_steps_equal_the_reference(micro_batches: int, placement: str, fast_path: Path) -> None:
    model = zoo.make("llama", vocab_size=272, num_hidden_layers=3, attention_dropout=0.0)
    total = ROWS * micro_batches
    section = {"path": str(TEXT), "format": "text", "tokenizer": "bytes", "sequence_length": 48}
    cfg = reference.config(
        fast_path / "run",
        ROWS,
        total,
        **{"model.dtype": "bfloat16", "train.steps": STEPS, "data": section, "train.schedule.warmup_steps": 10},
    )
    data = offload.Config.load(cfg).data
    with open_dataset(
        data, None, vocab_size=272, micro_batch_size=ROWS, global_batch_size=total, seed=0, cache_dir=fast_path / "data"
    ) as dataset:
        batches = [dataset.train.batch(step) for step in range(STEPS)]
    want = reference.train(
        model, batches, ROWS, steps=STEPS, warmup=10, dtype=torch.bfloat16, max_grad_norm=reference.NORM
    )
    if placement == "nvme":
        made = offload.engine.prepare(offload.Config.load(cfg), copy.deepcopy(model))
        cfg["memory"]["cpu"] = bare_ram(made.workload, made.plan)
    got = reference.Outcome()
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        for batch in batches:
            result = engine.step(batch)
            got.losses.append(result.loss)
            got.norms.append(result.grad_norm)
        got.weights = reference.weights(engine)
    assert got.losses == want.losses
    assert got.norms == want.norms
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)
    assert got.losses[-1] < got.losses[0] - 1.0
