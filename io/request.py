"""Operations under way: one that a backend executes, and several that complete as one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from .buffers import PAGE
from .directfile import DirectFile
from .errors import IOTimeout, StoreError

logger = logging.getLogger(__name__)

Observer = Callable[[str, float, float, int, str], None]
"""Called as observer(kind, begin, end, nbytes, label) in the I/O thread after each operation; times are
time.perf_counter() seconds. A sync of a file is reported as a "write" of 0 bytes labelled "sync"."""

# What Linux moves at most in one read or write call: 2 GiB less a page.
MAX_CALL = 0x7FFFF000


class Priority(IntEnum):
    """Order of service; within one priority first come, first served."""

    COMPUTE = 0  # what compute waits for
    STATE = 1  # optimizer state, prefetched
    WRITE = 2  # write-behind


class Meter:
    """What a backend shows of itself: bytes moved, the time of its last progress, and the limit to being without.

    `timeout` is in seconds, `progress` the time.perf_counter() at which any request last moved bytes.
    """

    def __init__(self, timeout: float, observer: Observer | None) -> None:
        self.timeout = timeout
        self.observer = observer
        self.progress = time.perf_counter()
        self.bytes_read = 0
        self.bytes_written = 0
        self._lock = threading.Lock()

    def moved(self, transfer: Transfer, nbytes: int) -> None:
        """Count bytes that a system call of `transfer` moved."""
        with self._lock:
            if transfer.kind == "read":
                self.bytes_read += nbytes
            else:
                self.bytes_written += nbytes
            self.progress = transfer.progress = time.perf_counter()

    def finished(self, transfer: Transfer) -> None:
        """Tell the observer, if there is one."""
        if self.observer is None:
            return
        kind = "read" if transfer.kind == "read" else "write"
        try:
            self.observer(kind, transfer.begin, transfer.end, transfer.nbytes, transfer.label)
        except Exception:
            logger.exception("the observer failed for %s", transfer.describe())


class Request:
    """An operation under way. Completes exactly once, with or without an error.

    `kind` is "read", "write" or "sync"; `offset` and `nbytes` are bytes in `path`; `begin` and `end` are
    time.perf_counter() seconds of the work itself (not of queueing), 0.0 until known.
    """

    def __init__(self, kind: str, path: Path, offset: int, nbytes: int, label: str = "") -> None:
        self.kind = kind
        self.path = path
        self.offset = offset
        self.nbytes = nbytes
        self.label = label
        self.begin = 0.0
        self.end = 0.0
        self._error: StoreError | None = None
        self._finished = False
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Request], None]] = []

    def done(self) -> bool:
        """True once the operation ended, well or badly."""
        return self._event.is_set()

    @property
    def error(self) -> StoreError | None:
        """Why the operation failed; None while it runs and when it succeeded."""
        return self._error

    def wait(self, timeout: float | None = None) -> None:
        """Return when the operation succeeded; raise its StoreError when it failed.

        Raises IOTimeout after `timeout` seconds; without one, when the device made no progress for the backend's
        time limit. After an IOTimeout the operation may still be running: its buffer must not be reused.
        """
        if timeout is not None:
            if not self._event.wait(timeout):
                raise self.timed_out(f"not done within {timeout:g} s")
        else:
            while not self._event.is_set():
                stuck, left = self._stuck()
                if left <= 0:
                    raise stuck.timed_out("no progress within the time limit: the device hangs")
                self._event.wait(left)
        if self._error is not None:
            raise self._error

    def add_done_callback(self, function: Callable[[Request], None]) -> None:
        """Call function(request) once done: in the I/O thread, or here and now if it is done already. It must not wait
        for other requests."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(function)
                return
        function(self)

    def finish(self, error: StoreError | None) -> bool:
        """Complete the request (backends call this). False, and nothing happens, if it was complete already."""
        with self._lock:
            if self._finished:
                return False
            self._finished = True
        self._error = error
        self._settle(error)
        with self._lock:  # from here on "done": a callback added now sees everything settled
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for function in callbacks:
            try:
                function(self)
            except Exception:
                logger.exception("a callback of %s failed", self.describe())
        return True

    def describe(self) -> str:
        """What this request is, for messages."""
        label = f" of '{self.label}'" if self.label else ""
        return f"{self.kind}{label}"

    def timed_out(self, message: str) -> IOTimeout:
        """The error that says so, with file and offset."""
        return IOTimeout(f"{self.describe()}: {message}", path=self.path, offset=self.offset, length=self.nbytes)

    def _settle(self, error: StoreError | None) -> None:
        """Last bookkeeping before waiters see the result."""

    def _stuck(self) -> tuple[Request, float]:
        """The request that has gone longest without progress, and the seconds that are left to it."""
        raise NotImplementedError


