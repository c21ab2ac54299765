"""The backend of plain threads: no native code, works on every Linux and every file system."""

from __future__ import annotations

from .queued import QUEUE, QueuedBackend, move_by_calls, perform
from .request import Observer, Transfer


class ThreadsBackend(QueuedBackend):
    """`preadv`/`pwritev` from a few threads that serve one queue."""

    name = "threads"

    def __init__(
        self, threads: int = 4, *, timeout: float = 120.0, observer: Observer | None = None, limit: int = QUEUE
    ) -> None:
        super().__init__(timeout=timeout, observer=observer, limit=limit)
        for number in range(threads):
            self._start_thread(str(number), self._serve)

    def _serve(self) -> None:
        while (transfer := self._take(wait=True)) is not None:
            self._end(transfer, perform(transfer, self._move))
            del transfer  # its memory must not be held while waiting for the next one

    def _move(self, transfer: Transfer, view: memoryview) -> None:
        move_by_calls(transfer, self.meter, view)

    def _wake(self) -> None:
        pass  # the threads wait at the queue itself
