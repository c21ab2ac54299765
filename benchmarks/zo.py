"""Zeroth-order steps: time against the same loop in memory, memory at two sizes, noise, and OPT beside ZO2's figures.

    python -m benchmarks.zo --json --out benchmarks/results/zo.json

The loop in memory keeps the clean weights and a perturbed copy and takes its directions from the same noise; it is what
MeZO does without offloading, and builds its model in memory, as the engine beside it does: RAM there is the process's
peak with that. `--ram` is what the command takes that makes its model unit by unit, with all weights on the SSD.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from offload.environment import set_defaults

set_defaults()

# ruff: noqa: E402  (PyTorch reads the environment when it is loaded)
import torch
from offload.planner import load_hardware
from transformers import AutoModelForCausalLM, LlamaConfig

import offload
from benchmarks import machine
from offload import train, zo
from offload.data import open_dataset
from offload.prepare import prepare
from offload.rundir import read_jsonl

EPS, LR, LENGTH = 1e-3, 1e-6, 512
RAM_BUDGET = "360MiB"  # of the command, whatever the model's size
# Hidden size, layers, heads and inner size of OPT, and the GPU memory (GB) that ZO2 publishes for it.
OPT = {
    "1.3B": (2048, 24, 32, 8192, 3.75), "2.7B": (2560, 32, 32, 10240, 4.14), "6.7B": (4096, 32, 32, 16384, 4.99),
    "13B": (5120, 40, 40, 20480, 6.18), "30B": (7168, 48, 56, 28672, 8.86), "66B": (9216, 64, 72, 36864, 12.07),
    "175B": (12288, 96, 96, 49152, 18.04),
}  # fmt: skip


def shape(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": 2048, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 64 * 64,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "max_position_embeddings": LENGTH, "use_cache": False,
    }  # fmt: skip


def model(layers: int, hidden: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape(layers, hidden)))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 2048, (1, LENGTH), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def config(path: Path, cpu: int | str = "auto") -> dict[str, Any]:
    return {
        "model": {"dtype": "float32"},
        "train": {
            "method": "zo", "steps": 100, "micro_batch_size": 1, "global_batch_size": 1, "optimizer": {"lr": LR},
            "schedule": {"name": "constant", "warmup_steps": 0}, "commit_every": 1000,
        },
        "zo": {"eps": EPS},
        "memory": {"device": "cpu", "cpu": cpu, "nvme": [{"path": str(path), "size": "12GiB"}]},
        "output": str(path / "run"),
    }  # fmt: skip


def peak_resident() -> int:
    """Bytes of RAM that this process had at most, by the kernel: no sampling disturbs the steps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@torch.no_grad()
def loop_in_memory(layers: int, hidden: int, steps: int) -> dict[str, Any]:
    """Seconds per step and RAM of plain MeZO."""
    net = model(layers, hidden).train()
    clean = {name: p.detach().clone() for name, p in net.named_parameters()}
    seconds = []
    for step, batch in enumerate(batches(steps)):
        begin = time.perf_counter()
        seed = zo.direction_seed(0, step)
        found = []
        for epsilon in (EPS, -EPS):
            for name, p in net.named_parameters():
                torch.add(clean[name], zo.noise(seed, name, 0, p.shape).mul_(epsilon), out=p)
            torch.manual_seed(offload.micro_seed(0, step, 0))
            found.append(net(**batch).loss.item())
        projected = (found[0] - found[1]) / (2 * EPS)
        for name, w in clean.items():
            w.sub_(zo.noise(seed, name, 0, w.shape).mul_(projected).mul_(LR))
        seconds.append(time.perf_counter() - begin)
    parameters = sum(p.numel() for p in net.parameters())
    return {"seconds": seconds[1:], "resident": peak_resident(), "parameters": parameters}


def streamed(layers: int, hidden: int, steps: int, path: str, on_nvme: bool) -> dict[str, Any]:
    """Seconds per step, RAM, planned and counted bytes of the engine."""
    cfg = config(Path(path))
    if on_nvme:
        for _ in range(2):  # the third slot goes first
            with torch.device("meta"):
                empty = model(layers, hidden)
            plan = prepare(offload.Config.load(cfg), empty).plan
            cfg["memory"]["cpu"] = plan.peak_bytes["cpu"] - plan.categories["cpu"].get("state", 0)
        cfg["train"]["commit_every"] = 1
    with offload.wrap(model(layers, hidden), cfg) as engine:
        rows = []
        for batch in batches(steps):
            engine.step(batch)
            rows.append(engine.run.last_row)
        counted = {tier: engine.ledger.peak(tier) for tier in ("gpu", "cpu", "nvme")}
        planned = engine.plan.peak_bytes
        slots = engine.plan.buffer("weights.block")
    assert slots is not None
    kept = [row for row in rows[1:] if row is not None]
    return {
        "seconds": [row["seconds"] for row in kept], "lane_seconds": [row["lane_seconds"] for row in kept],
        "io_bytes": [row["io_bytes"] for row in kept], "resident": peak_resident(), "counted": counted,
        "planned": planned, "slots": [slots.count, slots.nbytes],
    }  # fmt: skip


