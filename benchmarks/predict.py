"""How right a plan is: predicted peaks and step times beside measured ones, on the CPU device.

Each run is `offload train` from the command line with a fresh measurement of the machine just before it. RAM is the
peak PSS of the process tree minus `offload.footprint`: the highest of what is sampled here up to the last few steps and
of what the run recorded itself, which knows the kernel's own peak of the resident set and so misses nothing between two
samples. The step time is the median of the last steps. Sampling slows a process down by up to 40 %, so nothing samples
while it measures and plans either: for that time the kernel's peak counts too. Bars: measured RAM at most the predicted
one and within 5 % of it, tiers by the ledger at most the predicted ones, step time within 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from benchmarks import machine
from offload import footprint, memory

INTERVAL = 0.02  # seconds between two samples of PSS; each takes the kernel some milliseconds per GiB ...
TIMED = 4  # ... so that the last steps, whose median is the measured time, run without
RESULTS = Path(__file__).parent / "results" / "predict.json"
VOCABULARY = 8192

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 64, "num_hidden_layers": 6, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 8, "n_head": 12, "vocab_size": VOCABULARY, "n_positions": 2048,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
        "num_attention_heads": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    },
}  # fmt: skip

# family, dtype, rows per micro-batch, rows per step, sequence, memory.cpu, clipping
RUNS: list[tuple[str, str, int, int, int, str, bool]] = [
    ("llama", "bfloat16", 1, 1, 512, "auto", True),
    ("llama", "bfloat16", 2, 4, 512, "900MiB", True),
    ("llama", "bfloat16", 1, 2, 1024, "900MiB", False),
    ("llama", "float32", 1, 2, 256, "1200MiB", True),
    ("qwen3", "bfloat16", 1, 2, 512, "auto", True),
    ("qwen3", "bfloat16", 2, 2, 256, "800MiB", True),
    ("qwen3", "float32", 1, 1, 512, "1100MiB", False),
    ("gpt2", "bfloat16", 1, 4, 512, "auto", True),
    ("gpt2", "float32", 2, 2, 256, "900MiB", True),
    ("gpt2", "bfloat16", 1, 1, 1024, "800MiB", False),
    ("gpt_neox", "bfloat16", 1, 2, 512, "auto", False),
    ("gpt_neox", "bfloat16", 2, 4, 256, "900MiB", True),
    ("gpt_neox", "float32", 1, 1, 256, "1200MiB", True),
]


def main() -> int:
    """Run the benchmark; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", nargs="*", type=int, help="numbers of runs, from 0; results join those on file")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dir", type=Path, default=None, help="where the stores go; default: a temporary directory")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text())["runs"] if args.only and RESULTS.exists() else {}
    bases: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="offload-predict-") as directory:
        for number in args.only if args.only is not None else range(len(RUNS)):
            model_type = FAMILIES[RUNS[number][0]]["model_type"]
            if model_type not in bases:
                bases[model_type] = footprint.measure(model_type)
            known[str(number)] = run(Path(directory) / str(number), RUNS[number], args.steps, bases[model_type])
            print(row(known[str(number)]), file=sys.stderr)
            result = {"machine": machine.describe(), "runs": known, **summary(list(known.values()))}
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if args.json else table(result))
    return 0 if result["bars_met"] else 1


