"""The traps of cutting a model into units: each once fooled somebody's offloading runtime."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import toys
import zoo
from offload.io import StoreError
from offload.planner.memory import bare_ram
from torch import Tensor, nn
from transformers import DynamicCache

import offload
from offload import capture
from offload.errors import OffloadError

ROWS, TOTAL = 2, 4


def run(model: nn.Module, path: Path, steps: int = 3, **changes: Any) -> reference.Outcome:
    outcome = reference.Outcome()
    with offload.wrap(copy.deepcopy(model), reference.config(path, ROWS, TOTAL, **changes)) as engine:
        engine._method._weights._poison = True
        for batch in toys.batches(steps, TOTAL):
            outcome.losses.append(engine.step(batch).loss)
        outcome.weights = reference.weights(engine)
    return outcome


def assert_exact(model: nn.Module, path: Path, steps: int = 3, rounded: bool = False) -> reference.Outcome:
    """Equal to plain PyTorch to the bit; `rounded` where one tensor's gradient is summed over several units."""
    want = reference.train(model, toys.batches(steps, TOTAL), ROWS, takes_total=False)
    got = run(model, path, steps)
    if rounded:
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
        assert all(torch.allclose(got.weights[n], want.weights[n], atol=1e-6) for n in want.weights)
        return got
    assert got.losses == want.losses
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)
    return got


def test_names_forward_and_copies(fast_path: Path) -> None:
    model = zoo.make("llama")
    names, forward = [n for n, _ in model.named_parameters()], type(model.model.layers[0]).forward
    engine = offload.wrap(model, reference.config(fast_path / "run", ROWS, TOTAL))
    assert [n for n, _ in model.named_parameters()] == names
    assert [type(m).__name__ for m in model.model.layers] == ["LlamaDecoderLayer"] * 4
    for owned in (model, model.model.layers[0]):
        with pytest.raises(OffloadError, match="belongs to an offload engine"):
            copy.deepcopy(owned)
    with pytest.raises(OffloadError, match=r"use engine\.step"):
        model(**zoo.batches("llama", 1, TOTAL)[0])
    with pytest.raises(OffloadError, match="belongs to an engine already"):
        offload.wrap(model, reference.config(fast_path / "other", ROWS, TOTAL))
    engine.close()
    assert model.model.layers[0].forward.__func__ is forward
    assert all(p.is_meta for p in model.parameters())
    copy.deepcopy(model)


def test_router_losses_reach_the_router(fast_path: Path) -> None:
    """Router logits are collected from inside blocks; their gradient has to come back in."""
    model = zoo.make("mixtral", router_aux_loss_coef=1.0)
    for name, p in model.named_parameters():
        if not name.endswith(("gate.weight", "lm_head.weight")):
            p.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    want = reference.train(model, zoo.batches("mixtral", 2, TOTAL), ROWS, steps=2, warmup=0)
    with offload.wrap(
        copy.deepcopy(model),
        reference.config(fast_path / "run", ROWS, TOTAL, **{"train.steps": 2, "train.schedule": {"warmup_steps": 0}}),
    ) as engine:
        for batch in zoo.batches("mixtral", 2, TOTAL):
            engine.step(batch)
        got = reference.weights(engine)
    for name in before:
        assert not torch.equal(got[name], before[name])
        assert torch.equal(got[name], want.weights[name])


def test_capture_adapter_matches_this_transformers() -> None:
    """The private collector still behaves as `offload.capture` expects."""
    assert capture.active() is None
    with capture.recapture(["router_logits"]) as collected:
        assert capture.active() is collected
        assert capture.lengths(collected) == {"router_logits": 0}
    assert capture.active() is None


