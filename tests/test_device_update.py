"""Units that live on the device: the numbers are plain PyTorch's, and their state survives as everybody else's."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import toys
import zoo
from torch import nn

import offload
from offload import full_step
from offload.device_home import DeviceHome
from offload.engine import Engine
from offload.errors import OffloadError

ROWS = 2
FIRST = ("model.embed_tokens", "model.layers.0")


def run(engine: Engine, batches: list[dict[str, torch.Tensor]]) -> reference.Outcome:
    """Every slot but the units' own is filled with NaN when released, so that a stale use would show."""
    engine._method._weights._poison = True  # type: ignore[union-attr]
    outcome = reference.Outcome()
    for batch in batches:
        result = engine.step(batch)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
    outcome.weights = reference.weights(engine)
    return outcome


def assert_same(got: reference.Outcome, want: reference.Outcome) -> None:
    assert got.losses == want.losses
    assert got.norms == want.norms
    assert not [name for name in want.weights if not torch.equal(got.weights[name], want.weights[name])]


def on_device(engine: Engine) -> list[str]:
    return [state.unit.name for state in engine._held.states.units if state.on_device is not None]


@pytest.mark.parametrize(("dtype", "micro_batches"), [("float32", 1), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3)])
@pytest.mark.parametrize("limit", [None, reference.NORM])
@pytest.mark.parametrize("names", [FIRST, None])
def test_equal_to_plain_pytorch(
    names: tuple[str, ...] | None, limit: float | None, dtype: str, micro_batches: int, fast_path: Path
) -> None:
    """Some units there and the others streamed from the store, or all of them there; every second step is committed."""
    model = zoo.make("llama")
    total = ROWS * micro_batches
    batches = zoo.batches("llama", reference.STEPS, total)
    want = reference.train(model, batches, ROWS, max_grad_norm=limit, dtype=getattr(torch, dtype))
    changes = {"model.dtype": dtype, "train.max_grad_norm": limit, "train.commit_every": 2}
    cfg = reference.config(fast_path / "run", ROWS, total, **changes)
    prepared = forcing.living_on_device(cfg, model, names)
    with Engine.create(prepared.config, prepared=prepared) as engine:
        assert len(on_device(engine)) == (len(names) if names else 6)
        assert_same(run(engine, batches), want)
        assert engine.ledger.peak("gpu") <= engine.plan.peak_bytes["gpu"]


@pytest.mark.parametrize("limit", [None, reference.NORM])
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "gemma3_text", "bert"])
def test_other_architectures(name: str, limit: float | None, fast_path: Path) -> None:
    """A tied embedding, experts, layers of two kinds, an encoder; all there that may be, and nothing on the SSD."""
    model = zoo.make(name)
    batches = zoo.batches(name, reference.STEPS, ROWS)
    want = reference.train(model, batches, ROWS, takes_total=name not in zoo.OWN_LOSS, max_grad_norm=limit)
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **{"train.max_grad_norm": limit})
    prepared = forcing.living_on_device(cfg, model, rest="cpu")
    with Engine.create(prepared.config, prepared=prepared) as engine:
        assert_same(run(engine, batches), want)


