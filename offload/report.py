"""report.html: one self-contained file from what a run logged, at its end, after a crash, or by `offload report`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offload import charts, report_memory, rundir, tables
from offload.progress import clock
from offload.run_data import (
    Moved,
    RunData,
    lane_means,
    load,
    model_name,
    moved_bytes,
    one_step,
    stall_means,
    step_seconds,
    tier_peak,
    tiers_in_use,
    typical,
    unfinished,
)


def build(path: str | Path, advise: bool = False) -> RunData:
    """Write report.html of the run at `path`, replacing an older one; returns what it was made from.

    `advise`: what would make the run faster is planned now if the run's plan does not say it.
    """
    data = load(path)
    unadvised = "" if data.plan.get("advised") else "offload report RUN_DIR does it"
    if advise:
        from offload.advice import with_advice  # as slow to import as a run

        data, unadvised = with_advice(data)
    context = {**_context(data), "unadvised": unadvised}
    rundir.write_atomically(data.path / "report.html", render("report.html.j2", context))
    return data


def render(template: str, context: Mapping[str, Any]) -> str:
    """One of the package's templates as text; values are escaped."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("offload", "."), autoescape=True)
    return environment.get_template(template).render(**context)


def summary(data: RunData) -> dict[str, str]:
    """The run in a few lines: how far, how well, how fast, how much memory, how many bytes."""
    facts = {"steps": f"{data.rows[-1]['step'] if data.rows else 0} of {data.config['train']['steps']}"}
    if how := unfinished(data):
        facts["state"] = how
    if data.rows:
        steady = typical(data.rows)
        facts["loss"] = (
            f"{data.rows[0]['loss']:.4f} at step {data.rows[0]['step']}, {data.rows[-1]['loss']:.4f} at the end"
        )
        if data.evals:
            facts["eval loss"] = f"{data.evals[-1]['eval_loss']:.4f} at step {data.evals[-1]['step']}"
        facts["speed"] = (
            f"{statistics.median(row['tokens_per_second'] for row in steady):,.0f} tokens/s, "
            f"{tables.duration(statistics.median(row['seconds'] for row in steady))} per step"
        )
        facts["time in steps"] = clock(sum(row["seconds"] for row in data.rows))
        facts["busiest lane"] = statistics.mode(row["busiest_lane"] for row in steady)
        if passes := sum(row.get("activation_fallbacks", 0) for row in data.rows):
            facts["over the plan"] = f"activations took more room than planned in {passes} passes through units"
    for tier, figures in tiers_in_use(data).items():
        _, planned, peak = tier_peak(data, tier)
        told, beyond = f"peak {tables.size(peak)}", ""
        if tier == "cpu" and "before" in (process := data.memory.get("process", {})):
            told = f"process at most {tables.size(process['pss_peak'])}, {tables.size(process['before'])} of it before"
            beyond = " beyond its footprint"
        facts[f"memory {tier}"] = (
            f"{told}; planned {tables.size(planned)}, budget {tables.size(figures['budget'])}{beyond}"
        )
    if data.rows:
        facts["SSD"] = " and ".join(
            f"{tables.size(moved_bytes(data, lane))} {word}"
            for lane, word in (("nvme_read", "read"), ("nvme_write", "written"))
        )
    drives = data.memory.get("drives", [])
    for number, drive in enumerate(drives, start=1):
        facts["SSD wear" if len(drives) == 1 else f"SSD {number}, wear"] = f"{tables.wear(drive)}; {drive['path']}"
    return facts


def _context(data: RunData) -> dict[str, Any]:
    lanes = lane_means(data)
    busy = {lane: [row["lane_seconds"][lane] for row in data.rows] for lane in lanes}
    step, spans, moved = one_step(data.trace)
    units = data.plan.get("units", [])
    return {
        "title": f"Run {data.path.name}",
        "subtitle": f"{model_name(data.config)} · started {data.info.get('created', '?')} · {data.path}",
        "result": _result(data),
        "failure": data.memory.get("failure", ""),
        "figures": _figures(data),
        "summary": summary(data),
        "loss_chart": data.rows
        and charts.loss(
            {"train": ([row["step"] for row in data.rows], [row["loss"] for row in data.rows])},
            [(row["step"], row["eval_loss"]) for row in data.evals],
        ),
        "memory": report_memory.section(data.memory, data.plan),
        "lanes": _lanes(data, lanes),
        "links": _links(data.memory.get("rates", {}), moved),
        "stalls": _stalls(data),
        "lane_chart": data.rows and charts.lanes(busy, [row["seconds"] for row in data.rows]),
        "timeline_chart": spans and charts.timeline(spans),
        "timeline": f"Step {step}. trace.json opens in Perfetto (ui.perfetto.dev) for every operation by name.",
        "units": _units(data.plan),
        "units_chart": units and _map(units),
        "planned_by": _planned_by(data.plan),
        "compared": _predicted_and_measured(data, lanes),
        "ssd": _ssd(data),
        "advice": _advice(data),
        "room": _room(data),
        "absent": {name: f"{name}: {why}; so {_LOST[name]}" for name, why in data.missing.items()},
        "late": _late(data),
    }


