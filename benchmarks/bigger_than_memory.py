"""Train a model whose weights and optimizer state are several times the RAM budget, and watch the RAM.

    python -m benchmarks.bigger_than_memory [--json] [--global-batch 1] [--dir DIRECTORY]

A Llama of 1.26 billion parameters (weights, gradients and AdamW state take 15 GB and more) takes three steps in a real
`offload train` process with `memory.cpu: 2GiB` and everything on disk. The proportional set size of its process tree,
sampled from outside, must stay under the budget plus the footprint that `python -m offload.footprint llama` prints.
Needs about 45 GB of free disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import machine
from offload import footprint, memory

INTERVAL = 0.05  # seconds between samples of the process tree
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def main() -> int:
    """Run the benchmark; exit code 1 if the peak exceeds the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cpu", default="2GiB", help="memory.cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--global-batch", type=int, default=1, help="rows per step, one per micro-batch")
    parser.add_argument("--dir", type=Path, default=None, help="where the store goes; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="offload-bench-") as directory:
        result = run(Path(directory), args.cpu, args.steps, args.sequence, args.global_batch)
    print(json.dumps(result, indent=1) if args.json else table(result))
    return 0 if result["peak_over_footprint_bytes"] <= result["budget_bytes"] else 1


def run(directory: Path, cpu: str, steps: int, sequence: int, rows: int) -> dict[str, Any]:
    """One run in `directory`; returns its figures (bytes, seconds)."""
    text = Path(__file__).parent.parent / "examples" / "quickstart.txt"
    config = {
        "model": {"architecture": ARCHITECTURE, "dtype": "bfloat16"},
        "data": {"path": str(text), "format": "text", "tokenizer": "bytes", "sequence_length": sequence},
        "train": {
            "steps": steps,
            "micro_batch_size": 1,
            "global_batch_size": rows,
            "max_grad_norm": 1.0,
            "optimizer": {"lr": 1e-4},
            "schedule": {"warmup_steps": 1},
        },
        "memory": {"device": "cpu", "cpu": cpu, "nvme": [{"path": str(directory / "store"), "size": "60GB"}]},
        "output": str(directory / "run"),
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    base = footprint.measure("llama")
    log = directory / "log.txt"
    begin, peak, samples = time.perf_counter(), 0, 0
    with log.open("w") as out:
        command = [sys.executable, "-m", "offload.cli", "train", str(path), "--yes"]
        with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as child:
            while child.poll() is None:
                peak, samples = max(peak, memory.tree_pss(child.pid)), samples + 1
                time.sleep(INTERVAL)
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise RuntimeError(f"offload train ended with {child.returncode}:\n{log.read_text()[-4000:]}")
    rows_of_metrics = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((directory / "run" / "plan.json").read_text())
    parameters = sum(unit["parameters"] for unit in plan["units"])
    return {
        "machine": machine.describe(),
        "parameters": parameters,
        "sequence_length": sequence,
        "global_batch_size": rows,
        "steps": steps,
        "budget_bytes": plan["budget_bytes"]["cpu"],
        "predicted_bytes": plan["peak_bytes"]["cpu"],
        "footprint_bytes": base,
        "peak_pss_bytes": peak,
        "peak_over_footprint_bytes": peak - base,
        "samples": samples,
        "losses": [row["loss"] for row in rows_of_metrics],
        "step_seconds": [row["seconds"] for row in rows_of_metrics],
        "median_step_seconds": median(row["seconds"] for row in rows_of_metrics),
        "lane_seconds": [row["lane_seconds"] for row in rows_of_metrics],
        "read_bytes_per_parameter": rows_of_metrics[-1]["io_bytes"]["nvme_read"] / parameters,
        "written_bytes_per_parameter": rows_of_metrics[-1]["io_bytes"]["nvme_write"] / parameters,
        "placements": sorted({tier for unit in plan["units"] for tier in unit["placement"].values()}),
        "total_seconds": seconds,
    }


def table(result: dict[str, Any]) -> str:
    """The figures for a person."""
    gib = 2.0**30
    lines = [
        f"{result['parameters'] / 1e9:.2f} billion parameters, sequence {result['sequence_length']}, "
        f"{result['global_batch_size']} row(s) per step, bfloat16 on the CPU, everything on disk",
        f"RAM   peak {result['peak_pss_bytes'] / gib:.3f} GiB PSS, footprint {result['footprint_bytes'] / gib:.3f}, "
        f"over it {result['peak_over_footprint_bytes'] / gib:.3f}; predicted {result['predicted_bytes'] / gib:.3f}, "
        f"budget {result['budget_bytes'] / gib:.3f}",
        f"steps {', '.join(f'{s:.1f} s' for s in result['step_seconds'])}",
        f"I/O   {result['read_bytes_per_parameter']:.1f} B read and "
        f"{result['written_bytes_per_parameter']:.1f} B written per parameter and step",
        f"total {result['total_seconds']:.0f} s, losses {', '.join(f'{x:.4f}' for x in result['losses'])}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