def test_frozen_weights_lie_beside_the_trained_ones(fast_path: Path) -> None:
    model = zoo.make("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    batches = zoo.batches("llama", reference.STEPS, ROWS)
    want = reference.train(model, batches, ROWS)
    prepared = forcing.living_on_device(reference.config(fast_path / "run", ROWS, ROWS), model)
    with Engine.create(prepared.config, prepared=prepared) as engine:
        assert on_device(engine) == [f"model.layers.{i}" for i in range(4)]
        assert_same(run(engine, batches), want)


def test_trials_of_the_other_units(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units in the store are updated in backward, and some of that is taken back; those on the device never are."""
    monkeypatch.setattr(full_step, "TRIAL_AFTER", 1)
    model = zoo.make("llama")
    batches = zoo.batches("llama", 6, ROWS)
    loose = reference.train(model, batches, ROWS, max_grad_norm=None, steps=6)
    limit = sorted(loose.norms)[4]
    want = reference.train(model, batches, ROWS, max_grad_norm=limit, steps=6)
    assert sum(n > limit for n in want.norms) in (1, 2)
    changes = {"train.max_grad_norm": limit, "train.commit_every": 1, "train.steps": 6}
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **changes)
    prepared = forcing.living_on_device(cfg, model, FIRST)
    with Engine.create(prepared.config, prepared=prepared) as engine:
        assert_same(run(engine, batches), want)
    with offload.resume(fast_path / "run") as engine:
        assert all(torch.equal(p, want.weights[name]) for name, p in reference.weights(engine).items())


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", None), ("float32", reference.NORM)])
def test_roles_larger_than_a_chunk_buffer(dtype: str, limit: float | None, fast_path: Path) -> None:
    """An embedding of 3.2 million elements passes through the buffers piece by piece, when it is due and when asked."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 25_000}
    model = zoo.make("llama", **shape, attention_dropout=0.0)
    batches = zoo.batches("llama", 3, 2, length=8)
    want = reference.train(model, batches, 1, max_grad_norm=limit, dtype=getattr(torch, dtype), steps=3)
    changes = {"model.dtype": dtype, "train.max_grad_norm": limit, "train.commit_every": 2, "train.steps": 3}
    cfg = reference.config(fast_path / "run", 1, 2, **changes)
    prepared = forcing.living_on_device(cfg, model, FIRST[:1], rest="cpu")
    with Engine.create(prepared.config, prepared=prepared) as engine:
        losses = run(engine, batches[:1]).losses
        assert engine.commit() == 1
        got = run(engine, batches[1:])
        assert losses + got.losses == want.losses
        assert engine.ledger.peak("gpu") <= engine.plan.peak_bytes["gpu"]
    with offload.resume(fast_path / "run") as engine:
        assert all(torch.equal(p, want.weights[name]) for name, p in reference.weights(engine).items())


@pytest.mark.parametrize(("limit", "part"), [(None, "write"), (reference.NORM, "copy")])
def test_a_commit_that_cannot_be_written(
    limit: float | None, part: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next steps hear of it, nothing hangs, and the run goes on from the commit before."""
    model = zoo.make("llama")
    batches = zoo.batches("llama", reference.STEPS, ROWS)
    want = reference.train(model, batches, ROWS, max_grad_norm=limit)
    changes = {"train.max_grad_norm": limit, "train.commit_every": 1}
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **changes)
    prepared = forcing.living_on_device(cfg, model, FIRST)

    with pytest.raises(OSError, match="no more"):  # noqa: SIM117
        with Engine.create(prepared.config, prepared=prepared) as engine:
            for batch in batches[:2]:
                engine.step(batch)
            engine.flush()
            write, copy_now = engine.store.write, engine._held.device.copy

            def refuse(*arguments: Any, **options: Any) -> Any:
                if part == "write" and arguments[0] != "0/exp_avg":
                    return write(*arguments, **options)
                if part == "copy" and threading.current_thread().name != "optimizer":
                    return copy_now(*arguments)
                raise OSError("no more")

            target, name = (engine.store, "write") if part == "write" else (engine._held.device, "copy")
            monkeypatch.setattr(target, name, refuse)
            for batch in batches[2:]:
                engine.step(batch)
            engine.flush()
    monkeypatch.undo()
    with offload.resume(fast_path / "run") as engine:
        assert engine.completed_steps == 2
        for batch in batches[2:]:
            engine.step(batch)
        assert all(torch.equal(p, want.weights[name]) for name, p in reference.weights(engine).items())


@pytest.mark.parametrize("limit", [None, reference.NORM])
@pytest.mark.parametrize("back", [False, True])
def test_a_run_goes_on_with_another_plan(back: bool, limit: float | None, fast_path: Path) -> None:
    """Units move to the device, or back, between two parts of a run; the second begins after a step that failed, when
    the device had been updated already, from the last commit."""
    model = zoo.make("llama")
    batches = zoo.batches("llama", reference.STEPS, ROWS)
    want = reference.train(model, batches, ROWS, max_grad_norm=limit)
    changes = {"train.max_grad_norm": limit, "train.commit_every": 2}
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **changes)

    def planned(there: bool) -> Any:
        return forcing.living_on_device(cfg, model, None if there else ())

    with pytest.raises(OffloadError, match="nothing of this step is committed"):  # noqa: SIM117
        with Engine.create((first := planned(back)).config, prepared=first) as engine:
            losses = [engine.step(batch).loss for batch in batches[:3]]  # of which two are committed
            make_nan(engine.model)
            engine.step(batches[3])
    second = planned(not back)
    with Engine.resume(fast_path / "run", prepared=second) as engine:
        assert engine.completed_steps == 2
        assert bool(on_device(engine)) is not back
        losses[2:] = [engine.step(batch).loss for batch in batches[2:]]
        assert losses == want.losses
        got = reference.weights(engine)
    assert all(torch.equal(got[name], value) for name, value in want.weights.items())


def make_nan(model: nn.Module) -> None:
    """From now on the first block's gradients are NaN."""
    block = model.model.layers[0].mlp
    block.down_proj.register_forward_hook(lambda *a: a[-1] * float("nan") if a[-1].requires_grad else None)


def test_what_is_asked_for_between_steps(fast_path: Path) -> None:
    """A commit that is not due, an evaluation and an export see the state on the device, and change nothing."""
    model = zoo.make("llama")
    batches = zoo.batches("llama", reference.STEPS, ROWS)
    want = reference.train(model, batches, ROWS)
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **{"train.commit_every": 4})
    prepared = forcing.living_on_device(cfg, model)
    losses = []
    with Engine.create(prepared.config, prepared=prepared) as engine:
        for i, batch in enumerate(batches):
            losses.append(engine.step(batch).loss)
            engine.evaluate(batch)
            if i == 0:
                assert engine.commit() == 1
        engine.save_pretrained(fast_path / "out")
    assert losses == want.losses
    saved = type(model).from_pretrained(fast_path / "out")
    assert all(torch.equal(p, want.weights[name]) for name, p in saved.named_parameters())
    with offload.resume(fast_path / "run") as engine:  # closing has committed, and this machine's plan has none there
        assert engine.completed_steps == reference.STEPS
        assert all(torch.equal(p, want.weights[name]) for name, p in reference.weights(engine).items())


@pytest.mark.parametrize("limit", [None, reference.NORM])
def test_state_leaves_before_the_next_update(
    limit: float | None, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the state off the device are slow: the next step's update waits for those of the commit before.

    The last norm is frozen: the step would wait for its weights, whose update is behind the copies.
    """
    model = zoo.make("llama")
    model.model.norm.weight.requires_grad_(False)
    batches = zoo.batches("llama", 4, ROWS)
    want = reference.train(model, batches[:2], ROWS, max_grad_norm=limit)
    changes = {"train.max_grad_norm": limit, "train.commit_every": 2}
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **changes)
    prepared, again = (forcing.living_on_device(cfg, model) for _ in range(2))
    with pytest.raises(OffloadError, match="nothing of this step is committed"):  # noqa: SIM117
        with Engine.create(prepared.config, prepared=prepared) as engine:
            copy_now = engine._held.device.copy

            def slowly(target: torch.Tensor, source: torch.Tensor) -> None:
                time.sleep(0.05)
                copy_now(target, source)

            monkeypatch.setattr(engine._held.device, "copy", slowly)
            for batch in batches[:3]:
                engine.step(batch)
            engine.flush()
            make_nan(engine.model)
            engine.step(batches[3])
    with Engine.resume(fast_path / "run", prepared=again) as engine:
        assert engine.completed_steps == 2
        assert all(torch.equal(p, want.weights[name]) for name, p in reference.weights(engine).items())


@pytest.mark.parametrize("limit", [None, reference.NORM])
def test_a_unit_without_gradient_is_part_of_a_commit(limit: float | None, fast_path: Path) -> None:
    """Updated in steps that are not committed (the first one's learning rate is 0), passed over in the one that is."""

    def some(model: nn.Module, hidden: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        for i, layer in enumerate(model.layers):
            if i != 1 or skip is None or not skip.any():
                hidden = layer(hidden)
        return hidden

    model = toys.make(around=some)
    batches = [
        {**batch, "skip": torch.full((ROWS,), i == 2)} for i, batch in enumerate(toys.batches(4, ROWS))
    ]  # fmt: skip
    want = reference.train(model, batches[:3], ROWS, takes_total=False, max_grad_norm=limit)
    changes = {"train.max_grad_norm": limit, "train.commit_every": 3}
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **changes)
    prepared, again = (forcing.living_on_device(cfg, model) for _ in range(2))
    with pytest.raises(RuntimeError, match="stop here"):  # noqa: SIM117
        with Engine.create(prepared.config, prepared=prepared) as engine:
            for batch in batches[:3]:
                engine.step(batch)
            engine.flush()
            engine.model.lm_head.register_forward_hook(stop)
            engine.step(batches[3])
    with Engine.resume(fast_path / "run", prepared=again) as engine:
        assert engine.completed_steps == 3
        assert all(torch.equal(p, want.weights[name]) for name, p in reference.weights(engine).items())


def stop(*arguments: Any) -> None:
    raise RuntimeError("stop here")


def test_a_buffer_that_is_too_small_is_refused() -> None:
    with pytest.raises(OffloadError, match="needs 8192 bytes there, the plan gives it 4096"):
        DeviceHome(torch.empty(4096, dtype=torch.uint8), {"param": 4000, "exp_avg": 4096})