# What the report lacks without a file.
_LOST = {
    "metrics.jsonl": "there is no loss, speed or busy time of lanes",
    "plan.json": "there is no placement and no prediction",
    "memory.json": "there is no split by what memory is for, no waits and no rates of the links; peaks of tiers are "
    "those of metrics.jsonl",
    "trace.json": "there is no timeline of a step, and no bytes of the links",
}


def _late(data: RunData) -> str:
    """That the memory figures are older than the last step: those of a killed run are."""
    logged = data.memory["steps"][-1]["step"] if data.memory.get("steps") else 0
    last = data.rows[-1]["step"] if data.rows else 0
    return f"memory.json was last written after step {logged}, and the run got to step {last}." * (0 < logged < last)


def _figures(data: RunData) -> dict[str, Any]:
    """The main numbers, unrounded, for scripts (and for the test that compares them with the logs)."""
    if not data.rows:
        return {}
    last = data.rows[-1]
    found = {key: last[key] for key in ("step", "loss", "grad_norm", "busiest_lane")}
    found["seconds_median"] = statistics.median(row["seconds"] for row in typical(data.rows))
    found["tokens_per_second_median"] = statistics.median(row["tokens_per_second"] for row in typical(data.rows))
    found["pss_peak"] = data.memory.get("process", {}).get("pss_peak", 0)
    # JSON has no NaN: a loss that is none is null.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def _result(data: RunData) -> str:
    how = unfinished(data)
    if not data.rows:
        return f"No step was completed. The run {how}."
    first, last = data.rows[0], data.rows[-1]
    state = f"stopped at step {last['step']} of {data.config['train']['steps']}: it {how}" if how else "finished"
    if not how and data.memory.get("failure"):  # the model could not be saved, say
        state = "took all its steps, and failed after them, as told below"
    change = "fell" if last["loss"] < first["loss"] else "did not fall"
    return (
        f"The run {state}; the loss {change}, from {first['loss']:.4f} to {last['loss']:.4f}, "
        f"at {statistics.median(row['tokens_per_second'] for row in typical(data.rows)):,.0f} tokens/s."
    )


def _lanes(data: RunData, lanes: Mapping[str, float]) -> list[dict[str, Any]]:
    whole = step_seconds(data)
    busiest = max(lanes, key=lambda lane: lanes[lane], default="")
    return [
        {
            "name": lane,
            "busiest": lane == busiest,
            "busy": tables.duration(mean),
            "share": f"{mean / whole:.0%}" if whole else "-",
            "planned": tables.duration(data.plan["lane_seconds"].get(lane, 0)) if data.plan else "-",
        }
        for lane, mean in lanes.items()
    ]


def _links(rates: Mapping[str, float], moved: Mapping[str, Moved]) -> list[dict[str, str]]:
    """Of each link: bytes of the traced step, the rate they went at while it moved any, and the measured rate."""
    found = []
    for lane in ("h2d", "d2h", "nvme_read", "nvme_write"):
        if lane in moved:
            achieved, rate = moved[lane].timed / moved[lane].seconds, rates.get(lane, 0.0)
            found.append(
                {
                    "name": lane,
                    "moved": tables.size(moved[lane].nbytes),
                    "achieved": f"{tables.size(achieved)}/s",
                    "measured": f"{tables.size(rate)}/s" if rate else "-",
                    "share": f"{achieved / rate:.0%}" if rate else "-",
                }
            )
    return found


def _stalls(data: RunData) -> list[dict[str, str]]:
    whole = step_seconds(data)
    return [
        {"name": reason, "seconds": tables.duration(mean), "share": f"{mean / whole:.0%}"}
        for reason, mean in stall_means(data).items()
        if whole
    ]


