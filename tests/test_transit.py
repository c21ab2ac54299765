"""Saved tensors on their way out: counted until their memory is free, and waited for where the plan has no room."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import zoo
from forcing import fractions
from torch.multiprocessing.reductions import StorageWeakRef

from offload.errors import OffloadError
from offload.transit import Transit, storage_bytes, taken


@contextmanager
def unrecorded(unit: str) -> Iterator[None]:
    yield


def test_waiting_ends_when_few_enough_are_left() -> None:
    transit, left = Transit(unrecorded, 10.0), []
    transit.begin(100)
    transit.wait(100, "block")

    def lane() -> None:
        for _ in range(4):
            time.sleep(0.01)
            left.append(0)
            transit.gone(25)

    thread = threading.Thread(target=lane)
    thread.start()
    transit.wait(50, "block")
    assert len(left) >= 2
    transit.wait(-1, "block")  # less than nothing cannot be left
    assert len(left) == 4
    thread.join()


def test_waiting_for_what_never_leaves_is_an_error() -> None:
    transit = Transit(unrecorded, 0.05)
    transit.begin(1)
    with pytest.raises(OffloadError, match=r"activations leaving \(block\)"):
        transit.wait(0, "block")


def test_a_storage_is_gone_after_its_last_piece() -> None:
    """Also one that is divided between two tiers."""
    storages = [torch.zeros(n, dtype=torch.uint8) for n in (100, 60, 40)]
    alive = [StorageWeakRef(x.untyped_storage()) for x in storages]
    pieces = list(zip((0, 100, 160), storages, strict=True))
    del storages
    assert storage_bytes(pieces) == 200
    told: list[int] = []
    found = []
    for start, stop in ((0, 130), (130, 200)):
        for at, piece in taken(pieces, start, stop, told.append):
            found.append((at, piece.numel()))
            del piece
    assert found == [(0, 100), (100, 30), (0, 30), (30, 40)]
    assert told == [100, 0, 60, 40] and all(ref.expired() for ref in alive)


@pytest.mark.parametrize("room", [0, 150_000])
def test_a_pass_goes_on_as_earlier_ones_leave(room: int, fast_path: Path) -> None:
    """Where the plan has little beside a pass, its saved tensors and those on their way out never exceed that."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 2, 4)
    want = reference.train(model, batches, 2)
    engine = forcing.engine(fast_path / "run", model, 2, 4, activations=fractions(cpu=0.5, nvme=0.5))
    method = engine._method
    stream = method.activations
    transit, waits = stream._transit, []
    wait = transit.wait

    def watched(allowed: int, unit: str) -> None:
        wait(allowed, unit)
        waits.append((transit._nbytes, max(0, allowed)))

    def make_room(unit: Any, spare: int, backward: bool, own: Any = stream.make_room) -> None:
        own(unit, room, backward)

    transit.wait, stream.make_room = watched, make_room  # type: ignore[method-assign]
    for tier in stream._tiers.values():

        def take(place: Any, pieces: Any, name: str, own: Any = tier.take) -> None:
            time.sleep(0.01)
            own(place, pieces, name)

        tier.take = take  # type: ignore[method-assign]
    got = reference.Outcome()
    with engine:
        for batch in batches:
            result = engine.step(batch)
            got.losses.append(result.loss)
            assert transit._nbytes == 0
        got.weights = reference.weights(engine)
    assert got.losses == want.losses
    assert all(torch.equal(got.weights[name], want.weights[name]) for name in want.weights)
    assert waits and all(left <= allowed for left, allowed in waits)
    assert any(allowed for _, allowed in waits) == bool(room)
