"""Bytes that cross between memory and the store: weights are read once per direction, not again for their update."""

from __future__ import annotations

from pathlib import Path

import forcing
import pytest
import reference
import torch
import zoo
from offload.planner.memory import bare_ram

import offload
from offload.engine import prepare
from offload.units import Unit

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
    prepared = prepare(offload.Config.load(cfg), model)
    cfg["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
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


def test_updates_that_were_clipped_start_from_the_weights_in_slots(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything on NVMe but the gradients: what a slot holds at the end of backward is not read again."""
    model = zoo.make("llama", hidden_size=128, intermediate_size=256)
    changes = {"train.max_grad_norm": 1e-3, "train.steps": 6}
    homes = {role: "nvme" for role in ("param", "exp_avg", "exp_avg_sq")}
    want = reference.train(model, zoo.batches("llama", 4, 1), 1, max_grad_norm=1e-3).losses
    with forcing.engine(fast_path / "run", model, 1, 1, changes, homes=homes) as engine:
        weights, read, losses = engine._method._weights, list[str](), []
        engine.store.observer = lambda kind, begin, end, nbytes, label: read.append(label) if kind == "read" else None
        outdate, held = weights.outdate, set[int]()

        def noted(unit: Unit) -> None:  # called when backward is over
            if not held:
                read.clear()
            held.update({unit.index} if weights.holds(unit) else ())
            outdate(unit)

        monkeypatch.setattr(weights, "outdate", noted)
        for batch in zoo.batches("llama", 4, 1):
            held.clear()
            losses.append(engine.step(batch).loss)
            engine.flush()
            units = {unit.index for unit in engine._units if unit.trainable and not unit.resident}
            assert len(held) >= 2 and {int(key.split("/")[0]) for key in read if key.endswith("/param")} >= units - held
            assert not {f"{index}/param" for index in held} & set(read)
            assert {f"{index}/exp_avg" for index in units} <= set(read)
    assert losses == want
