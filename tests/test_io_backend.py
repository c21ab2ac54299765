"""Files and backends: every backend through the same contract: data, errors, priorities, shutdown."""

from __future__ import annotations

import errno
import functools
import gc
import json
import logging
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.io import (
    BACKENDS,
    PAGE,
    AiofilesBackend,
    Backend,
    DirectFile,
    FaultyBackend,
    HostBuffer,
    IOTimeout,
    Ledger,
    LibaioBackend,
    Priority,
    Request,
    StoreError,
    StoreFull,
    ThreadsBackend,
    UringBackend,
    allocate,
    choose,
    choose_backend,
    directfile,
    libaio,
    open_backend,
    uring,
    why_not,
)
from offload.io.backend import PIECE
from offload.io.choose import WORTH_MEASURING
from offload.io.libaio import built
from offload.io.request import Transfer

SHM = Path("/dev/shm")
pytestmark = pytest.mark.timeout(60)

Make = Callable[..., Backend]
"""make(n, timeout=...): a backend that has n transfers under way at a time."""


@functools.cache
def unavailable(name: str) -> str:
    """Why this machine does not offer a backend; "" when it does."""
    if name == "libaio" and not built():
        return "DeepSpeed's async_io operator is not built"
    with tempfile.TemporaryDirectory() as folder:
        return why_not(name, Path(folder))


def make_backend(name: str, width: int = 2, timeout: float = 20, limit: int = 4096) -> Backend:
    if name == "threads":
        return ThreadsBackend(width, timeout=timeout, limit=limit)
    if name == "io_uring":
        return UringBackend(width, timeout=timeout, limit=limit)
    if name == "libaio":
        return LibaioBackend(width, timeout=timeout, limit=limit)
    return AiofilesBackend(width, timeout=timeout, limit=limit)


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest) -> Make:
    if reason := unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return functools.partial(make_backend, request.param)


def random_buffer(nbytes: int, seed: int = 0) -> HostBuffer:
    buffer = allocate(nbytes, Ledger())
    buffer.tensor.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return buffer


@pytest.fixture
def backend(make: Make) -> Iterator[Backend]:
    backend = make()
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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DirectFile]:
    file = DirectFile(tmp_path / "data.bin", create=True)
    file.reserve(1 << 20)
    yield file
    file.close()