def alone(function: Any, *arguments: Any) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(function, arguments)
        return found


def compare(layers: int, hidden: int, steps: int, directory: Path) -> dict[str, Any]:
    """The loop in memory, the engine in RAM, and the engine on NVMe."""
    found = {"loop": alone(loop_in_memory, layers, hidden, steps)}
    for name, on_nvme in (("ram", False), ("nvme", True)):
        path = tempfile.mkdtemp(dir=directory)
        found[name] = alone(streamed, layers, hidden, steps, path, on_nvme)
    for run in found.values():
        run["median"] = statistics.median(run["seconds"])
    lanes = found["nvme"]["lane_seconds"]
    bound = statistics.median(
        max(x["compute"] + x["optimizer"] + x["h2d"] + x["d2h"], x["nvme_read"] + x["nvme_write"]) for x in lanes
    )
    return {
        "layers": layers, "hidden": hidden, "parameters": found["loop"]["parameters"], **found,
        "ram_over_loop": found["ram"]["median"] / found["loop"]["median"],
        "nvme_over_bound": found["nvme"]["median"] / bound,
    }  # fmt: skip


def ram_of_command(layers: int, hidden: int, directory: Path) -> dict[str, Any]:
    """Peak PSS of `offload train` with all weights on the SSD, and what it was before the first step."""
    cfg = config(directory, RAM_BUDGET)
    cfg["model"]["architecture"] = {"model_type": "llama", **shape(layers, hidden)}
    text = Path(__file__).parent.parent / "examples" / "quickstart.txt"
    cfg["data"] = {"path": str(text), "format": "text", "tokenizer": "bytes", "sequence_length": LENGTH}
    cfg["train"]["steps"] = 4
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(cfg))
    subprocess.run(
        [sys.executable, "-m", "offload.cli", "train", str(path), "--yes"], check=True, stdout=subprocess.DEVNULL
    )
    process = json.loads((directory / "run" / "memory.json").read_text())["process"]
    plan = json.loads((directory / "run" / "plan.json").read_text())
    return {
        "layers": layers, "hidden": hidden, "parameters": sum(unit["parameters"] for unit in plan["units"]),
        "budget": plan["budget_bytes"]["cpu"], "planned": plan["peak_bytes"]["cpu"], "peak": process["pss_peak"],
        "before": process["before"], "on": sorted({t for u in plan["units"] for t in u["placement"].values()}),
    }  # fmt: skip


def noise_rate() -> float:
    """Normals per second of one thread."""
    zo.noise(0, "w", 0, 1 << 16)
    rates = []
    for i in range(20):
        begin = time.perf_counter()
        zo.noise(0, "w", i << 20, 1 << 20)
        rates.append((1 << 20) / (time.perf_counter() - begin))
    return statistics.median(rates)


def opt_memory(names: list[str]) -> list[dict[str, Any]]:
    """Predicted GPU memory of OPT in float16, batch 1, sequence 2048, with two and with three slots, beside ZO2's."""
    found = []
    for name in names:
        hidden, layers, heads, inner, published = OPT[name]
        architecture = {
            "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "ffn_dim": inner, "word_embed_proj_dim": hidden, "vocab_size": 50272, "max_position_embeddings": 2048,
        }  # fmt: skip
        cfg = {
            "model": {"architecture": architecture, "dtype": "float16"},
            "data": {"path": "unread.jsonl", "format": "tokens", "sequence_length": 2048},
            "train": {"method": "zo", "micro_batch_size": 1, "global_batch_size": 1},
            "memory": {"gpu": "22GiB", "cpu": "900GiB", "nvme": [{"path": "/", "size": "4TiB"}]},
        }
        plan = prepare(offload.Config.load(cfg), None, load_hardware("rtx4090")).plan
        slots = plan.buffer("weights.block")
        assert slots is not None
        two = plan.peak_bytes["gpu"] - (slots.count - 2) * slots.nbytes
        three = two + slots.nbytes
        found.append({"model": name, "two_slots_gb": two / 1e9, "three_slots_gb": three / 1e9, "zo2_gb": published})
    return found


