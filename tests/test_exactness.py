"""The engine against plain PyTorch: losses, gradient norms and weights, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import zoo
from torch import nn

import offload
from offload.engine import prepare

ROWS = 2


def streamed(path: Path, model: nn.Module, batches: list[dict[str, torch.Tensor]], total: int, **changes: Any) -> Any:
    """Run the engine over the batches; every slot is filled with NaN when released, so a stale use would show."""
    outcome = reference.Outcome()
    with offload.wrap(copy.deepcopy(model), reference.config(path, ROWS, total, **changes)) as engine:
        engine._method._weights._poison = True
        for batch in batches:
            result = engine.step(batch)
            outcome.losses.append(result.loss)
            outcome.norms.append(result.grad_norm)
        outcome.weights = reference.weights(engine)
    return outcome


def least_memory(path: Path, model: nn.Module, total: int, **changes: Any) -> dict[str, Any]:
    """The least RAM that works with the head in one chunk (several are exact to rounding): for the buffers alone.

    All state goes to the store, gradients are spilled.
    """
    one_chunk = {"train.head_chunks": 1}
    cfg = offload.Config.load(reference.config(path, ROWS, total, **{**changes, **one_chunk, "memory.cpu": 1}))
    return {**one_chunk, "memory.cpu": 1 + prepare(cfg, copy.deepcopy(model)).plan.shortfall_bytes["cpu"]}


def assert_same(got: Any, want: Any) -> None:
    assert got.losses == want.losses
    assert got.norms == want.norms
    differing = [name for name in want.weights if not torch.equal(got.weights[name], want.weights[name])]
    assert not differing


def assert_close(got: Any, want: Any) -> None:
    """The documented exceptions: loss to 1e-6, mean weight difference to 1e-5 of lr x steps."""
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    difference = sum((got.weights[name] - want.weights[name]).abs().sum().item() for name in want.weights)
    mean = difference / sum(w.numel() for w in want.weights.values())
    assert mean <= 1e-5 * reference.LR * reference.STEPS


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("placement", ["cpu", "nvme"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_equal_to_plain_pytorch(name: str, placement: str, micro_batches: int, fast_path: Path) -> None:
    model = zoo.make(name)
    total = ROWS * micro_batches
    batches = zoo.batches(name, reference.STEPS, total)
    want = reference.train(model, batches, ROWS, takes_total=name not in zoo.OWN_LOSS)
    changes: dict[str, Any] = {"planner.activations": "auto"}  # kept: there is room
    if placement == "nvme":
        changes["planner.activations"] = "recompute"
        changes |= least_memory(fast_path / "plan", model, total, **changes)
    got = streamed(fast_path / "run", model, batches, total, **changes)
    if (name in zoo.TIED and micro_batches > 1) or name in zoo.ENCODER_DECODER:
        assert_close(got, want)
    else:
        assert_same(got, want)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_equal_without_clipping(micro_batches: int, fast_path: Path) -> None:
    """Without a norm to wait for, each unit is updated inside backward."""
    model = zoo.make("llama")
    total = ROWS * micro_batches
    batches = zoo.batches("llama", reference.STEPS, total)
    want = reference.train(model, batches, ROWS, max_grad_norm=None)
    least = least_memory(fast_path / "plan", model, total, **{"train.max_grad_norm": None})
    for where, changes in {"cpu": {}, "nvme": least}.items():
        got = streamed(fast_path / where, model, batches, total, **{"train.max_grad_norm": None}, **changes)
        assert_same(got, want)


def test_nvme_placement_streams_everything(fast_path: Path) -> None:
    model = zoo.make("llama")
    least = least_memory(fast_path / "plan", model, 6)
    with offload.wrap(model, reference.config(fast_path / "run", ROWS, 6, **least)) as engine:
        roles = ("param", "exp_avg", "exp_avg_sq")
        blocks = [unit for unit in engine.plan.units if ".layers." in unit.name]
        assert {unit.placement[role] for unit in blocks for role in roles} == {"nvme"}
        assert "nvme" in {unit.placement["grad"] for unit in blocks}
        assert engine.plan.commit_every == 1
        assert not engine._held.states.units[0].homes
        engine.step(zoo.batches("llama", 1, 6)[0])
        assert engine.commit() == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_of_a_given_model_needs_no_model(dtype: str, fast_path: Path) -> None:
    """A run that began with a model in memory and no model section goes on from the run directory alone."""
    model = zoo.make("qwen3").to(getattr(torch, dtype))
    batches = zoo.batches("qwen3", reference.STEPS, 6)
    cfg = reference.config(fast_path / "whole", ROWS, 6)
    del cfg["model"]
    losses = []
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        losses = [engine.step(batch).loss for batch in batches]
        want = reference.weights(engine)
    with offload.wrap(copy.deepcopy(model), {**cfg, "output": str(fast_path / "parts")}) as engine:
        first = [engine.step(batch).loss for batch in batches[:2]]
    with offload.resume(fast_path / "parts") as engine:
        assert engine.completed_steps == 2
        assert first + [engine.step(batch).loss for batch in batches[2:]] == losses
        got = reference.weights(engine)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_evaluate_between_steps_changes_nothing(fast_path: Path) -> None:
    model = zoo.make("llama")
    batches = zoo.batches("llama", 3, 6)
    want = reference.train(model, batches, ROWS)
    with offload.wrap(copy.deepcopy(model), reference.config(fast_path / "run", ROWS, 6)) as engine:
        before = engine.evaluate(batches[0])
        losses = []
        for batch in batches:
            losses.append(engine.step(batch).loss)
            engine.evaluate({name: tensor[:3, :10] for name, tensor in batches[0].items()})
        after = engine.evaluate(batches[0])
    assert losses == want.losses
    model.eval()
    with torch.no_grad():
        micros = reference.micro_batches(batches[0], ROWS)
        n = [reference.counted(model, micro) for micro in micros]
        plain = sum(reference.scaled_loss(model, micro, n, i, True).item() for i, micro in enumerate(micros))
    assert before == plain
    assert after != before


@pytest.mark.parametrize(("dtype", "max_grad_norm"), [("float32", 1.0), ("bfloat16", 1.0), ("bfloat16", None)])
def test_units_of_several_chunks_on_striped_paths(dtype: str, max_grad_norm: float | None, fast_path: Path) -> None:
    """Blocks of more elements than the optimizer takes at once, in a store on two paths of unequal size."""
    model = zoo.make("llama", hidden_size=512, intermediate_size=1280, num_hidden_layers=2, attention_dropout=0.0)
    batches = zoo.batches("llama", 3, 4, length=12)
    kind = getattr(torch, dtype)
    want = reference.train(model, batches, ROWS, max_grad_norm=max_grad_norm, dtype=kind)
    changes: dict[str, Any] = {"model.dtype": dtype, "train.max_grad_norm": max_grad_norm}
    changes["memory.nvme"] = [
        {"path": str(fast_path / "a"), "size": "150MiB"},
        {"path": str(fast_path / "b"), "size": "400MiB"},
    ]
    changes |= least_memory(fast_path / "plan", model, 4, **changes)
    assert_same(streamed(fast_path / "run", model, batches, 4, **changes), want)


def test_an_expert_without_a_token(fast_path: Path) -> None:
    """Its slice of the fused weights gets zeros, as in PyTorch: decay and moments go on, nothing shifts."""
    model = zoo.make("qwen3_moe", num_experts=32, moe_intermediate_size=8)
    batches = zoo.batches("qwen3_moe", 3, ROWS)
    probe = copy.deepcopy(model)
    probe(**batches[0]).loss.backward()
    gradient = next(p.grad for name, p in probe.named_parameters() if name.endswith("experts.gate_up_proj"))
    assert (gradient.flatten(1) == 0).all(1).any()
    want = reference.train(model, batches, ROWS)
    least = least_memory(fast_path / "plan", model, ROWS)
    assert_same(streamed(fast_path / "run", model, batches, ROWS, **least), want)