@pytest.mark.parametrize("name", ["aiofiles", "threads"])
def test_bytes_in_the_page_cache_are_flushed_in_pieces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow drive, the sync of a commit would take longer than a drive may go without progress."""
    file = DirectFile(tmp_path / "data.bin", create=True)
    file.direct = False  # as where the file system has no O_DIRECT
    monkeypatch.setattr(directfile, "FLUSH", 2 << 20)
    flushed: list[int] = []
    sync = os.fdatasync

    def counted(fd: int) -> None:
        flushed.append(fd)
        if fd != file.fd:
            raise OSError(errno.EIO, "lost")  # is for the commit's own sync to tell
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    backend, data = make_backend(name), random_buffer(1 << 20)
    for request in [backend.write(file, at << 20, data.tensor) for at in range(16)]:
        request.wait()
    assert len(flushed) == 8 and file.fd not in flushed
    backend.sync(file).wait()
    assert flushed[8:] == [file.fd]
    into = allocate(1 << 20, Ledger())
    backend.read(file, 5 << 20, into.tensor).wait()
    assert torch.equal(into.tensor, data.tensor) and len(flushed) == 9
    backend.close()
    file.close()


def test_what_was_written_is_read(file: DirectFile, backend: Backend) -> None:
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


PAGES = 96
Operation = tuple[str, int, int, Priority]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["read", "write"]), st.integers(0, 63), st.integers(1, 32), st.sampled_from(list(Priority))
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=20, deadline=None)
@given(operations=OPERATIONS, width=st.integers(1, 4), short=st.booleans())
@pytest.mark.parametrize("name", BACKENDS)
def test_random_transfers_match_a_model(name: str, operations: list[Operation], width: int, short: bool) -> None:
    """Transfers of all kinds in flight together, those that conflict waited for: every read and the file at the end
    equal a plain byte array, all bytes are accounted for, and all memory is given back."""
    if reason := unavailable(name):
        pytest.skip(reason)
    ledger, model = Ledger(), torch.zeros(PAGES * PAGE, dtype=torch.uint8)
    moved = {"read": 0, "write": 0}
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() and width % 2 else None) as folder:
        file = DirectFile(Path(folder) / "data.bin", create=True)
        file.reserve(PAGES * PAGE)
        backend: Backend = make_backend(name, width)
        if short:
            backend = FaultyBackend(backend, "read:short;write:short")
        pending: list[tuple[str, int, int, Request, HostBuffer, torch.Tensor]] = []

        def settle(kind: str, begin: int, end: int) -> None:
            """Wait for what must not run beside a transfer of these pages."""
            for entry in list(pending):
                other, first, last, request, buffer, expected = entry
                if first < end and begin < last and "write" in (kind, other):
                    request.wait(30)
                    assert torch.equal(buffer.tensor, expected)
                    buffer.free()
                    pending.remove(entry)

        for seed, (kind, page, pages, priority) in enumerate(operations):
            begin, end = page * PAGE, (page + pages) * PAGE
            settle(kind, page, page + pages)
            moved[kind] += end - begin
            buffer = allocate(end - begin, ledger)
            if kind == "write":
                buffer.tensor.random_(0, 256, generator=torch.Generator().manual_seed(seed))
                model[begin:end] = buffer.tensor
            request = (backend.read if kind == "read" else backend.write)(file, begin, buffer.tensor, priority)
            pending.append((kind, page, page + pages, request, buffer, model[begin:end].clone()))
        settle("write", 0, PAGES)
        assert not pending and (backend.bytes_read, backend.bytes_written) == (moved["read"], moved["write"])
        with allocate(PAGES * PAGE, ledger) as into:
            backend.read(file, 0, into.tensor).wait(30)
            assert torch.equal(into.tensor, model)
        assert backend.close()
        assert ledger.in_use("cpu") == 0
        file.close()


def test_a_unit_is_moved_in_pieces_and_completes_as_one(tmp_path: Path, backend: Backend) -> None:
    nbytes = 2 * PIECE + 3 * PAGE
    seen: list[int] = []
    backend.observer = lambda kind, begin, end, nbytes, label: seen.append(nbytes)
    file = DirectFile(tmp_path / "data.bin", create=True)
    file.reserve(nbytes + PAGE)
    with random_buffer(nbytes) as out, allocate(nbytes, Ledger()) as into:
        backend.write(file, PAGE, out.tensor, label="unit").wait(30)
        request = backend.read(file, PAGE, into.tensor, label="unit")
        request.wait(30)
        assert torch.equal(out.tensor, into.tensor)
    assert (request.kind, request.offset, request.nbytes) == ("read", PAGE, nbytes)
    assert sorted(seen) == [3 * PAGE] * 2 + [PIECE] * 4
    file.close()


def test_memory_that_was_moved_is_let_go_of(file: DirectFile, backend: Backend) -> None:
    """A buffer that is freed after its transfers is gone: activations come and go with every step."""
    kept = []
    for at in range(8):
        array = np.frombuffer(mmap.mmap(-1, PAGE), np.uint8)
        kept.append(weakref.ref(array))
        part = torch.from_numpy(array)
        backend.write(file, at * PAGE, part).wait()
        backend.read(file, at * PAGE, part).wait()
    del array, part
    assert backend.close()  # threads hold on to their last transfer for a moment
    gc.collect()
    assert [ref() for ref in kept] == [None] * 8


def test_registered_buffers_change_nothing_that_is_seen(file: DirectFile, backend: Backend) -> None:
    with random_buffer(1 << 20) as out, allocate(1 << 20, Ledger()) as into:
        backend.register([out.tensor, into.tensor])
        backend.write(file, PAGE, out.tensor[PAGE : 5 * PAGE]).wait()
        backend.read(file, PAGE, into.tensor[: 4 * PAGE]).wait()
        assert torch.equal(into.tensor[: 4 * PAGE], out.tensor[PAGE : 5 * PAGE])
        with allocate(PAGE, Ledger()) as other:  # not registered
            backend.read(file, PAGE, other.tensor).wait()
            assert torch.equal(other.tensor, out.tensor[PAGE : 2 * PAGE])
        assert backend.close()


def test_short_transfers_continue(disk: DirectFile, make: Make) -> None:
    backend = FaultyBackend(make(1), "write:short;read:short")
    out, into = random_buffer(10 * PAGE), allocate(10 * PAGE, Ledger())
    backend.write(disk, 0, out.tensor).wait()
    backend.read(disk, 0, into.tensor).wait()
    backend.close()
    assert torch.equal(out.tensor, into.tensor) and backend.bytes_read == 10 * PAGE


def test_end_of_file_is_an_error(tmp_path: Path, backend: Backend) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(3 * PAGE + 100))
    file = DirectFile(path)
    with pytest.raises(StoreError, match=rf"after {3 * PAGE}.*short.bin.*offset {3 * PAGE}") as caught:
        backend.read(file, 0, allocate(8 * PAGE, Ledger()).tensor).wait()
    assert caught.value.path == str(path) and caught.value.offset == 3 * PAGE
    file.close()


def test_a_transfer_of_several_calls_fails_at_its_first_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := unavailable("io_uring"):
        pytest.skip(reason)
    monkeypatch.setattr(uring, "CALL", 3 * PAGE)
    path = tmp_path / "data.bin"
    with random_buffer(40 * PAGE) as out, allocate(40 * PAGE, Ledger()) as into:
        path.write_bytes(bytes(out.tensor.numpy()))
        file = DirectFile(path)
        backend = FaultyBackend(make_backend("io_uring", 4), "read:short:times=1")
        for _ in range(2):  # in short calls, and in whole ones
            into.tensor.zero_()
            backend.read(file, 0, into.tensor).wait()
            assert torch.equal(into.tensor, out.tensor)
        os.truncate(path, 25 * PAGE + 100)
        with pytest.raises(StoreError, match=rf"after {25 * PAGE} of {40 * PAGE} bytes.*offset {25 * PAGE}, "):
            backend.read(file, 0, into.tensor).wait()
        assert backend.close()
        file.close()


def test_a_closed_file_is_reported(tmp_path: Path, backend: Backend) -> None:
    file = DirectFile(tmp_path / "data.bin", create=True)
    file.reserve(4 * PAGE)
    with allocate(PAGE, Ledger()) as buffer:
        backend.write(file, 0, buffer.tensor).wait()
        file.close()
        with pytest.raises(StoreError, match=r"write of 'unit'.*data.bin, offset 4096, length 4096: EBADF") as caught:
            backend.write(file, PAGE, buffer.tensor, label="unit").wait()
    assert caught.value.errno == errno.EBADF


def test_a_file_size_limit_gives_a_short_write_then_an_error(tmp_path: Path) -> None:
    """The kernel writes a part, then refuses: the request fails with errno and the offset it got to."""
    # DeepSpeed's operator ends the process when the kernel refuses a request.
    names = [name for name in BACKENDS if name != "libaio" and not unavailable(name)]
    code = f"""
