"""Backends: what executes transfers asynchronously. Here the one of plain threads, which works on every Linux."""

from __future__ import annotations

import heapq
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .buffers import PAGE
from .directfile import DirectFile
from .errors import StoreError, from_os_error
from .request import Meter, Observer, Priority, Request, Transfer


class Backend(ABC):
    """What executes transfers. `timeout` (seconds) is how long a device may make no progress before waiters fail."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    @property
    def timeout(self) -> float:
        return self.meter.timeout

    @property
    def observer(self) -> Observer | None:
        """Called after every operation; see Observer."""
        return self.meter.observer

    @observer.setter
    def observer(self, value: Observer | None) -> None:
        self.meter.observer = value

    @property
    def bytes_read(self) -> int:
        return self.meter.bytes_read

    @property
    def bytes_written(self) -> int:
        return self.meter.bytes_written

    @abstractmethod
    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer. Raises StoreError when the backend is closed."""

    @abstractmethod
    def close(self, timeout: float | None = None) -> bool:
        """Fail what is queued, let what runs finish for `timeout` seconds, fail the rest. False if some still runs."""

    def read(
        self, file: DirectFile, offset: int, buffer: Tensor, priority: Priority = Priority.COMPUTE, label: str = ""
    ) -> Request:
        """Fill `buffer` from `offset` on. Ending before the buffer is full is an error."""
        transfer = Transfer("read", file, offset, buffer, priority, label=label)
        self.submit(transfer)
        return transfer

    def write(
        self, file: DirectFile, offset: int, buffer: Tensor, priority: Priority = Priority.WRITE, label: str = ""
    ) -> Request:
        """Write all of `buffer` at `offset`. The buffer must not change until the request is done."""
        transfer = Transfer("write", file, offset, buffer, priority, label=label)
        self.submit(transfer)
        return transfer

    def sync(self, file: DirectFile, action: Callable[[], None] | None = None, path: Path | None = None) -> Request:
        """Run file.fsync(), or another blocking `action` (on `path`), in the I/O threads and under their time limit."""
        transfer = Transfer("sync", file, 0, None, Priority.COMPUTE, label="sync", action=action or file.fsync)
        transfer.path = path or file.path
        self.submit(transfer)
        return transfer


class ThreadsBackend(Backend):
    """`preadv`/`pwritev` from a few threads that serve one priority queue. Works on every Linux."""

    def __init__(self, threads: int = 4, *, timeout: float = 120.0, observer: Observer | None = None) -> None:
        super().__init__(Meter(timeout, observer))
        self._queue: list[tuple[int, int, Transfer]] = []
        self._sequence = 0
        self._running: set[Transfer] = set()
        self._closed = False
        self._changed = threading.Condition()
        # Daemons: a thread stuck in a system call on a hung device must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._serve, name=f"offload-io-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer) -> None:
        with self._changed:
            if self._closed:
                raise StoreError(f"{transfer.describe()} refused: the backend is closed", path=transfer.path)
            transfer.progress = time.perf_counter()
            transfer.meter = self.meter
            heapq.heappush(self._queue, (int(transfer.priority), self._sequence, transfer))
            self._sequence += 1
            self._changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._closed = True
            queued, self._queue = [item[2] for item in self._queue], []
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
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            stuck = list(self._running)
        for transfer in stuck:
            transfer.finish(transfer.timed_out("still running when the backend was closed: the device hangs"))
        return not stuck

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                transfer = heapq.heappop(self._queue)[2]
                self._running.add(transfer)
            failure = self._execute(transfer)
            with self._changed:
                self._running.discard(transfer)
            transfer.finish(failure)

    def _execute(self, transfer: Transfer) -> StoreError | None:
        failure: StoreError | None = None
        view, before, after = transfer.view, transfer.before, transfer.after
        transfer.begin = transfer.progress = time.perf_counter()
        try:
            if before is not None:
                before(view)
            if transfer.action is not None:
                transfer.action()
            else:
                self._move(transfer, view)
            if after is not None:
                after(view)
        except StoreError as error:
            failure = error
        except OSError as error:
            failure = from_os_error(
                error, f"{transfer.describe()} failed", transfer.path, transfer.offset, transfer.nbytes
            )
        except BaseException as error:  # whatever it is, the waiter must learn of it
            failure = StoreError(
                f"{transfer.describe()} failed with {error!r}", path=transfer.path, offset=transfer.offset
            )
            failure.__cause__ = error
        transfer.end = time.perf_counter()
        del view
        self.meter.finished(transfer)
        return failure

    def _move(self, transfer: Transfer, view: memoryview) -> None:
        """Loop until all bytes are moved (Python itself retries a call that a signal interrupted)."""
        moved = 0
        call = os.preadv if transfer.kind == "read" else os.pwritev
        while moved < len(view):
            if transfer.done():
                return  # given up by close(): the file may be closed next
            part = view[moved : min(len(view), moved + transfer.most_per_call)]
            count = call(transfer.file.fd, [part], transfer.offset + moved)
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
            moved += count
            self.meter.moved(transfer, count)
