"""What happened when, on which lane: spans of one step, their busy time per lane, and a Chrome/Perfetto trace.

Lanes: compute, h2d, d2h, nvme_read, nvme_write, optimizer; beside them `stall` holds what compute waited for.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

LANES = ("compute", "h2d", "d2h", "nvme_read", "nvme_write", "optimizer")
EVENTS = 2500  # in the trace file, some 300 kB; of more operations the longest stand there


class Span(NamedTuple):
    """One operation on a lane; `begin` and `end` are `time.perf_counter` seconds."""

    lane: str
    name: str
    begin: float
    end: float
    nbytes: int = 0


class Clock(Protocol):
    """Tells when a device reached points of what it was given to compute."""

    def mark(self) -> Any:
        """The point behind all that was launched so far."""
        ...

    def read(self, marks: list[Any]) -> list[float]:
        """When each point was reached, in `time.perf_counter` seconds; waits until all are."""
        ...


@dataclass(frozen=True)
class Totals:
    """One step in sums: seconds each lane was busy (overlapping operations count once), bytes read and written."""

    lanes: dict[str, float]
    nbytes: dict[str, int]


class Trace:
    """Collects spans from all threads; keeps those of the first step and of the latest one for the trace file.

    `stalls` are the seconds that compute waited in the latest step, by reason.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._launched: list[tuple[str, str, Any, Any]] = []  # lane, name and both marks of the device's clock
        self._kept: dict[int, list[Span]] = {}
        self.clock: Clock | None = None  # of a device that computes beside the main thread
        self._ended = 0  # steps
        self._waited: dict[str, float] = {}  # by reason, in all steps but the first
        self.stalls: dict[str, float] = {}
        self.origin = time.perf_counter()
        self.doing = ""  # what the main thread computes, or waits for, at this moment
        self.done = ""  # what it computed last
        self.interrupted = ""  # the innermost operation that an error ended first

    def add(self, lane: str, name: str, begin: float, end: float, nbytes: int = 0) -> None:
        """Record a finished operation."""
        with self._lock:
            self._spans.append(Span(lane, name, begin, end, nbytes))

    @contextmanager
    def span(self, lane: str, name: str, nbytes: int = 0, launches: bool = False) -> Iterator[None]:
        """Record the body as one operation. One that only `launches` work on the device, as all of lane "compute" does,
        takes as long as the device works on it."""
        clock = self.clock if launches or lane == "compute" else None
        first = clock.mark() if clock else None
        begin = time.perf_counter()
        main = lane in ("compute", "stall")  # these two are the main thread's, and nobody else's
        if main:
            outer, self.doing = self.doing, name if lane == "compute" else f"waiting for {name}"
        try:
            yield
        except BaseException:
            self.interrupted = self.interrupted or (name if main else f"{lane} of {name}")
            raise
        finally:
            if main:
                self.doing = outer
                self.done = name if lane == "compute" else self.done
            if clock is None:
                self.add(lane, name, begin, time.perf_counter(), nbytes)
        if clock is not None:
            self._launched.append((lane, name, first, clock.mark()))

    def stall(self, reason: str, unit: str) -> AbstractContextManager[None]:
        """Record the body as time that compute waited: for what, and for which unit."""
        return self.span("stall", f"{reason}: {unit}")

    def end_step(self, step: int) -> Totals:
        """Close a step and sum it up. Waits for the device, if that has a clock."""
        launched, self._launched = self._launched, []
        if launched and self.clock:
            at = iter(self.clock.read([mark for _, _, *marks in launched for mark in marks]))
            for lane, name, _, _ in launched:
                self.add(lane, name, next(at), next(at))
        with self._lock:
            spans, self._spans = self._spans, []
        first = min(self._kept, default=step)
        self._kept = {k: v for k, v in self._kept.items() if k == first}
        self._kept[step] = spans
        by_lane: dict[str, list[Span]] = {lane: [] for lane in (*LANES, "stall")}
        for s in spans:
            by_lane[s.lane].append(s)
        busy = {lane: _union(by_lane[lane]) for lane in LANES}
        if self.clock is None:  # what an operation waits for within itself is no work
            waited = by_lane["stall"]
            busy["compute"] = _union([*by_lane["compute"], *waited]) - _union(waited)
        moved = {lane: sum(s.nbytes for s in by_lane[lane]) for lane in ("nvme_read", "nvme_write")}
        self.stalls, self.done = {}, ""
        for s in by_lane["stall"]:
            reason = s.name.split(":")[0]
            self.stalls[reason] = self.stalls.get(reason, 0.0) + s.end - s.begin
        self._ended += 1
        if self._ended > 1:
            for reason, seconds in self.stalls.items():
                self._waited[reason] = self._waited.get(reason, 0.0) + seconds
        return Totals(busy, moved)

    def stall_means(self) -> dict[str, float]:
        """Seconds per step that compute waited, by reason, the longest first, over all steps so far; without the first
        one, which also warms up, if there are others."""
        waited = self._waited if self._ended > 1 else self.stalls
        return {
            reason: seconds / max(1, self._ended - 1)
            for reason, seconds in sorted(waited.items(), key=lambda item: -item[1])
        }

    def forget(self) -> None:
        """Drop the spans since the last step ended: they belong to none."""
        self._launched = []
        with self._lock:
            self._spans = []

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events of the kept steps; opens in Perfetto. Times are microseconds since the run began.

        Of more than `EVENTS` operations the shortest are left out; an event `left_out` of each lane and step says how
        many, and their bytes.
        """
        rows = {lane: i for i, lane in enumerate((*LANES, "stall"))}
        every = [(step, s) for step, spans in self._kept.items() for s in spans]
        shown = heapq.nlargest(EVENTS, every, key=lambda item: item[1].end - item[1].begin)
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": i, "name": "thread_name", "args": {"name": lane}} for lane, i in rows.items()
        ]
        for step, s in sorted(shown, key=lambda item: item[1].begin):
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
        there = {id(s) for _, s in shown}
        left: dict[tuple[int, str], list[int]] = {}
        for step, s in every:
            if id(s) not in there:
                left.setdefault((step, s.lane), []).append(s.nbytes)
        for (step, lane), sizes in left.items():
            told = {"step": step, "operations": len(sizes), "bytes": sum(sizes)}
            events.append({"ph": "M", "pid": 1, "tid": rows[lane], "name": "left_out", "args": told})
        return events


def _union(spans: list[Span]) -> float:
    """Seconds covered by at least one span."""
    total, reach = 0.0, float("-inf")
    for begin, end in sorted((s.begin, s.end) for s in spans):
        if end > reach:
            total += end - max(begin, reach)
            reach = end
    return total