import json, resource
from pathlib import Path
from offload.io import *
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, resource.RLIM_INFINITY))
found = {{}}
for name in {names!r}:
    file = DirectFile(Path({str(tmp_path)!r}) / name, create=True)
    backend = make_backend(name)
    try:
        backend.write(file, 0, allocate(8 * PAGE, Ledger()).tensor).wait()
    except StoreError as error:
        found[name] = (str(error), backend.bytes_written)
    backend.close()
print("FOUND", json.dumps(found))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(out[out.index("FOUND") + len("FOUND") :])
    assert list(found) == names
    for message, written in found.values():
        assert "EFBIG" in message and written == 3 * PAGE


@pytest.mark.parametrize(("kind", "match"), [("offset", "multiples"), ("length", "multiples"), ("address", "address")])
def test_misaligned_requests_are_refused(file: DirectFile, backend: Backend, kind: str, match: str) -> None:
    tensor = allocate(2 * PAGE, Ledger()).tensor
    part = {"offset": tensor, "length": tensor[: PAGE + 1], "address": tensor[1 : PAGE + 1]}[kind]
    with pytest.raises(StoreError, match=match):
        backend.read(file, 1 if kind == "offset" else 0, part)
    with pytest.raises(StoreError, match="uint8"):
        backend.write(file, 0, tensor.view(torch.int16))