class Transfer(Request):
    """One contiguous read or write of `buffer`, or (kind "sync") a call of `action`, as a backend executes it.

    `before(view)` and `after(view)` run in the I/O thread around the transfer, on the buffer's bytes; an exception of
    theirs fails the request. `most_per_call` limits the bytes of one system call.
    """

    def __init__(
        self,
        kind: str,
        file: DirectFile,
        offset: int,
        buffer: Tensor | None,
        priority: Priority,
        *,
        label: str = "",
        before: Callable[[memoryview], None] | None = None,
        after: Callable[[memoryview], None] | None = None,
        action: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(kind, file.path, offset, 0 if buffer is None else buffer.numel(), label)
        self.file = file
        self.priority = priority
        self.before = before
        self.after = after
        self.action = action
        self.most_per_call = MAX_CALL
        self.view = memoryview(b"") if buffer is None else _view(buffer, self)
        self.address = 0 if buffer is None else buffer.data_ptr()
        self.meter: Meter | None = None
        self.progress = 0.0

    def _settle(self, error: StoreError | None) -> None:
        # Let the memory go: a request may be kept long after its buffer was freed.
        self.view = memoryview(b"")
        self.before = self.after = self.action = None

    def _stuck(self) -> tuple[Request, float]:
        if self.meter is None:
            return self, 1.0  # about to be submitted
        latest = self.progress if self.begin else max(self.progress, self.meter.progress)
        return self, latest + self.meter.timeout - time.perf_counter()


class Batch(Request):
    """Several requests that complete as one: with the first error, once all of them are done."""

    def __init__(
        self, children: Sequence[Transfer], label: str, settle: Callable[[StoreError | None], None] | None = None
    ) -> None:
        first = children[0]
        super().__init__(first.kind, first.path, first.offset, sum(child.nbytes for child in children), label)
        self.children = tuple(children)
        self._left = len(self.children)
        self._first_error: StoreError | None = None
        self._settled = settle
        for child in self.children:
            child.add_done_callback(self._child_done)

    def _child_done(self, child: Request) -> None:
        with self._lock:
            self._left -= 1
            if child.begin:
                self.begin = child.begin if not self.begin else min(self.begin, child.begin)
                self.end = max(self.end, child.end)
            self._first_error = self._first_error or child.error
            last = self._left == 0
        if last:
            self.finish(self._first_error)

    def _settle(self, error: StoreError | None) -> None:
        settle, self._settled = self._settled, None
        if settle is not None:
            settle(error)

    def _stuck(self) -> tuple[Request, float]:
        running = [child._stuck() for child in self.children if not child.done()]
        return min(running, key=lambda item: item[1]) if running else (self, 1.0)


def _view(buffer: Tensor, request: Request) -> memoryview:
    """The bytes of a buffer; StoreError unless it and the request are fit for O_DIRECT."""
    wrong = ""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous() or buffer.device.type != "cpu":
        wrong = "the buffer must be a contiguous 1-D uint8 tensor on the CPU"
    elif buffer.data_ptr() % PAGE:
        wrong = f"the buffer's address must be a multiple of {PAGE}"
    elif buffer.numel() % PAGE or buffer.numel() == 0 or request.offset % PAGE or request.offset < 0:
        wrong = f"offset and length must be multiples of {PAGE}, the length not zero"
    if wrong:
        raise StoreError(
            f"{request.describe()} refused: {wrong}", path=request.path, offset=request.offset, length=request.nbytes
        )
    return buffer.numpy().data
