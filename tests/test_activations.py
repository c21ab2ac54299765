"""Activations kept, swapped and recomputed by plan: the numbers of plain PyTorch, whatever goes where."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import toys
import zoo
from forcing import fractions
from offload.io import FaultyBackend, StoreError
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from offload import activation_uses
from offload.activation_places import SWAP_FILE
from offload.activation_saving import SavedTensors, Shares
from offload.engine import Engine
from offload.errors import OffloadError
from offload.units import Unit, find_units

ROWS = 2


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' outputs are small enough to be left where they are."""
    monkeypatch.setattr(activation_uses, "SMALLEST", 1)


class Moved:
    """Counts what an engine's tiers take and give."""

    def __init__(self, engine: Engine) -> None:
        self.taken = {"cpu": 0, "cxl": 0, "nvme": 0}
        self.given = dict(self.taken)
        self.parked = 0
        self._watch(engine)

    def _watch(self, engine: Engine) -> None:
        stream = engine._method.activations
        for name, tier in stream._tiers.items():

            def take(place: Any, *rest: Any, name: str = name, own: Any = tier.take) -> None:
                self.taken[name] += place.nbytes
                own(place, *rest)

            def give(place: Any, *rest: Any, name: str = name, own: Any = tier.give) -> None:
                self.given[name] += place.nbytes
                own(place, *rest)

            tier.take, tier.give = take, give
        own_park = stream._send

        def send(parts: Any, pieces: Any, unit: Any, storage: Any) -> Any:
            self.parked += storage is not None
            return own_park(parts, pieces, unit, storage)

        stream._send = send


def trained(engine: Engine, batches: list[dict[str, Tensor]]) -> reference.Outcome:
    """Train with slots that are filled with NaN when released; closes the engine."""
    outcome = reference.Outcome()
    with engine:
        engine._method._weights._poison = True
        for batch in batches:
            result = engine.step(batch)
            outcome.losses.append(result.loss)
            outcome.norms.append(result.grad_norm)
            assert engine._method.activations.fallbacks == 0
        outcome.weights = reference.weights(engine)
    return outcome


def assert_same(got: reference.Outcome, want: reference.Outcome) -> None:
    assert got.losses == want.losses
    assert got.norms == want.norms
    assert not [name for name in want.weights if not torch.equal(got.weights[name], want.weights[name])]


KEEP = fractions(keep=1.0)
RAM = fractions(cpu=1.0)
DISK = fractions(nvme=1.0)
ROWS_MIXED = fractions(keep=0.3, cpu=0.45, nvme=0.25)
SOME_AGAIN = {**fractions(keep=0.1, cpu=0.3, nvme=1 - 0.1 - 1 / 3 - 0.3), "recompute": 1 / 3}


@pytest.mark.parametrize(
    ("activations", "boundary", "micro_batches", "dtype"),
    [
        (KEEP, "gpu", 1, "float32"),
        (RAM, "gpu", 3, "float32"),
        (DISK, "cpu", 1, "float32"),
        (ROWS_MIXED, "nvme", 3, "float32"),
        (SOME_AGAIN, "cpu", 3, "float32"),
        (fractions(), "nvme", 3, "float32"),
        (ROWS_MIXED, "cpu", 1, "bfloat16"),
        (SOME_AGAIN, "nvme", 3, "bfloat16"),
    ],
)
def test_equal_to_plain_pytorch(
    activations: dict[str, float], boundary: str, micro_batches: int, dtype: str, fast_path: Path
) -> None:
    model = zoo.make("llama", attention_dropout=0.1)
    total = ROWS * micro_batches
    batches = zoo.batches("llama", 3, total)
    want = reference.train(model, batches, ROWS, dtype=getattr(torch, dtype))
    engine = forcing.engine(
        fast_path / "run", model, ROWS, total, {"model.dtype": dtype}, activations=activations, boundary=boundary
    )
    moved = Moved(engine)
    assert_same(trained(engine, batches), want)
    assert moved.taken == moved.given
    # The embedding's output stays, because the model's own frame holds it, and the last block's, which the norm saves.
    passes = len(batches) * micro_batches * (model.config.num_hidden_layers - 1)
    assert moved.parked == (0 if boundary == "gpu" else passes)
    for tier in ("cpu", "nvme"):
        assert (moved.taken[tier] > 0) == (activations[f"swap_{tier}"] > 0 or boundary == tier)


