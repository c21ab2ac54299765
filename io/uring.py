"""The backend of io_uring, through the package `liburing` (PyPI).

One thread owns the ring: it submits and reaps, and waits on one eventfd, which the kernel signals for completions and
submit() for work. It has to be so: the package's own waits hold the interpreter's lock. What takes time in Python or
blocks, that is checksums, syncs and injected delays, runs in helper threads; syncs in some of their own, because
reads that compute waits for must not stand behind those of a commit.
"""

from __future__ import annotations

import errno
import functools
import heapq
import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .directfile import DirectFile
from .errors import StoreError
from .queued import QUEUE, QueuedBackend, guarded, progressed
from .request import Observer, Transfer
from .uring_vector import Vector

logger = logging.getLogger(__name__)

GRACE = 0.5
"""Seconds that close() gives the kernel to cancel what did not finish."""
CALL = 8 << 20
"""Bytes of one request to the kernel. Smaller ones cost more CPU time and, with huge pages, gain nothing."""
_CANCEL = 0  # user_data of a request to cancel another one; transfers have 1 and up
_FILES = 64  # slots for registered files


@dataclass(eq=False)
class _Flight:
    """A transfer under way, cut into calls. Keeps the buffer alive until the kernel is done with all of them."""

    transfer: Transfer
    view: memoryview
    calls: int = 0  # not over yet
    failure: StoreError | None = None
    failed_at: int = 0


@dataclass(eq=False)
class _Call:
    """Bytes `moved` to `stop` of a flight: one request to the kernel, and what follows when it moves only a part."""

    flight: _Flight
    moved: int
    stop: int
    vector: Vector | None = None  # while it is in the ring
    number: int = 0  # its place in the order, and user_data in the ring
    index: int | None = None  # of the registered buffer it lies in


