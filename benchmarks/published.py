"""Published measurements beside what the planner predicts for the same hardware: `python -m benchmarks.published`.

Writes docs/published.md. Nothing is measured here; the numbers in the tables come from the sources they name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from offload.planner import Budgets, UnitProfile, Workload, load_hardware
from offload.planner.activations import candidates
from offload.planner.choice import everything_in_ram, nothing_in_ram
from offload.planner.mip import solve
from offload.planner.placement import Problem
from offload.planner.prediction import predict
from offload.planner.timing import whole_step

PAGE = Path(__file__).parent.parent / "docs" / "published.md"
GB, GIB = 10**9, 1 << 30


@dataclass(frozen=True)
class Row:
    """One published number and the planner's; `error` is signed and relative to the published one."""

    what: str
    published: float
    predicted: float
    unit: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


# ---- throughput: Ratel on one RTX 4090 ----

# Calibrated: the GPU on the plateau of the second table, the optimizer on the 20 s that its two smallest batches share.
# Ratel moves a float32 master beside 16-bit weights (16 bytes read and 14 written per
# parameter); the split master here needs 14 and 12, so its drives are given that much less of their rate.
RATEL_BYTES = 30 / 26
RATEL_ADAMW = 0.75e9
RATEL_GRID = {
    32: {1: 37.5, 2: 64.3, 3: 81.1, 6: 121.7, 12: 142.0},
    48: {1: 53.1, 2: 89.7, 3: 121.7, 6: 146.3, 12: 153.9},
    64: {1: 70.3, 2: 111.7, 3: 136.3, 6: 151.5, 12: 148.2},
}
RATEL_BATCHES = {8: 42.8, 16: 84.3, 32: 143.1, 64: 155.8, 128: 153.8}
RATEL_175B = {8: 52.6, 16: 86.9}


def gpt(layers: int, hidden: int, rows: int, length: int = 1024, vocabulary: int = 50257) -> tuple[UnitProfile, ...]:
    """Units of a GPT: blocks of 12 h^2 parameters, 34 bsh bytes saved in 16 bits, one tied table."""
    tokens, per_block, table = rows * length, 12 * hidden * hidden, vocabulary * hidden
    boundary = 2 * tokens * hidden
    flops = 2 * tokens * per_block + 4 * tokens * length * hidden
    saved = (boundary,) * 16
    blocks = tuple(
        UnitProfile(
            f"block.{i}", "block", per_block, per_block, 0, forward_flops=flops, boundary_bytes=boundary,
            workspace_forward=6 * boundary, workspace_backward=18 * boundary, saved=saved,
        )
        for i in range(layers)
    )  # fmt: skip
    loss = min(tokens, 4096) * vocabulary * 10  # head and loss in chunks of rows, as a batch of 64 needs
    embedding = UnitProfile(
        "embedding", "embedding", table, table, 0, held=True, forward_flops=2 * tokens * table,
        boundary_bytes=boundary, workspace_backward=loss, visits=2, kept=True,
    )  # fmt: skip
    return (embedding, *blocks)


def ratel(layers: int, hidden: int, rows: int, drives: int) -> float:
    """TFLOPS as Ratel counts them, recomputation included: four forwards per step."""
    units = gpt(layers, hidden, rows)
    w = Workload(units, 1, rows, 1024, "bfloat16", clipping=False, commit_every=1, activations="plan")
    base = load_hardware("rtx4090", ssds=drives)
    hw = replace(
        base, nvme_read=base.nvme_read / RATEL_BYTES, nvme_write=base.nvme_write / RATEL_BYTES,
        adamw_parameters_per_second=RATEL_ADAMW / base.adamw_split_ratio, ram=1.6e11, adamw_device=0.0,
    )  # fmt: skip
    p = Problem(w, hw, Budgets(base.gpu_bytes, 700 * GB, 0, (("/ssd", 46 * 10**12),)))
    # All state on the drives and blocks recomputed, as it was run; boundaries go where they fit.
    found = [c for c in candidates(p) if all(u.recompute == 1.0 or u.keep == 1.0 for u in c.units)]
    plain = [c for c in found if all(u.recompute == 1.0 for u, x in zip(c.units, units, strict=True) if not x.kept)]
    fitting = [c for c in plain if p.room(c)["gpu"] >= 0] or plain[-1:]
    seconds = min(predict(w, hw, c).step_seconds for c in fitting)
    return 4 * sum(u.forward_flops for u in units) / seconds / 1e12


def ratel_rows() -> dict[str, list[Row]]:
    grid = [
        Row(f"13B, batch {rows}, {drives} SSD", value, ratel(40, 5120, rows, drives), "TFLOPS")
        for rows, line in RATEL_GRID.items()
        for drives, value in line.items()
    ]
    batches = [
        Row(f"13B, batch {rows}, 12 SSDs", value, ratel(40, 5120, rows, 12), "TFLOPS")
        for rows, value in RATEL_BATCHES.items()
    ]
    large = [
        Row(f"175B, batch {rows}, 12 SSDs", value, ratel(96, 12288, rows, 12), "TFLOPS")
        for rows, value in RATEL_175B.items()
    ]
    return {"grid": grid, "batches": batches, "large": large}


