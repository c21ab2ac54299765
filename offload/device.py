"""The device a model computes on: one small interface, so that the schedule is the same on a CPU and on CUDA.

On the CPU the device tier is an arena of page-aligned host memory. On CUDA every copy runs on a stream of its own lane
and the lane's thread waits for it, which blocks neither the compute stream nor the main thread.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from offload import heap
from offload.heap import Heap
from offload.io import Ledger, allocate, lock, yield_to_compute
from offload.planner.memory import KERNEL_CACHE_CAPACITY, MMAP_THRESHOLD
from offload.trace import Clock

log = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# The main thread, and the lanes that work rather than wait: the gradient's, with its norms, and the store's checksums.
_OTHER_LANES = 3
# AdamW is bound by memory; beyond these few cores fill the channels of any machine with one GPU.
_MOST_OPTIMIZER_THREADS = 12


class Device(Protocol):
    """Memory of the device tier, and copies between it and the host.

    `in_host_memory`: the host reads and writes device memory itself, so nothing needs to be staged.
    `clock`: of a device that computes beside the main thread; None where a launch returns when it is done.
    `heap`: of the framework's tensors, where the device is host memory.
    """

    name: str
    in_host_memory: bool
    clock: Clock | None
    heap: Heap

    def allocate(self, nbytes: int, ledger: Ledger, categories: Mapping[str, int]) -> Tensor:
        """Reserve `nbytes` in one piece for the whole run: 1-D uint8, page aligned; `ledger` counts the parts."""
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
    in_host_memory = True
    clock: Clock | None = None

    def __init__(self, locked: bool = False) -> None:
        self._buffers = ExitStack()
        self._locked = locked
        self.heap = Heap(used=True)

    def allocate(self, nbytes: int, ledger: Ledger, categories: Mapping[str, int]) -> Tensor:
        buffer = allocate(nbytes, Ledger(), tier="gpu", category="arena")  # the run's ledger counts its parts
        self._buffers.callback(buffer.free)
        for category, part in categories.items():
            ledger.add("gpu", category, part)
            self._buffers.callback(ledger.remove, "gpu", category, part)
        self.pin(buffer.tensor)
        return buffer.tensor[:nbytes]

    def pin(self, buffer: Tensor) -> None:
        if self._locked:  # else nothing to do: host memory is the device's own
            lock(buffer)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def mark(self) -> None:
        return None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        pass  # compute is synchronous

    def close(self) -> None:
        self._buffers.close()


def keep_to_the_plan() -> None:
    """On the CPU: make the framework's temporaries cost what they hold, so that the planned peak is the real one.

    glibc raises its mmap threshold to 32 MiB as blocks are freed and then keeps freed memory in its heap: up to four
    times the live bytes of a unit were seen. oneDNN keeps about 0.7 MB for every shape it has met, up to 1024 of them.
    To be called before the first large allocation.
    """
    heap.begin()
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNEL_CACHE_CAPACITY))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, MMAP_THRESHOLD)


class CudaDevice:
    """The current CUDA device; copies run on a stream per calling thread, beside the compute stream.

    Waiting threads sleep (blocking events): by default the driver spins, which would take a core from the optimizer for
    every lane. Lanes name the device in all they do, because the current device is each thread's own.
    """

    name = "cuda"
    in_host_memory = False

    def __init__(self) -> None:
        self.heap = Heap(used=False)
        self._index = torch.cuda.current_device()
        self.clock: Clock | None = StreamClock(self._index)
        self._lanes = threading.local()
        self._pinned: list[Tensor] = []
        # What planning has tried out is over: its cached blocks would count as the run's memory, and its peak too.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._index)

    def allocate(self, nbytes: int, ledger: Ledger, categories: Mapping[str, int]) -> Tensor:
        for category, part in categories.items():
            ledger.add("gpu", category, part)
        return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", self._index))

    def pin(self, buffer: Tensor) -> None:
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        if int(error) != 0:
            raise RuntimeError(
                f"cudaHostRegister of {buffer.numel()} bytes failed with CUDA error {int(error)}; raise the "
                "locked-memory limit (ulimit -l) or lower memory.cpu"
            )
        self._pinned.append(buffer)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if not hasattr(self._lanes, "stream"):
            self._lanes.stream = torch.cuda.Stream(self._index)
            self._lanes.done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._lanes.stream):
            target.copy_(source, non_blocking=True)
        self._lanes.done.record(self._lanes.stream)
        self._lanes.done.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._index))
        return event

    def wait(self, mark: torch.cuda.Event | None) -> None:
        if mark is not None:
            mark.synchronize()

    def close(self) -> None:
        for buffer in self._pinned:
            error = torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
            if int(error) != 0:
                log.warning("cudaHostUnregister of %d bytes failed with CUDA error %d", buffer.numel(), int(error))
        self._pinned.clear()


class StreamClock:
    """When the compute stream passed its marks: timing events, read against one of which the time is known."""

    def __init__(self, index: int) -> None:
        self._index = index

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._index))
        return event

    def read(self, marks: list[torch.cuda.Event]) -> list[float]:
        last = self.mark()
        last.synchronize()
        now = time.perf_counter()
        return [now - mark.elapsed_time(last) / 1e3 for mark in marks]


def open_device(name: str, locked: bool = False) -> Device:
    """The device called "cpu" or "cuda". `locked` keeps host memory from being swapped out (CUDA's pinning does so
    anyway)."""
    return CudaDevice() if name == "cuda" else CpuDevice(locked)


def optimizer_threads(device: str) -> int:
    """How many threads the optimizer's lane works with: beside a GPU, the cores that no other lane needs; on the CPU
    compute has the others."""
    return 1 if device == "cpu" else max(1, min(_MOST_OPTIMIZER_THREADS, len(os.sched_getaffinity(0)) - _OTHER_LANES))


def limit_lane_threads() -> None:
    """Give the calling lane thread one OpenMP thread, so that lanes do not each grow a pool beside compute's, and let
    it yield to compute (`yield_to_compute`).

    `torch.set_num_threads` would also shrink the matrix library's pool for the main thread; OpenMP's own call sets the
    number for the calling thread alone. No result depends on it: see `tests/test_adamw.py`.
    """
    yield_to_compute()
    _set_openmp_threads(1)


@contextmanager
def lane_threads(count: int) -> Iterator[None]:
    """So many OpenMP threads for the calling lane thread inside the body."""
    _set_openmp_threads(count)
    try:
        yield
    finally:
        _set_openmp_threads(1)


def _set_openmp_threads(count: int) -> None:
    torch.get_num_threads()  # torch sets the number once per thread, at the first call; ours must come after it
    openmp = _openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(count)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded; None where it cannot be found (other systems)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line}
    except OSError:
        return None
    return ctypes.CDLL(sorted(paths)[0]) if paths else None