def test_urgent_requests_overtake_and_equal_ones_keep_their_order(disk: DirectFile, make: Make) -> None:
    order: list[str] = []
    started, release = threading.Event(), threading.Event()
    backend = make(1)
    backend.observer = lambda kind, begin, end, nbytes, label: order.append(label)

    def block() -> None:
        started.set()
        release.wait(10)

    blocker = backend.sync(disk, block)
    assert started.wait(10)
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [
        backend.read(disk, 0, tensor, priority, f"{priority.name}{number}")
        for number in range(2)
        for priority in (Priority.WRITE, Priority.COMPUTE, Priority.STATE)
    ]
    release.set()
    for request in [blocker, *requests]:
        request.wait()
    backend.close()
    assert order == ["sync", "COMPUTE0", "COMPUTE1", "STATE0", "STATE1", "WRITE0", "WRITE1"]


def test_observer_and_callbacks_see_every_operation_and_cannot_break_it(file: DirectFile, backend: Backend) -> None:
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


def test_close_cancels_what_is_queued_and_refuses_more(disk: DirectFile, make: Make) -> None:
    backend = FaultyBackend(make(1), "write:delay=0.2")
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [backend.write(disk, PAGE * number, tensor) for number in range(4)]
    time.sleep(0.05)
    assert backend.close()
    requests[0].wait()
    for number in (1, 2, 3):
        with pytest.raises(StoreError, match=rf"cancelled.*data.bin, offset {PAGE * number}"):
            requests[number].wait()
    with pytest.raises(StoreError, match="closed"):
        backend.write(disk, 0, tensor)


def test_a_hung_device_fails_waiters_and_close_returns(disk: DirectFile, make: Make) -> None:
    backend = FaultyBackend(make(1, timeout=0.2), "read:delay=2")
    tensor = allocate(PAGE, Ledger()).tensor
    running, queued = backend.read(disk, PAGE, tensor), backend.read(disk, 2 * PAGE, tensor)
    begin = time.monotonic()
    with pytest.raises(IOTimeout, match=rf"0.05 s.*data.bin, offset {PAGE},"):
        running.wait(0.05)
    with pytest.raises(IOTimeout, match="hangs"):
        running.wait()
    with pytest.raises(IOTimeout, match="hangs"):
        queued.wait()
    assert not backend.close()
    assert time.monotonic() - begin < 1.8
    with pytest.raises(IOTimeout, match="closed"):
        running.wait()
    with pytest.raises(StoreError, match="cancelled"):
        queued.wait()


