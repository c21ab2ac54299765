"""Files and the threads backend: contract, errors, priorities, shutdown."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.io import (
    PAGE,
    DirectFile,
    FaultyBackend,
    HostBuffer,
    IOTimeout,
    Ledger,
    Priority,
    Request,
    StoreError,
    StoreFull,
    ThreadsBackend,
    allocate,
)

SHM = Path("/dev/shm")


def random_buffer(nbytes: int, seed: int = 0) -> HostBuffer:
    buffer = allocate(nbytes, Ledger())
    buffer.tensor.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return buffer


@pytest.fixture
def backend() -> Iterator[ThreadsBackend]:
    backend = ThreadsBackend(2, timeout=20)
    yield backend
    backend.close()


@pytest.fixture(params=["disk", "shm"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DirectFile]:
    if request.param == "shm" and not SHM.is_dir():
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM if request.param == "shm" else tmp_path) as folder:
        file = DirectFile(Path(folder) / "data.bin", create=True)
        file.reserve(4 << 20)
        yield file
        file.close()


def test_what_was_written_is_read(file: DirectFile, backend: ThreadsBackend) -> None:
    out, into = random_buffer(1 << 20), allocate(1 << 20, Ledger())
    write = backend.write(file, 8 * PAGE, out.tensor)
    write.wait()
    read = backend.read(file, 8 * PAGE, into.tensor)
    read.wait()
    assert torch.equal(out.tensor, into.tensor)
    assert (read.kind, read.path, read.offset, read.nbytes) == ("read", file.path, 8 * PAGE, 1 << 20)
    assert write.done() and 0 < write.begin <= write.end <= read.begin <= read.end
    assert backend.bytes_written == backend.bytes_read == 1 << 20
    backend.sync(file).wait()
    with open(file.path, "rb") as raw:
        assert raw.read(8 * PAGE + 10)[-10:] == bytes(out.tensor[:10].tolist())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(1, 32), st.sampled_from(Priority)), min_size=1, max_size=20),
    st.integers(1, 4),
)
def test_random_transfers_match_a_model(operations: list[tuple[int, int, Priority]], threads: int) -> None:
    """Disjoint writes in flight together, then reads of everything: equal to a plain byte array."""
    model = torch.zeros(96 * PAGE, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, allocate(96 * PAGE, Ledger()) as into:
        file = DirectFile(Path(folder) / "data.bin", create=True)
        file.reserve(96 * PAGE)
        backend = ThreadsBackend(threads, timeout=20)
        pending: list[tuple[int, int, Request]] = []
        for seed, (page, pages, priority) in enumerate(operations):
            for begin, end, request in pending:
                if page < end and begin < page + pages:
                    request.wait()
            buffer = random_buffer(pages * PAGE, seed)
            model[page * PAGE : (page + pages) * PAGE] = buffer.tensor
            pending.append((page, page + pages, backend.write(file, page * PAGE, buffer.tensor, priority)))
        for _, _, request in pending:
            request.wait()
        backend.read(file, 0, into.tensor).wait()
        assert torch.equal(into.tensor, model)
        assert backend.close()
        file.close()


def test_short_transfers_continue(file: DirectFile) -> None:
    backend = FaultyBackend(ThreadsBackend(1), "write:short;read:short")
    out, into = random_buffer(10 * PAGE), allocate(10 * PAGE, Ledger())
    backend.write(file, 0, out.tensor).wait()
    backend.read(file, 0, into.tensor).wait()
    backend.close()
    assert torch.equal(out.tensor, into.tensor) and backend.bytes_read == 10 * PAGE


def test_end_of_file_is_an_error(tmp_path: Path, backend: ThreadsBackend) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(3 * PAGE + 100))
    file = DirectFile(path)
    with pytest.raises(StoreError, match=rf"after {3 * PAGE}.*short.bin.*offset {3 * PAGE}") as caught:
        backend.read(file, 0, allocate(8 * PAGE, Ledger()).tensor).wait()
    assert caught.value.path == str(path) and caught.value.offset == 3 * PAGE
    file.close()


def test_a_real_failed_system_call_is_reported(tmp_path: Path, backend: ThreadsBackend) -> None:
    file = DirectFile(tmp_path / "data.bin", create=True)
    os.close(file.fd)
    file.fd = os.open(file.path, os.O_RDONLY)
    with pytest.raises(StoreError, match=r"write of 'unit'.*data.bin, offset 4096, length 4096: EBADF") as caught:
        backend.write(file, PAGE, allocate(PAGE, Ledger()).tensor, label="unit").wait()
    assert caught.value.errno == errno.EBADF
    file.close()


def test_a_file_size_limit_gives_a_short_write_then_an_error(tmp_path: Path) -> None:
    """The kernel writes a part, then refuses: the request fails with errno and the offset it got to."""
    code = f"""
import resource
from offload.io import *
file = DirectFile({str(tmp_path / "data.bin")!r}, create=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, 3 * PAGE))
backend = ThreadsBackend(1)
try:
    backend.write(file, 0, allocate(8 * PAGE, Ledger()).tensor).wait()