def _predicted_and_measured(data: RunData, lanes: Mapping[str, float]) -> list[dict[str, str]]:
    """Every number that the plan predicts, beside what was measured."""
    plan, rows = data.plan, []
    if not plan or not data.rows:
        return []

    def add(name: str, predicted: float, measured: float, text: Callable[[float], str]) -> None:
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        rows.append({"name": name, "predicted": text(predicted), "measured": text(measured), "ratio": ratio})

    speed = statistics.median(row["tokens_per_second"] for row in typical(data.rows))
    add("seconds per step", plan["step_seconds"], step_seconds(data), tables.duration)
    add("tokens per second", plan["tokens_per_second"], speed, lambda value: f"{value:,.0f}")
    for lane, mean in lanes.items():
        add(f"{lane}, busy per step", plan["lane_seconds"].get(lane, 0.0), mean, tables.duration)
    if "stall_seconds" in plan:
        waited = sum(stall_means(data).values())
        add("compute waits per step", sum(plan["stall_seconds"].values()), waited, tables.duration)
    for tier in tiers_in_use(data):
        add(*tier_peak(data, tier), tables.size)
    return rows


def _advice(data: RunData) -> list[dict[str, str]]:
    base = data.plan.get("tokens_per_second", 0.0)
    return [
        {"change": a["change"], "speedup": f"{a['speedup']:.2f}", "speed": f"{a['speedup'] * base:,.0f} tokens/s"}
        for a in data.plan.get("advice", ())
    ]


def _room(data: RunData) -> list[str]:
    """What of each budget was never used: room for a longer sequence or a larger batch, or for another program."""
    lines = []
    for tier, figures in tiers_in_use(data).items():
        used = max(figures["peak"], figures["predicted"])
        if figures["budget"] and used < 0.9 * figures["budget"]:
            lines.append(f"{tier}: {tables.size(figures['budget'] - used)} of {tables.size(figures['budget'])}")
    return lines


# Colours of the map of units: places first, then what happens to activations.
_DECIDED = {
    "gpu": "#1f6feb", "cpu": "#2da44e", "cxl": "#8250df", "nvme": "#bf8700",
    "keep": "#54aeff", "swap_cpu": "#7ee2a8", "swap_cxl": "#d2a8ff", "swap_nvme": "#e3b341", "recompute": "#afb8c1",
    "-": "#eaeef2",
}  # fmt: skip


def _map(units: list[dict[str, Any]]) -> charts.Picture:
    """Every unit with the places of its weights, optimizer state and gradient, what its activations do, by share."""
    rows: dict[str, list[dict[str, float]]] = {
        label: [{unit["placement"].get(role, "-"): 1.0} for unit in units]
        for label, role in (("weights", "param"), ("state", "exp_avg"), ("gradient", "grad"))
        if any(role in unit["placement"] for unit in units)  # forward passes only need no gradient
    }
    rows["activations"] = [
        {what: share for what, share in unit["activations"].items() if share > 0} or {"-": 1.0} for unit in units
    ]
    return charts.units([unit["name"] for unit in units], rows, _DECIDED)


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
        total = moved_bytes(data, lane)
        per_step = total / len(data.rows)
        facts[f"{word} in all steps"] = tables.size(total)
        facts[f"{word} per step"] = tables.size(per_step)
        if parameters:
            facts[f"{word} per parameter and step"] = f"{per_step / parameters:.1f} bytes"
    return {**facts, **_endurance(data)}


def _endurance(data: RunData) -> dict[str, str]:
    """Of each rated drive, what the run has written to it since it was made, and how long the rating lasts at this
    run's pace; paths without a rating are left out."""
    drives = data.memory.get("drives", [])
    rated = [drive for drive in drives if drive["tbw"]]
    facts = {}
    for drive in rated:
        of = f", {drive['path']}" if len(drives) > 1 else ""
        facts[f"of the rated endurance{of}"] = f"{drive['used_share']:.3%} of {drive['tbw']:g} TB"
        share = drive["written"] / (sum(other["written"] for other in drives) or 1)
        per_step = moved_bytes(data, "nvme_write") / len(data.rows) * share
        if per_step:
            steps = max(0.0, drive["tbw"] * 1e12 - drive["written"]) / per_step
            days = steps * step_seconds(data) / 86400
            facts[f"the rest of it lasts{of}"] = f"{steps:,.0f} such steps, {days:,.0f} days of them"
    if not any(entry["tbw"] for entry in data.info["store"]["paths"]):
        facts["rated endurance"] = "not known: give memory.nvme[].tbw, the terabytes written of the drive's data sheet"
    return facts
