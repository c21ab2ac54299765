"""From samples to answers: medians with their spread, ratios of paired rounds with intervals, and the bars."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from benchmarks.step.setting import Setting

RESAMPLES, COVERAGE, GIB = 2000, 0.95, 2.0**30
NAMES = {
    "a": "plain PyTorch",
    "a-ckpt": "plain PyTorch, checkpointing",
    "b": "DeepSpeed ZeRO-3, RAM",
    "c": "DeepSpeed ZeRO-Infinity, SSD",
    "d": "this engine, RAM",
    "e": "this engine, SSD",
    "e-clip": "this engine, SSD, clipping 1.0",
}
Rounds = dict[int, dict[str, dict[str, Any]]]  # round -> system -> result


def summarize(results: list[dict[str, Any]], parameters: int, footprint: int) -> dict[str, Any]:
    """One system's rounds: seconds, bytes, and bytes per parameter and step. Peaks are the largest seen."""
    seconds = [s for r in results for s in r["seconds"]]
    peak = max(r["peak_pss_bytes"]["steps"] for r in results)
    return {
        "rounds": len(results),
        "median_step_seconds": median(seconds),
        "step_seconds": seconds,
        "cpu_seconds_per_step": median(s for r in results for s in r["cpu_seconds"]),
        "peak_pss_bytes": peak,
        "peak_over_footprint_bytes": peak - footprint,
        "peak_while_loading_bytes": max(r["peak_pss_bytes"]["load"] for r in results),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in results),
        "read_bytes_per_parameter": median(n for r in results for n in r["read"]) / parameters,
        "written_bytes_per_parameter": median(n for r in results for n in r["written"]) / parameters,
        "losses": [r["losses"] for r in results],
        **({"step_over_busiest_lane": median(_over_busiest(r) for r in results)} if "found" in results[0] else {}),
    }


def _over_busiest(result: dict[str, Any]) -> float:
    """Seconds of the measured steps over the busy seconds of the lane that was busiest in them."""
    lanes = result["found"]["lane_seconds"]
    return sum(result["seconds"]) / max(sum(row[lane] for row in lanes) for lane in lanes[0])


def paired(rounds: Rounds, above: str, below: str) -> dict[str, Any] | None:
    """The ratio of two systems' step times: the median over rounds of the ratio of their medians, with an interval.

    The interval is the bootstrap's: rounds are drawn with replacement, and within each the steps of both systems.
    None when no round has both.
    """
    pairs = [(r[above]["seconds"], r[below]["seconds"]) for r in rounds.values() if above in r and below in r]
    if not pairs:
        return None
    draw = random.Random(0)
    drawn = sorted(
        median(
            median(draw.choices(a, k=len(a))) / median(draw.choices(b, k=len(b)))
            for a, b in draw.choices(pairs, k=len(pairs))
        )
        for _ in range(RESAMPLES)
    )
    tail = int(RESAMPLES * (1 - COVERAGE) / 2)
    return {"value": median(median(a) / median(b) for a, b in pairs), "interval": [drawn[tail], drawn[-1 - tail]]}


