"""The backend of libaio, through DeepSpeed's `async_io` operator (`deepspeed.ops.op_builder.AsyncIOBuilder`).

DeepSpeed compiles the operator when it is first loaded, which takes minutes and needs a compiler and libaio's headers.
So it is only taken when it is built already, or when the user names it.

The operator never looks at the result of a request (deepspeed_aio_common.cpp, `_do_io_complete`, version 0.19.8). So
the results are checked here: before a read one word of every page gets a mark that must be gone afterwards, and after a
write the last page of every block is read back and compared. What fails that check is done again with preadv or
pwritev, which says what is wrong. And it ends the process (`assert`) when the kernel refuses to take a request or to
lock memory. What can be known before, a closed or too short file and the limit of locked memory, is checked here; the
rest is as a crash at that moment. For this, and because it copies every buffer that is not page-locked for CUDA, "auto"
never takes it. (Without CUDA, only buffers made by its `new_cpu_locked_tensor` would be spared the copy: all of them
under the limit of locked memory, in small pages, and gone under the views that outlive them.)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import mmap
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import PIECE
from .buffers import PAGE, allocate, lock
from .errors import StoreError
from .ledger import Ledger
from .queued import QUEUE, QueuedBackend, move_by_calls, perform
from .request import Observer, Transfer

logger = logging.getLogger(__name__)

READ_BLOCK = 1 << 20
WRITE_BLOCK = PIECE  # of each block one page is read back
DEPTH = 8
_WORDS = PAGE // 8
_OPERATORS = ("async_io", "pin_memory")


def built() -> bool:
    """Whether the operator can be loaded without compiling it. Looks for its files only; imports nothing."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        return False
    shipped = Path(found.origin).parent / "ops"  # built when DeepSpeed was installed (DS_BUILD_AIO=1)
    if all(any(shipped.rglob(f"{name}_op*.so")) for name in _OPERATORS):
        return True
    if _locks():
        return False
    return any(all(_is_of_this_torch(folder / name) for name in _OPERATORS) for folder in build_folders())


def _is_of_this_torch(folder: Path) -> bool:
    """Whether the operator there was built against the PyTorch of this environment; another one would be built anew."""
    torch = importlib.util.find_spec("torch")
    commands = folder / "build.ninja"
    if torch is None or torch.origin is None or not (folder / f"{folder.name}.so").is_file() or not commands.is_file():
        return False
    return f"{Path(torch.origin).parent}/" in commands.read_text()


def build_folders() -> list[Path]:
    """Where PyTorch keeps the operators that it has built, each in a folder of its name."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(cache)] if cache else list((Path.home() / ".cache" / "torch_extensions").glob("py*"))


def _locks() -> list[Path]:
    """Locks of builds under way, or interrupted: PyTorch would wait for them without end."""
    return [lock for folder in build_folders() for name in _OPERATORS if (lock := folder / name / "lock").exists()]


_loading = threading.Lock()


def load(*, compile: bool) -> Any:
    """DeepSpeed's module with `aio_handle`. Raises StoreError with the reason when it cannot be had."""
    if importlib.util.find_spec("deepspeed") is None:
        raise StoreError(
            "libaio cannot be used: the package deepspeed is not installed",
            advice="Install it with pip install deepspeed, or set memory.backend to threads.",
        )
    if not compile and not built():
        raise StoreError(
            "libaio cannot be used: DeepSpeed's async_io operator is not built",
            advice="Set memory.backend to libaio to have it compiled (minutes; needs a C++ compiler and libaio-dev).",
        )
    if locks := _locks():
        raise StoreError(
            f"libaio cannot be used: {locks[0]} says that DeepSpeed's operator is being built",
            advice="Wait for that build to end; if none is running, one was interrupted: remove the file.",
        )
    try:
        # It prints compiler commands and warnings to standard output, which belongs to the program.
        with _loading, contextlib.redirect_stdout(sys.stderr):
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not built():
                logger.warning("compiling DeepSpeed's async_io operator: this takes minutes, once")
            return AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise StoreError(
            f"libaio cannot be used: DeepSpeed's async_io operator does not load ({reason[0] if reason else error!r})",
            advice="It needs the package libaio-dev and a C++ compiler; or set memory.backend to threads.",
        ) from error


