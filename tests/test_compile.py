"""train.compile: blocks compiled once for all of their kind, with weights that come and go, equal to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import zoo
from forcing import fractions
from torch import Tensor
from torch._dynamo.utils import counters

import offload
from offload.errors import ConfigError

ROWS, TOTAL = 2, 4
# Blocks and batches that nothing else in these tests has, so that they are compiled here.
LAYERS, LENGTH = 3, 16


@pytest.fixture(scope="module", autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def masked_by_labels(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Without attention masks, which transformers leaves out where a micro-batch has no padding: another graph."""
    return [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches]


@pytest.mark.parametrize(
    "activations", [fractions(), fractions(keep=0.5, cpu=0.5)], ids=["recomputed", "kept and swapped"]
)
def test_compiled_once_and_close_to_plain_pytorch(activations: dict[str, float], fast_path: Path) -> None:
    model = zoo.make("llama", num_hidden_layers=LAYERS, attention_dropout=0.0)
    batches = masked_by_labels(zoo.batches("llama", 3, TOTAL, length=LENGTH))
    want = reference.train(model, batches, ROWS)
    engine = forcing.engine(
        fast_path / "run", model, ROWS, TOTAL, {"train.compile": True}, activations=activations
    )
    with engine:
        engine._method._weights._poison = True
        losses = [engine.step(batch).loss for batch in batches]
        assert engine._method.activations.fallbacks == 0
        # Of all blocks, passes and plans so far: what runs again draws the random numbers that it drew before.
        assert counters["stats"]["unique_graphs"] == 1
        engine.evaluate(batches[0])  # not compiled
        got = reference.weights(engine)
    assert counters["stats"]["unique_graphs"] == 1
    assert losses == pytest.approx(want.losses, rel=1e-6)
    for name, weight in want.weights.items():
        assert torch.allclose(got[name], weight, atol=1e-5), name


def test_missing_compilers_are_named(monkeypatch: pytest.MonkeyPatch, fast_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cfg: dict[str, Any] = reference.config(fast_path / "run", ROWS, TOTAL, **{"train.compile": True})
    with pytest.raises(ConfigError, match=r"train\.compile: .* C\+\+ compiler \(no-such-compiler\)"):
        offload.wrap(zoo.make("llama"), cfg)
    assert not (fast_path / "run").exists()
