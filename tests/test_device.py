"""What the engine asks of a device whose memory the host cannot reach, tried with one that is slow and late."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import zoo
from forcing import MACHINE
from offload.io import HostBuffer
from offload.planner import Buffers
from offload.planner.memory import bare_ram
from torch import Tensor

import offload
from offload import ownership, resources
from offload.device import CpuDevice
from offload.engine import Engine, prepare
from offload.trace import Trace

ROWS = 2


class Apart(CpuDevice):
    """Staging, landing and copies as on a GPU. A copy takes a while, with half of the bytes in place."""

    in_host_memory = False

    def __init__(self, refuse_after: int = 1_000_000) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.copied = 0
        self._refuse_after = refuse_after

    def pin(self, buffer: Tensor) -> None:
        if len(self.pinned) == self._refuse_after:
            raise RuntimeError("no more page-locked memory")
        self.pinned.append(buffer)

    def copy(self, target: Tensor, source: Tensor) -> None:
        half = source.numel() // 2
        target[:half].copy_(source[:half])
        time.sleep(0.0005)
        target[half:].copy_(source[half:])
        self.copied += source.nbytes

    def close(self) -> None:
        self.pinned.clear()
        super().close()


def engine_on(device: Apart, path: Path, model: Any, total: int, monkeypatch: Any, **changes: Any) -> Engine:
    monkeypatch.setattr(resources, "open_device", lambda name, locked: device)
    cfg = offload.Config.load(reference.config(path, ROWS, total, **changes))
    prepared = prepare(cfg, copy.deepcopy(model), MACHINE)
    largest = max(u.layout.trainable_elements for u in prepared.units) * prepared.gradient_dtype.itemsize
    plan = replace(prepared.plan, buffers=(*prepared.plan.buffers, Buffers("landing", "cpu", 1, largest)))
    return Engine.create(cfg, prepared=replace(prepared, plan=plan))


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_equal_to_plain_pytorch(clip: float | None, place: str, fast_path: Path, monkeypatch: Any) -> None:
    model = zoo.make("llama")
    batches = zoo.batches("llama", 3, 2 * ROWS)
    want = reference.train(model, batches, ROWS, max_grad_norm=clip)
    changes: dict[str, Any] = {"train.max_grad_norm": clip}
    if place == "nvme":
        made = prepare(
            offload.Config.load(reference.config(fast_path / "plan", ROWS, 2 * ROWS, **changes)),
            copy.deepcopy(model), MACHINE,
        )  # fmt: skip
        changes["memory.cpu"] = bare_ram(made.workload, made.plan)
    device = Apart()
    with engine_on(device, fast_path / "run", model, 2 * ROWS, monkeypatch, **changes) as engine:
        engine._method._weights._poison = True
        assert bool(engine._held.states.units[1].homes) == (place == "cpu")
        results = [engine.step(batch) for batch in batches]
        got = reference.weights(engine)
        assert device.copied
    assert [r.loss for r in results] == want.losses
    assert [r.grad_norm for r in results] == want.norms
    assert all(torch.equal(got[name], weight) for name, weight in want.weights.items())


def test_slots_lie_where_the_layout_has_them(fast_path: Path, monkeypatch: Any) -> None:
    """Wherever that is: here the planner's arena upside down. One piece of memory, whose parts the ledger knows."""
    model, batches = zoo.make("llama", tie_word_embeddings=True), zoo.batches("llama", 3, 2 * ROWS)
    want = reference.train(model, batches, ROWS)
    made = forcing.prepared(
        fast_path / "run", model, ROWS, 2 * ROWS, activations=forcing.fractions(cpu=1.0), staging=2 << 20
    )
    sizes = {b.name: b.nbytes for b in made.plan.buffers if b.tier == "gpu"}
    arena = made.plan.layout["arena_bytes"]
    offsets = {
        name: [arena - at - sizes[name] for at in places] for name, places in made.plan.layout["offsets"].items()
    }
    reserved: list[HostBuffer] = []
    begin = HostBuffer.__init__
    monkeypatch.setattr(
        HostBuffer, "__init__", lambda self, *args, **more: (reserved.append(self), begin(self, *args, **more))[1]
    )
    plan = replace(made.plan, layout={**made.plan.layout, "offsets": offsets})
    with Engine.create(made.config, prepared=replace(made, plan=plan)) as engine:
        (one,) = [b for b in reserved if b.tier == "gpu"]
        held, first = engine._held, one.tensor.data_ptr()
        assert one.nbytes == arena == sum(sizes[name] * len(places) for name, places in offsets.items())
        assert held.resident is not None and held.resident.data_ptr() - first == offsets.pop("resident")[0]
        assert held.kept_memory is not None
        slots = {"activations.staging": held.activation_staging, "activations.kept": [held.kept_memory]}
        slots |= {f"weights.{group}": tensors for group, tensors in held.weight_slots.items()}
        slots |= {f"gradients.{group}": tensors for group, tensors in held.gradient_slots.items()}
        found = {name: [t.data_ptr() - first for t in slots[name]] for name in offsets}
        assert found == offsets and any("held" in name for name in found)
        before = held.weight_slots["block"][0]._version
        held.gradient_slots["block"][0].zero_()
        assert held.weight_slots["block"][0]._version == before
        counted = {name: n["bytes"] for name, n in engine.ledger.snapshot()["gpu"].items()}
        names = ("weights", "gradients", "resident", "swapped activations")
        assert {name: counted[name] for name in names} == {name: plan.categories["gpu"][name] for name in names}
        results = [engine.step(batch) for batch in batches]
        got = reference.weights(engine)
    assert [r.loss for r in results] == want.losses
    assert all(torch.allclose(got[name], weight, atol=1e-6) for name, weight in want.weights.items())  # tied, M > 1
    assert engine.ledger.in_use("gpu") == 0


