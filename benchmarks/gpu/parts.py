"""The parts: which cases each runs, and what is concluded from them. Every part is a table of cases and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from benchmarks.gpu.case import GIB, OPT, Case

Result = dict[str, Any]
ZO_SEQUENCE = 2048


@dataclass(frozen=True)
class Sizes:
    """What the machine decides: `base` has device, cap, text and the RAM budget; `small` is the trial on a CPU."""

    base: Case
    small: bool
    disk_cpu: int | str  # the RAM budget of the run whose state has to go to disk

    def case(self, name: str, **changes: Any) -> Case:
        """A case, shrunk to a toy where only the script is tried out."""
        if self.small:
            shape = changes.get("shape", self.base.shape)
            toy = "opt-toy" if shape.startswith("opt-") else "toy"
            changes |= {"shape": toy, "sequence": min(32, changes.get("sequence", 32)), "steps": 2, "warm": 1}
            changes["micro_batch"] = min(2, changes.get("micro_batch", 1))
            changes["micro_batches"] = min(2, changes.get("micro_batches", 1))
        return replace(self.base, name=name, **changes)


def exact(s: Sizes) -> Iterator[Case]:
    """Twenty steps against the reference."""
    common: dict[str, Any] = {"task": "exact", "shape": "tiny", "sequence": 256, "warm": 0, "steps": 20,
                              "micro_batch": 2, "cpu": "auto", "place": "ram"}  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        for name, changes in (
            ("ram", {}),
            ("clip, M=3", {"clip": 1.0, "micro_batches": 3}),
            ("nvme, recompute, clip", {"place": "nvme", "activations": "recompute", "clip": 1.0}),
            ("dropout, recompute", {"dropout": 0.1, "activations": "recompute"}),
            ("dropout, swap, M=3", {"dropout": 0.1, "activations": "swap", "micro_batches": 3}),
            ("nvme, swap to nvme", {"place": "nvme", "activations": "swap-nvme"}),
            ("on the device", {"place": "device"}),
            ("on the device, clip, M=3", {"place": "device", "clip": 1.0, "micro_batches": 3}),
            ("compiled", {"compile": True}),
        ):
            yield s.case(f"{dtype}, {name}", **{**common, "dtype": dtype, **changes})


def exact_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """Equal to the bit; the compiled ones to tolerance."""
    bits = {n: r["losses_equal"] and r["weights_equal"] for n, r in found.items() if "compiled" not in n}
    close = {n: r["largest_loss_difference"] for n, r in found.items() if "compiled" in n}
    return {"equal": bits, "compiled_loss_difference": close, "met": bool(bits) and all(bits.values())}


def overlap(s: Sizes) -> Iterator[Case]:
    """One step under the profiler, after others."""
    common: dict[str, Any] = {"shape": "1b", "sequence": 1024, "micro_batch": 4, "profile": True, "warm": 3,
                              "place": "ram"}  # fmt: skip
    yield s.case("rates", task="rates")
    yield s.case("ram", micro_batches=8, **common)
    yield s.case("swap to ram", micro_batches=4, activations="swap", **common)
    yield s.case("nvme", micro_batches=8, **{**common, "place": "nvme"})
    yield s.case("on the device", micro_batches=8, **{**common, "place": "auto"})


def overlap_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """The bars of each step that was profiled."""
    answer: dict[str, Any] = {}
    for name, r in found.items():
        profile = r.get("profile", {}).get("device")
        if profile is None:
            continue
        copies, stats = profile["copies"], r["allocator"]
        busiest = r["rows"][-1]["busiest_lane"]
        answer[name] = {
            "copies_beside_kernels": {d: c["beside_kernels"] for d, c in copies.items()},
            "share_of_link": {d: c["share_of_link"] for d, c in copies.items()},
            "waits_inside_units": profile["waits_inside_units"],
            "reserved_growth_after_step_one": stats[-1]["reserved_bytes.all.current"]
            - stats[1]["reserved_bytes.all.current"],
            "idle_share": profile["idle_share"],
            "busiest_lane": busiest,
            "met": all((c["share_of_link"] or 1.0) >= 0.9 for c in copies.values())
            and not profile["waits_inside_units"]
            and (busiest != "compute" or profile["idle_share"] <= 0.1),
        }
    return answer


def memory(s: Sizes) -> Iterator[Case]:
    """Peaks beside the plan."""
    for name, changes in (
        ("ram", {"place": "ram"}), ("nvme", {"place": "nvme"}), ("recompute", {"activations": "recompute"}),
        ("float32", {"dtype": "float32", "micro_batch": 2}),
    ):  # fmt: skip
        yield s.case(name, **{"shape": "1b", "sequence": 1024, "micro_batch": 4, "micro_batches": 4, **changes})


def memory_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """Measured over planned: allocator and driver against the device's plan, RAM less the footprint against the CPU's.

    The driver's figure holds libraries and the allocator's slack beside the plan's.
    """
    answer = {}
    for name, r in found.items():
        planned = r["planned"]["peak_bytes"]
        ratios = {"ram": (r["peak_pss_bytes"] - r["footprint_bytes"]) / planned["cpu"]}
        for kind in ("allocated", "allocator", "driver"):
            if f"{kind}_peak_bytes" in r and planned["gpu"]:
                ratios[kind] = r[f"{kind}_peak_bytes"] / planned["gpu"]
        answer[name] = {"over_plan": ratios, "met": all(x <= 1.0 for n, x in ratios.items() if n != "driver")}
    return answer


def full(s: Sizes) -> Iterator[Case]:
    """Full fine-tuning of real shapes."""
    yield s.case("rates", task="rates")
    for shape, sequence, place in (
        ("qwen3-4b", 1024, "auto"), ("qwen3-4b", 4096, "auto"), ("llama-3.1-8b", 1024, "auto"),
        ("llama-3.1-8b", 4096, "auto"), ("llama-3.1-8b", 1024, "disk"),
    ):  # fmt: skip
        rows = 32768 // sequence
        yield s.case(
            f"{shape}, {sequence}{', disk' if place == 'disk' else ''}", shape=shape, sequence=sequence,
            micro_batch=16384 // sequence, micro_batches=rows * sequence // 16384,
            cpu=s.disk_cpu if place == "disk" else s.base.cpu, fits=True,
        )  # fmt: skip
    yield s.case("plain, 1b in memory", system="plain", shape="1b", sequence=1024, micro_batch=4, micro_batches=4)


def full_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """Tokens per second, TFLOPS, and the share of the measured matrix rate that each reaches."""
    matrix = found.get("rates", {}).get("matrix_flops")
    rows = {n: speed(r, matrix) for n, r in found.items() if "step_seconds" in r}
    plain = next((row["share_of_matrix_rate"] for n, row in rows.items() if n.startswith("plain")), None)
    for n, row in rows.items():
        if plain and row["share_of_matrix_rate"] and not n.startswith("plain"):
            row["over_plain_share"] = row["share_of_matrix_rate"] / plain  # bar: 0.85
    return rows


def peers(s: Sizes) -> Iterator[Case]:
    """Side by side at equal batch."""
    for shape, sequence in (("1b", 1024), ("qwen3-4b", 1024), ("llama-3.1-8b", 1024)):
        for system in ("ours", "deepspeed-cpu", "torchao", "megatrain", "ours-nvme", "deepspeed-nvme"):
            place = "nvme" if system == "ours-nvme" else "auto"
            yield s.case(
                f"{shape}, {system}", shape=shape, sequence=sequence, micro_batch=4, micro_batches=2, place=place,
                system=system.removesuffix("-nvme") if system.startswith("ours") else system,
            )  # fmt: skip


def peers_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """Speed over each peer's, and RAM over DeepSpeed's."""
    answer: dict[str, Any] = {"rows": {n: speed(r, None) for n, r in found.items()}, "bars": []}
    for shape in dict.fromkeys(n.split(", ")[0] for n in found):
        for mine, other, least in (
            ("ours", "deepspeed-cpu", 1.9), ("ours-nvme", "deepspeed-nvme", 2.5), ("ours", "megatrain", 1.2),
        ):  # fmt: skip
            a, b = found.get(f"{shape}, {mine}"), found.get(f"{shape}, {other}")
            if a and b:
                ratio = median(b["step_seconds"]) / median(a["step_seconds"])
                answer["bars"].append({"bar": f"{shape}: tokens/s of {mine} over {other}", "limit": least,
                                       "value": ratio, "met": ratio >= least})  # fmt: skip
                if other == "deepspeed-cpu":
                    ram = a["peak_pss_bytes"] / b["peak_pss_bytes"]
                    answer["bars"].append({"bar": f"{shape}: RAM of {mine} over {other}", "limit": 0.6, "value": ram,
                                           "met": ram <= 0.6})  # fmt: skip
    return answer


def zo(s: Sizes) -> Iterator[Case]:
    """Forward passes only: OPT's shapes in float16, one row of 2048 tokens."""
    common: dict[str, Any] = {"task": "zo", "dtype": "float16", "sequence": ZO_SEQUENCE, "steps": 5}
    for size in ("6.7b", "13b", "30b"):
        yield s.case(f"{size}, ours", shape=f"opt-{size}", **common)
        if size == "6.7b":  # larger ones do not fit the cap
            yield s.case(f"{size}, mezo", shape=f"opt-{size}", system="mezo", **common)


