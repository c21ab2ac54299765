"""The device a model computes on: one small interface, so that the schedule is the same on a CPU and on CUDA.

On the CPU the device tier is an arena of page-aligned host memory. On CUDA every copy runs on a stream of its own lane
and the lane's thread waits for it, which blocks neither the compute stream nor the main thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Protocol

import torch
from torch import Tensor

from offload.io import HostBuffer, Ledger, allocate
from offload.planner.memory import KERNEL_CACHE_CAPACITY

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Larger blocks are mapped and unmapped one by one; the heap gives back more than this at its end.
_MALLOC_BYTES = 1 << 20


class Device(Protocol):
    """Memory of the device tier, and copies between it and the host."""

    name: str

    def allocate(self, nbytes: int, ledger: Ledger, category: str) -> Tensor:
        """Reserve `nbytes` on the device for the whole run: a 1-D uint8 tensor."""
        ...

    def pin(self, buffer: Tensor) -> None:
        """Page-lock host memory so that copies from and to it are asynchronous."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between host and device (equal dtypes) and return when it is done; called from a lane's thread."""
        ...

    def mark(self) -> torch.cuda.Event | None:
        """A point in the compute stream: what was launched before it."""
        ...

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Block the calling lane until the compute stream has passed `mark`."""
        ...

    def close(self) -> None:
        """Give the device's memory back."""
        ...


class CpuDevice:
    """The CPU as device: an arena in RAM."""

    name = "cpu"

    def __init__(self) -> None:
        self._buffers: list[HostBuffer] = []

    def allocate(self, nbytes: int, ledger: Ledger, category: str) -> Tensor:
        buffer = allocate(nbytes, ledger, tier="gpu", category=category)
        self._buffers.append(buffer)
        return buffer.tensor[:nbytes]

    def pin(self, buffer: Tensor) -> None:
        pass  # host memory is the device's own

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> None:
        return None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        pass  # compute is synchronous

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()


def keep_to_the_plan() -> None:
    """On the CPU: make the framework's temporaries cost what they hold, so that the planned peak is the real one.

    glibc raises its mmap threshold to 32 MiB as blocks are freed and then keeps freed memory in its heap: up to four
    times the live bytes of a unit were seen. oneDNN keeps about 0.7 MB for every shape it has met, up to 1024 of them.
    To be called before the first large allocation.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNEL_CACHE_CAPACITY))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MALLOC_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MALLOC_BYTES)


class CudaDevice:
    """One CUDA device; copies run on a stream per calling thread, beside the compute stream."""

    name = "cuda"

    def __init__(self) -> None:
        self._streams = threading.local()
        self._pinned: list[Tensor] = []

    def allocate(self, nbytes: int, ledger: Ledger, category: str) -> Tensor:
        ledger.add("gpu", category, nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def pin(self, buffer: Tensor) -> None:
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(error) != 0:
            raise RuntimeError(
                f"cudaHostRegister of {buffer.numel()} bytes failed with CUDA error {int(error)}; raise the "
                "locked-memory limit (ulimit -l) or lower memory.cpu"
            )
        self._pinned.append(buffer)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if not hasattr(self._streams, "stream"):
            self._streams.stream = torch.cuda.Stream()
        with torch.cuda.stream(self._streams.stream):
            target.copy_(source, non_blocking=True)
        self._streams.stream.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            mark.synchronize()

    def close(self) -> None:
        for buffer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self._pinned.clear()


def open_device(name: str) -> Device:
    """The device called "cpu" or "cuda"."""
    return CudaDevice() if name == "cuda" else CpuDevice()


def limit_lane_threads() -> None:
    """Give the calling lane thread one OpenMP thread, so that lanes do not each grow a pool beside compute's.

    `torch.set_num_threads` would also shrink the matrix library's pool for the main thread; OpenMP's own call sets the
    number for the calling thread alone. No result depends on it: see `tests/test_adamw.py`.
    """
    torch.get_num_threads()  # torch sets the number once per thread, at the first call; ours must come after it
    openmp = _openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(1)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded; None where it cannot be found (other systems)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line}
    except OSError:
        return None
    return ctypes.CDLL(sorted(paths)[0]) if paths else None
