"""Greedy against the MIP on random instances: how far apart they are, and that the plan is never worse than greedy."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from statistics import mean
from typing import Any

from offload.planner import Budgets, Hardware, UnitProfile, Workload
from offload.planner.choice import nothing_in_ram
from offload.planner.decide import decide
from offload.planner.placement import Problem
from offload.planner.unit_bytes import home_bytes

from benchmarks import machine

GIB = 1 << 30
MACHINE = Hardware("desktop", 0, 0, {"bfloat16": 1e14, "float32": 4e13}, 2e10, 2e10, 3e10, 6e9, 3e9, 2e9)

# Without units on the device, and with them, at the estimated rate of an RTX 4090.
MACHINES = {"streamed": MACHINE, "device offered": replace(MACHINE, adamw_device=5e9)}


def instance(seed: int) -> tuple[Workload, Budgets]:
    """16 to 48 blocks of two to four kinds, with device memory and RAM for a part of what they would like."""
    rng = random.Random(seed)
    kinds = list[dict[str, Any]]()
    for _ in range(rng.randrange(2, 5)):
        parameters, boundary = 64 * rng.randrange(100_000, 3_000_000), 4096 * rng.randrange(500, 16_000)
        saved = tuple(boundary * rng.choice([1, 1, 2, 4]) for _ in range(rng.randrange(6, 16)))
        kinds.append(
            {
                "parameters": parameters, "trainable": parameters, "frozen": 0, "boundary_bytes": boundary,
                "forward_flops": int(parameters * rng.uniform(2e3, 3e4)), "saved": saved,
                "workspace_forward": 4 * boundary, "workspace_backward": 2 * sum(saved),
            }
        )  # fmt: skip
    blocks = rng.randrange(16, 49)
    units = tuple(UnitProfile(f"block.{i}", "block", **kinds[i % len(kinds)]) for i in range(blocks))
    w = Workload(
        units, rng.choice([1, 2, 4]), 1, 1024, "bfloat16", rng.random() < 0.5, 4, "cuda", activations="plan"
    )
    least = Problem(w, MACHINE, Budgets(0, 0, 0, (("/a", 1 << 50),))).peak(nothing_in_ram(w))
    homes = sum(sum(home_bytes(u, w).values()) for u in units)
    kept = w.micro_batches * sum(u.saved_bytes for u in units)
    gpu, cpu = least["gpu"] + int(kept * rng.uniform(0.05, 0.8)), least["cpu"] + int(homes * rng.uniform(0.1, 0.9))
    return w, Budgets(gpu, cpu, 0, (("/a", 1 << 50),))


def main() -> int:
    """Run the benchmark; exit code 1 if the MIP is worse anywhere or greedy is more than 5 % behind on average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--instances", type=int, default=40)
    args = parser.parse_args()
    found = {name: compared(hw, args.instances) for name, hw in MACHINES.items()}
    if args.json:
        print(json.dumps({"machine": machine.describe(), **found}, indent=1))
    else:
        for name, result in found.items():
            print(
                f"{name}: {args.instances} instances: greedy {result['mean_gap']:.2%} behind the MIP on average, "
                f"{result['worst_gap']:.2%} at worst; the plan never worse than greedy: {result['never_worse']}; "
                f"slowest plan {result['slowest_plan_seconds']:.2f} s"
            )
    return 0 if all(r["never_worse"] and r["mean_gap"] <= 0.05 for r in found.values()) else 1


def compared(hw: Hardware, instances: int) -> dict[str, Any]:
    """Greedy and the MIP on every instance: how far apart their steps are, and seconds of planning."""
    rows: list[dict[str, Any]] = []
    for seed in range(instances):
        w, budgets = instance(seed)
        seconds, plans = [], []
        for solver in ("greedy", "mip"):
            begin = time.perf_counter()
            plans.append(decide(w, budgets, hw, solver))
            seconds.append(time.perf_counter() - begin)
        quick, best = (p.prediction.step_seconds for p in plans)
        on_device = len(plans[1].choice.placed("state", "gpu"))
        rows.append(
            {"seed": seed, "units": len(w.units), "on_device": on_device, "gap": quick / best - 1,
             "status": plans[1].status, "seconds": seconds}
        )  # fmt: skip
    gaps = [row["gap"] for row in rows]
    return {
        "mean_gap": mean(gaps), "worst_gap": max(gaps), "never_worse": min(gaps) >= 0,
        "slowest_plan_seconds": max(row["seconds"][1] for row in rows), "instances": rows,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