def bars(setting: Setting, rounds: Rounds, systems: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every bar that this setting can answer: {bar, limit, value, interval, met}."""
    found: list[dict[str, Any]] = []

    def add(bar: str, limit: float, value: float | None, interval: list[float] | None = None) -> None:
        if value is not None:
            found.append({"bar": bar, "limit": limit, "value": value, "interval": interval, "met": value <= limit})

    def time(above: str, below: str, limit: float) -> None:
        ratio = paired(rounds, above, below)
        if ratio is not None:
            add(f"step time of ({above}) over ({below})", limit, ratio["value"], ratio["interval"])

    def figure(system: str, name: str) -> Any:
        return systems.get(system, {}).get(name)

    def memory(above: str, below: str, limit: float) -> None:
        if above in systems and below in systems:
            name = "peak_pss_bytes"
            add(f"peak memory of ({above}) over ({below})", limit, figure(above, name) / figure(below, name))

    one = setting.micro_batches == 1 and setting.max_grad_norm is None
    if one and setting.size in ("271m", "1b"):
        small = setting.size == "271m"
        time("e", "c", 0.45 if small else 0.65)
        memory("e", "c", 0.30)
        time("e", "a-ckpt", 1.6 if small else 1.2)
        add("bytes written per parameter and step, (e)", 12.1, figure("e", "written_bytes_per_parameter"))
        add("bytes read per parameter and step, (e)", 14.1, figure("e", "read_bytes_per_parameter"))
        time("e-clip", "e", 1.15)
        add("bytes written per parameter and step, (e-clip)", 16.1, figure("e-clip", "written_bytes_per_parameter"))
        add("bytes read per parameter and step, (e-clip)", 18.1, figure("e-clip", "read_bytes_per_parameter"))
        time("d", "b", 0.55)
        memory("d", "b", 0.65)
        if figure("d", "recomputes") is False:
            time("d", "a", 1.15)
    if setting.micro_batches >= 8 and setting.size != "toy":
        time("e", "a-ckpt", 1.15)
        add("step time over the busiest lane, (e)", 1.15, figure("e", "step_over_busiest_lane"))
    if setting.size != "toy":
        add("step time over the busiest lane, (d)", 1.15, figure("d", "step_over_busiest_lane"))
    return found


def losses(systems: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per system, whether its losses are those of plain PyTorch to the bit in every round, and the largest difference.

    A system that clips alone has nothing to be compared with. Without a plain system: empty.
    """
    reference = next((systems[name]["losses"][0] for name in ("a", "a-ckpt") if name in systems), None)
    if reference is None:
        return {}
    answer = {}
    for name, system in systems.items():
        if name != "e-clip":
            differences = [abs(x - y) for run in system["losses"] for x, y in zip(run, reference, strict=True)]
            answer[name] = {"equal": all(d == 0.0 for d in differences), "largest_difference": max(differences)}
    return answer


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    s = report["setting"]
    lines = [
        f"{report['parameters'] / 1e6:.0f} M parameters, bfloat16, sequence {s['sequence']}, micro-batch "
        f"{s['micro_batch']} x {s['micro_batches']}, clipping {s['max_grad_norm']}; medians over {s['steps']} steps of "
        f"each round; footprint {report['footprint_bytes'] / GIB:.2f} GiB",
        f"{'':36}{'s/step':>8}{'min':>8}{'max':>8}{'CPU s':>8}{'peak GiB':>10}{'-footprint':>11}{'read B/p':>10}"
        f"{'written':>9}{'/busiest':>9}  losses",
    ]
    same = report["losses"]
    for name, x in report["systems"].items():
        over = f"{x['step_over_busiest_lane']:.2f}" if "step_over_busiest_lane" in x else ""
        word = ""
        if name in same:
            word = "equal" if same[name]["equal"] else f"off by {same[name]['largest_difference']:.1e}"
        lines.append(
            f"{f'({name}) {NAMES[name]}':36}{x['median_step_seconds']:8.3f}{min(x['step_seconds']):8.3f}"
            f"{max(x['step_seconds']):8.3f}{x['cpu_seconds_per_step']:8.2f}{x['peak_pss_bytes'] / GIB:10.2f}"
            f"{x['peak_over_footprint_bytes'] / GIB:11.2f}{x['read_bytes_per_parameter']:10.2f}"
            f"{x['written_bytes_per_parameter']:9.2f}{over:>9}  {word}"
        )
    for name, why in report["failures"].items():
        lines.append(f"({name}) {NAMES[name]}: did not run: {why}")
    for bar in report["bars"]:
        word = "met   " if bar["met"] else "MISSED"
        interval = "" if bar["interval"] is None else f"  [{bar['interval'][0]:.3f}, {bar['interval'][1]:.3f}]"
        lines.append(f"{word}  {bar['bar']}: {bar['value']:.3f}, at most {bar['limit']}{interval}")
    return "\n".join(lines)


def all_met(report: dict[str, Any]) -> bool:
    """Whether every bar is met and this engine's losses are the reference's."""
    ours: Iterable[bool] = (x["equal"] for name, x in report["losses"].items() if name in ("d", "e"))
    return all(bar["met"] for bar in report["bars"]) and all(ours)


def by_system(rounds: Rounds, pick: Callable[[str], bool]) -> dict[str, list[dict[str, Any]]]:
    """Results per system in the order of `NAMES`, rounds in order."""
    return {
        name: [rounds[i][name] for i in sorted(rounds) if name in rounds[i]]
        for name in NAMES
        if pick(name) and any(name in r for r in rounds.values())
    }