@pytest.mark.parametrize("name", ["threads", "io_uring"])
def test_a_device_that_never_answers_is_reported_and_close_returns(name: str, tmp_path: Path) -> None:
    """A real one: reading a pipe that nobody writes to. The kernel cancels that for io_uring; a thread stays stuck."""
    if reason := unavailable(name):
        pytest.skip(reason)
    file = DirectFile(tmp_path / "data.bin", create=True)
    reader, writer = os.pipe()
    file.close()
    file.fd = reader
    backend = make_backend(name, 1, timeout=0.2)
    with allocate(PAGE, Ledger()) as buffer:
        if name == "threads":  # preadv refuses a pipe, so its read is an action here
            request = backend.sync(file, lambda: bool(os.read(reader, 1)) and None)
        else:
            request = backend.read(file, 0, buffer.tensor)
        with pytest.raises(IOTimeout, match=r"no progress.*data.bin, offset 0"):
            request.wait()
        begin = time.monotonic()
        assert backend.close() == (name == "io_uring")
        assert time.monotonic() - begin < 1.5 and request.done()
        with pytest.raises(StoreError, match="ECANCELED" if name == "io_uring" else "the device hangs"):
            request.wait()
        os.close(writer)
        file.close()


def test_a_request_that_never_completes_is_reported_and_does_not_hang_close(disk: DirectFile, make: Make) -> None:
    backend = FaultyBackend(make(1, timeout=0.2), "read:hang:after=1:times=1")
    with allocate(PAGE, Ledger()) as buffer:
        backend.read(disk, 0, buffer.tensor).wait()
        hung = backend.read(disk, PAGE, buffer.tensor, label="unit")
        backend.read(disk, 2 * PAGE, buffer.tensor).wait()  # the others go on
        begin = time.monotonic()
        with pytest.raises(IOTimeout, match=r"read of 'unit': no progress.*data.bin, offset 4096, length 4096"):
            hung.wait()
        assert not hung.done() and not backend.close() and hung.done()
        assert time.monotonic() - begin < 1
        with pytest.raises(IOTimeout, match="closed"):
            hung.wait()


def test_a_slow_queue_is_not_a_hung_device(disk: DirectFile, make: Make) -> None:
    backend = FaultyBackend(make(1, timeout=0.3), "read:delay=0.1")
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [backend.read(disk, 0, tensor) for _ in range(6)]
    requests[-1].wait()  # after 0.6 s, twice the limit
    assert backend.close()


def test_a_rate_is_kept_over_all_requests(disk: DirectFile, make: Make) -> None:
    """Two requests at a time, yet together no faster than the device that is emulated, and hardly slower."""
    backend = FaultyBackend(make(2), f"read:rate={100 * PAGE}")
    with allocate(PAGE * 5, Ledger()) as buffer:
        begin = time.perf_counter()
        for request in [backend.read(disk, 0, buffer.tensor) for _ in range(6)]:
            request.wait()
        assert 0.3 <= time.perf_counter() - begin < 0.6
        backend.write(disk, 0, buffer.tensor).wait()  # another kind
    assert backend.close()