# ---- GPU memory: ZO2 ----

ZO2 = {
    "1.3B": (24, 2048, 3.75), "2.7B": (32, 2560, 4.14), "6.7B": (32, 4096, 4.99), "13B": (40, 5120, 6.18),
    "30B": (48, 7168, 8.86), "66B": (64, 9216, 12.07), "175B": (96, 12288, 18.04),
}  # fmt: skip
CUDA_CONTEXT = 0.6 * GB  # calibrated on the smallest model, where hardly anything else is on the device


def zo2_rows() -> list[Row]:
    """Forward only, 16 bits, batch 1 of 2048 tokens: three block slots, the table, logits of one pass."""
    found = []
    for name, (_, hidden, published) in ZO2.items():
        block, table = 2 * 12 * hidden * hidden, 2 * 50272 * hidden
        logits = 2048 * 50272
        # the table is embedding and head; each is perturbed with a copy of its random direction beside it
        predicted = 3 * block + 4 * table + logits * (2 + 4 + 4 + 4) + CUDA_CONTEXT
        found.append(Row(f"OPT-{name}", published, predicted / GB, "GB"))
    return found


# ---- the largest swapped fraction: MEMO ----


def memo_rows() -> list[Row]:
    """7B at 1M tokens on 8 GPUs: 4096 GB saved in 32 blocks, 1/16 of it the attention output; 2 TB of RAM."""
    per_block = 4096 * GB // 32
    always, rest = per_block // 8, per_block - per_block // 8  # layer input and attention output leave in any case
    blocks = tuple(
        UnitProfile(
            f"block.{i}", "block", 1, 64, 0, forward_flops=10**16, boundary_bytes=always, saved=(rest // 14,) * 14
        )
        for i in range(30)  # the last two of 32 never swap
    )
    w = Workload(blocks, 1, 1, 1 << 20, "bfloat16", clipping=False, commit_every=1, activations="plan")
    # eight links, which do not bind; the optimizer runs on the CPU
    hw = replace(load_hardware("a100-80g"), h2d=1e12, d2h=1e12, adamw_device=0.0)
    least = Problem(w, hw, Budgets(1 << 60, 1 << 60, 0, (("/ssd", 1 << 50),)))
    everything_away = replace(
        nothing_in_ram(w), units=tuple(replace(u, boundary="cpu") for u in nothing_in_ram(w).units)
    )
    peak = least.peak(everything_away)
    buffers = peak["cpu"] - 30 * always
    in_flight = 2 * (rest + always) + 2 * rest  # on its way out and back
    gpu = peak["gpu"] + int(1.2 * in_flight)
    p = Problem(w, hw, Budgets(gpu, 2048 * GB + buffers, 0))
    choice = solve(p, 20.0).choice
    return [Row("share of the rest swapped, 2 TB of RAM", 0.467, mean(u.swap_cpu for u in choice.units), "")]


# ---- bytes ----


def bytes_rows() -> dict[str, list[Row]]:
    """DeepSpeed's estimator by its own rules; bytes per parameter of others beside those of a plan here."""
    parameters, largest, gpus = 2851e6, 32e6, 8
    estimator = [
        Row("CPU, parameters and optimizer there, no staged init", 127.45, parameters * 4 * gpus * 1.5 / GIB, "GiB"),
        Row("CPU, the same with staged init", 71.69, parameters * 18 * 1.5 / GIB, "GiB"),
        Row("CPU, optimizer there", 63.72, parameters * 16 * 1.5 / GIB, "GiB"),
        Row("GPU, parameters and optimizer on the CPU", 0.12, largest * 4 / GIB, "GiB"),
        Row("GPU, optimizer on the CPU", 0.78, (largest * 4 + 2 * parameters / gpus) / GIB, "GiB"),
        Row("GPU, nothing offloaded", 6.09, (largest * 4 + 18 * parameters / gpus) / GIB, "GiB"),
    ]
    infinity = [
        # 16-bit weights read twice, float32 master, moments and gradient read once; all but the first written
        Row("ZeRO-Infinity, written", 18.0, 2 + 12 + 4, "bytes per parameter"),
        Row("ZeRO-Infinity, read", 20.0, 2 * 2 + 12 + 4, "bytes per parameter"),
    ]
    return {"estimator": estimator, "infinity": infinity}


def own_bytes() -> dict[str, float]:
    """What a plan here takes per parameter: RAM with all state there, and NVMe traffic with all state there."""
    units = tuple(replace(u, kept=False) for u in gpt(32, 4096, 1) if u.kind == "block")
    parameters = sum(u.trainable for u in units)
    hw = load_hardware("rtx4090")
    w = Workload(units, 4, 1, 1024, "bfloat16", clipping=False, commit_every=1)
    p = Problem(w, hw, Budgets(1 << 50, 1 << 50, 0, (("/ssd", 1 << 60),)))
    full = p.categories(everything_in_ram(w))["cpu"]
    found = {"ram": (full["state"] + full.get("gradient homes", 0)) / parameters}
    for name, clipping in (("clipping", True), ("no clipping", False)):
        step = whole_step(replace(w, clipping=clipping), hw, nothing_in_ram(w))
        found[f"{name}, written"] = (step.forward.nvme_write + step.backward.nvme_write) / parameters
        found[f"{name}, read"] = (step.forward.nvme_read + step.backward.nvme_read) / parameters
    return found


def main() -> int:
    """Write the page; exit code 1 if the mean error on the SSD grid exceeds 15 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, write nothing")
    args = parser.parse_args()
    tables = {**ratel_rows(), "zo2": zo2_rows(), "memo": memo_rows(), **bytes_rows()}
    error = mean(abs(row.error) for row in tables["grid"])
    if args.json:
        print(json.dumps({name: [vars(row) | {"error": row.error} for row in rows] for name, rows in tables.items()}))
    else:
        text = page(tables, own_bytes())
        PAGE.write_text(text)
        print(text)
    return 0 if error <= 0.15 else 1


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| | published | predicted | error |"
    yield "|---|---|---|---|"
    for row in rows:
        yield f"| {row.what} | {row.published:g} {row.unit} | {row.predicted:.3g} | {row.error:+.0%} |"


def _errors(rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: abs(row.error))
    return f"Mean error {mean(abs(r.error) for r in rows):.0%}, worst {worst.error:+.0%} ({worst.what})."


def page(tables: dict[str, list[Row]], own: dict[str, float]) -> str:
    """docs/published.md."""
    def section(title: str, text: str, *names: str) -> list[str]:
        lines = [f"## {title}", "", text.strip(), ""]
        for name in names:
            lines += [*_table(tables[name]), "", _errors(tables[name]), ""]
        return lines

    lines = [
        "# Published numbers beside predictions", "",
        "Made by `python -m benchmarks.published` from the planner alone; nothing on this page was measured here. Each",
        "table names what was calibrated on it: agreement on those numbers shows consistency, not foresight.", "",
        *section("Throughput: Ratel (LoHan) on one RTX 4090", RATEL_TEXT, "grid", "batches", "large"),
        *section("GPU memory: ZO2, OPT, zeroth-order, batch 1 of 2048 tokens, 16 bits", ZO2_TEXT, "zo2"),
        *section("Swapped activations: MEMO, a 7B model at 1M tokens", MEMO_TEXT, "memo"),
        *section("DeepSpeed's memory estimator", ESTIMATOR_TEXT, "estimator"),
        *section("NVMe traffic and RAM per parameter", INFINITY_TEXT, "infinity"),
        "| a plan here, bfloat16, several micro-batches | bytes per parameter |", "|---|---|",
        f"| all state on NVMe, clipping: written, read | {own['clipping, written']:.0f}, {own['clipping, read']:.0f} |",
        f"| all state on NVMe, no clipping: written, read | {own['no clipping, written']:.0f}, "
        f"{own['no clipping, read']:.0f} |",
        f"| all state in RAM, no clipping: RAM (MegaTrain 14, SlideFormer about 12) | {own['ram']:.0f} |", "",
    ]  # fmt: skip
    return "\n".join(lines)


RATEL_TEXT = """
Source: the evaluation data of github.com/Crispig/Ratel. GPT models, sequence 1024, all state on the SSDs, 768 GB of
RAM; predicted for that placement with blocks recomputed. TFLOPS count recomputation (four forwards per step). From the
preset `rtx4090`: link 21 GB/s, SSD 6.5 and 3.4 GB/s half duplex, divided by 30/26 because Ratel moves a whole float32
master. Calibrated: the GPU's 157 TFLOPS on the plateau of the second table, and 0.75 G parameters/s of its CPU
optimizer on the 20 s that a step takes there with a batch of 8 and of 16 alike. The 175B rows and all of the grid but
the plateau were not used. Misses over 25 % are at batch 32 with three SSDs and beside it: the published line gains 26 %
from the third drive where the bytes would allow 50 %, so something other than the drives' own rates binds there; what,
the source does not say.
"""
ZO2_TEXT = """
Source: ZO2's table of GPU memory. Predicted as three block slots, embedding and head with a random direction beside
each, the loss of one pass, and 0.6 GB for the CUDA context (calibrated).
"""
MEMO_TEXT = """
Source: MEMO's analysis: 4096 GB of saved activations in 32 blocks, layer input and attention output always leave the
GPU, the last two blocks never swap. The fraction is what the MIP swaps under 2 TB of RAM when the links do not bind.
"""
ESTIMATOR_TEXT = """
DeepSpeed's own rules, for 2,851M parameters, largest layer 32M, 8 GPUs: a check that we read them right.
"""
INFINITY_TEXT = """
ZeRO-Infinity measured on a 271M model with everything on NVMe; predicted from what it moves.
"""


if __name__ == "__main__":
    sys.exit(main())
