"""Progress of a run: a live bar on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

LINES_AT_FIRST = 100  # a plain log shows this many steps one by one, then one line every `SECONDS_PER_LINE`
SECONDS_PER_LINE = 10.0


class Progress(Protocol):
    """What the training loop tells: `row` is the step's line of metrics.jsonl."""

    def step(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def open_progress(console: Console, completed: int, total: int) -> Progress:
    """Progress from `completed` of `total` steps on; the form depends on where `console` writes."""
    return LiveProgress(console, completed, total) if console.is_terminal else PlainProgress(console, completed, total)


class _Pace:
    """Seconds per step over the latest steps, hence the time that is left."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=20)

    def eta(self, row: Mapping[str, Any], total: int) -> str:
        self._seconds.append(float(row["seconds"]))
        ordered = sorted(self._seconds)  # the median: a first step, or one with a commit, is not typical
        return clock(ordered[len(ordered) // 2] * max(0, total - int(row["step"])))


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def busiest(row: Mapping[str, Any]) -> str:
    """The busiest lane with the share of the step it was busy: `nvme_read 93%`."""
    lane = row.get("busiest_lane")
    if not lane:
        return "-"
    share = row["lane_seconds"][lane] / row["seconds"] if row["seconds"] else 0.0
    return f"{lane} {min(share, 1.0):.0%}"


class PlainProgress:
    """One line per step at first, then one at least every 10 seconds, and always the last."""

    def __init__(self, console: Console, completed: int, total: int) -> None:
        self._console = console
        self._total = total
        self._pace = _Pace()
        self._lines = 0
        self._last = 0.0

    def step(self, row: Mapping[str, Any]) -> None:
        eta = self._pace.eta(row, self._total)
        now = time.monotonic()
        due = self._lines < LINES_AT_FIRST or now - self._last >= SECONDS_PER_LINE or row["step"] == self._total
        if due:
            self._lines += 1
            self._last = now
            self.note(
                f"step {row['step']}/{self._total}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  "
                f"{row['seconds']:.2f} s  busiest {busiest(row)}  eta {eta}"
            )

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        return


class LiveProgress:
    """A bar with step, loss, tokens per second, busiest lane and remaining time; notes scroll above it."""

    def __init__(self, console: Console, completed: int, total: int) -> None:
        self._total = total
        self._pace = _Pace()
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss [bold]{task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("busiest {task.fields[lane]}"),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=total, completed=completed, loss="-", speed="-", lane="-", eta="-")
        self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        self._bar.update(
            self._task,
            completed=row["step"],
            loss=f"{row['loss']:.4f}",
            speed=f"{row['tokens_per_second']:,.0f}",
            lane=busiest(row),
            eta=self._pace.eta(row, self._total),
        )

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()