class Lingering(list[Any]):
    """What leaves, when it lets its tensors go some time before the lane goes on."""

    def clear(self) -> None:
        super().clear()
        time.sleep(0.02)


def test_a_boundary_leaves_once(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 2, ROWS)
    want = reference.train(model, batches, ROWS)
    engine = forcing.engine(fast_path / "run", model, ROWS, ROWS, activations=KEEP, boundary="cpu")
    stream = engine._method.activations
    send = stream._send
    stream._send = lambda parts, pieces, unit, storage: send(parts, Lingering(pieces), unit, storage)
    moved = Moved(engine)
    assert_same(trained(engine, batches), want)
    assert moved.parked == len(batches) * (model.config.num_hidden_layers - 1)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mixtral", "gpt_oss", "t5", "bert"])
def test_architectures(name: str, fast_path: Path) -> None:
    """Dropout, sliding windows, router losses from inside blocks, experts, an encoder read by every decoder block."""
    model = zoo.make(name)
    batches = zoo.batches(name, 2, ROWS)
    want = reference.train(model, batches, ROWS, takes_total=name not in zoo.OWN_LOSS)
    engine = forcing.engine(fast_path / "run", model, ROWS, ROWS, activations=ROWS_MIXED, boundary="nvme")
    got = trained(engine, batches)
    if name in zoo.ENCODER_DECODER:
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
        assert all(torch.allclose(got.weights[n], want.weights[n], atol=1e-6) for n in want.weights)
    else:
        assert_same(got, want)


class Scaled(torch.autograd.Function):
    """Saves an input, an output, a tensor of its own and plain numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        out = torch.exp(x * factor).clamp(max=3.0)
        ctx.factor, ctx.shape = factor, x.shape
        ctx.save_for_backward(x, out, torch.arange(x.shape[-1], dtype=x.dtype, device=x.device))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, out, ramp = ctx.saved_tensors
        assert x.shape == ctx.shape
        return gradients[0] * out * ctx.factor * (out < 3.0) + gradients[0] * 1e-3 * ramp, None


class Tricky(toys.Block):
    """What a block may do to the tensors that autograd saves of it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(toys.WIDTH, 3 * toys.WIDTH)
        self.norm = nn.BatchNorm1d(toys.WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(x)))

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        wide = self.wide(hidden).mul_(0.5)  # changed before anything saved it
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in wide.chunk(3, -1))
        shift = torch.eye(hidden.shape[1]).roll(1, 0).to_sparse()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        mixed = mixed * mixed + mixed[..., ::2].repeat_interleave(2, -1)
        mixed = self.norm(mixed.transpose(1, 2)).transpose(1, 2) * self.calls
        mixed = torch.relu_(mixed * hidden[:, :1].expand_as(hidden))
        mixed = torch.stack([torch.sparse.mm(shift, row) for row in mixed])
        mixed = checkpoint(self._feed, mixed, use_reentrant=False) + checkpoint(self._feed, mixed, use_reentrant=True)
        phase = torch.view_as_real(torch.polar(torch.ones_like(mixed), mixed)).sum(-1)
        return hidden + Scaled.apply(phase, 0.3) + mixed


@pytest.mark.parametrize("activations", [KEEP, RAM, ROWS_MIXED])
def test_what_blocks_do_to_saved_tensors(activations: dict[str, float], fast_path: Path) -> None:
    """Views, in-place operators, sparse and complex tensors, own Functions, checkpoints, buffers that change."""
    model, batches = toys.make(Tricky), toys.batches(2, 2 * ROWS)
    want = reference.train(model, batches, ROWS, takes_total=False)
    engine = forcing.engine(fast_path / "run", model, ROWS, 2 * ROWS, activations=activations, boundary="cpu")
    assert_same(trained(engine, batches), want)


