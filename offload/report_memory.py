"""The memory section of the report: peaks named and split into parts that add up, and one step as stacks over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offload import charts
from offload.tables import size

TIERS = ("gpu", "cpu", "cxl", "nvme")
HOST_TIERS = ("cpu", "cxl")
# The ledger's categories by what the bytes are for; what is not named here is a buffer.
_GROUPS = {
    "weights": "weights", "resident": "weights", "param": "weights", "frozen": "weights",
    "gradients": "gradients", "grad": "gradients", "gradient homes": "gradients",
    "master": "optimizer state", "exp_avg": "optimizer state", "exp_avg_sq": "optimizer state",
    "state": "optimizer state", "activations": "activations", "swapped activations": "activations",
}  # fmt: skip
_BEFORE = " (of the budget and what the program took at its start)"


def group(category: str) -> str:
    """What a category of the ledger is for: weights, optimizer state, gradients, activations or buffers."""
    return _GROUPS.get(category.split(".")[0], "buffers")


def section(memory: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of memory.json, beside the plan; empty parts where nothing was logged."""
    tiers = {t: f for t, f in memory.get("tiers", {}).items() if f["budget"] or f["peak"] or f["predicted"]}
    panels = []
    step = memory["steps"][-1] if memory.get("steps") else None
    if step is not None:
        found = (_process(memory, step), *(_tier(memory, step, tier, plan) for tier in tiers))
        panels = [panel for panel in found if panel]
    return {
        "tiers": [_row(tier, figures, memory) for tier, figures in tiers.items()],
        "panels": panels,
        "step": step["step"] if step else 0,
        "parts": _parts(memory),
        "peaks": peaks(memory),
    }


def peaks(memory: Mapping[str, Any]) -> list[str]:
    """Each peak by name: `gpu: step 3, backward of layer 17: 1.9 GiB of 2 GiB, of which activations 1.1 GiB`."""
    lines, reserved = [], memory.get("reserved", {})
    for tier, peak in sorted(reserved.items(), key=lambda item: TIERS.index(item[0])):
        budget = memory["tiers"].get(tier, {}).get("budget", 0)
        lines.append(f"{tier}: {_named(peak, peak['categories'], budget)}")
    process = memory.get("process", {})
    if "at_peak" in process:
        peak = process["at_peak"]
        budget = _ram(memory, "budget")
        lines.insert(0, f"RAM of the process (PSS): {_named(peak, _grouped(peak), budget)}" + _BEFORE * (budget > 0))
    if "device" in memory:
        peak, budget = memory["device"]["at_peak"], memory["tiers"].get("gpu", {}).get("budget", 0)
        lines.insert(0, f"CUDA device, temporaries included: {_named(peak, _grouped(peak), budget)}")
    return lines


def _named(peak: Mapping[str, Any], categories: Mapping[str, int], budget: int = 0) -> str:
    largest = sorted(categories.items(), key=lambda item: -item[1])[:3]
    when = f"step {peak['step']}, {peak['during']}" if peak["step"] else peak["during"]
    whole = f"{size(peak['bytes'])} of {size(budget)}" if budget else size(peak["bytes"])
    return f"{when}: {whole}, of which " + ", ".join(f"{name} {size(n)}" for name, n in largest if n)


def _grouped(peak: Mapping[str, Any]) -> dict[str, int]:
    found = {"program": peak["before"], "framework": max(0, peak["rest"])}
    for name, n in peak["categories"].items():
        kind = group(name.split(" ", 1)[1])
        found[kind] = found.get(kind, 0) + n
    return found


