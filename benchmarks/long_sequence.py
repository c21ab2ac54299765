"""A long sequence in a tenth of the device memory that plain PyTorch needs for its activations.

    python -m benchmarks.long_sequence --json --out benchmarks/results/long_sequence.json

A small Llama is trained on rows of 8192 tokens, first in plain PyTorch, then by the engine with `memory.gpu` at a tenth
of what plain PyTorch's autograd saved. Three plans in turn: recompute everything, swap everything to the scratch file,
and what the planner mixes. The file is slowed down: what a block saves takes twice (`--slow`) the time of the block's
forward, each way, so that one lane alone cannot win. That is the ratio of compute to bandwidth of a GPU with one SSD,
which a CPU with the same SSD does not have. Steps of the three plans alternate and are compared round by round; losses
must equal plain PyTorch's.

Two limits stand beside each plan: operations over rate, the measured compute of its forward, backward and what it
computes again; and bytes over bandwidth, what it moves through the file each way. Needs 5 GB of RAM and 3 GB of disk.
A swap has up to four blocks' saved tensors on the device, so that a tenth of what plain PyTorch needs is enough from
some 60 layers on.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from offload.planner import Budgets, Plan, Workload
from offload.planner.activations import can_choose
from offload.planner.decide import as_plan, decide
from offload.planner.memory import STAGING_BYTES, STAGING_COUNT
from offload.planner.prediction import predict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import offload
from benchmarks import machine
from offload.activation_places import Place, Tier
from offload.engine import Engine, Prepared, prepare
from offload.full_step import FullStep
from offload.units import find_units

SEQUENCE = 8192
LAYERS = 64
HEADS = 2  # a thread each in the backward of attention on a CPU
LR = 1e-3
TEXT = Path(__file__).parent.parent / "examples" / "quickstart.txt"


def main() -> int:
    """Run the benchmark; exit code 1 if a loss differs, a plan was not kept to, or the mix is not the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--steps", type=int, default=3, help="of each plan; the first is not timed")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--hidden", type=int, default=32, help="width of the model")
    parser.add_argument("--slow", type=float, default=2.0, help="forward times of a block that its file traffic takes")
    parser.add_argument("--dir", type=Path, default=None, help="where the store goes; default: a temporary directory")
    args = parser.parse_args()
    shape = {
        "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "num_hidden_layers": args.layers, "vocab_size": 256,
        "max_position_embeddings": SEQUENCE,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="offload-bench-") as directory:
        result = run(Path(directory), shape, args.steps, args.slow)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else table(result))
    return 0 if result["exact"] and result["as_planned"] and result["mix_is_fastest"] else 1


