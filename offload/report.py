"""report.html: one self-contained file from what a run logged, at its end, after a crash, or by `offload report`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload import charts, rundir, tables
from offload.progress import clock


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


def load(path: str | Path) -> RunData:
    """Read a run directory without its lock, so that a run can be looked at while it goes. Raises ConfigError."""
    path = Path(path).expanduser().absolute()
    return RunData(
        path=path,
        info=rundir.read_info(path),
        config=rundir.read_config(path).dump(),
        plan=_json(path / "plan.json", {}),
        rows=list(rundir.read_jsonl(path / "metrics.jsonl")),
        evals=list(rundir.read_jsonl(path / "eval.jsonl")),
        memory=_json(path / "memory.json", {}),
        trace=_json(path / "trace.json", []),
    )


def build(path: str | Path) -> RunData:
    """Write report.html of the run at `path`, replacing an older one; returns what it was made from."""
    import jinja2

    data = load(path)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("offload", "."), autoescape=True)
    rundir.write_atomically(
        data.path / "report.html", environment.get_template("report.html.j2").render(**_context(data))
    )
    return data


def summary(data: RunData) -> dict[str, str]:
    """The run in a few lines: how far, how well, how fast, how much memory, how many bytes."""
    facts = {"steps": f"{data.rows[-1]['step'] if data.rows else 0} of {data.config['train']['steps']}"}
    if data.rows:
        typical = _typical(data.rows)
        facts["loss"] = (
            f"{data.rows[0]['loss']:.4f} at step {data.rows[0]['step']}, {data.rows[-1]['loss']:.4f} at the end"
        )
        if data.evals:
            facts["eval loss"] = f"{data.evals[-1]['eval_loss']:.4f} at step {data.evals[-1]['step']}"
        facts["speed"] = (
            f"{statistics.median(row['tokens_per_second'] for row in typical):,.0f} tokens/s, "
            f"{tables.duration(statistics.median(row['seconds'] for row in typical))} per step"
        )
        facts["time in steps"] = clock(sum(row["seconds"] for row in data.rows))
        facts["busiest lane"] = statistics.mode(row["busiest_lane"] for row in typical)
    for tier, figures in _tiers(data).items():
        facts[f"memory {tier}"] = (
            f"peak {tables.size(figures['peak'])}, planned {tables.size(figures['predicted'])}, "
            f"budget {tables.size(figures['budget'])}"
        )
    if data.rows:
        facts["SSD"] = " and ".join(
            f"{tables.size(_moved(data, lane))} {word}"
            for lane, word in (("nvme_read", "read"), ("nvme_write", "written"))
        )
    return facts


def _context(data: RunData) -> dict[str, Any]:
    lanes = _lane_means(data)
    busy = {lane: [row["lane_seconds"][lane] for row in data.rows] for lane in lanes}
    tiers = _tiers(data)
    step, spans = _one_step(data.trace)
    pss = data.memory.get("process", {}).get("pss_peak")
    return {
        "title": f"Run {data.path.name}",
        "subtitle": f"{_model_name(data.config)} · started {data.info.get('created', '?')} · {data.path}",
        "result": _result(data),
        "summary": summary(data),
        "loss_chart": data.rows
        and charts.loss(
            [row["step"] for row in data.rows],
            [row["loss"] for row in data.rows],
            [(row["step"], row["eval_loss"]) for row in data.evals],
        ),
        "tiers": [
            {
                "name": tier,
                "over": figures["peak"] > figures["budget"],
                **{key: tables.size(figures[key]) for key in ("peak", "predicted", "budget")},
                "categories": ", ".join(
                    f"{name} {tables.size(n['peak'])}"
                    for name, n in sorted(figures["categories"].items(), key=lambda item: -item[1]["peak"])
                ),
            }
            for tier, figures in tiers.items()
        ],
        "memory_chart": tiers
        and charts.memory({t: (f["peak"], f["predicted"], f["budget"]) for t, f in tiers.items()}),
        "process": f"The process tree, everything included, peaked at {tables.size(pss)} of RAM (PSS)." if pss else "",
        "lanes": [
            {
                "name": lane,
                "busy": tables.duration(mean),
                "share": f"{mean / _step_seconds(data):.0%}" if _step_seconds(data) else "-",
                "planned": tables.duration(data.plan["lane_seconds"].get(lane, 0)) if data.plan else "-",
            }
            for lane, mean in lanes.items()
        ],
        "lane_chart": data.rows and charts.lanes(busy, [row["seconds"] for row in data.rows]),
        "timeline_chart": spans and charts.timeline(spans),
        "timeline": f"Step {step}. trace.json opens in Perfetto (ui.perfetto.dev) for every operation by name.",
        "units": _units(data.plan),
        "planned_by": _planned_by(data.plan),
        "ssd": _ssd(data),
    }


def _result(data: RunData) -> str:
    if not data.rows:
        return "No step was completed."
    first, last = data.rows[0], data.rows[-1]
    wanted = data.config["train"]["steps"]
    state = "finished" if last["step"] == wanted else f"stopped at step {last['step']} of {wanted}"
    change = "fell" if last["loss"] < first["loss"] else "did not fall"
    return (
        f"The run {state}; the loss {change}, from {first['loss']:.4f} to {last['loss']:.4f}, "
        f"at {statistics.median(row['tokens_per_second'] for row in _typical(data.rows)):,.0f} tokens/s."
    )


def _typical(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the first step, which also warms up, if there are others."""
    return rows[1:] or rows


