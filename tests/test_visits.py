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


def made(path: Path, model: toys.Toy, tier: str) -> Engine:
    homes = dict.fromkeys(("param", "exp_avg", "exp_avg_sq", "grad"), tier)
    return forcing.engine(path / "run", model, 2, 2, {"train.max_grad_norm": CLIPPED}, homes=homes)


def assert_trains(engine: Engine, model: toys.Toy, given: list[dict[str, Tensor]]) -> None:
    want = reference.train(model, given, 2, takes_total=False, max_grad_norm=CLIPPED)
    losses = [engine.step(batch).loss for batch in given]
    weights = reference.weights(engine)
    assert losses == want.losses
    assert all(torch.equal(weights[name], want.weights[name]) for name in want.weights)


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
        fill, outdate, late = stream._fill, stream.outdate, []

        def fill_slowly(*arguments: Any) -> None:
            time.sleep(0.02)
            fill(*arguments)

        def noted(unit: Any) -> None:
            slot = stream._where.get(unit.index)
            if slot is not None and slot.filling:
                late.append(unit.index)
            outdate(unit)

        monkeypatch.setattr(stream, "_fill", fill_slowly)
        monkeypatch.setattr(stream, "outdate", noted)
        assert_trains(engine, model, batches("loops", [3, 1, 3, 2, 1]))
        assert late


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