def test_a_gradient_that_waits_for_the_norm_lands_in_its_home(fast_path: Path, monkeypatch: Any) -> None:
    device = Apart()
    with engine_on(device, fast_path / "run", zoo.make("llama"), ROWS, monkeypatch) as engine:
        homes = {s.gradient_home.data_ptr() for s in engine._held.states.units if s.gradient_home is not None}
        landed: set[int] = set()
        own = device.copy
        device.copy = lambda target, source: (landed.add(target.data_ptr()), own(target, source))[1]  # type: ignore
        engine.step(zoo.batches("llama", 1, ROWS)[0])
        assert homes and homes <= landed


def test_memory_outlives_its_page_locks(fast_path: Path, monkeypatch: Any) -> None:
    """Where set-up fails half-way, too: the device lets go before anything is freed."""
    order: list[str] = []
    free = HostBuffer.free
    monkeypatch.setattr(HostBuffer, "free", lambda self: (order.append("free"), free(self))[1])
    device = Apart(refuse_after=9)
    close = device.close
    device.close = lambda: (order.append("close"), close())[1]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(RuntimeError, match="no more page-locked memory"):
        engine_on(device, fast_path / "run", zoo.make("llama"), ROWS, monkeypatch)
    assert order[0] == "close" and "free" in order


class Late:
    """A clock of a device that begins each launch one second after it was made."""

    def __init__(self) -> None:
        self.read_once = 0

    def mark(self) -> float:
        return time.perf_counter()

    def read(self, marks: list[float]) -> list[float]:
        self.read_once += 1
        return [mark + 1.0 for mark in marks]


def test_compute_is_timed_by_the_device() -> None:
    trace = Trace()
    trace.clock = clock = Late()
    begin = time.perf_counter()
    with trace.span("compute", "forward of a"):
        time.sleep(0.01)
    with trace.span("optimizer", "a", launches=True), trace.span("h2d", "b"):
        time.sleep(0.01)
    totals = trace.end_step(1)
    assert clock.read_once == 1
    assert totals.lanes["compute"] == pytest.approx(0.01, abs=0.009)
    at = {e["name"]: e["ts"] / 1e6 + trace.origin - begin for e in trace.events() if e["ph"] == "X"}
    assert at["forward of a"] >= 1.0 and at["a"] >= 1.01
    assert at["b"] < 1.0  # a copy's thread waits for it: the host's own time


def test_buffers_move_with_the_engine_and_stay_shared() -> None:
    model = torch.nn.Module()
    model.first, model.second = torch.nn.Module(), torch.nn.Module()
    shared = torch.ones(3)
    model.first.register_buffer("b", shared)
    model.second.register_buffer("b", shared)
    ownership._move_buffers(model, "meta")
    assert model.first.b.device.type == "meta"
    assert model.first.b is model.second.b


