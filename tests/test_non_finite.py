"""A gradient that is not a number ends the step, names its parameter, and leaves the last commit whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
import torch
import zoo

import offload
from offload.errors import OffloadError


@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_step_with_a_nan_gradient_is_not_committed(limit: float | None, fast_path: Path) -> None:
    model = zoo.make("llama")
    good, bad = zoo.batches("llama", 2, 2)
    cfg = reference.config(fast_path / "run", 2, 2, **{"train.max_grad_norm": limit, "train.commit_every": 1})
    with pytest.raises(OffloadError, match=r"the gradient of model\.layers\.1\..*nothing of this step is committed"):  # noqa: SIM117
        with offload.wrap(model, cfg) as engine:
            engine.step(good)
            engine.flush()
            weights = reference.weights(engine)
            block = model.model.layers[1].mlp
            block.down_proj.register_forward_hook(lambda *a: a[-1] * float("nan") if a[-1].requires_grad else None)
            engine.step(bad)
    with offload.resume(fast_path / "run") as engine:
        assert engine.completed_steps == 1
        assert all(torch.equal(value, weights[name]) for name, value in reference.weights(engine).items())
