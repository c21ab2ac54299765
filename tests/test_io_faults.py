"""Injected faults: each ends in its documented error, with the committed version intact and nothing hanging."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import pytest
import torch
from offload.io import (
    BACKENDS,
    BLOCK,
    ChecksumError,
    Extent,
    IOTimeout,
    Ledger,
    Store,
    StoreError,
    StoreFull,
    StorePath,
    allocate,
)
from offload.io.faults import parse_rules

EXTENT = Extent("0/param", 3 * BLOCK, 2, True)


@pytest.fixture
def paths(tmp_path: Path) -> list[StorePath]:
    """A store committed once with ones in it."""
    paths = [StorePath(tmp_path, 1 << 28)]
    with Store.create(paths, "run", [EXTENT]) as store:
        fill(store, 1)
        store.commit({"step": 1})
    return paths


def fill(store: Store, value: int) -> None:
    with allocate(3 * BLOCK, Ledger()) as buffer:
        buffer.tensor.fill_(value)
        store.write("0/param", 0, buffer.tensor).wait(30)
        store.publish("0/param")


def content(store: Store) -> int:
    with allocate(3 * BLOCK, Ledger()) as buffer:
        store.read("0/param", 0, buffer.tensor).wait(30)
        assert torch.equal(buffer.tensor, buffer.tensor[:1].expand(3 * BLOCK))
        return int(buffer.tensor[0])


def faulty(
    paths: list[StorePath], monkeypatch: pytest.MonkeyPatch, rules: str, timeout: float = 20, backend: str = "auto"
) -> Store:
    with monkeypatch.context() as environment:
        environment.setenv("OFFLOAD_FAULTS", rules)
        return Store.open(paths, "run", timeout=timeout, backend=backend)


@pytest.mark.parametrize(("code", "kind"), [("ENOSPC", StoreFull), ("EIO", StoreError)])
def test_a_failed_write_leaves_the_committed_version(
    paths: list[StorePath], monkeypatch: pytest.MonkeyPatch, code: str, kind: type[StoreError]
) -> None:
    store = faulty(paths, monkeypatch, f"write:{code}:after=1:times=1")
    with pytest.raises(kind, match=rf"write of '0/param' failed: file .*data-0.bin, offset \d+, length \d+: {code}"):
        fill(store, 2)
    with pytest.raises(StoreError, match=r"cannot publish extent '0/param', block \d: its last write failed"):
        store.publish("0/param")
    assert content(store) == 1
    fill(store, 3)  # the device is well again: the update can be repeated
    assert store.commit({"step": 2}) == 2 and content(store) == 3
    store.close()


def test_a_failed_write_in_place_cannot_be_committed(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "write:EIO:after=2")
    fill(store, 2)
    with pytest.raises(StoreError, match="EIO"):
        fill(store, 3)  # not committed: overwrites in place
    with pytest.raises(StoreError, match="cannot read extent '0/param'"):
        content(store)
    with pytest.raises(StoreError, match="cannot commit extent '0/param'"):
        store.commit({})
    store.close()
    with Store.open(paths, "run") as store:
        assert store.version == 1 and content(store) == 1


def test_failed_and_flipped_reads_fail_their_waiters(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "read:flip:after=1:times=1; read:EIO:after=3")
    with pytest.raises(ChecksumError, match=r"'0/param', block 2.*data-0.bin, offset"):
        content(store)
    with pytest.raises(StoreError, match=r"read of '0/param' failed.*EIO.*check the kernel log"):
        content(store)
    store.close()


def test_short_and_slow_transfers_succeed(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "write:short;read:short;read:delay=0.1")
    fill(store, 5)
    begin = time.monotonic()
    assert content(store) == 5 and time.monotonic() - begin >= 0.1
    store.commit({})
    store.close()
    with Store.open(paths, "run") as store:
        assert content(store) == 5


def test_a_failed_data_sync_is_final(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "sync:EIO:times=1")
    fill(store, 2)
    with pytest.raises(StoreError, match=r"sync of 'sync' failed.*data-0.bin.*EIO"):
        store.commit({})
    with pytest.raises(StoreError, match=r"stopped at version 1.*EIO.*open it again"):
        store.commit({})
    with pytest.raises(StoreError, match="stopped at version 1"):
        fill(store, 3)
    assert content(store) == 2
    store.close()
    with Store.open(paths, "run") as store:
        assert store.version == 1 and content(store) == 1


def test_no_room_for_the_manifest_can_be_retried(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "sync:ENOSPC:after=1:times=2")
    fill(store, 2)
    with pytest.raises(StoreFull, match=r"manifest.tmp.*ENOSPC.*Free space"):
        store.commit({"step": 2})
    assert store.version == 1 and store.meta == {"step": 1}
    assert store.commit({"step": 3}) == 2
    store.close()
    with Store.open(paths, "run") as store:
        assert store.meta == {"step": 3} and content(store) == 2


def test_a_failed_replacement_is_final(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "sync:EIO:after=2:times=1")
    fill(store, 2)
    with pytest.raises(StoreError, match=r"manifest.json.*EIO"):
        store.commit({})
    with pytest.raises(StoreError, match="at that version or the next"):
        fill(store, 3)
    store.close()
    with Store.open(paths, "run") as store:
        assert store.version == 1 and content(store) == 1


def test_a_hung_device_is_reported_and_does_not_hang_close(
    paths: list[StorePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = faulty(paths, monkeypatch, "write:delay=2", timeout=0.2)
    begin = time.monotonic()
    with allocate(3 * BLOCK, Ledger()) as buffer:
        request = store.write("0/param", 0, buffer.tensor)
        with pytest.raises(IOTimeout, match=r"write of '0/param': no progress.*data-0.bin, offset \d+, length \d+"):
            request.wait()
        store.close()
        with pytest.raises(IOTimeout):
            request.wait()
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transfer_that_never_completes_loses_nothing(
    backend: str, paths: list[StorePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiter learns of it with file and offset, close() returns, and the committed version is whole."""
    if backend == "libaio":
        pytest.skip("loading DeepSpeed's operator again for this takes seconds; tests/test_io_backend.py covers it")
    store = faulty(paths, monkeypatch, "write:hang:after=1:times=1", timeout=0.2, backend=backend)
    begin = time.monotonic()
    with allocate(3 * BLOCK, Ledger()) as buffer:
        request = store.write("0/param", 0, buffer.tensor)
        with pytest.raises(IOTimeout, match=r"write of '0/param': no progress.*data-0.bin, offset \d+, length \d+"):
            request.wait()
        with pytest.raises(StoreError, match="still being written"):
            store.publish("0/param")
        store.close()
        with pytest.raises(IOTimeout, match="the device hangs"):
            request.wait()
    assert time.monotonic() - begin < 5
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # a hung store keeps its lock until the process ends
    with Store.open(paths, "run", backend=backend) as store:
        assert store.version == 1 and content(store) == 1
        fill(store, 4)
        assert store.commit({}) == 2 and content(store) == 4


