"""Where memory goes over a step: what the ledger holds, and what process and device take beside it.

The ledger tells every change of what the engine reserves. What the framework takes on its own is measured: a thread
reads the size of the process (and, on CUDA, of the allocator's pool) some fifty times a second, and what the ledger
does not account for is the rest. Peaks between two readings are not lost: the kernel and the allocator keep the highest
value themselves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from offload.io import Ledger
from offload.memory import beyond_pss, tree_pss
from offload.trace import Trace

INTERVAL = 0.02  # seconds between readings
SHARE = 0.002  # of the time that summing up the process's pages (PSS) may take
EVENTS = 20_000  # changes kept of one step; beyond, every second one is forgotten
POINTS = 120  # of a timeline, each the highest of its part of the step
START = "before the first step"
BETWEEN = "after its end"

Sizes = dict[str, dict[str, int]]  # bytes by tier and category


@dataclass
class Peak:
    """The highest measured value: `bytes` are `accounted` by category, and the rest that nothing accounts for."""

    bytes: int = 0
    step: int = 0
    during: str = START
    categories: dict[str, int] = field(default_factory=dict)

    @property
    def rest(self) -> int:
        return self.bytes - sum(self.categories.values())


@dataclass
class _Step:
    step: int
    begin: float
    before: Sizes
    process: int
    device: int
    end: float = 0.0
    changes: list[tuple[float, str, str, int]] = field(default_factory=list)
    readings: list[tuple[float, int, int]] = field(default_factory=list)  # time, process, device


class MemoryRecord:
    """Watches `ledger` and this process from the moment it is made; a context manager that runs the thread.

    Args:
        device: "cpu" when the device tier is an arena in RAM, and so part of the process; else "cuda".
    `steps` of `to_json` are the first and the latest one.
    """

    def __init__(self, ledger: Ledger, trace: Trace, device: str) -> None:
        self._trace = trace
        self._cuda = device == "cuda"
        self._host = ("cpu", "cxl") if self._cuda else ("gpu", "cpu", "cxl")
        self._lock = threading.Lock()
        self._now: Sizes = {tier: {c: n["bytes"] for c, n in held.items()} for tier, held in ledger.snapshot().items()}
        self._reserved: dict[str, Peak] = {}  # highest of the ledger, by tier
        self._number = 0
        self._steps: list[_Step] = []
        self._open: _Step | None = None
        self.start = tree_pss()
        self._next_pss = 0.0
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        with suppress(OSError):  # the kernel shall forget what planning took: a lower peak of the run counts
            Path("/proc/self/clear_refs").write_text("5")
        rss, self._highest_rss = self._rss()
        self._shared = max(0, rss - self.start)
        self._process, self._device = Peak(self.start), Peak()
        self._latest = (self.start, 0)
        ledger.observer = self._changed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-record", daemon=True)

    # ---- what happens ----

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """The body is step number `step`."""
        with self._lock:
            self._number = step
            opened = _Step(step, time.perf_counter(), self._copy(), *self._latest)
            self._open = opened
        try:
            yield
        finally:
            self.read(pages=False)  # in the thread that computes: the long sum is the other one's
            with self._lock:
                opened.end = time.perf_counter()
                self._open = None
                self._steps = [*self._steps[:1], opened]

    def _changed(self, tier: str, category: str, nbytes: int) -> None:
        with self._lock:
            held = self._now.setdefault(tier, {})
            held[category] = held.get(category, 0) + nbytes
            if nbytes > 0:
                total, peak = sum(held.values()), self._reserved.get(tier)
                if peak is None or total > peak.bytes:
                    self._reserved[tier] = Peak(total, self._number, self._doing(), dict(held))
            if self._open is not None:
                changes = self._open.changes
                changes.append((time.perf_counter(), tier, category, held[category]))
                if len(changes) > EVENTS:
                    del changes[::2]

    def read(self, pages: bool = True) -> None:
        """Take one reading now; with `pages`, sum up the process's pages if that is due."""
        now = time.perf_counter()
        if pages and now >= self._next_pss:
            self._shared = beyond_pss()  # counted at once: tensors come and go between two readings
            self._next_pss = time.perf_counter() + (time.perf_counter() - now) / SHARE
        rss, highest = self._rss()
        device, device_peak = self._allocated()
        with self._lock:
            process = rss - self._shared
            process_peak = (highest if highest > self._highest_rss else rss) - self._shared
            self._highest_rss = highest
            self._latest = (process, device)
            if process_peak > self._process.bytes:
                self._process = self._named(process_peak, *self._host)
            if device_peak > self._device.bytes:
                self._device = self._named(device_peak, "gpu")
            if self._open is not None:
                self._open.readings.append((now, max(process, process_peak), device))
                if len(self._open.readings) > EVENTS:
                    del self._open.readings[::2]

    def _rss(self) -> tuple[int, int]:
        """Resident bytes now, and the most there ever were."""
        text = os.pread(self._status, 4096, 0)
        highest, now = text.index(b"VmHWM:") + 6, text.index(b"VmRSS:") + 6  # in kB; the rest is not worth parsing
        return int(text[now : text.index(b"kB", now)]) * 1024, int(text[highest : text.index(b"kB", highest)]) * 1024

    def _allocated(self) -> tuple[int, int]:
        """Bytes of tensors on the CUDA device, now and at most; on the CPU they are part of the process."""
        return (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if self._cuda else (0, 0)

    def _named(self, nbytes: int, *tiers: str) -> Peak:
        held: dict[str, int] = {}
        for tier in tiers:
            for category, n in self._now.get(tier, {}).items():
                if n:
                    held[f"{tier} {category}"] = n
        return Peak(nbytes, self._number, self._doing(), held)

    def _doing(self) -> str:
        if not self._number:
            return START
        if self._open is None:
            return f"{BETWEEN}, {self._trace.doing}" if self._trace.doing else BETWEEN
        return self._trace.doing or (f"after {self._trace.done}" if self._trace.done else "before the first unit")

    def _copy(self) -> Sizes:
        return {tier: dict(held) for tier, held in self._now.items()}

    # ---- what it tells ----

    def to_json(self) -> dict[str, Any]:
        """Peaks and timelines in bytes and seconds, plain data; see docs/files.md."""
        with self._lock:
            steps = list(self._steps)
            process, device, reserved = self._process, self._device, dict(self._reserved)
        found: dict[str, Any] = {
            "process": {"pss_peak": process.bytes, "before": self.start, "at_peak": _told(process, self.start)},
            "reserved": {tier: asdict(peak) for tier, peak in reserved.items()},
            "steps": [_timeline(step) for step in steps],
        }
        if self._cuda:
            found["device"] = {"peak": device.bytes, "at_peak": _told(device, 0)}
        return found

    @property
    def grown(self) -> int:
        """Bytes of RAM that the process tree took at its peak beyond what it had at its start."""
        return self._process.bytes - self.start

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.read()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._status)