class LibaioBackend(QueuedBackend):
    """DeepSpeed's `aio_handle`, one per thread, behind the queue of all backends.

    Buffers that are not page-locked for it go through a locked chunk of 8 MiB per thread. Raises StoreError when the
    operator cannot be loaded (`compile`: built).
    """

    name = "libaio"

    def __init__(
        self,
        threads: int = 4,
        *,
        compile: bool = False,
        timeout: float = 120.0,
        observer: Observer | None = None,
        limit: int = QUEUE,
    ) -> None:
        super().__init__(timeout=timeout, observer=observer, limit=limit)
        self._module = load(compile=compile)
        _check_lockable(threads * PIECE)
        for number in range(threads):
            self._start_thread(str(number), self._serve)

    def _serve(self) -> None:
        lane = _Lane(self._module)
        while (transfer := self._take(wait=True)) is not None:
            self._end(transfer, perform(transfer, lambda transfer, view: self._move(lane, transfer, view)))
            del transfer  # its memory must not be held while waiting for the next one
        lane.close()

    def _move(self, lane: _Lane, transfer: Transfer, view: memoryview) -> None:
        moved = 0
        # The operator opens every file with O_DIRECT.
        while transfer.file.direct and moved < len(view) and not transfer.done():
            part = view[moved : min(len(view), moved + PIECE, moved + transfer.most_per_call)]
            good = lane.move(transfer, transfer.offset + moved, part)
            if good:
                self.meter.moved(transfer, good)
            moved += good
            if good < len(part):
                break
        move_by_calls(transfer, self.meter, view, moved)

    def _wake(self) -> None:
        pass  # the threads wait at the queue itself


def _check_lockable(nbytes: int) -> None:
    """Raise StoreError unless that much more memory can be locked now: the operator would end the process."""
    try:
        with allocate(nbytes, Ledger()) as probe:
            lock(probe.tensor)
    except StoreError as error:
        raise StoreError(
            f"libaio cannot be used: DeepSpeed's operator copies through locked memory, and {nbytes} bytes of it "
            "cannot be had",
            errno=error.errno,
            advice="Raise the limit of locked memory (ulimit -l), or set memory.backend to threads.",
        ) from error


class _Lane:
    """The handles of one thread."""

    def __init__(self, module: Any) -> None:
        self._read = module.aio_handle(READ_BLOCK, DEPTH, False, True, 1)
        self._write = module.aio_handle(WRITE_BLOCK, DEPTH, False, True, 1)
        self._chunk: Tensor | None = None
        self._page = mmap.mmap(-1, PAGE)

    def move(self, transfer: Transfer, offset: int, part: memoryview) -> int:
        """Move at most PIECE bytes; how many from the start on are known to have been moved."""
        tensor = torch.frombuffer(part, dtype=torch.uint8)
        direct = self._read.is_pinned(tensor)
        if not direct and self._chunk is None:
            _check_lockable(PIECE)  # others may have locked some since the start
            self._chunk = self._read.new_cpu_locked_tensor(PIECE, torch.empty(0, dtype=torch.uint8))
        if not direct:
            assert self._chunk is not None
            chunk = self._chunk[: len(part)]
            if transfer.kind == "write":
                chunk.copy_(tensor)
        else:
            chunk = tensor
        # Until the call returns, nobody may destroy the handle: its destructor waits for the device.
        handle = self._read if transfer.kind == "read" else self._write
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))
        good = (self._fill if transfer.kind == "read" else self._store)(transfer, offset, chunk)
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(handle))
        if not direct and transfer.kind == "read":
            tensor[:good].copy_(chunk[:good])
        return good

    def _fill(self, transfer: Transfer, offset: int, chunk: Tensor) -> int:
        if os.fstat(transfer.file.fd).st_size < offset + len(chunk):
            return 0  # the operator would end the process
        words = chunk.numpy().view(np.uint64).reshape(-1, _WORDS)
        mark = np.uint64(secrets.randbits(64))
        words[:, -1] = mark
        if self._read.sync_pread(chunk, str(transfer.path), offset) < 0:
            return 0
        missing = np.flatnonzero(words[:, -1] == mark)
        return len(chunk) if not len(missing) else int(missing[0]) * PAGE

    def _store(self, transfer: Transfer, offset: int, chunk: Tensor) -> int:
        os.fstat(transfer.file.fd)  # EBADF when it was closed: the operator would end the process
        self._write.async_pwrite(chunk, transfer.file.fd, offset)
        self._write.wait()
        data = chunk.numpy()
        for start in range(0, len(data), WRITE_BLOCK):
            last = min(start + WRITE_BLOCK, len(data)) - PAGE
            count = os.preadv(transfer.file.fd, [self._page], offset + last)
            if count < PAGE or not np.array_equal(np.frombuffer(self._page, np.uint8), data[last : last + PAGE]):
                return start
        return len(data)

    def close(self) -> None:
        if self._chunk is not None:
            self._read.free_cpu_locked_tensor(self._chunk)
            self._chunk = None