def test_a_hung_commit_is_reported(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "sync:delay=1.5", timeout=0.2)
    fill(store, 2)
    with pytest.raises(IOTimeout, match=r"sync.*data-0.bin"):
        store.commit({})
    with pytest.raises(StoreError, match="stopped at version 1"):
        store.commit({})
    store.close()


def test_close_cancels_queued_requests(paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    store = faulty(paths, monkeypatch, "write:delay=0.2")
    with allocate(3 * BLOCK, Ledger()) as buffer:
        requests = [store.write("0/param", block * BLOCK, buffer.tensor[:BLOCK]) for block in range(3)]
        more = Store.create(paths, "other", [Extent(str(i), BLOCK, 1, False) for i in range(8)])
        queued = [more.write(str(i), 0, buffer.tensor[:BLOCK]) for i in range(8)]
        store.close()
        more.close()
    assert all(request.done() for request in [*requests, *queued])


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "write",
        "open:EIO",
        "write:EWHAT",
        "write:flip",
        "sync:short",
        "read:delay",
        "read:rate=0",
        "sync:rate=5",
        "write:hang=1",
        "read:EIO:after=x",
        "read:EIO:a=1",
    ],
)
def test_rules_are_checked(rule: str, paths: list[StorePath], monkeypatch: pytest.MonkeyPatch) -> None:
    if not rule:
        assert parse_rules(" ; ") == []
        return
    with pytest.raises(StoreError, match=f"fault rule '{rule}'"):
        faulty(paths, monkeypatch, f"read:delay=0;{rule}")
    Store.open(paths, "run").close()  # nothing is left locked