def run(directory: Path, shape: dict[str, Any], steps: int, slow: float) -> dict[str, Any]:
    """Plain PyTorch, then the three plans; returns figures (bytes, seconds)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, shape["vocab_size"], (1, SEQUENCE), generator=generator) for _ in range(steps)]
    batches = [{"input_ids": x, "labels": x} for x in ids]
    plain = in_memory(copy.deepcopy(model), batches)
    budget = plain["activation_bytes"] // 10
    prepared, rate, plans = planned(directory, model, budget, steps, slow)
    arms: dict[str, dict[str, Any]] = {name: {"losses": [], "seconds": []} for name in plans}
    with ExitStack() as stack:
        engines = {}
        for name, plan in plans.items():
            cfg = configuration(directory / name, budget, prepared.plan.budget_bytes["cpu"], steps)
            own = copy.deepcopy(prepared.model)
            made = replace(prepared, config=cfg, model=own, units=find_units(own), plan=plan)
            engines[name] = stack.enter_context(Engine.create(cfg, prepared=made))
            slow_down(engines[name], rate)
        for batch in batches:
            for name, engine in engines.items():
                result = engine.step(batch)
                arms[name]["losses"].append(result.loss)
                arms[name]["seconds"].append(result.seconds)
        for name, engine in engines.items():
            arms[name] |= summary(engine, plans[name], prepared.workload, rate, arms[name]["seconds"][1:])
    ratios = {
        name: [a / b for a, b in zip(arms["mix"]["seconds"][1:], arms[name]["seconds"][1:], strict=True)]
        for name in ("recompute", "swap")
    }
    return {
        "machine": machine.describe(),
        "model": shape,
        "sequence": SEQUENCE,
        "slow": slow,
        "plain": plain,
        "gpu_budget_bytes": budget,
        "file_bytes_per_second": rate,
        "plans": arms,
        "exact": all(arm["losses"] == plain["losses"] for arm in arms.values()),
        "as_planned": all(
            arm["activation_fallbacks"] == 0 and arm["gpu_reserved_peak_bytes"] <= arm["gpu_planned_bytes"] <= budget
            for arm in arms.values()
        ),
        "mix_over": {name: {"median": median(found), "rounds": found} for name, found in ratios.items()},
        "mix_is_fastest": all(median(found) < 1 for found in ratios.values()),
    }


def in_memory(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Plain PyTorch: losses, seconds per step, and the bytes of what autograd saves, weights left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            saved[x.untyped_storage()._cdata] = x.detach()
        return x

    losses, seconds, nbytes = [], [], 0
    for step, batch in enumerate(batches):
        begin = time.perf_counter()
        torch.manual_seed(offload.micro_seed(0, step, 0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch).loss
        nbytes = sum(x.untyped_storage().nbytes() for x in saved.values())
        saved.clear()
        losses.append(loss.item())
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return {
        "losses": losses,
        "seconds": seconds,
        "median_seconds": median(seconds[1:]),
        "activation_bytes": nbytes,
    }


def configuration(path: Path, gpu: int, cpu: int | str, steps: int) -> offload.Config:
    """The engine's configuration for the same training."""
    return offload.Config.load(
        {
            "model": {"dtype": "float32"},
            # of which only the kind of rows counts here: batches are given
            "data": {"path": str(TEXT), "format": "text", "tokenizer": "bytes", "sequence_length": SEQUENCE,
                     "packing": False, "padding": False},
            "train": {
                "steps": steps, "micro_batch_size": 1, "global_batch_size": 1, "max_grad_norm": None, "seed": 0,
                "commit_every": 1000, "optimizer": {"lr": LR}, "schedule": {"name": "constant", "warmup_steps": 0},
            },
            "memory": {"device": "cpu", "gpu": gpu, "cpu": cpu, "nvme": [{"path": str(path.parent / "store")}]},
            "output": str(path),
        }
    )  # fmt: skip


def planned(
    directory: Path, model: nn.Module, gpu: int, steps: int, slow: float
) -> tuple[Prepared, float, dict[str, Plan]]:
    """The three plans, for a scratch file of the rate that is returned (bytes per second)."""
    cfg = configuration(directory / "plan", gpu, "auto", steps)
    prepared = prepare(cfg, copy.deepcopy(model))
    w = replace(prepared.workload, activations="plan")
    block = max((u for u in w.units if can_choose(u)), key=lambda u: u.saved_bytes)
    rate = block.saved_bytes / (slow * block.forward_seconds)
    hardware = replace(prepared.hardware, nvme_read=rate, nvme_write=rate, nvme_duplex=2.0)
    # RAM for the state and the way to the file, none for activations: that would be a copy, not a swap, where the
    # device is RAM too.
    ram = {name: n for name, n in prepared.plan.categories["cpu"].items() if name not in ("device", "staging")}
    ram.pop("swapped activations", None)
    limits = Budgets(gpu, sum(ram.values()) + STAGING_COUNT * STAGING_BYTES + gpu, 0, tuple(prepared.store_budgets))
    mix = decide(w, limits, hardware)
    plans = {"mix": mix.choice}
    for name, share in (("recompute", 0.0), ("swap", 1.0)):
        units = tuple(
            replace(c, keep=0.0, recompute=1.0 - share, swap_cpu=0.0, swap_nvme=share) if can_choose(u) else c
            for u, c in zip(w.units, mix.choice.units, strict=True)
        )
        plans[name] = replace(mix.choice, units=units)
    found = {
        name: as_plan(replace(mix, choice=choice, prediction=predict(w, hardware, choice)), 0.0)
        for name, choice in plans.items()
    }
    return replace(prepared, workload=w, plan=found["mix"], hardware=hardware), rate, found


