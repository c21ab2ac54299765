"""What happened when, on which lane: spans of one step, their busy time per lane, and a Chrome/Perfetto trace.

Lanes: compute, h2d, d2h, nvme_read, nvme_write, optimizer; beside them `stall` holds what compute waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LANES = ("compute", "h2d", "d2h", "nvme_read", "nvme_write", "optimizer")


@dataclass(frozen=True)
class Span:
    """One operation on a lane; `begin` and `end` are `time.perf_counter` seconds."""

    lane: str
    name: str
    begin: float
    end: float
    nbytes: int = 0


class Trace:
    """Collects spans from all threads; keeps those of the first step and of the latest one for the trace file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._kept: dict[int, list[Span]] = {}
        self.origin = time.perf_counter()

    def add(self, lane: str, name: str, begin: float, end: float, nbytes: int = 0) -> None:
        """Record a finished operation."""
        with self._lock:
            self._spans.append(Span(lane, name, begin, end, nbytes))

    @contextmanager
    def span(self, lane: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the body as one operation."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, begin, time.perf_counter(), nbytes)

    def end_step(self, step: int) -> tuple[dict[str, float], dict[str, int]]:
        """Close a step: seconds each lane was busy (overlapping operations count once), and bytes read and written."""
        with self._lock:
            spans, self._spans = self._spans, []
        first = min(self._kept, default=step)
        self._kept = {k: v for k, v in self._kept.items() if k == first}
        self._kept[step] = spans
        busy = {lane: _union([s for s in spans if s.lane == lane]) for lane in LANES}
        moved = {lane: sum(s.nbytes for s in spans if s.lane == lane) for lane in ("nvme_read", "nvme_write")}
        return busy, moved

    def forget(self) -> None:
        """Drop the spans since the last step ended: they belong to none."""
        with self._lock:
            self._spans = []

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events of the kept steps; opens in Perfetto. Times are microseconds since the run began."""
        rows = {lane: i for i, lane in enumerate((*LANES, "stall"))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": i, "name": "thread_name", "args": {"name": lane}} for lane, i in rows.items()
        ]
        for step, spans in self._kept.items():
            for s in spans:
                events.append(
                    {
                        "ph": "X",
                        "pid": 1,
                        "tid": rows[s.lane],
                        "name": s.name,
                        "ts": round((s.begin - self.origin) * 1e6, 1),
                        "dur": round((s.end - s.begin) * 1e6, 1),
                        "args": {"step": step, "bytes": s.nbytes},
                    }
                )
        return events


def _union(spans: list[Span]) -> float:
    """Seconds covered by at least one span."""
    total, reach = 0.0, float("-inf")
    for s in sorted(spans, key=lambda s: s.begin):
        if s.end > reach:
            total += s.end - max(s.begin, reach)
            reach = s.end
    return total
