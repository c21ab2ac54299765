"""Plans and run summaries as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


def open_console(stderr: bool = False) -> Console:
    """A console that keeps lines whole when piped, and takes texts as they are: `[` in a path is no markup."""
    console = Console(stderr=stderr, markup=False)
    return console if console.is_terminal else Console(stderr=stderr, markup=False, width=110)


def size(nbytes: float) -> str:
    """Bytes for people: `1.9 GiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or (unit == "GiB" and abs(value) < 1024):
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.0f} TiB" if abs(value) >= 100 else f"{value:.3g} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: `1 h 12 min`, `12 min 5 s`, `1.23 s`, `12.3 ms`, `815 us`."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60:,} h {minutes % 60} min"
    if seconds >= 600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def rate(tokens_per_second: float) -> str:
    """Tokens per second for people: `1,234`, `43`, `0.388`."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.3g}"


def plan_tables(plan: Mapping[str, Any]) -> RenderableType:
    """A plan (as `plan.json`): memory per tier, time per lane, placement of units."""
    parts: list[RenderableType] = [_tiers(plan), _lanes(plan), _units(plan)]
    facts = [
        f"step {duration(plan['step_seconds'])}, {rate(plan['tokens_per_second'])} tokens/s, {limit(plan)}",
        f"durable commit every {plan['commit_every']} step(s)" if "commit_every" in plan else "",
        f"planned by {plan['solver']['name']} ({plan['solver']['status']}) in {duration(plan['solver']['seconds'])}"
        + (f" for {plan['hardware']}" if plan.get("hardware") else ""),
        *plan.get("notes", ()),
        helps(plan),
    ]
    return Group(*parts, *(Text(fact) for fact in facts if fact))


def limit(plan: Mapping[str, Any]) -> str:
    """What a step is bound by: the busiest lane, and what compute waits for."""
    busiest = plan["busiest_lane"]
    stalls = sorted(plan.get("stall_seconds", {}).items(), key=lambda item: -item[1])
    waits = [f"{lane} {duration(s)}" for lane, s in stalls if s >= 0.02 * plan["step_seconds"]]
    if not waits:
        return "bound by compute" if busiest == "compute" else f"busiest lane {busiest}"
    share = sum(seconds for _, seconds in stalls) / plan["step_seconds"]
    return f"busiest lane {busiest}; compute waits {share:.0%} of it: for {', '.join(waits)}"


def helps(plan: Mapping[str, Any], most: int = 4) -> str:
    """What would bring more tokens per second, by how much."""
    found = [f"{a['change']}: {a['speedup']:.2g}x" for a in plan.get("advice", ())[:most]]
    return f"what would help most (tokens/s): {'; '.join(found)}" if found else ""


def verdict(plan: Mapping[str, Any]) -> RenderableType:
    """One line if the plan fits; else per tier what is missing, and what would help."""
    return Text("fits", style="bold green") if plan["fits"] else Text(shortfall(plan), style="bold red")


def shortfall(plan: Mapping[str, Any]) -> str:
    """Why a plan does not fit, with numbers per tier, and what would make it fit."""
    lines = ["does not fit:"]
    for tier, missing in plan.get("shortfall_bytes", {}).items():
        if missing > 0:
            need, have = plan["peak_bytes"].get(tier, 0), plan["budget_bytes"].get(tier, 0)
            lines.append(f"  {tier}: needs {size(need)}, budget {size(have)}, short of {size(missing)}")
    lines += [f"  try: {suggestion}" for suggestion in plan.get("suggestions", ())]
    return "\n".join(lines)


def _tiers(plan: Mapping[str, Any]) -> Table:
    table = Table("tier", title="Memory", title_justify="left")
    for column in ("budget", "planned peak", "used"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("of which", overflow="fold")
    for tier, budget in plan["budget_bytes"].items():
        peak = plan["peak_bytes"].get(tier, 0)
        if not budget and not peak:
            continue
        categories = sorted(plan.get("categories", {}).get(tier, {}).items(), key=lambda item: -item[1])
        table.add_row(
            tier,
            size(budget),
            size(peak),
            f"{peak / budget:.0%}" if budget else "-",
            ", ".join(f"{name} {size(n)}" for name, n in categories if n),
            style="red" if peak > budget else "",
        )
    return table


def _lanes(plan: Mapping[str, Any]) -> Table:
    table = Table(title="Time per step", title_justify="left")
    table.add_column("lane")
    table.add_column("busy", justify="right")
    table.add_column("of the step", justify="right")
    for lane, seconds in plan["lane_seconds"].items():
        share = seconds / plan["step_seconds"] if plan["step_seconds"] else 0.0
        table.add_row(lane, duration(seconds), f"{share:.0%}", style="bold" if lane == plan["busiest_lane"] else "")
    return table


def _units(plan: Mapping[str, Any]) -> Table:
    table = Table(title="Units", title_justify="left")
    table.add_column("units", overflow="fold")  # in a narrow terminal nothing is cut off
    table.add_column("parameters", justify="right", overflow="fold")
    table.add_column("where its state lives", overflow="fold")
    table.add_column("activations", overflow="fold")
    for group in runs_of_units(plan["units"]):
        names = [unit["name"] for unit in group]
        label = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
        table.add_row(
            label,
            f"{sum(unit['parameters'] for unit in group):,}",
            placement(group[0]["placement"]),
            activations(group[0]["activations"]) + boundary(group[0]["placement"]),
        )
    return table


def runs_of_units(units: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Neighbouring units that the plan treats alike, together."""
    groups: list[list[Mapping[str, Any]]] = []
    for unit in units:
        last = groups[-1][-1] if groups else None
        same = last and all(last[k] == unit[k] for k in ("parameters", "placement", "activations"))
        if same:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def placement(tiers: Mapping[str, str]) -> str:
    """`all nvme`, or `nvme; grad cpu` when some roles live elsewhere."""
    roles = {role: tier for role, tier in tiers.items() if role != "activation"}
    if not roles:
        return "-"
    common = Counter(roles.values()).most_common(1)[0][0]
    others = [f"{role} {tier}" for role, tier in roles.items() if tier != common]
    return "; ".join([common, *others]) if others else f"all {common}"


def activations(fractions: Mapping[str, float]) -> str:
    """`recompute`, or `swap_cpu 40%, recompute 60%`."""
    parts = [(name, share) for name, share in fractions.items() if share > 0]
    return ", ".join(name if share == 1 else f"{name} {share:.0%}" for name, share in parts) or "-"


def boundary(tiers: Mapping[str, str]) -> str:
    """`; outputs nvme` where a unit's outputs wait for backward off the device."""
    tier = tiers.get("activation", "gpu")
    return "" if tier == "gpu" else f"; outputs {tier}"


def wear(drive: Mapping[str, Any]) -> str:
    """`2.31 GiB written since the run began, 0.003% of the rated 600 TB`; see offload.io.drives."""
    text = f"{size(drive['written'])} written since the run began"
    if drive["used_share"] is not None:
        text += f", {drive['used_share']:.3%} of the rated {drive['tbw']:g} TB"
    return text


def run_table(summary: Mapping[str, str]) -> Table:
    """The summary of a run: one line per fact."""
    table = Table(show_header=False, title="Run", title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for key, value in summary.items():
        table.add_row(key, value)
    return table