def _lane_means(data: RunData) -> dict[str, float]:
    if not data.rows:
        return {}
    typical = _typical(data.rows)
    return {
        lane: statistics.fmean(row["lane_seconds"][lane] for row in typical) for lane in data.rows[0]["lane_seconds"]
    }


def _step_seconds(data: RunData) -> float:
    return statistics.fmean(row["seconds"] for row in _typical(data.rows))


def _moved(data: RunData, lane: str) -> int:
    return sum(int(row["io_bytes"][lane]) for row in data.rows)


def _tiers(data: RunData) -> dict[str, dict[str, Any]]:
    return {t: f for t, f in data.memory.get("tiers", {}).items() if f["budget"] or f["peak"] or f["predicted"]}


def _one_step(trace: list[dict[str, Any]]) -> tuple[int, list[tuple[str, float, float]]]:
    """The latest step of the trace: its number and (lane, begin, duration) in milliseconds."""
    names = {e["tid"]: e["args"]["name"] for e in trace if e["ph"] == "M" and e["name"] == "thread_name"}
    events = [e for e in trace if e["ph"] == "X"]
    if not events:
        return 0, []
    step = max(e["args"]["step"] for e in events)
    events = [e for e in events if e["args"]["step"] == step]
    origin = min(e["ts"] for e in events)
    return step, [(names[e["tid"]], (e["ts"] - origin) / 1e3, e["dur"] / 1e3) for e in events]


def _units(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for group in tables.runs_of_units(plan.get("units", [])):
        names = [unit["name"] for unit in group]
        rows.append(
            {
                "name": names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)} units)",
                "parameters": f"{sum(unit['parameters'] for unit in group):,}",
                "placement": tables.placement(group[0]["placement"]),
                "activations": tables.activations(group[0]["activations"]),
            }
        )
    return rows


def _planned_by(plan: Mapping[str, Any]) -> str:
    if not plan:
        return ""
    return (
        f"Planned by {plan['solver']['name']} ({plan['solver']['status']}): "
        f"step {tables.duration(plan['step_seconds'])}, "
        f"{plan['tokens_per_second']:,.0f} tokens/s, busiest lane {plan['busiest_lane']}."
    )


def _ssd(data: RunData) -> dict[str, str]:
    if not data.rows:
        return {}
    parameters = sum(unit["parameters"] for unit in data.plan.get("units", []))
    facts = {}
    for lane, word in (("nvme_read", "read"), ("nvme_write", "written")):
        total = _moved(data, lane)
        per_step = total / len(data.rows)
        facts[f"{word} in all steps"] = tables.size(total)
        facts[f"{word} per step"] = tables.size(per_step)
        if parameters:
            facts[f"{word} per parameter and step"] = f"{per_step / parameters:.1f} bytes"
    rated = sum(entry["tbw"] or 0 for entry in data.info["store"]["paths"])
    if rated:
        facts["of the rated endurance"] = f"{_moved(data, 'nvme_write') / (rated * 1e12):.3%}"
    return facts


def _model_name(config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    if model.get("path"):
        return str(model["path"])
    return (
        f"{model['architecture']['model_type']} (random weights)" if model.get("architecture") else "a model in memory"
    )


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else absent
