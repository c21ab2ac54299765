"""Progress of a run: live lanes and tiers on a terminal, plain lines in a pipe, a log, a notebook or CI."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.tables import size

LINES_AT_FIRST = 100  # a plain log shows this many steps one by one, then one line every `SECONDS_PER_LINE`
SECONDS_PER_LINE = 10.0


class Progress(Protocol):
    """What the training loop tells: `row` is the step's line of metrics.jsonl, `stalls` are the seconds that compute
    waited in it, by reason, `ram` the bytes that the process took so far at its peak."""

    def step(self, row: Mapping[str, Any], stalls: Mapping[str, float], ram: int = 0) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def open_progress(
    console: Console,
    completed: int,
    total: int,
    budgets: Mapping[str, int] | None = None,
    doing: Callable[[], str] = lambda: "",
) -> Progress:
    """Progress from `completed` of `total` steps on; the form depends on where `console` writes.

    `budgets`: bytes per tier. `doing` is asked what happens at this moment. A terminal of a CI system, which keeps a
    log, gets lines like a pipe.
    """
    if console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI"):
        return LiveProgress(console, completed, total, budgets or {}, doing)
    return PlainProgress(console, completed, total)


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

    def step(self, row: Mapping[str, Any], stalls: Mapping[str, float], ram: int = 0) -> None:
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
    """Step, loss, tokens per second and remaining time; under it bars: steps, how busy each lane was in the last step,
    what compute waited for, and how full each tier is; last what is being computed. Notes scroll above."""

    def __init__(
        self, console: Console, completed: int, total: int, budgets: Mapping[str, int], doing: Callable[[], str]
    ) -> None:
        self._console = console
        self._completed, self._total = completed, total
        self._budgets = budgets
        self._doing = doing
        self._pace = _Pace()
        self._told = "step " + (f"{completed + 1}/{total}" if completed < total else f"{total}/{total}")
        self._meters: Sequence[Meter] = ()
        self._live = Live(get_renderable=self._shown, console=console, refresh_per_second=4)
        self._live.start()

    def step(self, row: Mapping[str, Any], stalls: Mapping[str, float], ram: int = 0) -> None:
        self._completed = row["step"]
        self._told = (
            f"step {row['step']}/{self._total}  loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"eta {self._pace.eta(row, self._total)}"
        )
        self._meters = meters(row, stalls, self._budgets, ram)
        self._live.refresh()

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._live.stop()

    def _shown(self) -> RenderableType:
        share = self._completed / self._total if self._total else 1.0
        bars = Table.grid(padding=(0, 1))
        width = max(6, min(24, self._console.width - 28))
        for meter in (Meter("steps", share, f"{share:.0%}"), *self._meters):
            bars.add_row(meter.name, ProgressBar(1, meter.share, width=width), meter.text, style=meter.style)
        now = self._doing()
        return Group(Text(self._told, style="bold"), bars, *([Text(f"now: {now}", style="dim")] if now else []))


@dataclass(frozen=True)
class Meter:
    """One bar: its name, how full it is (0 to 1), and the text behind it."""

    name: str
    share: float
    text: str
    style: str = ""


def meters(
    row: Mapping[str, Any], stalls: Mapping[str, float], budgets: Mapping[str, int], ram: int = 0
) -> list[Meter]:
    """How busy each lane was in the step that `row` tells of, and each tier's peak against its budget: of RAM what was
    measured (`ram`: what the process grew by), where that is more than what was reserved."""
    seconds = row["seconds"] or 1.0
    found = []
    for lane, busy in row["lane_seconds"].items():
        share = min(1.0, busy / seconds)
        found.append(Meter(lane, share, f"{share:.0%}", "bold" if lane == row["busiest_lane"] else ""))
    waits = {reason: wait for reason, wait in stalls.items() if wait >= 0.01 * seconds}
    if waits:
        share = min(1.0, sum(waits.values()) / seconds)
        found.append(Meter("waiting", share, f"{share:.0%}, mostly for {max(waits, key=waits.__getitem__)}"))
    for tier, reserved in row["peak_bytes"].items():
        budget, peak = budgets.get(tier, 0), max(reserved, ram if tier == "cpu" else 0)
        if peak or budget:
            share = min(1.0, peak / budget) if budget else 1.0
            over = "red" if budget and reserved > budget else ""
            found.append(Meter(tier, share, f"{size(peak)} of {size(budget)}", over))
    return found
