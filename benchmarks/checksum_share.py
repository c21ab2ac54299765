"""What checksums cost a step: the same run twice, all state on the SSD, one with checksums and one without, in turns.

    python -m benchmarks.checksum_share PATH --micro-batches 1 8 --json --out benchmarks/results/checksum_share.json

A Llama of some 90 million parameters in bfloat16. The two steps of a pair follow each other, in alternating order; a
step is timed with everything it leaves behind (flushed). "Off" takes the sums out of the requests of that run's store,
before they reach its backend, and out of its optimizer's passes; nothing else differs.
"""

from __future__ import annotations

# ruff: noqa: E402  (OpenMP reads the environment when PyTorch is loaded)
import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import xxhash

from offload.environment import set_defaults

set_defaults()  # as the command does

import torch
from offload.io import BLOCK, STRIPE, BlockCheck, BlockSums, DirectFile, Ledger, Priority, Request, allocate
from offload.io.request import Transfer
from offload.planner.memory import bare_ram

import offload
from benchmarks import machine
from offload.engine import Engine, prepare

BAR = 0.03
MIB = 1 << 20
SEQUENCE, ROWS = 256, 2
ARCHITECTURE = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 4096, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip


def configuration(directory: Path, micro_batches: int) -> dict[str, Any]:
    """A run whose RAM budget has no room for any state."""
    config: dict[str, Any] = {
        "model": {"architecture": ARCHITECTURE, "dtype": "bfloat16"},
        "train": {
            "steps": 1000, "micro_batch_size": ROWS, "global_batch_size": ROWS * micro_batches, "max_grad_norm": None,
            "optimizer": {"lr": 1e-4}, "schedule": {"name": "constant", "warmup_steps": 0},
        },
        "memory": {"device": "cpu", "cpu": "8GiB", "nvme": [{"path": str(directory / "store"), "size": "auto"}]},
        "output": str(directory / "run"),
    }  # fmt: skip
    prepared = prepare(offload.Config.load(config))
    config["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    return config


@contextmanager
def without_checksums(engine: Engine) -> Iterator[None]:
    """While this lasts, the engine neither computes nor compares sums."""
    store = engine.store
    submit, write = store.backend.submit, store.write

    def bare(transfer: Transfer) -> None:
        if transfer.kind != "sync":
            transfer.before = transfer.after = None
        submit(transfer)

    def unsummed(key: str, offset: int, buffer: torch.Tensor, priority: Priority, sums: Any = None) -> Request:
        return write(key, offset, buffer, priority)

    with (
        patch.object(store.backend, "submit", bare),
        patch.object(store, "write", unsummed),
        patch.object(BlockSums, "update", lambda self, piece: None),
        patch.object(BlockCheck, "finish", lambda self: []),
    ):
        yield


def measure(directory: Path, micro_batches: int, pairs: int) -> dict[str, Any]:
    """Paired steps; the share is that of the seconds with checksums over those without, less one."""
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    cpu: dict[str, list[float]] = {"on": [], "off": []}
    with ExitStack() as stack:
        engines = {}
        for name in seconds:
            config = configuration(directory / name, micro_batches)
            engines[name] = stack.enter_context(offload.wrap(None, config))
            placed = {u.placement["exp_avg"] for u in engines[name].plan.units if u.name != "resident"}
        parameters = sum(unit.layout.parameters for unit in engines["on"]._units)
        for pair in range(-2, pairs):  # the first two are not counted
            ids = torch.randint(0, 4096, (ROWS * micro_batches, SEQUENCE))
            for name in ("on", "off") if pair % 2 else ("off", "on"):
                with without_checksums(engines[name]) if name == "off" else nullcontext():
                    began, used = time.perf_counter(), time.process_time()
                    engines[name].step({"input_ids": ids, "labels": ids})
                    engines[name].flush()
                if pair >= 0:
                    seconds[name].append(time.perf_counter() - began)
                    cpu[name].append(time.process_time() - used)
        moved = engines["on"].store.bytes_read + engines["on"].store.bytes_written
    logs = np.log(np.array(seconds["on"]) / np.array(seconds["off"]))
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(axis=1)
    low, high = (float(x) - 1 for x in np.exp(np.percentile(draws, [2.5, 97.5])))
    return {
        "micro_batches": micro_batches,
        "parameters": parameters,
        "state_on": sorted(placed),
        "store_bytes_per_step": moved // (pairs + 2),
        "pairs": pairs,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "median_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "median_cpu_seconds": {name: float(np.median(values)) for name, values in cpu.items()},
        "share": float(np.exp(logs.mean())) - 1,
        "low": low,
        "high": high,
        "bar": BAR,
        "verdict": "met" if high <= BAR else "missed" if low > BAR else "open: the interval holds the bar",
    }


def landed(directory: Path, nbytes: int = 512 << 20) -> dict[str, float]:
    """CPU seconds per GB of summing a piece at once after its direct read, by the piece's MiB; and of a cached MiB."""
    found: dict[str, float] = {}
    file = DirectFile(directory / "landed", create=True)
    with allocate(nbytes, Ledger()) as buffer:
        file.reserve(nbytes)
        buffer.tensor.random_(0, 256)
        view = buffer.tensor.numpy().data
        for at in range(0, nbytes, STRIPE):
            os.pwrite(file.fd, view[at : at + STRIPE], at)
        for piece in (MIB, 2 * MIB, 8 * MIB):
            spent = 0.0
            for at in range(0, nbytes, piece):
                os.preadv(file.fd, [view[at : at + piece]], at)
                began = time.thread_time()
                for block in range(at, at + piece, BLOCK):
                    xxhash.xxh3_64_intdigest(view[block : block + BLOCK])
                spent += time.thread_time() - began
            found[f"{piece // MIB}"] = spent / nbytes * 1e9
        began = time.thread_time()
        for _ in range(nbytes // BLOCK):
            xxhash.xxh3_64_intdigest(view[:BLOCK])
        found["cached"] = (time.thread_time() - began) / nbytes * 1e9
        del view
    file.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="directory on the drive")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pairs", type=int, nargs="+", default=[20, 8], help="one number per number of micro-batches")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine.describe(), "settings": []}
    with tempfile.TemporaryDirectory(dir=options.path) as folder:
        found["landed_cpu_seconds_per_gb"] = landed(Path(folder))
    for micro_batches, pairs in zip(options.micro_batches, options.pairs, strict=True):
        directory = Path(tempfile.mkdtemp(prefix="checksum-share-", dir=options.path))
        try:
            found["settings"].append(measure(directory, micro_batches, pairs))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
        return
    print("CPU s/GB of sums right after a direct read, by MiB of the read:", found["landed_cpu_seconds_per_gb"])
    for item in found["settings"]:
        on, off = item["median_seconds"]["on"], item["median_seconds"]["off"]
        print(
            f"{item['micro_batches']} micro-batches: {on:.3f} s with checksums, {off:.3f} s without, "
            f"share {item['share']:.1%} ({item['low']:.1%} to {item['high']:.1%}), at most {item['bar']:.0%}: "
            f"{item['verdict']}"
        )


if __name__ == "__main__":
    main()
