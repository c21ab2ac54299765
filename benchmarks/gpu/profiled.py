"""A step as the profiler saw it: what ran on the device at once, how fast copies were, and who waited for whom."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload.trace import Trace

STEP, UNIT = "offload step", "offload unit"
# Runtime calls that keep a host thread waiting for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LARGE = 4 << 20  # bytes of a copy whose rate is that of the link and not of its launch
Event = dict[str, Any]
Interval = tuple[float, float]


class Record:
    """What was recorded of one step; `result` says what it means."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self.events: list[Event] | None = None
        self.threads: set[int] = set()

    def result(self, hardware: Any) -> dict[str, Any]:
        """Lanes as the engine's own trace has them, and on CUDA kernels and copies as the profiler has them."""
        found: dict[str, Any] = {"lanes": lanes(self._trace.events())}
        if self.events is not None:
            found["device"] = device(self.events, self.threads, {"HtoD": hardware.h2d, "DtoH": hardware.d2h})
        return found


@contextmanager
def recorded(trace: Trace, directory: Path, profile: bool) -> Iterator[Record]:
    """Record the body, one step, with PyTorch's profiler if `profile`; its trace goes to `directory`."""
    record = Record(trace)
    if not profile:
        yield record
        return
    # The lanes wait by design; the main thread and autograd's, which Python does not know, must not.
    main = threading.main_thread()
    record.threads = {t.native_id for t in threading.enumerate() if t is not main and t.native_id is not None}
    own = trace.span

    @contextmanager
    def span(lane: str, name: str, *rest: Any, **more: Any) -> Iterator[None]:
        with own(lane, name, *rest, **more):
            if lane != "compute":
                yield
                return
            with torch.profiler.record_function(f"{UNIT}: {name}"):
                yield

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        trace.span = span  # type: ignore[method-assign]
        try:
            with torch.profiler.record_function(STEP):
                yield record
                torch.cuda.synchronize()
        finally:
            del trace.span
    path = directory / "profile.json"
    profiler.export_chrome_trace(str(path))
    record.events = json.loads(path.read_text())["traceEvents"]


def lanes(events: Sequence[Event]) -> dict[str, Any]:
    """Of the latest step in the engine's trace: seconds of each lane, and how much of it compute ran beside."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    latest = max((e["args"]["step"] for e in spans), default=0)
    busy: dict[str, list[Interval]] = {}
    for e in spans:
        if e["args"]["step"] == latest:
            busy.setdefault(names[e["tid"]], []).append((e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6))
    compute = union(busy.get("compute", []))
    return {
        lane: {"seconds": length(union(found)), "beside_compute": shared(union(found), compute)}
        for lane, found in busy.items()
    }


def device(events: Sequence[Event], lane_threads: set[int], link: dict[str, float]) -> dict[str, Any]:
    """Idle time, copies and waits of the step in a profiler's Chrome trace.

    Args:
        lane_threads: native ids of threads that may wait. link: bytes per second by direction, "HtoD" and "DtoH".
    """
    whole = [e for e in events if e.get("ph") == "X"]
    step = next(e for e in whole if e["name"] == STEP and e.get("cat") == "user_annotation")
    begin, end = float(step["ts"]), float(step["ts"]) + float(step["dur"])
    kernels = union(_interval(e) for e in whole if e.get("cat") == "kernel")
    found: dict[str, Any] = {
        "step_seconds": (end - begin) / 1e6,
        "kernel_seconds": length(kernels) / 1e6,
        "idle_share": 1.0 - length(kernels) / (end - begin),
        "copies": {},
    }
    for direction, rate in link.items():
        copies = [e for e in whole if e.get("cat") == "gpu_memcpy" and direction in e["name"]]
        large = [e for e in copies if int(e["args"]["bytes"]) >= LARGE and e["dur"] > 0]
        rates = [int(e["args"]["bytes"]) / float(e["dur"]) * 1e6 for e in large]
        busy = union(_interval(e) for e in copies)
        found["copies"][direction] = {
            "bytes": sum(int(e["args"]["bytes"]) for e in copies),
            "seconds": length(busy) / 1e6,
            "beside_kernels": shared(busy, kernels),
            "median_rate": median(rates) if rates else None,
            "share_of_link": median(rates) / rate if rates else None,
            "large_pageable": sum("Pageable" in e["name"] for e in large),
        }
    units = union(
        _interval(e) for e in whole if e.get("cat") == "user_annotation" and e["name"].startswith(f"{UNIT}: ")
    )
    waits = [
        e for e in whole
        if e.get("cat") == "cuda_runtime" and e["name"] in WAITS and e["tid"] not in lane_threads
        and any(low <= e["ts"] <= high for low, high in units)
    ]  # fmt: skip
    found["waits_inside_units"] = {name: sum(e["name"] == name for e in waits) for name in {e["name"] for e in waits}}
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not touch, in order."""
    found: list[Interval] = []
    for low, high in sorted(intervals):
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def length(intervals: Sequence[Interval]) -> float:
    """Of intervals that do not touch."""
    return sum(high - low for low, high in intervals)


def shared(some: Sequence[Interval], others: Sequence[Interval]) -> float:
    """The share of `some` that lies within `others`; both as `union` gives them. 1 of nothing."""
    total, i = 0.0, 0
    for low, high in some:
        while i < len(others) and others[i][1] <= low:
            i += 1
        j = i
        while j < len(others) and others[j][0] < high:
            total += min(high, others[j][1]) - max(low, others[j][0])
            j += 1
    return total / length(some) if some else 1.0


def _interval(event: Event) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])