def _told(peak: Peak, before: int) -> dict[str, Any]:
    """The peak in parts that add up to it: what was there before, what is accounted for, and the measured rest."""
    return {
        "step": peak.step,
        "during": peak.during,
        "bytes": peak.bytes,
        "before": before,
        "categories": peak.categories,
        "rest": peak.rest - before,
    }


def _timeline(step: _Step) -> dict[str, Any]:
    """Bytes by tier and category, of the process and of the device at moments of one step; constants once."""
    held = {tier: dict(sizes) for tier, sizes in step.before.items()}
    process, device = step.process, step.device
    moments: list[tuple[float, Sizes, int, int]] = [(0.0, _deep(held), process, device)]
    events: list[Any] = sorted([*step.changes, *step.readings], key=lambda event: event[0])
    parts = max(1, len(events) // POINTS)
    for at in range(0, len(events), parts):
        best: tuple[float, Sizes, int, int] | None = None
        for event in events[at : at + parts]:
            if len(event) == 4:
                held.setdefault(event[1], {})[event[2]] = event[3]
            else:
                process, device = event[1:]
            if best is None or _height(held, process, device) > _height(*best[1:]):
                best = (max(0.0, event[0] - step.begin), _deep(held), process, device)
        assert best is not None
        moments.append(best)
    moments.append((step.end - step.begin, _deep(held), process, device))
    names = [(tier, category) for tier in held for category in held[tier]]
    tiers: dict[str, dict[str, list[int]]] = {}
    for tier, category in names:
        tiers.setdefault(tier, {})[category] = _short([m[1].get(tier, {}).get(category, 0) for m in moments])
    return {
        "step": step.step,
        "at": [round(m[0], 4) for m in moments],
        "tiers": tiers,
        "process": _short([m[2] for m in moments]),
        "device": _short([m[3] for m in moments]),
    }


def _deep(held: Sizes) -> Sizes:
    return {tier: dict(sizes) for tier, sizes in held.items()}


def _height(held: Sizes, process: int, device: int) -> int:
    return sum(held.get("gpu", {}).values()) + process + device


def _short(values: list[int]) -> list[int]:
    return values[:1] if len(set(values)) == 1 else values