except StoreError as error:
    print(error)
print(backend.bytes_written)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "EFBIG" in out and out.split()[-1] == str(3 * PAGE)


@pytest.mark.parametrize(("kind", "match"), [("offset", "multiples"), ("length", "multiples"), ("address", "address")])
def test_misaligned_requests_are_refused(file: DirectFile, backend: ThreadsBackend, kind: str, match: str) -> None:
    tensor = allocate(2 * PAGE, Ledger()).tensor
    part = {"offset": tensor, "length": tensor[: PAGE + 1], "address": tensor[1 : PAGE + 1]}[kind]
    with pytest.raises(StoreError, match=match):
        backend.read(file, 1 if kind == "offset" else 0, part)
    with pytest.raises(StoreError, match="uint8"):
        backend.write(file, 0, tensor.view(torch.int16))


def test_urgent_requests_overtake_and_equal_ones_keep_their_order(file: DirectFile) -> None:
    order: list[str] = []
    started, release = threading.Event(), threading.Event()
    backend = ThreadsBackend(1, observer=lambda kind, begin, end, nbytes, label: order.append(label))

    def block() -> None:
        started.set()
        release.wait(10)

    blocker = backend.sync(file, block)
    assert started.wait(10)
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [
        backend.read(file, 0, tensor, priority, f"{priority.name}{number}")
        for number in range(2)
        for priority in (Priority.WRITE, Priority.COMPUTE, Priority.STATE)
    ]
    release.set()
    for request in [blocker, *requests]:
        request.wait()
    backend.close()
    assert order == ["sync", "COMPUTE0", "COMPUTE1", "STATE0", "STATE1", "WRITE0", "WRITE1"]


def test_observer_and_callbacks_see_every_operation_and_cannot_break_it(
    file: DirectFile, backend: ThreadsBackend
) -> None:
    seen: list[tuple[str, int, str]] = []

    def observe(kind: str, begin: float, end: float, nbytes: int, label: str) -> None:
        assert 0 < begin <= end
        seen.append((kind, nbytes, label))
        raise RuntimeError("observer")

    backend.observer = observe
    tensor = allocate(PAGE, Ledger()).tensor
    called = threading.Event()
    request = backend.write(file, 0, tensor, label="a")
    request.add_done_callback(lambda request: 1 / 0)
    request.add_done_callback(lambda request: called.set())
    request.wait()
    assert called.wait(10)
    late: list[bool] = []
    request.add_done_callback(lambda request: late.append(request.done()))
    backend.sync(file).wait()
    assert late == [True] and seen == [("write", PAGE, "a"), ("write", 0, "sync")]


def test_close_cancels_what_is_queued_and_refuses_more(file: DirectFile) -> None:
    backend = FaultyBackend(ThreadsBackend(1), "write:delay=0.2")
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [backend.write(file, PAGE * number, tensor) for number in range(4)]
    time.sleep(0.05)
    assert backend.close()
    requests[0].wait()
    for number in (1, 2, 3):
        with pytest.raises(StoreError, match=rf"cancelled.*data.bin, offset {PAGE * number}"):
            requests[number].wait()
    with pytest.raises(StoreError, match="closed"):
        backend.write(file, 0, tensor)


def test_a_hung_device_fails_waiters_and_close_returns(file: DirectFile) -> None:
    backend = FaultyBackend(ThreadsBackend(1, timeout=0.2), "read:delay=3")
    tensor = allocate(PAGE, Ledger()).tensor
    running, queued = backend.read(file, PAGE, tensor), backend.read(file, 2 * PAGE, tensor)
    begin = time.monotonic()
    with pytest.raises(IOTimeout, match=rf"0.05 s.*data.bin, offset {PAGE},"):
        running.wait(0.05)
    with pytest.raises(IOTimeout, match="hangs"):
        running.wait()
    with pytest.raises(IOTimeout, match="hangs"):
        queued.wait()
    assert not backend.close()
    assert time.monotonic() - begin < 2
    with pytest.raises(IOTimeout, match="closed"):
        running.wait()
    with pytest.raises(StoreError, match="cancelled"):
        queued.wait()


def test_a_slow_queue_is_not_a_hung_device(file: DirectFile) -> None:
    backend = FaultyBackend(ThreadsBackend(1, timeout=0.5), "read:delay=0.1")
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [backend.read(file, 0, tensor) for _ in range(10)]
    requests[-1].wait()  # after 1 s, twice the limit
    assert backend.close()


def test_reserve_names_what_is_needed_and_available() -> None:
    if not SHM.is_dir():
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        file = DirectFile(Path(folder) / "data.bin", create=True)
        with pytest.raises(StoreFull, match=r"needed \d+ bytes, available \d+.*data.bin: ENOSPC"):
            file.reserve(1 << 45)
        file.close()


def test_open_failures_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot open.*nowhere.bin.*ENOENT"):
        DirectFile(tmp_path / "nowhere.bin")
