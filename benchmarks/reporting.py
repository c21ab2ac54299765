"""What reporting costs: steps with and without it, paired, in one engine.

    python -m benchmarks.reporting --json --out benchmarks/results/reporting.json

Reporting is what a run does beside training: the trace's sums, the row of metrics.jsonl, the record of memory (its
thread and the ledger's changes), memory.json and trace.json every half minute, and the progress line. One engine takes
its steps in pairs, one of each with reporting and one without, in random order. The ratio is of seconds per step, with
over without: the mean of the pairs' logarithms and its 95 % interval. What is done less often than every step is timed
on its own and divided by its interval. Other programs blur wall time, and CPU time less: `cpu_share` is what reporting
takes of it (all threads, with over without) as a share of the step's wall time, as if none of it overlapped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import offload
from benchmarks import machine
from offload.engine import Engine
from offload.progress import open_progress
from offload.train import MEMORY_JSON_SECONDS

BAR = 1.01


def config(work: Path, hidden: int) -> dict[str, Any]:
    return {
        "model": {
            "architecture": {
                "model_type": "llama", "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4,
                "num_attention_heads": hidden // 32, "vocab_size": 272, "tie_word_embeddings": False,
            },
            "dtype": "float32",
        },
        "data": {"path": "none.jsonl", "sequence_length": 128},
        "train": {
            "steps": 100_000, "micro_batch_size": 2, "global_batch_size": 4, "schedule": {"name": "constant"},
            "commit_every": 100_000,
        },
        "memory": {"device": "cpu", "cpu": "2GiB", "nvme": [{"path": str(work / "store"), "size": "2GiB"}]},
        "planner": {"activations": "recompute"},
        "output": str(work / "run"),
    }  # fmt: skip


class Switch:
    """Reporting of an engine, on or off: what is off does nothing during a step."""

    def __init__(self, engine: Engine) -> None:
        def nothing(*_: object, **__: object) -> None:
            return None

        def empty(*_: object, **__: object) -> nullcontext[None]:
            return nullcontext()

        trace, record = engine._trace, engine._held.record
        off: list[tuple[object, str, Any]] = [
            (engine.ledger, "observer", None), (engine, "_log", nothing),
            (trace, "add", nothing), (trace, "span", empty), (record, "read", nothing), (record, "during", empty),
        ]  # fmt: skip
        self._values = [(owner, name, {False: value, True: getattr(owner, name)}) for owner, name, value in off]

    def set(self, on: bool) -> None:
        for owner, name, value in self._values:
            setattr(owner, name, value[on])


def measure(seconds: float, hidden: int) -> dict[str, Any]:
    """Paired steps for `seconds`; each pair's ratio, their mean and interval."""
    with tempfile.TemporaryDirectory(prefix="offload-reporting-") as directory:
        work = Path(directory)
        with offload.wrap(None, config(work, hidden)) as engine:
            switch, ids = Switch(engine), torch.randint(0, 272, (4, 128))
            batch = {"input_ids": ids, "labels": ids}
            progress = open_progress(Console(file=(work / "log").open("w")), 0, 100_000, engine.plan.budget_bytes)

            def step(on: bool) -> tuple[float, float]:
                """Seconds by the clock, and of the CPU in all threads."""
                switch.set(on)
                began, used = time.perf_counter(), time.process_time()
                engine.step(batch)
                if on:
                    assert engine.run.last_row is not None
                    progress.step(engine.run.last_row, engine.stalls)
                return time.perf_counter() - began, time.process_time() - used

            for warm in (True, False, True, False):
                step(warm)
            ratios, without, extra = [], [], []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                order = random.sample([True, False], 2)
                took = {on: step(on) for on in order}
                ratios.append(math.log(took[True][0] / took[False][0]))
                without.append(took[False][0])
                extra.append(took[True][1] - took[False][1])
            switch.set(True)
            began, used = time.perf_counter(), time.process_time()
            for _ in range(5):
                engine.write_memory()
                engine.write_trace()
            rewrite = (time.perf_counter() - began) / 5
            rewrite_cpu = (time.process_time() - used) / 5
    mean, spread = _interval(ratios)
    rest = rewrite / MEMORY_JSON_SECONDS
    usual = statistics.median(without)
    more, more_spread = _interval([seconds / usual for seconds in extra])
    more += rewrite_cpu / MEMORY_JSON_SECONDS
    return {
        "pairs": len(ratios),
        "step_seconds": round(usual, 5),
        "ratio": round(math.exp(mean) + rest, 5),
        "interval": [round(math.exp(mean - spread) + rest, 5), round(math.exp(mean + spread) + rest, 5)],
        "median_ratio": round(math.exp(statistics.median(ratios)) + rest, 5),
        "cpu_share": round(more, 5),
        "cpu_share_interval": [round(more - more_spread, 5), round(more + more_spread, 5)],
        "memory_json": {"seconds": round(rewrite, 5), "every": MEMORY_JSON_SECONDS, "share": round(rest, 6)},
        "bar": BAR,
    }


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="of paired steps")
    parser.add_argument("--hidden", type=int, default=256, help="size of the model: 4 blocks of this width")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args(arguments)
    found = measure(options.seconds, options.hidden)
    text = json.dumps({"machine": machine.describe(), "arguments": vars(options) | {"out": None}, **found}, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    low, high = found["interval"]
    print(
        text if options.json else
        f"{found['pairs']} pairs of steps of {found['step_seconds'] * 1e3:.1f} ms: with reporting {found['ratio']:.4f} "
        f"times as long as without, 95 % interval {low:.4f} to {high:.4f}; bar {BAR}; its CPU time is "
        f"{found['cpu_share']:.2%} of the step"
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
