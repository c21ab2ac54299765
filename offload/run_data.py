"""What a run directory holds and what its logs say, for the report and for comparing two runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload import charts, report_memory, run_place, rundir


@dataclass(frozen=True)
class RunData:
    """What a run directory holds; a part that was never written is empty."""

    path: Path
    info: dict[str, Any]
    config: dict[str, Any]
    plan: dict[str, Any]
    rows: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    memory: dict[str, Any]
    trace: list[dict[str, Any]]
    missing: dict[str, str]  # file: why its part is empty
    process: str  # that holds the run now, empty if none does


def load(path: str | Path) -> RunData:
    """Read a run directory without its lock, so that a run can be looked at while it goes. Raises ConfigError."""
    path = Path(path).expanduser().absolute()
    info, config = rundir.read_info(path), rundir.read_config(path).dump()
    rows = list(rundir.read_jsonl(path / "metrics.jsonl"))
    missing = {} if rows else {"metrics.jsonl": "it has no step"}

    def read(name: str, absent: Any) -> Any:
        """A file that is missing or damaged leaves its part of the report empty, and is named there."""
        try:
            found = json.loads((path / name).read_text(encoding="utf-8"))
            if isinstance(found, type(absent)):
                return found
            missing[name] = f"it is no JSON {'object' if absent == {} else 'list'}"
        except FileNotFoundError:
            missing[name] = "it was not written"
        except (OSError, ValueError) as error:
            missing[name] = f"it cannot be read: {error}"
        return absent

    plan, memory, trace = read("plan.json", {}), read("memory.json", {}), read("trace.json", [])
    if not memory:
        memory = {"tiers": _tiers_without_memory(plan, rows)}
    return RunData(
        path=path,
        info=info,
        config=config,
        plan=plan,
        rows=rows,
        evals=list(rundir.read_jsonl(path / "eval.jsonl")),
        memory=memory,
        trace=trace,
        missing=missing,
        process=run_place.holder(path),
    )


def _tiers_without_memory(plan: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What plan.json and the last row of metrics.jsonl know of memory.json's `tiers`."""
    budgets, predicted = plan.get("budget_bytes", {}), plan.get("peak_bytes", {})
    peaks = rows[-1]["peak_bytes"] if rows else {}
    return {
        tier: {
            "budget": budgets.get(tier, 0), "predicted": predicted.get(tier, 0), "peak": peaks.get(tier, 0),
            "categories": {},
        }
        for tier in budgets or peaks
    }  # fmt: skip


def model_name(config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    if model.get("path"):
        return str(model["path"])
    return (
        f"{model['architecture']['model_type']} (random weights)" if model.get("architecture") else "a model in memory"
    )


def unfinished(data: RunData) -> str:
    """How a run that is short of its steps came to that; empty for one that has them all."""
    if data.rows and data.rows[-1]["step"] == data.config["train"]["steps"]:
        return ""
    if data.process:
        return f"is going on in process {data.process}"
    if data.memory.get("failure"):
        return f"failed, as told below; --resume goes on after {_last(data)}"
    if data.memory.get("closed"):
        return "was ended before; --resume goes on"
    return f"ended without a word (killed, or the machine went down); --resume goes on after {_last(data)}"


def _last(data: RunData) -> str:
    """The step that a run goes on after; see zo_step."""
    if data.config["train"]["method"] != "zo":
        return "the last committed step"
    return "the last step logged in zo.jsonl (a model that changes its own buffers: the last committed step)"


def typical(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the first step, which also warms up, if there are others."""
    return rows[1:] or rows


def lane_means(data: RunData) -> dict[str, float]:
    """Busy seconds per step of each lane, on average."""
    if not data.rows:
        return {}
    steady = typical(data.rows)
    lanes = data.rows[0]["lane_seconds"]
    return {lane: statistics.fmean(row["lane_seconds"][lane] for row in steady) for lane in lanes}


def step_seconds(data: RunData) -> float:
    """Seconds per step, on average; 0 without a step."""
    return statistics.fmean(row["seconds"] for row in typical(data.rows)) if data.rows else 0.0


def stall_means(data: RunData) -> dict[str, float]:
    """Seconds per step that compute waited, by reason, on average since the run was last started."""
    return dict(data.memory.get("stall_seconds", {}))


def tiers_in_use(data: RunData) -> dict[str, dict[str, Any]]:
    return {t: f for t, f in data.memory.get("tiers", {}).items() if f["budget"] or f["peak"] or f["predicted"]}


def tier_peak(data: RunData, tier: str) -> tuple[str, int, int]:
    """What is compared of a tier's peak, in bytes predicted and measured.

    Of RAM and of a CUDA device all that was taken is measured; else it is what the engine reserved.
    """
    figures, process = data.memory["tiers"][tier], data.memory.get("process", {})
    predicted, measured = figures["predicted"], figures["peak"]
    if tier == "cpu" and "before" in process:
        return "RAM peak, process less what it was at the start", predicted, process["pss_peak"] - process["before"]
    if tier == "gpu" and "device" in data.memory:
        return "device peak, temporaries included", predicted, data.memory["device"]["peak"]
    return f"{tier} peak, reserved", report_memory.arena_predicted(data.memory, data.plan, tier), measured


def moved_bytes(data: RunData, lane: str) -> int:
    """Bytes that crossed an SSD lane in all logged steps."""
    return sum(int(row["io_bytes"][lane]) for row in data.rows)


@dataclass(frozen=True)
class Moved:
    """Bytes of one lane in one step: all of them, and those of the operations in the trace with the seconds these took
    (what overlaps counts once)."""

    nbytes: int
    timed: int
    seconds: float


def one_step(trace: list[dict[str, Any]]) -> tuple[int, list[tuple[str, float, float]], dict[str, Moved]]:
    """The latest step of the trace: its number, lane (of a stall its reason), begin and duration in ms of each
    operation, and what each lane moved."""
    names = {e["tid"]: e["args"]["name"] for e in trace if e["ph"] == "M" and e["name"] == "thread_name"}
    events = [e for e in trace if e["ph"] == "X"]
    if not events:
        return 0, [], {}
    step = max(e["args"]["step"] for e in events)
    events = [e for e in events if e["args"]["step"] == step]
    moved = {}
    for lane in names.values():
        mine = [e for e in events if names[e["tid"]] == lane and e["args"]["bytes"] and e["dur"]]
        left = [e["args"]["bytes"] for e in trace if e["name"] == "left_out" and names[e["tid"]] == lane
                and e["args"]["step"] == step]  # fmt: skip
        if mine:
            timed = sum(e["args"]["bytes"] for e in mine)
            busy = charts.joined([(e["ts"], e["ts"] + e["dur"]) for e in mine])
            moved[lane] = Moved(timed + sum(left), timed, sum(end - begin for begin, end in busy) / 1e6)
    origin = min(e["ts"] for e in events)
    spans = []
    for e in events:
        lane = names[e["tid"]]
        row = f"waits: {e['name'].split(':')[0]}" if lane == "stall" else lane
        spans.append((row, (e["ts"] - origin) / 1e3, e["dur"] / 1e3))
    return step, spans, moved
