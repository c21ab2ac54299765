"""How fast the run's own optimizer is on this machine, for the planner's probe."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from offload import device_adamw
from offload.adamw import Hyper, Kernel
from offload.device import limit_lane_threads
from offload.planner import Hardware
from offload.state import CHUNK_ELEMENTS

_CHUNKS = 4  # more bytes than a cache holds
_SECONDS = 0.4


def adamw(dtype: str, threads: int = 1) -> float:
    """Parameters per second of AdamW on the state of a run in `dtype`, as its lane works: by chunks, on `threads`."""
    with ThreadPoolExecutor(1, initializer=limit_lane_threads) as lane:
        return lane.submit(_measure, dtype, threads).result()


def adamw_on_device() -> float:
    """Parameters per second of AdamW on the current CUDA device, on the split state; 0 where its bits are not the
    CPU's."""
    return device_adamw.rate(_cuda())


def with_known_bits(hardware: Hardware, device: str) -> Hardware:
    """Rates may be from a cache, and drivers change: without the rate of AdamW on a device whose bits are not, today,
    those of the CPU."""
    if device == "cpu" or not hardware.adamw_device or device_adamw.find(_cuda()) is not None:
        return hardware
    return replace(hardware, adamw_device=0.0)


def _cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _measure(dtype: str, threads: int) -> float:
    n = _CHUNKS * CHUNK_ELEMENTS
    gradient, first, second = torch.full((3, n), 1e-3)
    low = torch.zeros(n, dtype=torch.int16) if dtype == "bfloat16" else None
    param = torch.ones(n, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    hyper = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, None)
    kernel = Kernel(threads)
    kernel.wait()
    try:
        best, begin = float("inf"), time.perf_counter()
        while time.perf_counter() - begin < _SECONDS:
            start = time.perf_counter()
            for at in range(0, n, CHUNK_ELEMENTS):
                part = slice(at, at + CHUNK_ELEMENTS)
                halves = None if low is None else low[part]
                pieces = [(0, CHUNK_ELEMENTS, 1)]
                kernel.step(param[part], halves, gradient[part], first[part], second[part], pieces, hyper)
            best = min(best, time.perf_counter() - start)
    finally:
        kernel.close()
    return n / best
