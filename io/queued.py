"""What all backends share: one bounded queue in order of urgency, and a shutdown that cannot hang."""

from __future__ import annotations

import heapq
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable

from .backend import Backend
from .buffers import PAGE
from .errors import IOTimeout, StoreError, from_os_error
from .request import Meter, Observer, Transfer
from .scheduling import yield_to_compute

QUEUE = 4096
"""Transfers that may wait before submit() blocks: 32 GiB in pieces of 8 MiB, more than any buffer pool holds."""


class QueuedBackend(Backend):
    """A backend whose transfers wait in one queue: most urgent first, first come first served within a priority.

    A subclass takes transfers with _take() and hands each back with _end(); _wake() is called, under no lock, after
    there is something to take and after closing began.
    """

    def __init__(self, *, timeout: float, observer: Observer | None, limit: int = QUEUE) -> None:
        super().__init__(Meter(timeout, observer))
        self._limit = limit
        self._queue: list[tuple[int, int, Transfer]] = []
        self._sequence = 0
        self._running: set[Transfer] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._changed = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []

    def _start_thread(self, name: str, target: Callable[[], None], urgent: bool = False) -> None:
        """Start a thread of this backend; an `urgent` one only wakes to keep the device busy, others work too."""

        def run() -> None:
            if not urgent:
                yield_to_compute()
            target()

        # Daemons: a thread stuck in a system call on a hung device must not keep the process alive.
        thread = threading.Thread(target=run, name=f"offload-io-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def submit(self, transfer: Transfer) -> None:
        with self._lock:
            if len(self._queue) >= self._limit and threading.current_thread() not in self._threads:
                self._wait_for_room(transfer)
            if self._closed:
                raise StoreError(f"{transfer.describe()} refused: the backend is closed", path=transfer.path)
            transfer.progress = time.perf_counter()
            transfer.meter = self.meter
            heapq.heappush(self._queue, (int(transfer.priority), self._sequence, transfer))
            self._sequence += 1
            self._filled.notify()
        self._wake()

    def _wait_for_room(self, transfer: Transfer) -> None:
        asked = time.perf_counter()
        while len(self._queue) >= self._limit and not self._closed:
            left = max(asked, self.meter.progress) + self.timeout - time.perf_counter()
            if left <= 0:
                raise IOTimeout(
                    f"{transfer.describe()} cannot be queued: {self._limit} requests wait and the device makes no "
                    "progress within the time limit: it hangs",
                    path=transfer.path,
                    offset=transfer.offset,
                    length=transfer.nbytes,
                )
            self._changed.wait(left)

    def close(self, timeout: float | None = None) -> bool:
        with self._lock:
            self._closed = True
            queued, self._queue = [item[2] for item in sorted(self._queue)], []
            self._filled.notify_all()
            self._changed.notify_all()
        for transfer in queued:
            transfer.finish(
                StoreError(
                    f"{transfer.describe()} cancelled: the backend was closed",
                    path=transfer.path,
                    offset=transfer.offset,
                    length=transfer.nbytes,
                )
            )
        self._wake()
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        if not self._drained(deadline):
            self._cancel_running()
        with self._lock:
            stuck = list(self._running)
        for transfer in stuck:
            transfer.finish(transfer.timed_out("still running when the backend was closed: the device hangs"))
        if stuck:
            return False
        self._stop()
        for thread in self._threads:  # nothing runs any more, so they end at once
            if thread is not threading.current_thread():
                thread.join(self.timeout)
        self._release()
        return True

    def _drained(self, deadline: float) -> bool:
        """Wait until nothing runs; False at `deadline` (time.monotonic() seconds)."""
        with self._lock:
            while self._running:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def _take(self, wait: bool) -> Transfer | None:
        """The next transfer, now running. None when there is none (`wait`: when the backend was closed)."""
        with self._lock:
            while wait and not self._queue and not self._closed:
                self._filled.wait()
            if not self._queue:
                return None
            transfer = heapq.heappop(self._queue)[2]
            self._running.add(transfer)
            self._changed.notify()
        transfer.begin = transfer.progress = time.perf_counter()
        return transfer

    def _end(self, transfer: Transfer, failure: StoreError | None) -> None:
        """A transfer that was taken is over."""
        transfer.end = time.perf_counter()
        self.meter.finished(transfer)
        with self._lock:
            self._running.discard(transfer)
            if not self._running:
                self._changed.notify_all()
        transfer.finish(failure)  # after the above: a callback may close the backend

    def _break(self, error: BaseException) -> None:
        """What serves the queue failed in a way that nobody expected: fail all that waits, and take no more."""
        with self._lock:
            self._closed = True
            waiting = [item[2] for item in sorted(self._queue)] + list(self._running)
            self._queue = []
            self._changed.notify_all()
        for transfer in waiting:
            failure = StoreError(
                f"{transfer.describe()} failed because backend {self.name} stopped with {error!r}",
                path=transfer.path,
                offset=transfer.offset,
                length=transfer.nbytes,
                advice="Set memory.backend to threads.",
            )
            failure.__cause__ = error
            transfer.finish(failure)

    @abstractmethod
    def _wake(self) -> None:
        """Make those that serve the queue look at it."""

    def _cancel_running(self) -> None:
        """Last attempt to end what the device does not finish, for instance by asking the kernel to cancel it."""

    def _stop(self) -> None:
        """Make threads end that do not wait at the queue; nothing runs any more."""

    def _release(self) -> None:
        """Give back what the backend holds; all threads have ended."""


def guarded(transfer: Transfer, action: Callable[[], None]) -> StoreError | None:
    """Run one stage of a transfer; what it raises, as the error that its waiter shall get."""
    try:
        action()
    except StoreError as error:
        return error
    except OSError as error:
        return from_os_error(error, f"{transfer.describe()} failed", transfer.path, transfer.offset, transfer.nbytes)
    except BaseException as error:  # whatever it is, the waiter must learn of it
        failure = StoreError(f"{transfer.describe()} failed with {error!r}", path=transfer.path, offset=transfer.offset)
        failure.__cause__ = error
        return failure
    return None


def perform(transfer: Transfer, move: Callable[[Transfer, memoryview], None]) -> StoreError | None:
    """Run a whole transfer in this thread: its hooks and, between them, its action or `move`."""
    view, before, action, after = transfer.view, transfer.before, transfer.action, transfer.after

    def stages() -> None:
        if before is not None:
            before(view)
        if action is not None:
            action()
        else:
            move(transfer, view)
        if after is not None:
            after(view)

    return guarded(transfer, stages)


def progressed(transfer: Transfer, meter: Meter, view: memoryview, moved: int, count: int) -> int:
    """Account for `count` bytes that one call moved after `moved` others; the bytes that now need no further call.

    Raises StoreError when the call moved nothing: the file, or the room on the device, ended there.
    """
    if transfer.file.direct:
        count -= count % PAGE  # the next call must be aligned too: move the broken page again
    if count == 0:
        raise StoreError(
            f"{transfer.describe()} ended after {moved} of {len(view)} bytes"
            + (": the file is shorter" if transfer.kind == "read" else ": the device takes no more"),
            path=transfer.path,
            offset=transfer.offset + moved,
            length=len(view) - moved,
            advice="The file was changed from outside; verify the store.",
        )
    meter.moved(transfer, count)
    return moved + count


def move_by_calls(transfer: Transfer, meter: Meter, view: memoryview, moved: int = 0) -> None:
    """preadv or pwritev until all bytes are moved (Python itself retries a call that a signal interrupted)."""
    call = os.preadv if transfer.kind == "read" else os.pwritev
    while moved < len(view) and not transfer.done():  # done: given up by close(), and the file may be closed next
        part = view[moved : min(len(view), moved + transfer.most_per_call)]
        count = call(transfer.file.fd, [part], transfer.offset + moved)
        moved = progressed(transfer, meter, view, moved, count)
        if transfer.kind == "write" and not transfer.file.direct:
            transfer.file.cached(count)