def zo_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """Peaks beside ZO2's published ones, and speed beside MeZO in memory."""
    answer: dict[str, Any] = {}
    for name, r in found.items():
        size, system = name.split(", ")
        if system == "ours":
            peak, published = r.get("allocator_peak_bytes"), OPT[size][3]
            answer[name] = {"seconds": r["step_seconds"], "peak_gb": peak and peak / 1e9, "zo2_gb": published}
            memory_loop = found.get(f"{size}, mezo")
            if memory_loop:
                answer[name]["speed_over_mezo"] = median(memory_loop["step_seconds"]) / median(r["step_seconds"])
    return answer


def long(s: Sizes) -> Iterator[Case]:
    """The longest sequences; what they are is found by planning, in the first case."""
    common: dict[str, Any] = {"shape": "llama-3.1-8b", "sequence": 16384 if not s.small else 32, "steps": 2}
    yield s.case("longest", task="longest", **common)
    for activations in ("auto", "recompute", "swap"):
        yield s.case(activations, activations=activations, **common)


def long_verdict(s: Sizes, found: dict[str, Result]) -> dict[str, Any]:
    """Tokens per second at the longest sequence of each way."""
    rows = {n: speed(r, None) for n, r in found.items() if "step_seconds" in r}
    return {"longest": found.get("longest", {}).get("longest"), "rows": rows}


