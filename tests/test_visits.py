"""Models that visit other units than in the step before: what was loaded or deferred for visits that do not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import toys
from torch import Tensor

from offload.engine import Engine
from offload.errors import OffloadError
from offload.units import Unit
from offload.weight_stream import WeightStream

CLIPPED = 1e-3


def passing_over(model: toys.Toy, hidden: Tensor, dropped: Tensor | None = None) -> Tensor:
    """As with LayerDrop."""
    for i, layer in enumerate(model.layers):
        if dropped is None or int(dropped[0]) != i:
            hidden = layer(hidden)
    return hidden


def looping(model: toys.Toy, hidden: Tensor, loops: Tensor | None = None) -> Tensor:
    """All blocks, several times."""
    for _ in range(3 if loops is None else int(loops[0])):
        for layer in model.layers:
            hidden = layer(hidden)
    return hidden


def batches(name: str, values: list[int]) -> list[dict[str, Tensor]]:
    made = toys.batches(len(values), 2)
    for batch, value in zip(made, values, strict=True):
        batch[name] = torch.full((2,), value)
    return made


def made(path: Path, model: toys.Toy, tier: str, **changes: Any) -> Engine:
    homes = dict.fromkeys(("param", "exp_avg", "exp_avg_sq", "grad"), tier)
    changes = {"train.max_grad_norm": CLIPPED, **changes}
    return forcing.engine(path / "run", model, 2, 2, changes, homes=homes)


def assert_trains(engine: Engine, model: toys.Toy, given: list[dict[str, Tensor]]) -> None:
    want = reference.train(model, given, 2, takes_total=False, max_grad_norm=CLIPPED)
    losses = [engine.step(batch).loss for batch in given]
    weights = reference.weights(engine)
    assert losses == want.losses
    assert all(torch.equal(weights[name], want.weights[name]) for name in want.weights)


def noted_late(stream: WeightStream, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units, as they come, whose load is under way when backward is over."""
    late, outdate = list[int](), stream.outdate

    def noted(unit: Unit) -> None:
        slot = stream._where.get(unit.index)
        if slot is not None and slot.filling:
            late.append(unit.index)
        outdate(unit)

    monkeypatch.setattr(stream, "outdate", noted)
    return late


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are slots."""
    monkeypatch.setattr(toys, "DEPTH", 5)


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_loads_that_are_over_at_once(tier: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that was passed over in the last step is not among the visits to come: the slot that it was loaded into
    was given to the first of those before it was bound."""
    model = toys.make(around=passing_over)
    with made(fast_path, model, tier) as engine:
        stream = engine._method._weights
        submit, main = stream._lane.submit, threading.current_thread()

        def submit_slowly(*arguments: Any) -> Future[None]:
            future: Future[None] = submit(*arguments)
            if threading.current_thread() is main:
                wait([future], 0.1)
            return future

        monkeypatch.setattr(stream._lane, "submit", submit_slowly)
        assert_trains(engine, model, batches("dropped", [9, 1, 9, 2, 0]))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tier", ["cpu", "nvme"])
def test_loads_for_visits_that_do_not_come(tier: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are still in the lane when backward is over; they waited there for updates that had been deferred meanwhile,
    and what those wait for was behind them."""
    model = toys.make(around=looping)
    model.embed_tokens.requires_grad_(False)  # the last visit of backward is a block
    with made(fast_path, model, tier) as engine:
        stream = engine._method._weights
        fill, late = stream._fill, noted_late(stream, monkeypatch)

        def fill_slowly(*arguments: Any) -> None:
            time.sleep(0.02)
            fill(*arguments)

        monkeypatch.setattr(stream, "_fill", fill_slowly)
        assert_trains(engine, model, batches("loops", [3, 1, 3, 2, 1]))
        assert late


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("loops", "flushes"), [([3, 1, 3, 2, 1], True), ([3, 1, 0, 2, 1], False)])
def test_updates_wait_for_loads_of_what_they_replace(
    loops: list[int], flushes: bool, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two commits an update writes to the blocks that hold its unit's weights, and a load that was announced
    before the end of backward may still read them: at a flush, and after a forward that needs no load behind it."""
    monkeypatch.setattr(toys, "VOCABULARY", 256)
    model = toys.make(around=looping)
    model.lm_head.weight = model.embed_tokens.weight  # one unit, larger than a block: it stays in a slot of its own
    model.norm.requires_grad_(False)
    given = batches("loops", loops)
    want = reference.train(model, given, 2, takes_total=False, max_grad_norm=CLIPPED)
    losses = []
    with made(fast_path, model, "nvme", **{"train.commit_every": 10}) as engine:
        backend, late = engine.store.backend, noted_late(engine._method._weights, monkeypatch)
        submit = backend.submit

        def submit_late(transfer: Any) -> None:
            if transfer.kind == "read" and threading.current_thread().name.startswith("h2d"):
                time.sleep(0.1)  # its blocks are chosen, and their checksums known
            submit(transfer)

        monkeypatch.setattr(backend, "submit", submit_late)
        for batch in given:
            losses.append(engine.step(batch).loss)
            if flushes:
                engine.flush()
    assert losses == want.losses and late


@pytest.mark.timeout(60)
def test_more_passes_than_were_planned_for(fast_path: Path) -> None:
    """Each unit's gradient waits for its other pass: there are slots for two units that are passed through once."""

    def around(model: toys.Toy, hidden: Tensor, loops: Tensor | None = None) -> Tensor:
        return looping(model, hidden, torch.ones(1) if loops is None else loops)

    once, twice = batches("loops", [1, 2])
    with made(fast_path, toys.make(around=around), "cpu") as engine:
        engine.step(once)
        with pytest.raises(OffloadError, match=r"slot is left for layers\.2: .* come back to layers\.4 and layers\.3,"):
            engine.step(twice)


def test_deferred_updates_that_are_started_from_two_threads(fast_path: Path) -> None:
    """A slot that comes free starts its unit's while `flush` starts all."""
    model = toys.make()
    with made(fast_path, model, "cpu") as engine:
        updates = engine._method._updates

        class Waiting(dict[int, Any]):
            """Another thread takes one away while it is being looked at, if it can."""

            def __iter__(self) -> Iterator[int]:
                found = super().__iter__()
                for index in list(self.keys()):
                    thread = threading.Thread(target=updates.start, args=(engine._units[index], None))
                    thread.start()
                    thread.join(0.05)
                    break
                return found

        want = reference.train(model, toys.batches(2, 2), 2, takes_total=False, max_grad_norm=CLIPPED)
        losses = []
        for batch in toys.batches(2, 2):
            losses.append(engine.step(batch).loss)
            with updates._lock:
                updates._waiting = Waiting(updates._waiting)
            engine.flush()
        assert losses == want.losses
