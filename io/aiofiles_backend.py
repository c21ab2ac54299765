"""The backend of aiofiles: buffered reads and writes by portable calls, for file systems without O_DIRECT.

An event loop in one thread; the package runs the calls in the threads of the executor it is given. Every worker has
its own handle of a file, because the calls move the handle's position.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import aiofiles

from .queued import QUEUE, QueuedBackend, guarded, progressed
from .request import Observer, Transfer

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class AiofilesBackend(QueuedBackend):
    """Reads and writes through the page cache, `depth` at a time."""

    name = "aiofiles"

    def __init__(
        self, depth: int = 4, *, timeout: float = 120.0, observer: Observer | None = None, limit: int = QUEUE
    ) -> None:
        super().__init__(timeout=timeout, observer=observer, limit=limit)
        self._depth = depth
        self._loop = asyncio.new_event_loop()
        self._executor = _Daemons(depth)
        self._work = asyncio.Semaphore(0)  # one for each transfer in the queue
        self._start_thread("loop", self._run)
        self._threads += self._executor.threads

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve_all())
        except BaseException as error:
            logger.exception("the event loop of the aiofiles backend stopped")
            self._break(error)
        self._executor.shutdown()
        with self._lock:  # see _wake
            self._loop.close()

    async def _serve_all(self) -> None:
        await asyncio.gather(*(self._serve() for _ in range(self._depth)))

    async def _serve(self) -> None:
        handles: dict[tuple[int, int], Any] = {}  # by device and inode
        while True:
            await self._work.acquire()
            transfer = self._take(wait=False)
            if transfer is None:  # woken because closing began
                break
            await self._execute(transfer, handles)
            del transfer
        for handle in handles.values():
            await handle.close()

    async def _execute(self, transfer: Transfer, handles: dict[tuple[int, int], Any]) -> None:
        view, before, action, after = transfer.view, transfer.before, transfer.action, transfer.after
        try:
            if before is not None:
                await self._call(before, view)
            if action is not None:
                await self._call(action)
            else:
                await self._move(transfer, view, handles)
            if after is not None:
                await self._call(after, view)
        except BaseException as error:
            self._end(transfer, guarded(transfer, functools.partial(_raise, error)))
        else:
            self._end(transfer, None)

    async def _move(self, transfer: Transfer, view: memoryview, handles: dict[tuple[int, int], Any]) -> None:
        status = os.fstat(transfer.file.fd)  # EBADF when it was closed
        key = (status.st_dev, status.st_ino)
        if key not in handles:
            handles[key] = await aiofiles.open(
                transfer.file.path, "r+b", buffering=0, loop=self._loop, executor=self._executor
            )
        handle, moved = handles[key], 0
        while moved < len(view) and not transfer.done():
            await handle.seek(transfer.offset + moved)
            part = view[moved : min(len(view), moved + transfer.most_per_call)]
            count = await (handle.readinto(part) if transfer.kind == "read" else handle.write(part))
            moved = progressed(transfer, self.meter, view, moved, count)
            if transfer.kind == "write":
                await self._loop.run_in_executor(self._executor, transfer.file.cached, count)

    async def _call(self, function: Callable[..., None], *arguments: memoryview) -> None:
        await self._loop.run_in_executor(self._executor, function, *arguments)

    def _wake(self) -> None:
        def more() -> None:
            for _ in range(self._depth if self._closed else 1):
                self._work.release()

        with self._lock:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(more)


class _Daemons(Executor):
    """Threads that do not keep the process alive when one is stuck in a call, as those of ThreadPoolExecutor do."""

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=self._serve, name=f"offload-io-{number}", daemon=True) for number in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, function: Callable[..., _Result], /, *args: Any, **kwargs: Any) -> Future[_Result]:
        future: Future[_Result] = Future()

        def job() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for _ in self.threads:
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job


def _raise(error: BaseException) -> None:
    raise error