class UringBackend(QueuedBackend):
    """Reads and writes through an io_uring with up to `depth` calls of CALL bytes in it, and at most `syncs` syncs.
    Files are registered, and buffers when register() is given them, where kernel and limits allow it.

    Raises StoreError when the package is missing or the kernel, or a sandbox, forbids io_uring.
    """

    name = "io_uring"

    def __init__(
        self,
        depth: int = 8,
        *,
        helpers: int = 2,
        syncs: int = 1,
        timeout: float = 120.0,
        observer: Observer | None = None,
        limit: int = QUEUE,
    ) -> None:
        super().__init__(timeout=timeout, observer=observer, limit=limit)
        try:
            import liburing
        except (ImportError, OSError) as error:
            raise StoreError(
                f"io_uring cannot be used: the package liburing does not load ({error})",
                advice="Install it with pip install liburing, or set memory.backend to threads.",
            ) from error
        self._uring: Any = liburing
        self._depth = depth
        self._vectors = [Vector(liburing) for _ in range(max(8, depth))]  # of calls that are not in the ring
        self._ring = self._make_ring(max(8, depth))
        self._cqe = liburing.Cqe()
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        liburing.io_uring_register_eventfd(self._ring, self._event)
        self._files = _Files(liburing, self._ring)
        self._buffers: list[tuple[int, int]] = []
        self._begun: deque[_Flight] = deque()  # from the helpers
        self._ready: list[tuple[int, int, _Call]] = []  # a heap: most urgent first, then in order
        self._calls: dict[int, _Call] = {}  # in the ring, by user_data
        self._next = 1
        self._cancelling = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._syncs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._start_thread("ring", self._drive, urgent=True)
        for kind, jobs, count in (("helper", self._jobs, helpers), ("sync", self._syncs, syncs)):
            for number in range(count):
                self._start_thread(f"{kind}-{number}", functools.partial(self._help, jobs))

    def _make_ring(self, entries: int) -> Any:
        # COOP_TASKRUN (Linux 5.19): completions wait until the ring's thread wakes, instead of interrupting it.
        for flags in (self._uring.IORING_SETUP_COOP_TASKRUN, 0):
            ring = self._uring.Ring()
            try:
                self._uring.io_uring_queue_init(entries, ring, flags)
                return ring
            except OSError as error:
                if error.errno != errno.EINVAL or flags == 0:
                    raise StoreError(
                        "io_uring cannot be used: the kernel or a sandbox refuses it",
                        errno=error.errno,
                        advice="See /proc/sys/kernel/io_uring_disabled, or set memory.backend to threads.",
                    ) from error
        raise AssertionError

    def register(self, buffers: Sequence[Tensor]) -> bool:
        # Done once, before there is work: the kernel can only replace the whole table.
        if self._buffers or not buffers:
            return False
        known = [(buffer.data_ptr(), buffer.data_ptr() + buffer.numel()) for buffer in buffers]
        iovec = self._uring.Iovec([buffer.numpy().data for buffer in buffers])
        try:
            self._uring.io_uring_register_buffers(self._ring, iovec)
        except (OSError, ValueError):  # the limit on locked memory, or more of them than the kernel takes
            return False
        self._buffers = known
        return True

    # ---- the ring's thread ----

    def _drive(self) -> None:
        try:
            while not (self._closed and not self._running):
                os.eventfd_read(self._event)
                self._reap()
                while self._begun:
                    self._cut(self._begun.popleft())
                if self._cancelling:
                    self._cancelling = False
                    for number in list(self._calls):
                        self._uring.io_uring_prep_cancel64(self._sqe(), number, 0)
                self._fill()
                self._submit()
        except BaseException as error:
            logger.exception("the thread of the io_uring stopped")
            self._break(error)

    def _fill(self) -> None:
        """Put calls into the ring until it is full; take more transfers as long as that needs them."""
        while True:
            while self._ready and len(self._calls) < self._depth:
                self._prepare(heapq.heappop(self._ready)[-1])
            # Ahead of the ring, so that what comes before the bytes move is done when there is room for them.
            if len(self._ready) >= self._depth or len(self._running) >= 2 * self._depth - 1:
                return
            transfer = self._take(wait=False)
            if transfer is None:
                return
            flight = _Flight(transfer, transfer.view)
            if transfer.action is not None or transfer.before is not None:
                jobs = self._jobs if transfer.action is None else self._syncs
                jobs.put(functools.partial(self._begin, flight))
            else:
                self._cut(flight)

    def _cut(self, flight: _Flight) -> None:
        nbytes = len(flight.view)
        calls = [_Call(flight, at, min(at + CALL, nbytes)) for at in range(0, nbytes, CALL)]
        flight.calls = len(calls)
        for call in calls:
            self._queue_call(call)

    def _queue_call(self, call: _Call) -> None:
        if not call.number:
            call.number, self._next = self._next, self._next + 1
        heapq.heappush(self._ready, (int(call.flight.transfer.priority), call.number, call))

    def _prepare(self, call: _Call) -> None:
        """Put a call into the submission queue."""
        flight, transfer, uring = call.flight, call.flight.transfer, self._uring
        if flight.failure is not None and call.moved > flight.failed_at:
            self._over(call, None)  # in vain: the transfer has failed before here
            return
        if transfer.done() or transfer.file.fd < 0:  # close() gave the transfer up, or the file was closed
            self._over(call, guarded(transfer, functools.partial(_raise, errno.EBADF)))
            return
        stop = min(call.stop, call.moved + transfer.most_per_call)
        call.vector = self._vectors.pop()
        iovec = call.vector.over(transfer.address + call.moved, stop - call.moved)
        self._calls[call.number] = call
        slot = self._files.slot(transfer.file)
        fd, flags = (transfer.file.fd, 0) if slot is None else (slot, uring.IOSQE_FIXED_FILE)
        if not transfer.file.direct:
            flags |= uring.IOSQE_ASYNC  # it is copied through the page cache: not in this thread
        sqe, offset = self._sqe(), transfer.offset + call.moved
        index = call.index = self._index(transfer.address, transfer.nbytes)
        if index is None:
            prepare = uring.io_uring_prep_readv if transfer.kind == "read" else uring.io_uring_prep_writev
            prepare(sqe, fd, iovec, offset)
        else:
            prepare = uring.io_uring_prep_readv_fixed if transfer.kind == "read" else uring.io_uring_prep_writev_fixed
            prepare(sqe, fd, iovec, index, offset)
        uring.io_uring_sqe_set_flags(sqe, flags)
        sqe.user_data = call.number

    def _index(self, address: int, nbytes: int) -> int | None:
        """Which registered buffer the bytes lie in."""
        for index, (begin, end) in enumerate(self._buffers):
            if begin <= address and address + nbytes <= end:
                return index
        return None

    def _sqe(self) -> Any:
        while (sqe := self._uring.io_uring_get_sqe(self._ring)) is None:
            self._submit()
        return sqe

    def _submit(self) -> None:
        while self._uring.io_uring_sq_ready(self._ring):
            try:
                self._uring.io_uring_submit(self._ring)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM):
                    raise
                time.sleep(0.001)  # short of memory or of room for completions: waiters have their own time limit
                self._reap()

    def _reap(self) -> None:
        for _ in range(self._uring.io_uring_cq_ready(self._ring)):
            self._uring.io_uring_peek_cqe(self._ring, self._cqe)
            entry = self._cqe[0]
            number, count, failed = entry.user_data, 0, 0
            try:
                count = entry.res
            except OSError as error:
                failed = error.errno or errno.EIO
            self._uring.io_uring_cqe_seen(self._ring, entry)
            if number == _CANCEL:
                continue
            call = self._calls.pop(number)
            if call.vector is not None:
                self._vectors.append(call.vector)
                call.vector = None
            if failed in (errno.EAGAIN, errno.EINTR):
                self._queue_call(call)
            elif failed == errno.EINVAL and call.index is not None:
                self._buffers = []  # vectored calls on registered buffers came with Linux 6.15
                self._queue_call(call)
            else:
                self._moved(call, count, failed)

    def _moved(self, call: _Call, count: int, failed: int) -> None:
        flight = call.flight

        def account() -> None:
            if failed:
                _raise(failed)
            call.moved = progressed(flight.transfer, self.meter, flight.view, call.moved, count)

        failure = guarded(flight.transfer, account)
        if failure is None and call.moved < call.stop:
            self._queue_call(call)
        else:
            self._over(call, failure)

    def _over(self, call: _Call, failure: StoreError | None) -> None:
        """A call is over; with the last one the transfer's bytes are moved, or it failed where the first gap is."""
        flight = call.flight
        flight.calls -= 1
        if failure is not None and (flight.failure is None or call.moved < flight.failed_at):
            flight.failure, flight.failed_at = failure, call.moved
        if flight.calls:
            return
        if flight.failure is None and flight.transfer.after is not None:
            self._jobs.put(functools.partial(self._finish, flight))
        else:
            self._end(flight.transfer, flight.failure)

    # ---- the helpers ----

    @staticmethod
    def _help(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            job()
            del job

    def _begin(self, flight: _Flight) -> None:
        """What comes before the bytes move; a sync is nothing else."""
        transfer, before, action = flight.transfer, flight.transfer.before, flight.transfer.action

        def stages() -> None:
            if before is not None:
                before(flight.view)
            if action is not None:
                action()

        failure = guarded(transfer, stages)
        if failure is not None or action is not None:
            self._end(transfer, failure)
        else:
            self._begun.append(flight)
        self._wake()

    def _finish(self, flight: _Flight) -> None:
        after = flight.transfer.after
        failure = guarded(flight.transfer, lambda: None if after is None else after(flight.view))
        self._end(flight.transfer, failure)
        self._wake()

    # ---- others' threads ----

    def _wake(self) -> None:
        with self._lock:  # so that nobody writes to the descriptor when it is closed, and perhaps another file's
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def _cancel_running(self) -> None:
        self._cancelling = True
        self._wake()
        self._drained(time.monotonic() + GRACE)

    def _stop(self) -> None:
        for _ in self._threads:  # more than there are, of either kind
            self._jobs.put(None)
            self._syncs.put(None)
        self._wake()

    def _release(self) -> None:
        with self._lock:
            event, self._event = self._event, -1
        if event < 0:
            return  # closed before
        self._uring.io_uring_queue_exit(self._ring)
        os.close(event)


class _Files:
    """The ring's table of registered files, filled as files are met. Its files stay open until the ring is closed."""

    def __init__(self, uring: Any, ring: Any) -> None:
        self._uring, self._ring = uring, ring
        self._slots: dict[DirectFile, tuple[int, int]] = {}
        try:
            uring.io_uring_register_files_sparse(ring, _FILES)
            self._room = _FILES
        except OSError:  # before Linux 5.19
            self._room = 0

    def slot(self, file: DirectFile) -> int | None:
        """Where `file` is in the table; None when it is not and cannot be put there."""
        slot, generation = self._slots.get(file, (-1, -1))
        if generation == file.generation:
            return slot
        if slot < 0:
            slot = len(self._slots)
            if slot >= self._room:
                return None
        try:
            self._uring.io_uring_register_files_update(self._ring, self._uring.FileIndex([file.fd]), slot)
        except OSError:
            self._room = 0
            return None
        self._slots[file] = (slot, file.generation)
        return slot


def _raise(code: int) -> None:
    raise OSError(code, os.strerror(code))