def run(directory: Path, what: tuple[str, str, int, int, int, str, bool], steps: int, base: int) -> dict[str, Any]:
    """One run in `directory`; returns its figures (bytes, seconds)."""
    family, dtype, micro, rows, length, cpu, clipping = what
    directory.mkdir()
    config = {
        "model": {"architecture": FAMILIES[family], "dtype": dtype},
        "data": {
            "path": str(Path(__file__).parent.parent / "examples" / "quickstart.txt"), "format": "text",
            "tokenizer": "bytes", "sequence_length": length,
        },
        "train": {
            "steps": steps, "micro_batch_size": micro, "global_batch_size": rows,
            "max_grad_norm": 1.0 if clipping else None, "optimizer": {"lr": 1e-4}, "schedule": {"warmup_steps": 1},
        },
        "memory": {"device": "cpu", "cpu": cpu, "nvme": [{"path": str(directory / "store"), "size": "20GB"}]},
        "output": str(directory / "run"),
    }  # fmt: skip
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}  # nothing measured before counts
    log, peak = directory / "log.txt", 0
    with log.open("w") as out:
        command = [sys.executable, "-m", "offload.cli", "train", str(path), "--yes"]
        with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as child:
            metrics_file, planned = directory / "run" / "metrics.jsonl", directory / "run" / "plan.json"
            while child.poll() is None:
                if not planned.exists():
                    peak = max(peak, resident_peak(child.pid))
                elif not metrics_file.exists() or metrics_file.read_bytes().count(b"\n") < steps - TIMED:
                    peak = max(peak, memory.tree_pss(child.pid))
                time.sleep(INTERVAL)
    if child.returncode:
        raise RuntimeError(f"offload train ended with {child.returncode}:\n{log.read_text()[-4000:]}")
    metrics = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((directory / "run" / "plan.json").read_text())
    memory_file = json.loads((directory / "run" / "memory.json").read_text())
    ledger = memory_file["tiers"]
    sampled, peak = peak, max(peak, memory_file["process"]["pss_peak"])
    measured = median(m["seconds"] for m in metrics[-TIMED:])
    for item in (directory / "store").rglob("*"):
        if item.is_file():
            item.unlink()
    return {
        "family": family, "dtype": dtype, "micro_batch": micro, "rows": rows, "sequence_length": length, "cpu": cpu,
        "clipping": clipping, "parameters": sum(u["parameters"] for u in plan["units"]),
        "predicted_seconds": plan["step_seconds"], "measured_seconds": measured,
        "seconds": [m["seconds"] for m in metrics], "time_error": plan["step_seconds"] / measured - 1,
        "commit_every": plan["commit_every"], "stall_seconds": plan["stall_seconds"], "notes": plan["notes"],
        "predicted_lanes": plan["lane_seconds"], "measured_lanes": metrics[-1]["lane_seconds"],
        "predicted_ram": plan["peak_bytes"]["cpu"], "measured_ram": peak - base, "footprint": base,
        "sampled_ram": sampled - base,
        "ram_error": plan["peak_bytes"]["cpu"] / (peak - base) - 1, "categories": plan["categories"]["cpu"],
        "device_categories": plan["categories"]["gpu"],
        "ledger": {tier: values["peak"] for tier, values in ledger.items()},
        "predicted": plan["peak_bytes"],
    }  # fmt: skip


def resident_peak(pid: int) -> int:
    """The most bytes that the process had resident so far, by the kernel's count; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many runs keep each bar."""
    time_met = sum(abs(r["time_error"]) <= 0.15 for r in runs)
    ram_met = sum(0 <= r["ram_error"] <= 0.05 for r in runs)
    below = sum(r["ram_error"] >= 0 for r in runs)
    ledger_met = sum(all(r["ledger"][t] <= r["predicted"][t] for t in r["ledger"]) for r in runs)
    return {
        "time_within_15_percent": time_met, "ram_within_5_percent": ram_met, "ram_never_above": below,
        "ledger_never_above": ledger_met, "mean_time_error": mean(abs(r["time_error"]) for r in runs),
        "bars_met": time_met == ram_met == ledger_met == len(runs),
    }  # fmt: skip


def row(r: dict[str, Any]) -> str:
    """One run for a person."""
    mib = 2.0**20
    return (
        f"{r['family']:9}{r['dtype']:9} {r['micro_batch']}x{r['rows'] // r['micro_batch']} rows of "
        f"{r['sequence_length']:5} cpu {r['cpu']:>8} {'clip' if r['clipping'] else '    '}  "
        f"RAM {r['predicted_ram'] / mib:6.0f} planned {r['measured_ram'] / mib:6.0f} MiB measured "
        f"({r['ram_error']:+.1%})  step {r['predicted_seconds']:6.2f} planned {r['measured_seconds']:6.2f} s measured "
        f"({r['time_error']:+.1%})"
    )


def table(result: dict[str, Any]) -> str:
    """All runs for a person."""
    runs, n = list(result["runs"].values()), len(result["runs"])
    return "\n".join([
        *map(row, runs),
        f"step time within 15 %: {result['time_within_15_percent']} of {n}; RAM at most predicted: "
        f"{result['ram_never_above']} of {n}, and within 5 %: {result['ram_within_5_percent']} of {n}; "
        f"ledger at most predicted: {result['ledger_never_above']} of {n}",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