@torch.no_grad()
def accuracy(run: Path, cfg: offload.Config) -> float:
    """Share of the held-out rows that a run's model answers right."""
    assert cfg.data is not None and cfg.train.micro_batch_size != "auto"
    net = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    right = rows = 0
    with open_dataset(
        cfg.data, None, vocab_size=net.config.vocab_size, micro_batch_size=cfg.train.micro_batch_size,
        global_batch_size=cfg.train.global_batch_size, seed=cfg.train.seed, cache_dir=run / "cache",
    ) as dataset:  # fmt: skip
        assert dataset.eval is not None
        for batch in dataset.eval.eval_batches():
            counted = batch["labels"][:, 1:] != -100
            answers = net(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
            right += int(((answers == batch["labels"][:, 1:]) & counted).sum())
            rows += int(counted.sum())
    return right / rows


def learning(directory: Path) -> dict[str, Any]:
    """The example's task by forward passes only and by back-propagation: accuracy, and the loss as it went."""
    found: dict[str, Any] = {}
    changes: dict[str, list[str]] = {
        "zo": [], "full": ["train.method=full", "zo=null", "train.steps=200", "train.schedule.name=cosine"],
    }  # fmt: skip
    for name, extra in changes.items():
        places = [f"output={directory / name}", f"memory.nvme=[{{path: {directory / 'store'}, size: 1GiB}}]"]
        cfg = offload.Config.load("examples/zo.yaml", [*extra, *places])
        begin = time.perf_counter()
        train.run(cfg)
        rows = list(read_jsonl(directory / name / "metrics.jsonl"))
        found[name] = {
            "steps": len(rows), "seconds": time.perf_counter() - begin,
            "accuracy": accuracy(directory / name, cfg), "loss": [round(row["loss"], 4) for row in rows[9::10]],
        }  # fmt: skip
    found["ratio"] = found["zo"]["accuracy"] / found["full"]["accuracy"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=".", help="directory on the SSD to measure")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--ram", type=int, nargs="*", default=[8, 16, 32], help="layers of the command's models")
    parser.add_argument("--opt", nargs="*", default=list(OPT), choices=list(OPT), help="sizes to predict")
    parser.add_argument("--learning", action="store_true", help="train examples/zo.yaml by both methods")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON to this file, keeping sections not measured now")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.describe(), "normals_per_second": noise_rate()}
    if options.opt:
        result["opt"] = opt_memory(options.opt)
    if options.learning:
        with tempfile.TemporaryDirectory(dir=options.path, prefix="zo-") as directory:
            result["learning"] = learning(Path(directory))
    if options.ram:
        result["ram"] = []
        for layers in options.ram:
            with tempfile.TemporaryDirectory(dir=options.path, prefix="zo-") as directory:
                result["ram"].append(ram_of_command(layers, options.hidden, Path(directory)))
    if options.layers:
        with tempfile.TemporaryDirectory(dir=options.path, prefix="zo-") as directory:
            result["steps"] = [
                compare(layers, options.hidden, options.steps, Path(directory)) for layers in options.layers
            ]
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps({**before, **result}, indent=1) + "\n")
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        return
    print(f"noise: {result['normals_per_second'] / 1e9:.2f} G normals/s on one thread")
    for row in result.get("opt", ()):
        print(
            f"OPT {row['model']:>5}: {row['two_slots_gb']:6.2f} GB with two slots, {row['three_slots_gb']:6.2f} with "
            f"three; ZO2 {row['zo2_gb']:6.2f}"
        )
    if "learning" in result:
        both = {name: result["learning"][name]["accuracy"] for name in ("zo", "full")}
        print(f"accuracy on held-out rows: {both['zo']:.3f} by forward passes, {both['full']:.3f} by back-propagation")
    for row in result.get("ram", ()):
        print(
            f"{row['parameters'] / 1e6:,.0f} M parameters, weights on {', '.join(row['on'])}: RAM of the command "
            f"{row['peak'] / 2**20:,.0f} MiB, {row['before'] / 2**20:,.0f} before its first step"
        )
    for row in result.get("steps", ()):
        times = ", ".join(f"{name} {row[name]['median']:.2f} s" for name in ("loop", "ram", "nvme"))
        ram = ", ".join(f"{name} {row[name]['resident'] / 2**20:,.0f} MiB" for name in ("loop", "ram", "nvme"))
        print(f"{row['parameters'] / 1e6:,.0f} M parameters: {times}; RAM of the process {ram}")
        print(f"  ram / loop {row['ram_over_loop']:.3f}, nvme / bound {row['nvme_over_bound']:.3f}")


if __name__ == "__main__":
    main()