def slow_down(engine: Engine, rate: float) -> None:
    """Let the scratch file move `rate` bytes per second each way."""
    assert isinstance(engine._method, FullStep)
    tier: Tier | None = engine._method.activations._tiers.get("nvme")
    if tier is None:
        return

    def slowed(move: Callable[..., None], lane: str) -> Callable[..., None]:
        def slow(place: Place, *rest: Any) -> None:
            end = time.perf_counter() + place.nbytes / rate
            move(place, *rest)
            with engine._trace.span(lane, "slowed down"):
                time.sleep(max(0.0, end - time.perf_counter()))

        return slow

    tier.take = slowed(tier.take, "nvme_write")  # type: ignore[method-assign]
    tier.give = slowed(tier.give, "nvme_read")  # type: ignore[method-assign]


def summary(engine: Engine, plan: Plan, w: Workload, rate: float, seconds: list[float]) -> dict[str, Any]:
    """What a plan's steps took: seconds, beside those that were predicted and the two limits, and bytes on the device
    (reserved, planned in all)."""
    shares = [unit.activations for unit in plan.units]
    rows = [json.loads(line) for line in engine.run.metrics_path.read_text().splitlines()]
    moved = sum(b.total for b in plan.buffers if b.name == "activations.nvme")
    again = sum(u.forward_seconds * s["recompute"] for u, s in zip(w.units, shares, strict=True))
    forward, backward = (sum(getattr(u, name) for u in w.units) for name in ("forward_seconds", "backward_seconds"))
    return {
        "median_seconds": median(seconds),
        "predicted_seconds": plan.step_seconds,
        "operations_over_rate_seconds": {"forward": forward, "backward": backward + again},
        "bytes_over_bandwidth_seconds": {"forward": moved / rate, "backward": moved / rate},
        "limit_seconds": max(forward, moved / rate) + max(backward + again, moved / rate),
        "stall_seconds": engine.stalls,
        "fits": plan.fits,
        "gpu_planned_bytes": plan.peak_bytes["gpu"],
        "gpu_reserved_peak_bytes": engine.ledger.peak("gpu"),
        "activation_fallbacks": max(row.get("activation_fallbacks", 0) for row in rows),
        "lane_seconds": rows[-1]["lane_seconds"],
        "units": {name: sum(s[name] for s in shares) for name in shares[0]},
        "boundaries_away": sum(unit.placement["activation"] != "gpu" for unit in plan.units),
    }


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    plain, mib = result["plain"], 2**20
    lines = [
        f"plain PyTorch   {plain['median_seconds']:6.2f} s   activations {plain['activation_bytes'] / mib:.0f} MiB",
        f"memory.gpu      {result['gpu_budget_bytes'] / mib:.0f} MiB",
    ]
    for name, arm in result["plans"].items():
        operations, moved = arm["operations_over_rate_seconds"], arm["bytes_over_bandwidth_seconds"]
        lines += [
            f"{name:15} {arm['median_seconds']:6.2f} s   predicted {arm['predicted_seconds']:.2f} s, limit "
            f"{arm['limit_seconds']:.2f} s: operations {operations['forward']:.2f} + {operations['backward']:.2f}, "
            f"file {moved['forward']:.2f} + {moved['backward']:.2f}",
            f"{'':25} device {arm['gpu_planned_bytes'] / mib:.0f} MiB planned, "
            f"{arm['gpu_reserved_peak_bytes'] / mib:.0f} reserved; fits: {arm['fits']}; units "
            + ", ".join(f"{key} {n:.1f}" for key, n in arm["units"].items()),
        ]
    lines.append(
        "mix over the others, median of rounds: "
        + ", ".join(f"{name} {found['median']:.3f}" for name, found in result["mix_over"].items())
    )
    lines.append(
        f"losses equal to plain PyTorch's: {result['exact']}; as planned: {result['as_planned']}; "
        f"mix fastest: {result['mix_is_fastest']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