def test_grad_mode_autocast_and_rng_do_not_leak(fast_path: Path) -> None:
    """A model that enters autocast and no_grad around its blocks: every switch happens inside those contexts."""

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model.layers[0](hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.layers[1](hidden)
        return model.layers[2](nn.functional.dropout(hidden.float(), 0.2))

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert_exact(toys.make(around=around), fast_path / "run")
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    torch.set_rng_state(state)
    expected = torch.rand(3)
    model = toys.make()
    torch.set_rng_state(state)
    run(model, fast_path / "again")
    assert torch.equal(torch.rand(3), expected)


def test_open_saved_tensor_hooks_are_refused(fast_path: Path) -> None:
    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model.layers[0](hidden)

    with pytest.raises(OffloadError, match="open saved_tensors_hooks"):
        run(toys.make(around=around), fast_path / "run")


def test_caches_are_refused(fast_path: Path) -> None:
    class Caching(toys.Block):
        def forward(self, hidden: Tensor, past_key_values: Any = None) -> Tensor:
            return super().forward(hidden)

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        return model.layers[0](hidden, past_key_values=DynamicCache())

    with pytest.raises(OffloadError, match=r"layers\.0 was given a key/value cache"):
        run(toys.make(Caching, around), fast_path / "run")
    model = zoo.make("llama")
    model.config.use_cache = True
    with offload.wrap(model, reference.config(fast_path / "llama", ROWS, TOTAL)) as engine:
        assert model.config.use_cache is False
        engine.step(zoo.batches("llama", 1, TOTAL)[0])


def test_an_argument_changed_in_place_is_refused_by_name(fast_path: Path) -> None:
    class InPlace(toys.Block):
        def forward(self, hidden: Tensor) -> Tensor:
            out = torch.tanh(self.linear(hidden))
            hidden.mul_(0.5)
            return out

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        return model.layers[1](hidden * 1.0)

    with pytest.raises(OffloadError, match=r"layers\.1 \(InPlace\) changes argument 0 in place"):
        run(toys.make(InPlace, around), fast_path / "run")


def test_a_container_changed_in_place_is_refused_by_name(fast_path: Path) -> None:
    class Sharing(toys.Block):
        def forward(self, hidden: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
            out = super().forward(hidden)
            assert shared is not None
            shared["keys"] = out
            return out

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        return model.layers[0](hidden, shared={})

    with pytest.raises(OffloadError, match=r"layers\.0 \(Sharing\) changes a container"):
        run(toys.make(Sharing, around), fast_path / "run")


def test_running_statistics_are_updated_once(fast_path: Path) -> None:
    """Running a block again in backward must neither see nor leave a second update of its buffers."""

    class Normalising(toys.Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(toys.WIDTH)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, hidden: Tensor) -> Tensor:
            self.calls += 1
            mixed = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
            return hidden + torch.tanh(self.linear(mixed)) * self.calls

    model = toys.make(Normalising)
    assert_exact(model, fast_path / "run")
    live = copy.deepcopy(model)
    with offload.wrap(live, reference.config(fast_path / "again", ROWS, TOTAL)) as engine:
        for batch in toys.batches(3, TOTAL):
            engine.step(batch)
        assert live.layers[0].calls.item() == 3 * TOTAL / ROWS
        assert live.layers[0].norm.num_batches_tracked.item() == 3 * TOTAL / ROWS
        plain = copy.deepcopy(model)
        statistics = live.layers[0].norm.running_var.clone()
    reference.train(plain, toys.batches(3, TOTAL), ROWS, takes_total=False, keep=plain)
    assert torch.equal(statistics, plain.layers[0].norm.running_var)
    again = offload.resume(fast_path / "again", model=copy.deepcopy(model))
    assert again.model.layers[0].calls.item() == 3 * TOTAL / ROWS
    again.close()


def test_equal_shapes_different_attributes(fast_path: Path) -> None:
    """Blocks with parameters of equal shapes that compute different things (sliding and full attention, say)."""
    kinds = iter([torch.tanh, torch.sigmoid, torch.relu])

    class Alternating(toys.Block):
        def __init__(self) -> None:
            super().__init__()
            self.kind = next(kinds)
            self.register_buffer("scale", torch.rand(toys.WIDTH))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.kind(self.linear(hidden)) * self.scale

    assert_exact(toys.make(Alternating), fast_path / "run")


def test_a_parameter_without_gradient_is_skipped(fast_path: Path) -> None:
    """No decay, no moments, no step count in a step in which it got no gradient; others are not shifted by it."""

    class Gated(toys.Block):
        def __init__(self) -> None:
            super().__init__()
            self.rare = nn.Linear(toys.WIDTH, toys.WIDTH)
            self.last = nn.Linear(toys.WIDTH, toys.WIDTH)

        def forward(self, hidden: Tensor, use: bool = False) -> Tensor:
            hidden = hidden + torch.tanh(self.linear(hidden))
            return self.last(hidden + self.rare(hidden) if use else hidden)

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        use = bool((hidden.detach().double().sum() * 1e3).long() % 2)
        for layer in model.layers:
            hidden = layer(hidden, use=use)
        return hidden

    model = toys.make(Gated, around)
    got = assert_exact(model, fast_path / "run", steps=5)
    assert not torch.equal(got.weights["layers.0.last.weight"], model.layers[0].last.weight)


def test_blocks_used_more_than_once_and_skipped(fast_path: Path) -> None:
    """Shared layers: one micro-batch passes the same unit twice, its gradient leaves once; another block is unused."""

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        for layer in (model.layers[0], model.layers[1], model.layers[0]):
            hidden = layer(hidden)
        return hidden

    model = toys.make(around=around)
    want = reference.train(model, toys.batches(3, TOTAL), ROWS, takes_total=False)
    got = run(model, fast_path / "run")
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    assert torch.equal(got.weights["layers.2.linear.weight"], model.layers[2].linear.weight)
    assert all(torch.allclose(got.weights[n], want.weights[n], atol=1e-7) for n in want.weights)


def test_a_frozen_prefix_is_streamed_but_not_trained(fast_path: Path) -> None:
    model = toys.make()
    for part in (model.embed_tokens, model.layers[0], model.layers[1].linear):
        part.requires_grad_(False)
    assert_exact(model, fast_path / "run")


def test_a_model_whose_loss_fails_leaves_the_last_commit(fast_path: Path) -> None:
    model = toys.make()
    batches = toys.batches(2, TOTAL)
    engine = offload.wrap(model, reference.config(fast_path / "run", ROWS, TOTAL, **{"train.commit_every": 1}))
    engine.step(batches[0])
    engine.flush()
    with pytest.raises(TypeError):
        engine.step({"input_ids": batches[1]["input_ids"]})
    with pytest.raises(OffloadError, match=r"offload\.resume"):
        engine.step(batches[1])
    engine.close()
    again = offload.resume(fast_path / "run", model=toys.make())
    assert again.completed_steps == 1
    again.close()


def test_objects_that_hide_gradients_are_refused_by_name(fast_path: Path) -> None:
    """Keys and values shared between layers through an object (gemma3n, say) cannot be followed: better to say so."""

    class Store:
        def __init__(self) -> None:
            self.keys: Tensor | None = None

    class Sharing(toys.Block):
        def forward(self, hidden: Tensor, store: Store | None = None) -> Tensor:
            out = super().forward(hidden)
            assert store is not None
            store.keys = out
            return out

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        store = Store()
        for layer in model.layers:
            hidden = layer(hidden, store=store)
        return hidden

    with pytest.raises(OffloadError, match=r"layers\.0 \(Sharing\) changes a container"):
        run(toys.make(Sharing, around), fast_path / "run")


def test_a_parameter_given_to_a_block_is_trained(fast_path: Path) -> None:
    """A table outside the blocks, handed to each of them (relative positions, say)."""

    class Adding(toys.Block):
        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            return super().forward(hidden) + table

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        for layer in model.layers:
            hidden = layer(hidden, table=model.table)
        return hidden

    model = toys.make(Adding, around)
    model.table = nn.Parameter(torch.randn(toys.WIDTH))
    got = assert_exact(model, fast_path / "run", rounded=True)
    assert not torch.equal(got.weights["table"], model.table)


@pytest.mark.parametrize("clipping", [1.0, None])
def test_micro_batches_may_take_different_paths(clipping: float | None, fast_path: Path) -> None:
    """Layers dropped at random: one micro-batch reaches the head while another is still in a block."""

    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        for layer in model.layers:
            if torch.rand(()) < 0.5:
                hidden = layer(hidden)
        return hidden

    model = toys.make(around=around)
    want = reference.train(model, toys.batches(5, TOTAL), ROWS, takes_total=False, max_grad_norm=clipping)
    got = run(model, fast_path / "run", steps=5, **{"train.max_grad_norm": clipping, "train.commit_every": 1})
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    assert all(torch.allclose(got.weights[n], want.weights[n], atol=1e-6) for n in want.weights)


def test_an_input_changed_after_the_call_is_refused_by_name(fast_path: Path) -> None:
    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        hidden = hidden * 1.0
        out = model.layers[0](hidden)
        hidden += out
        return hidden

    with pytest.raises(OffloadError, match=r"changes argument 0 of layers\.0 in place after the call"):
        run(toys.make(around=around), fast_path / "run")


def test_a_layer_shared_by_two_blocks_is_resident(fast_path: Path) -> None:
    shared = nn.Linear(toys.WIDTH, toys.WIDTH)

    class Sharing(toys.Block):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + self.shared(hidden)

    assert_exact(toys.make(Sharing), fast_path / "run", rounded=True)


def test_a_value_used_before_the_blocks_and_in_the_loss(fast_path: Path) -> None:
    def around(model: toys.Toy, hidden: Tensor) -> Tensor:
        scale = torch.tanh(hidden)
        for layer in model.layers:
            hidden = layer(hidden * scale)
        return hidden + scale

    assert_exact(toys.make(around=around), fast_path / "run", rounded=True)


def test_closing_after_a_failure_keeps_the_commit_under_way_whole(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing step ends while the last one is still being written: old commit or new, but nothing in between."""
    monkeypatch.setenv("OFFLOAD_FAULTS", "write:delay=0.003")
    batches = toys.batches(1, TOTAL)
    want = reference.train(toys.make(), batches, ROWS, takes_total=False)
    start = dict(toys.make().named_parameters())
    for attempt in range(4):
        path = fast_path / f"run-{attempt}"
        engine = offload.wrap(toys.make(), reference.config(path, ROWS, TOTAL, **{"train.commit_every": 1}))
        engine.step(batches[0])
        with pytest.raises(TypeError):
            engine.step({"input_ids": batches[0]["input_ids"]})
        engine.close()
        with offload.resume(path, model=toys.make()) as again:
            expected = want.weights if again.completed_steps else start
            got = reference.weights(again)
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_a_failing_spill_is_reported_at_once(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.make()
    path = fast_path / "run"
    made = offload.engine.prepare(offload.Config.load(reference.config(path, ROWS, TOTAL)), copy.deepcopy(model))
    budget = bare_ram(made.workload, made.plan)
    engine = offload.wrap(model, reference.config(path, ROWS, TOTAL, **{"memory.cpu": budget}))
    engine.step(toys.batches(1, TOTAL)[0])
    engine.flush()
    engine.close()
    monkeypatch.setenv("OFFLOAD_FAULTS", "write:EIO:after=1")
    engine = offload.resume(path, model=toys.make())
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"EIO|Input/output error"):
        for batch in toys.batches(2, TOTAL):
            engine.step(batch)
        engine.flush()
    engine.close()
    assert time.monotonic() - begin < 20
    monkeypatch.delenv("OFFLOAD_FAULTS")
    with offload.resume(path, model=toys.make()) as engine:
        assert engine.completed_steps == 1