def follow(part: str, case: Case, found: dict[str, Result]) -> Case | None:
    """The case with what earlier ones found out; None if it cannot be."""
    if part != "long" or case.task == "longest":
        return case
    fits = found.get("longest", {}).get("longest", {})
    return replace(case, sequence=fits[case.activations]) if case.activations in fits else None


def speed(r: Result, matrix: float | None) -> dict[str, Any]:
    """A run's tokens (none are padding) per second, TFLOPS as 6 N tokens, recomputation not counted, and peaks."""
    seconds = median(r["step_seconds"])
    flops = 6 * r["parameters"] * r["tokens"] / seconds
    return {
        "seconds": r["step_seconds"], "tokens_per_second": r["tokens"] / seconds, "tflops": flops / 1e12,
        "share_of_matrix_rate": flops / matrix if matrix else None,
        "allocator_peak_gib": r.get("allocator_peak_bytes", 0) / GIB, "ram_peak_gib": r["peak_pss_bytes"] / GIB,
    }  # fmt: skip


Verdict = Callable[[Sizes, dict[str, Result]], dict[str, Any]]
PARTS: dict[str, tuple[Callable[[Sizes], Iterator[Case]], Verdict]] = {
    "exact": (exact, exact_verdict), "overlap": (overlap, overlap_verdict), "memory": (memory, memory_verdict),
    "full": (full, full_verdict), "peers": (peers, peers_verdict), "zo": (zo, zo_verdict), "long": (long, long_verdict),
}  # fmt: skip