def test_a_full_queue_makes_submitters_wait(disk: DirectFile, make: Make) -> None:
    backend, release = make(1, limit=2), threading.Event()
    tensor = allocate(PAGE, Ledger()).tensor
    requests = [backend.sync(disk, lambda: bool(release.wait(20)) and None)]
    deadline = time.monotonic() + 10
    while not requests[0].begin and time.monotonic() < deadline:
        time.sleep(0.005)
    requests += [backend.read(disk, 0, tensor) for _ in range(2)]
    more: list[Request] = []
    thread = threading.Thread(target=lambda: more.append(backend.read(disk, 0, tensor)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and not more
    release.set()
    thread.join(20)
    for request in [*requests, *more]:
        request.wait(20)
    # From a callback, which runs in an I/O thread, submitting never blocks: nobody else would make room.
    chained: list[Request] = []
    ends = [backend.read(disk, 0, tensor) for _ in range(2)]
    ends[0].add_done_callback(lambda _: chained.extend(backend.read(disk, 0, tensor) for _ in range(6)))
    ends[0].wait(20)
    deadline = time.monotonic() + 10
    while len(chained) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    for request in chained:
        request.wait(20)
    assert backend.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_reads_do_not_stand_behind_the_syncs_of_a_commit(name: str, disk: DirectFile) -> None:
    """A commit syncs the files of all paths at once; what compute waits for is read and checked meanwhile."""
    if reason := unavailable(name):
        pytest.skip(reason)
    backend, release = choose.make_backend(name, paths=2, timeout=20), threading.Event()
    syncs = [backend.sync(disk, lambda: bool(release.wait(20)) and None) for _ in range(2)]
    with allocate(PAGE, Ledger()) as buffer:
        checked = threading.Event()
        read = Transfer("read", disk, 0, buffer.tensor, Priority.COMPUTE, after=lambda view: checked.set())
        backend.submit(read)
        read.wait(10)
        assert checked.is_set() and not any(sync.done() for sync in syncs)
        release.set()
        for sync in syncs:
            sync.wait(10)
    assert backend.close()


def test_a_full_queue_of_a_hung_device_is_reported(disk: DirectFile, make: Make) -> None:
    backend, release = make(1, timeout=0.2, limit=1), threading.Event()
    tensor = allocate(PAGE, Ledger()).tensor
    running = backend.sync(disk, lambda: bool(release.wait(20)) and None)
    deadline = time.monotonic() + 10
    while not running.begin and time.monotonic() < deadline:
        time.sleep(0.005)
    backend.read(disk, 0, tensor)
    with pytest.raises(IOTimeout, match=r"cannot be queued: 1 requests wait.*data.bin, offset 4096"):
        backend.read(disk, PAGE, tensor)
    release.set()
    backend.close()


def test_no_thread_is_left(disk: DirectFile, make: Make) -> None:
    before = set(threading.enumerate())
    backend = make(3)
    backend.sync(disk).wait()
    assert backend.close() and set(threading.enumerate()) <= before
    assert backend.close()  # again


def test_an_unusable_backend_is_replaced_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "liburing", None)
    reason = why_not("io_uring", tmp_path)
    assert "liburing does not load" in reason and "memory.backend" in reason
    with caplog.at_level(logging.WARNING):
        backend = open_backend("io_uring", [tmp_path], 1 << 30)
    assert backend.name == "threads" and backend.close()
    assert "io_uring does not work in" in caplog.text and "liburing does not load" in caplog.text
    with pytest.raises(StoreError, match=r"unknown I/O backend 'uring'.*io_uring"):
        open_backend("uring", [tmp_path], 0)


def test_the_fastest_backend_is_measured_once(tmp_path: Path) -> None:
    record = tmp_path / "io.json"
    assert choose_backend([tmp_path], WORTH_MEASURING - 1, record).backend == "threads" and not record.exists()
    begin = time.monotonic()
    choice = choose_backend([tmp_path], WORTH_MEASURING, record)
    assert choice.backend in BACKENDS and time.monotonic() - begin < 20
    if choice.measured:
        assert choice.backend in choice.measured
        assert all(item["seconds_per_gb"] > 0 for item in choice.measured.values())
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({**kept, "backend": "aiofiles"}))
    assert choose_backend([tmp_path], WORTH_MEASURING, record).backend == "aiofiles"  # read, not measured
    other = tmp_path / "other"
    other.mkdir()
    assert choose_backend([other], WORTH_MEASURING, record).paths == [str(other)]
    assert not list(other.iterdir())


