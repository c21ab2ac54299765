"""Two runs side by side: what differs in their configs, and every figure of both with its ratio."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from offload import charts, report, report_memory, run_data, rundir, tables
from offload.progress import clock
from offload.run_data import RunData


@dataclass(frozen=True)
class Line:
    """One figure of two runs; `ratio` is the second over the first, empty where that says nothing."""

    name: str
    first: str
    second: str
    ratio: str = ""


def build(path: str | Path, other: str | Path) -> tuple[Path, list[Line], list[Line]]:
    """Write compare.html into the run at `path`; returns it, the figures, and the settings that differ.

    Raises ConfigError where one of the two is no run.
    """
    first, second = run_data.load(path), run_data.load(other)
    figures, settings = lines(first, second), differences(first, second)
    curves = {
        name: ([row["step"] for row in run.rows], [row["loss"] for row in run.rows])
        for name, run in _names(first, second).items()
        if run.rows
    }
    out = first.path / "compare.html"
    context = {
        "title": f"{first.path.name} and {second.path.name}",
        "names": list(_names(first, second)),
        "paths": [str(first.path), str(second.path)],
        "loss_chart": charts.loss(curves, []) if curves else "",
        "figures": figures,
        "settings": settings,
        "runs": [
            {
                "name": name,
                "memory": report_memory.section(run.memory, run.plan),
                "missing": "; ".join(f"{file}: {why}" for file, why in run.missing.items()),
            }
            for name, run in _names(first, second).items()
        ],
    }
    rundir.write_atomically(out, report.render("compare.html.j2", context))
    return out, figures, settings


def _names(first: RunData, second: RunData) -> dict[str, RunData]:
    """The runs by the names of their directories; by whole paths where those are equal."""
    names = [run.path.name if first.path.name != second.path.name else str(run.path) for run in (first, second)]
    names = names if names[0] != names[1] else ["first", "second"]
    return dict(zip(names, (first, second), strict=True))


def lines(first: RunData, second: RunData) -> list[Line]:
    """Every figure of the runs, `-` where one was not logged; steps after the first one count for speed."""
    found = [Line("steps", str(_steps(first)), str(_steps(second)))]
    if not (first.rows and second.rows):
        return found

    def add(name: str, value: Callable[[RunData], float | None], text: Callable[[float], str]) -> None:
        one, two = value(first), value(second)
        left, right = ("-" if figure is None else text(figure) for figure in (one, two))
        found.append(Line(name, left, right, f"{two / one:.2f}" if one and two is not None else ""))

    common = min(_steps(first), _steps(second))
    by_step = [{row["step"]: row["loss"] for row in run.rows} for run in (first, second)]
    if common in by_step[0] and common in by_step[1]:
        add(f"loss at step {common}", lambda run: by_step[run is second][common], lambda x: f"{x:.6g}")
    shared = by_step[0].keys() & by_step[1].keys()
    equal = sum(by_step[0][step] == by_step[1][step] for step in shared)
    found.append(Line("steps of equal loss, to the bit", f"{equal} of {len(shared)}", ""))
    if first.evals or second.evals:
        add("eval loss, last", lambda run: run.evals[-1]["eval_loss"] if run.evals else None, lambda x: f"{x:.6g}")
    add("seconds per step, median", lambda run: _median(run, "seconds"), tables.duration)
    add("seconds per step, mean", run_data.step_seconds, tables.duration)
    add("tokens per second, median", lambda run: _median(run, "tokens_per_second"), lambda x: f"{x:,.0f}")
    add("time in steps", lambda run: sum(row["seconds"] for row in run.rows), clock)
    found.append(Line("busiest lane", *(statistics.mode(r["busiest_lane"] for r in d.rows) for d in (first, second))))
    means = [run_data.lane_means(run) for run in (first, second)]
    for lane in means[0]:
        add(f"{lane}, busy per step", lambda run, lane=lane: means[run is second].get(lane, 0.0), tables.duration)  # type: ignore[misc]
    waits = [run_data.stall_means(run) for run in (first, second)]
    for reason in sorted(waits[0].keys() | waits[1].keys()):
        add(f"waits for {reason}", lambda run, r=reason: _waited(run, r), tables.duration)  # type: ignore[misc]
    for lane, word in (("nvme_read", "read"), ("nvme_write", "written")):
        add(f"SSD {word} per step", lambda run, lane=lane: _mean_bytes(run, lane), tables.size)  # type: ignore[misc]
    add("RAM of the process, peak (PSS)", lambda run: run.memory.get("process", {}).get("pss_peak"), tables.size)
    for tier in ("gpu", "cpu", "cxl", "nvme"):
        if any(_peak(run, tier) for run in (first, second)):
            add(f"{tier} reserved, peak", lambda run, tier=tier: _peak(run, tier), tables.size)  # type: ignore[misc]
    return found


def differences(first: RunData, second: RunData) -> list[Line]:
    """Settings of the resolved configs that are not the same, by dotted key; the place of the run left out."""
    one, two = dict(_flat(first.config)), dict(_flat(second.config))
    keys = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key) and key != "output")
    return [Line(key, *(_as_written(run[key]) if key in run else "-" for run in (one, two))) for key in keys]


def _as_written(value: Any) -> str:
    """A value as a config file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _steps(run: RunData) -> int:
    return int(run.rows[-1]["step"]) if run.rows else 0


def _waited(run: RunData, reason: str) -> float | None:
    return None if "memory.json" in run.missing else run_data.stall_means(run).get(reason, 0.0)


def _median(run: RunData, key: str) -> float:
    return statistics.median(row[key] for row in run_data.typical(run.rows))


def _mean_bytes(run: RunData, lane: str) -> float:
    return statistics.fmean(row["io_bytes"][lane] for row in run_data.typical(run.rows))


def _peak(run: RunData, tier: str) -> int:
    return int(run.rows[-1]["peak_bytes"].get(tier, 0))


def table(first: str, second: str, figures: list[Line], settings: list[Line]) -> Table:
    """Both runs for a terminal."""
    shown = Table(title="Two runs", title_justify="left")
    for column in ("", first, second, "ratio"):
        shown.add_column(column, overflow="fold")
    for line in figures:
        shown.add_row(line.name, line.first, line.second, line.ratio)
    shown.add_section()
    for line in settings:
        shown.add_row(line.name, line.first, line.second, "", style="dim")
    return shown
