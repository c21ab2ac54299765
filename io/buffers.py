"""Host memory for I/O: page-aligned buffers of exact size, and a ring of equal chunks.

Memory comes from anonymous private mappings and not from PyTorch's allocator: it is page aligned (O_DIRECT needs
that), its size is the one asked for rounded up to a page, and freeing gives the pages back at once. Mappings of 2 MiB
and more ask for huge pages, which never reach beyond the mapping and make filling twice as fast and every pass over
large memory a quarter faster (`benchmarks/passes.py`).

A process that forks (a data loader's workers, say) does not share it: the child finds zeros there. Otherwise every page
that is written while the child lives would be copied, which doubles what the run takes, page-locked memory would be
copied at once, and before Linux 6.3 a direct read under way could end in the child's copy (open(2), NOTES).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from . import numa
from .errors import IOTimeout, StoreError
from .ledger import Ledger

PAGE = 4096
"""Alignment in bytes of buffers, file offsets and lengths: the largest logical block that drives ask for."""
HUGE_PAGE = 2 << 20
"""From this size on a mapping asks for huge pages."""
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of linux/mman.h; MADV_DONTFORK would leave the addresses to the child's own memory


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    """The smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


class HostBuffer:
    """One mapping. `tensor` is 1-D uint8 of `nbytes` bytes (a multiple of PAGE), page aligned, zero at first. With
    `nodes` its pages come from those NUMA nodes only."""

    def __init__(self, nbytes: int, ledger: Ledger, tier: str, category: str, nodes: Sequence[int] = ()) -> None:
        if nbytes <= 0:
            raise ValueError(f"buffer {tier}/{category}: size must be positive, not {nbytes}")
        self.nbytes = round_up(nbytes)
        self.tier = tier
        self.category = category
        self._ledger = ledger
        try:
            mapping = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise StoreError(
                f"cannot allocate {self.nbytes} bytes of host memory for {tier}/{category}",
                errno=error.errno,
                advice="Lower the memory budget of this tier.",
            ) from error
        self._mapping: mmap.mmap | None = mapping
        # Through numpy, because it holds the mapping's buffer: a view that outlives free() can never touch
        # unmapped memory (torch.frombuffer lets the mapping go under its feet).
        self.tensor: Tensor = torch.from_numpy(np.frombuffer(mapping, dtype=np.uint8))
        for advice, wanted in ((mmap.MADV_HUGEPAGE, self.nbytes >= HUGE_PAGE), (_WIPE_ON_FORK, True)):
            if wanted:
                with contextlib.suppress(OSError):  # a kernel without it
                    mapping.madvise(advice)
        if nodes:
            numa.bind(self.tensor, nodes)
        ledger.add(tier, category, self.nbytes)

    def free(self) -> None:
        """Give the memory back and tell the ledger. Idempotent. Views of `tensor` must not be used afterwards."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        address, self.tensor = self.tensor.data_ptr(), torch.empty(0, dtype=torch.uint8)
        try:
            mapping.close()
        except BufferError:
            # A view is still alive somewhere: release the pages now; the addresses go with the last view.
            _libc().munlock(ctypes.c_void_p(address), ctypes.c_size_t(self.nbytes))  # locked pages could not go
            mapping.madvise(mmap.MADV_DONTNEED)
        self._ledger.remove(self.tier, self.category, self.nbytes)

    def __enter__(self) -> HostBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()


def allocate(nbytes: int, ledger: Ledger, tier: str = "cpu", category: str = "buffer") -> HostBuffer:
    """Reserve `nbytes` bytes (rounded up to a page) and count them in `ledger` under `tier` and `category`.

    Raises ValueError for a size that is not positive, StoreError when the system refuses the memory.
    """
    return HostBuffer(nbytes, ledger, tier, category)


def lock(tensor: Tensor) -> None:
    """Keep the pages of a buffer in RAM until it is freed (mlock); they are all allocated by this.

    Raises StoreError when the system refuses: over the limit of locked memory, or out of memory.
    """
    if _libc().mlock(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel())) != 0:
        code = ctypes.get_errno()
        raise StoreError(
            f"cannot lock {tensor.numel()} bytes in RAM: {os.strerror(code)}",
            errno=code,
            advice="Raise the limit of locked memory (ulimit -l), lower memory.cpu, or leave memory.lock off.",
        )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class Ring:
    """`count` equal chunks of `nbytes` bytes (rounded up to a page) that users acquire and release from any thread."""

    def __init__(self, count: int, nbytes: int, ledger: Ledger, tier: str = "cpu", category: str = "ring") -> None:
        if count <= 0:
            raise ValueError(f"ring {tier}/{category}: count must be positive, not {count}")
        self.category = category
        self.count = count
        self.nbytes = round_up(nbytes)
        self._buffers: list[HostBuffer] = []
        try:
            for _ in range(count):
                self._buffers.append(HostBuffer(nbytes, ledger, tier, category))
        except BaseException:
            for buffer in self._buffers:
                buffer.free()
            raise
        self._chunks = {buffer.tensor.data_ptr(): buffer.tensor for buffer in self._buffers}
        self._free: deque[int] = deque(self._chunks)
        self._out: set[int] = set()
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, timeout: float) -> Tensor:
        """A free chunk: 1-D uint8 of `nbytes` bytes, contents undefined.

        Raises IOTimeout after `timeout` seconds without one, StoreError when the ring is closed.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._free:
                if self._closed:
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    raise IOTimeout(
                        f"no free chunk of ring '{self.category}' within {timeout:g} s: all {self.count} chunks of "
                        f"{self.nbytes} bytes are in use",
                        advice="An operation that holds one hangs, or was never released.",
                    )
                self._changed.wait(left)
            if self._closed:
                raise StoreError(f"ring '{self.category}' is closed")
            address = self._free.popleft()
            self._out.add(address)
            return self._chunks[address]

    def try_acquire(self) -> Tensor | None:
        """A free chunk as `acquire` gives it, or None if there is none now or the ring is closed."""
        with self._changed:
            if self._closed or not self._free:
                return None
            address = self._free.popleft()
            self._out.add(address)
            return self._chunks[address]

    def release(self, tensor: Tensor) -> None:
        """Give back a chunk (or a view from its first byte on).

        Raises ValueError for a tensor that is not an acquired chunk of this ring. After close() it does nothing.
        """
        with self._changed:
            if self._closed:
                return
            address = tensor.data_ptr()
            if address not in self._out:
                state = "was released already" if address in self._chunks else "is not a chunk of it"
                raise ValueError(f"ring '{self.category}': cannot release this tensor: it {state}")
            self._out.remove(address)
            self._free.append(address)
            self._changed.notify()

    @property
    def tensors(self) -> list[Tensor]:
        """All chunks: for page-locking them."""
        return [buffer.tensor for buffer in self._buffers]

    def cancel(self) -> None:
        """Fail whoever waits for a chunk, now and later; the memory stays until close(), for transfers under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Free all chunks, acquired ones too, and fail whoever waits for one. Idempotent."""
        with self._changed:
            self._closed = True
            self._free.clear()
            self._out.clear()
            self._chunks.clear()
            self._changed.notify_all()
        for buffer in self._buffers:
            buffer.free()