def test_more_than_planned_is_computed_again(fast_path: Path) -> None:
    """Passes for which a tier has no room fall back, are counted, and stay within what was reserved."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 2, 2 * ROWS)
    want = reference.train(model, batches, ROWS)
    for name, activations, rooms in (
        ("kept", KEEP, {"kept": 600_000}),
        ("ram", RAM, {"cpu": 600_000}),
        ("disk", DISK, {"nvme": 600_000}),
        ("staging", RAM, {"staging": 65_536}),
    ):
        engine = forcing.engine(fast_path / name, model, ROWS, 2 * ROWS, activations=activations, **rooms)
        outcome = reference.Outcome()
        with engine:
            for batch in batches:
                outcome.losses.append(engine.step(batch).loss)
                assert 0 < engine._method.activations.fallbacks <= 2 * model.config.num_hidden_layers
            outcome.weights = reference.weights(engine)
            peaks = {tier: engine.ledger.peak(tier) for tier in ("gpu", "cpu", "nvme")}
            assert all(peak <= engine.plan.peak_bytes[tier] for tier, peak in peaks.items())
        assert outcome.losses == want.losses
        assert all(torch.equal(outcome.weights[n], want.weights[n]) for n in want.weights)
        rows = [json.loads(line) for line in (fast_path / name / "metrics.jsonl").read_text().splitlines()]
        assert all(row["activation_fallbacks"] > 0 for row in rows)


def test_trace_ledger_and_scratch_file(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 2, 2 * ROWS)
    path = fast_path / "run"
    engine = forcing.engine(
        path, model, ROWS, 2 * ROWS, activations=fractions(keep=0.3, cpu=0.3, nvme=0.4), boundary="nvme"
    )
    with engine:
        scratch = [directory / SWAP_FILE for directory in engine.store.directories]
        assert [file.stat().st_size for file in scratch] == [forcing.ROOM]
        before = engine.store.bytes_written, sum(engine.store.written)
        for batch in batches:
            engine.step(batch)
        # what wears the drive: all that was written, activations too, and the manifests
        moved, worn = engine.store.bytes_written - before[0], sum(engine.store.written) - before[1]
        assert moved <= worn <= moved + (1 << 20)
        held = engine.ledger.snapshot()
        for tier, count in (("gpu", 2), ("cpu", 1), ("nvme", 1)):
            assert held[tier]["swapped activations"]["bytes"] == count * forcing.ROOM
        kept = forcing.ROOM  # reserved all the time; of what comes and goes nothing is left
        assert held["gpu"]["activations"]["bytes"] == kept < held["gpu"]["activations"]["peak"]
        assert held["gpu"]["activations"]["peak"] <= engine.plan.categories["gpu"]["activations"]
    assert not any(file.exists() for file in scratch)
    events = json.loads((path / "trace.json").read_text())
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    found = {lanes[e["tid"]] for e in events if e["ph"] == "X" and e["name"] == "activations of model.layers.1"}
    assert {"d2h", "h2d", "nvme_write", "nvme_read"} <= found


def test_rows_for_which_no_mask_is_planned(fast_path: Path) -> None:
    """With neither packing nor padding the blocks get no mask, as the plan has it, and batches that need one do not
    pass."""
    ids = zoo.batches("llama", 1, ROWS)[0]["input_ids"]
    batch, (rows, length) = {"input_ids": ids, "labels": ids}, ids.shape
    data = {"path": "rows.jsonl", "format": "tokens", "sequence_length": length}
    peaks = {}
    for padding in (True, False):
        changes = {"data": {**data, "packing": False, "padding": padding}}
        made = forcing.prepared(fast_path / str(padding), zoo.make("llama"), ROWS, ROWS, changes, activations=KEEP)
        peaks[padding] = made.workload.shared_bytes
    assert peaks[True] - peaks[False] >= rows * length * length
    seen: list[Any] = []
    block = made.model.model.layers[1]
    block.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with Engine.create(made.config, prepared=made) as engine:
        positions = torch.arange(length // 2).repeat(2).expand(rows, -1)
        for extra in ({"attention_mask": torch.ones(rows, length).tril(length // 2)}, {"position_ids": positions}):
            with pytest.raises(OffloadError, match="padding, or rows of several sequences"):
                engine.step({**batch, **extra})
        engine.step(batch)
    assert seen == [None]


@pytest.mark.parametrize(("rule", "message"), [("read:flip", "are not those"), ("write:EIO", "EIO|Input/output error")])
def test_a_failing_scratch_file_is_reported_at_once(rule: str, message: str, fast_path: Path) -> None:
    engine = forcing.engine(fast_path / "run", zoo.make("llama"), ROWS, ROWS, activations=DISK)
    engine._method.activations._tiers["nvme"]._backend = FaultyBackend(engine.store.backend, rule)
    begin = time.monotonic()
    with pytest.raises(StoreError, match=message):
        engine.step(zoo.batches("llama", 1, ROWS)[0])
    engine.close()
    assert time.monotonic() - begin < 20


class Hold:
    """A block of a toy model run once under `SavedTensors`."""

    def __init__(self, shares: Shares, limit: int = 1 << 30) -> None:
        self.model = toys.make()
        self.unit: Unit = next(u for u in find_units(self.model) if u.name == "layers.1")
        self.block = self.model.layers[1]
        self.flat = torch.cat([p.detach().flatten() for p in self.unit.parameters])  # one slot for all of them
        self.generation: int | None = 1
        self.bind(self.flat)
        self.saved = SavedTensors(self.unit, "cpu", lambda unit: self.generation, set(), shares, limit)
        self.own = torch.randn(20, 12, toys.WIDTH, requires_grad=True)
        self.input = self.own.detach().requires_grad_()
        with self.saved.hooks([self.input], [self.own], [], []):
            self.output = self.block(self.input)
        self.leaf = self.output.detach().requires_grad_()
        self.saved.settle([self.leaf])

    def bind(self, flat: Tensor) -> None:
        at = 0
        for p in self.unit.parameters:
            p.data = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()


def test_saved_tensors_leave_the_device_and_come_back() -> None:
    """Weights and boundaries are never saved; what left is freed; weights may move to another slot meanwhile."""
    hold = Hold(Shares(0.25, 0.75, 0.0))
    items = hold.saved._inner()
    assert {item.nbytes for item in items} <= {hold.leaf.nbytes, hold.leaf.nbytes // 4}  # activations, dropout's mask
    refs = [StorageWeakRef(item.held.untyped_storage()) for item in items if item.held is not None]
    sizes = hold.saved.place(split_first=True)
    assert list(sizes) == ["cpu"]
    cpu = sizes["cpu"]
    assert 0 < hold.saved.kept_bytes < hold.saved.kept_bytes + hold.saved.leaving_bytes
    pool = torch.empty(cpu, dtype=torch.uint8)
    for at, piece in hold.saved.leave():
        pool[at : at + piece.numel()] = piece
    del piece, items
    assert all(ref.expired() for ref in refs)
    elsewhere = hold.flat.clone()
    hold.flat.fill_(float("nan"))
    hold.bind(elsewhere)
    image = torch.empty(1 << 20, dtype=torch.uint8)
    hold.saved.arrive(image)[:cpu] = pool
    hold.saved.put_head()
    hold.output.backward(torch.ones_like(hold.output))
    assert hold.input.grad is not None
    assert torch.isfinite(hold.input.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in hold.unit.parameters if p.grad is not None)


def test_what_stays_moves_into_memory_of_the_engine() -> None:
    """The framework's blocks are free at once, whatever lies around them, and the gradient is to the bit the same."""
    left, moved = Hold(Shares(1.0, 0.0, 0.0)), Hold(Shares(1.0, 0.0, 0.0))
    for hold in (left, moved):
        hold.saved.place(split_first=True)
    refs = [StorageWeakRef(item.held.untyped_storage()) for item in moved.saved._inner() if item.held is not None]
    assert sum(item.nbytes for item in moved.saved._inner()) <= moved.saved.kept_bytes
    room = torch.full((moved.saved.kept_bytes + 512,), 7, dtype=torch.uint8)
    moved.saved.keep_in(room[256:-256])
    assert all(ref.expired() for ref in refs)
    assert (room[:256] == 7).all() and (room[-256:] == 7).all()
    for hold in (left, moved):
        hold.output.backward(torch.ones_like(hold.output))
    assert moved.input.grad is not None
    assert left.input.grad is not None
    assert torch.equal(moved.input.grad, left.input.grad)


def test_a_graph_of_other_weights_is_refused() -> None:
    for generation, message in ((2, "generation 1, but the unit's weights are of generation 2"), (None, "not bound")):
        hold = Hold(Shares(1.0, 0.0, 0.0))
        hold.saved.place(split_first=True)
        hold.generation = generation
        with pytest.raises(OffloadError, match=message):
            hold.output.sum().backward()


def test_a_saved_tensor_changed_in_place_is_refused() -> None:
    hold = Hold(Shares(1.0, 0.0, 0.0))
    hold.saved.place(split_first=True)
    hold.saved._inner()[0].held.add_(1.0)  # type: ignore[union-attr]
    with pytest.raises(OffloadError, match="changed in place after it was saved"):
        hold.output.sum().backward()


def test_a_pass_over_its_limit_holds_nothing() -> None:
    hold = Hold(Shares(1.0, 0.0, 0.0), limit=16)
    assert hold.saved.dropped
    assert not hold.saved._inner()