def test_the_slowest_file_system_of_a_store_decides(
    tmp_path: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Striped over two file systems; threads win on one of them and lose more on the other."""
    if os.stat(tmp_path).st_dev == os.stat(fast_path).st_dev:
        pytest.skip("needs two file systems")
    seconds = {tmp_path: {"threads": 0.2, "io_uring": 0.5}, fast_path: {"threads": 2.0, "io_uring": 0.6}}

    def rates(directory: Path, names: list[str]) -> dict[str, dict[str, float]]:
        return {name: {"seconds_per_gb": seconds[directory][name], "cpu_seconds_per_gb": 0.1} for name in names}

    monkeypatch.setattr(choose, "_rates", rates)
    monkeypatch.setattr(choose, "why_not", lambda name, directory: "")
    again = tmp_path / "again"
    again.mkdir()
    choice = choose_backend([tmp_path, again, fast_path], WORTH_MEASURING)
    assert choice.backend == "io_uring"
    assert choice.measured_in == [str(tmp_path), str(fast_path)]  # each file system once
    assert choice.measured["threads"]["seconds_per_gb"] == 2.0
    assert choose_backend([tmp_path], WORTH_MEASURING).backend == "threads"


class _Careless:
    """An aio_handle that moves half of what it is asked for, and says nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        return True

    def sync_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        fd = os.open(path, os.O_RDONLY)
        os.preadv(fd, [buffer.numpy().data[: len(buffer) // 2]], offset)
        os.close(fd)
        return 1

    def async_pwrite(self, buffer: torch.Tensor, fd: int, offset: int) -> int:
        return os.pwritev(fd, [buffer.numpy().data[: len(buffer) // 2]], offset)

    def wait(self) -> int:
        return 1


def test_what_deepspeeds_operator_does_not_report_is_noticed_and_mended(
    disk: DirectFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not disk.direct:
        pytest.skip("the operator is used with O_DIRECT only")
    monkeypatch.setattr(libaio, "load", lambda **_: types.SimpleNamespace(aio_handle=_Careless))
    backend = LibaioBackend(1, timeout=20)
    with random_buffer(16 * PAGE) as out, allocate(16 * PAGE, Ledger()) as into:
        backend.write(disk, PAGE, out.tensor).wait()
        with open(disk.path, "rb") as raw:
            assert raw.read()[PAGE : 17 * PAGE] == bytes(out.tensor.numpy())
        backend.read(disk, PAGE, into.tensor).wait()
        assert torch.equal(into.tensor, out.tensor)
    assert backend.bytes_written == backend.bytes_read == 16 * PAGE
    assert backend.close()


def test_deepspeeds_operator_is_not_asked_to_lock_more_than_it_may(
    disk: DirectFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end the process. At the start that is a reason to take another backend, later an error."""
    if not disk.direct:
        pytest.skip("the operator is used with O_DIRECT only")

    class Unpinned(_Careless):
        def is_pinned(self, buffer: torch.Tensor) -> bool:
            return False

        def new_cpu_locked_tensor(self, count: int, example: torch.Tensor) -> torch.Tensor:
            pytest.fail("the operator was asked")

    monkeypatch.setattr(libaio, "load", lambda **_: types.SimpleNamespace(aio_handle=Unpinned))

    def refused(tensor: torch.Tensor) -> None:
        raise StoreError("cannot lock", errno=errno.ENOMEM)

    with monkeypatch.context() as locked:
        locked.setattr(libaio, "lock", lambda tensor: None)
        backend = LibaioBackend(1, timeout=20)
        locked.setattr(libaio, "lock", refused)
        with random_buffer(PAGE) as out, pytest.raises(StoreError, match=rf"{PIECE} bytes.*ENOMEM.*ulimit -l"):
            backend.write(disk, 0, out.tensor).wait()
        assert backend.close()
        with pytest.raises(StoreError, match=rf"libaio cannot be used.*{3 * PIECE} bytes.*ulimit -l"):
            LibaioBackend(3, timeout=20)


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


@pytest.mark.parametrize(
    ("made_for", "usable"), [(str(Path(torch.__file__).parent), True), ("/elsewhere/torch", False)]
)
def test_an_operator_built_for_another_environment_is_not_built(
    made_for: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    for name in ("async_io", "pin_memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.so").touch()
        (tmp_path / name / "build.ninja").write_text(f"cflags = -isystem {made_for}/include\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert built() == usable
