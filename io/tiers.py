"""Host memory tiers: ordinary RAM ("cpu"), and memory of NUMA nodes without CPUs ("cxl"), real or emulated.

    cxl = HostTier("cxl", nodes=choose([2], nbytes))              # real: pages come from node 2
    cxl = HostTier("cxl", pace=Pace(bandwidth=20e9, latency=4e-7))  # ordinary RAM that is as slow as this
    with cxl.allocate(nbytes, ledger, "param") as buffer:
        copy(buffer.tensor, source, cxl)

Whoever touches a tier's memory does it in the body of `moving`, as `copy` does: there an emulated tier is slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from .buffers import HostBuffer
from .ledger import Ledger

_MEASURED = 64 << 20


class Pace:
    """How slow an emulated memory is: `bandwidth` in bytes per second, shared by all who copy; `latency` in seconds."""

    def __init__(self, bandwidth: float, latency: float = 0.0) -> None:
        if bandwidth <= 0 or latency < 0:
            raise ValueError(f"bandwidth must be positive and latency not negative, not {bandwidth} and {latency}")
        self.bandwidth = bandwidth
        self.latency = latency
        self._free_at = 0.0
        self._lock = threading.Lock()

    def ends(self, nbytes: int, began: float) -> float:
        """The time.perf_counter() before which a transfer of `nbytes` that began at `began` may not end."""
        with self._lock:
            self._free_at = max(self._free_at, began) + nbytes / self.bandwidth
            return self._free_at + self.latency


@dataclass(frozen=True)
class HostTier:
    """Where host buffers come from: NUMA `nodes` (none: where the system likes), with an emulated `pace` if any."""

    name: str
    nodes: tuple[int, ...] = ()
    pace: Pace | None = None

    @property
    def emulated(self) -> bool:
        return self.pace is not None

    def allocate(self, nbytes: int, ledger: Ledger, category: str) -> HostBuffer:
        """As buffers.allocate, on this tier's nodes and account. Raises StoreError when they cannot be had."""
        return HostBuffer(nbytes, ledger, self.name, category, self.nodes)

    def describe(self) -> str:
        """For plans and reports; an emulated tier always says so."""
        if self.pace is not None:
            rate, delay = self.pace.bandwidth / 1e9, self.pace.latency * 1e9
            return f"{self.name} (emulated in RAM at {rate:g} GB/s and {delay:.0f} ns)"
        return f"{self.name} (NUMA node {', '.join(map(str, self.nodes))})" if self.nodes else self.name


def copy(target: Tensor, source: Tensor, *tiers: HostTier) -> None:
    """target[:] = source, between host memories; `tiers` are those the two lie in. Returns when it is done, which with
    an emulated tier is when that memory would have been. Dtypes may differ, as for Tensor.copy_."""
    with moving(target.numel() * max(target.itemsize, source.itemsize), *tiers):
        target.copy_(source)


@contextmanager
def moving(nbytes: int, *tiers: HostTier) -> Iterator[None]:
    """The body reads or writes `nbytes` of these memories. It ends when they would have been done with it, which is
    later than it took where one is emulated."""
    began = time.perf_counter()
    yield
    ends = [tier.pace.ends(nbytes, began) for tier in tiers if tier.pace is not None]
    left = max(ends, default=0.0) - time.perf_counter()
    if left > 0:
        time.sleep(left)


def measure(tier: HostTier, nbytes: int = _MEASURED) -> tuple[float, float]:
    """Bytes per second read from and written to the tier by one thread's copies, second pass of two."""
    ledger, rates = Ledger(), (0.0, 0.0)
    with tier.allocate(nbytes, ledger, "measure") as there, HostTier("cpu").allocate(nbytes, ledger, "measure") as here:
        for _ in range(2):
            began = time.perf_counter()
            copy(there.tensor, here.tensor, tier)
            between = time.perf_counter()
            copy(here.tensor, there.tensor, tier)
            rates = nbytes / (time.perf_counter() - between), nbytes / (between - began)
    return rates