def _parts(memory: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measured peak of the process (and of a CUDA device) in rows that add up to it."""
    found = []
    for title, peak in (
        ("RAM of the process tree at its peak (PSS)", memory.get("process", {}).get("at_peak")),
        ("CUDA device at its peak", memory.get("device", {}).get("at_peak")),
    ):
        if peak is None:
            continue
        rows = [("the program before the run reserved anything", peak["before"])] if peak["before"] else []
        rows += sorted(peak["categories"].items(), key=lambda item: -item[1])
        rest = peak["rest"]
        rows.append(
            ("the rest, measured: the framework's temporaries and what the program grew by", rest)
            if rest >= 0
            else ("reserved and not touched yet", rest)
        )
        named = [{"name": name, "bytes": n, "text": size(n)} for name, n in rows]
        found.append({"title": title, "rows": named, "bytes": peak["bytes"], "text": size(peak["bytes"])})
    return found


def _row(tier: str, figures: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    categories = sorted(figures["categories"].items(), key=lambda item: -item[1]["peak"])
    return {
        "name": memory.get("host_tiers", {}).get(tier, tier),
        "over": figures["peak"] > figures["budget"],
        "bytes": {key: figures[key] for key in ("peak", "predicted", "budget")},
        **{key: size(figures[key]) for key in ("peak", "predicted", "budget")},
        "categories": ", ".join(f"{name} {size(n['peak'])}" for name, n in categories),
    }


def _stack(step: Mapping[str, Any], tiers: Sequence[str]) -> dict[str, list[float]]:
    moments = len(step["at"])
    stack: dict[str, list[float]] = {}
    for tier in tiers:
        for category, values in step["tiers"].get(tier, {}).items():
            into = stack.setdefault(group(category), [0.0] * moments)
            for i, value in enumerate(_long(values, moments)):
                into[i] += value
    return {name: values for name, values in stack.items() if any(values)}


def _long(values: Sequence[int], moments: int) -> Sequence[int]:
    return list(values) * moments if len(values) == 1 else values


def _rest(measured: Sequence[float], accounted: Sequence[float]) -> dict[str, list[float]]:
    """What was measured beyond what is accounted for: the framework's, if there is any."""
    rest = [max(0.0, m - a) for m, a in zip(measured, accounted, strict=True)]
    return {"framework": rest} if any(rest) else {}


def _process(memory: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any] | None:
    """RAM: the program, what is reserved in it, and the rest up to the measured size of the process."""
    in_ram = memory.get("device_in_ram", False)
    if "cpu" not in memory["tiers"] or len(step["at"]) < 2:
        return None
    before = memory["process"]["before"]
    stack = {"program": [float(before)] * len(step["at"])}
    stack |= _stack(step, ("gpu", *HOST_TIERS) if in_ram else HOST_TIERS)
    accounted = [sum(values) for values in zip(*stack.values(), strict=True)]
    measured = _long(step["process"], len(step["at"]))
    stack |= _rest(measured, accounted)
    for i, untouched in enumerate(a - m for m, a in zip(measured, accounted, strict=True)):
        if untouched > 0 and "buffers" in stack:  # reserved, and not in RAM before it is first used
            stack["buffers"][i] = max(0.0, stack["buffers"][i] - untouched)
    lines = {"planned peak": _ram(memory, "predicted"), "budget": _ram(memory, "budget")}
    return {
        "title": "RAM: this process" + (", the device's arena included" if in_ram else ""),
        "chart": charts.memory(step["at"], stack, lines),
    }


def _ram(memory: Mapping[str, Any], figure: str) -> int:
    """Budget or planned peak of the process: what it took at its start, and beyond it the host tiers'; 0 for none."""
    beyond = sum(memory["tiers"][tier][figure] for tier in HOST_TIERS if tier in memory["tiers"])
    return int(memory["process"]["before"] + beyond) if beyond else 0


def arena_predicted(memory: Mapping[str, Any], plan: Mapping[str, Any], tier: str) -> int:
    """Planned peak of what the engine reserves in a tier: of a device in RAM without the framework's temporaries, which
    are in the process."""
    inside = tier == "gpu" and "device" not in memory
    framework = plan.get("categories", {}).get("gpu", {}).get("framework", 0) if inside else 0
    return int(memory["tiers"][tier]["predicted"] - framework)


def _tier(
    memory: Mapping[str, Any], step: Mapping[str, Any], tier: str, plan: Mapping[str, Any]
) -> dict[str, Any] | None:
    stack = _stack(step, (tier,))
    if not stack or len(step["at"]) < 2 or tier == "cpu":  # the process shows it
        return None
    figures = memory["tiers"][tier]
    if tier == "gpu" and "device" in memory:
        accounted = [sum(values) for values in zip(*stack.values(), strict=True)]
        measured = _long(step["device"], len(step["at"]))
        stack |= _rest(measured, accounted)
    lines = {"planned peak": arena_predicted(memory, plan, tier), "budget": figures["budget"]}
    title = {"gpu": "Device", "nvme": "SSD", "cxl": "CXL"}.get(tier, tier)
    if tier == "gpu" and "device" not in memory:
        title += " (an arena in RAM; the framework's temporaries are in the chart above)"
    return {"title": title, "chart": charts.memory(step["at"], stack, lines)}
