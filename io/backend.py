"""The interface of all backends: what executes transfers asynchronously.

Which there are: threads (threads.py), io_uring (uring.py), libaio (libaio.py), aiofiles (aiofiles_backend.py). Which
of them to take: choose.py. What they have in common, the queue and its shutdown: queued.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from .directfile import DirectFile
from .errors import StoreError
from .request import Batch, Meter, Observer, Priority, Request, Transfer

PIECE = 8 << 20
"""Bytes of the largest transfer that read() and write() make; larger buffers become several, which run side by side."""


class Backend(ABC):
    """What executes transfers. `timeout` (seconds) is how long a device may make no progress before waiters fail."""

    name: ClassVar[str]

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
        """Queue a transfer. Blocks while the queue is full (never in an I/O thread, where callbacks run).

        Raises StoreError when the backend is closed, IOTimeout when a full queue makes no progress for `timeout`.
        """

    @abstractmethod
    def close(self, timeout: float | None = None) -> bool:
        """Fail what is queued, let what runs finish for `timeout` seconds, fail the rest. False if some still runs."""

    def register(self, buffers: Sequence[Tensor]) -> bool:
        """Say that these page-aligned buffers will be used for transfers again and again, until close().

        A backend that can spares the kernel looking up their pages for every request. False if that changes nothing.
        """
        return False

    def read(
        self, file: DirectFile, offset: int, buffer: Tensor, priority: Priority = Priority.COMPUTE, label: str = ""
    ) -> Request:
        """Fill `buffer` from `offset` on. Ending before the buffer is full is an error."""
        return self._transfer("read", file, offset, buffer, priority, label)

    def write(
        self, file: DirectFile, offset: int, buffer: Tensor, priority: Priority = Priority.WRITE, label: str = ""
    ) -> Request:
        """Write all of `buffer` at `offset`. The buffer must not change until the request is done."""
        return self._transfer("write", file, offset, buffer, priority, label)

    def sync(self, file: DirectFile, action: Callable[[], None] | None = None, path: Path | None = None) -> Request:
        """Run file.fsync(), or another blocking `action` (on `path`), in the I/O threads and under their time limit."""
        transfer = Transfer("sync", file, 0, None, Priority.COMPUTE, label="sync", action=action or file.fsync)
        transfer.path = path or file.path
        self.submit(transfer)
        return transfer

    def _transfer(
        self, kind: str, file: DirectFile, offset: int, buffer: Tensor, priority: Priority, label: str
    ) -> Request:
        transfers = [
            Transfer(kind, file, offset + start, buffer[start : start + PIECE], priority, label=label)
            for start in range(0, max(buffer.numel(), 1), PIECE)
        ]
        if len(transfers) == 1:
            self.submit(transfers[0])
            return transfers[0]
        batch = Batch(transfers, label)
        for transfer in transfers:
            try:
                self.submit(transfer)
            except StoreError as error:  # the pieces before it may be under way: the batch must say it
                transfer.finish(error)
        return batch
