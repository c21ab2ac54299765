"""How near buffer layouts come to the lower bound: instances from files, and blocks traced from models.

    python -m benchmarks.layout instances/*.csv --time-limit 60 --json --out benchmarks/results/layout.json
    python -m benchmarks.layout --model-type llama --model-type gpt2 --layers 32

A file has the columns id, lower, upper, size: bytes live on [lower, upper). A capacity is taken from `--capacity` or
from the file's name (NAME.CAPACITY.csv). Every layout is checked for overlap.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from offload.planner.layout import Layout, Lifetime, check, solve
from offload.planner.layout_stack import solve_stack
from offload.planner.layout_trace import repeated_blocks, stack, trace_block
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from benchmarks import machine

# Real blocks: the widths of published models of 1 to 8 billion parameters, where the defaults are smaller than that.
WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8},
    "gemma3_text": {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "head_dim": 256},
    "gpt2": {"n_embd": 1600, "n_head": 25, "n_layer": 2},
    "t5": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 2, "decoder_start_token_id": 0},
    "bert": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 2,
        "max_position_embeddings": 8192,
    },
}


def read(path: Path) -> list[Lifetime]:
    """The buffers of a file, ValueError naming a row that is not of the format."""
    buffers = []
    with path.open(newline="") as f:
        for number, row in enumerate(csv.DictReader(f), 2):
            try:
                buffers.append(Lifetime(int(row["lower"]), int(row["upper"]), int(row["size"])))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: wanted id,lower,upper,size in whole numbers: {error}") from error
    return buffers


def row_of(
    name: str, buffers: Sequence[Lifetime], found: Layout, capacity: int | None, seconds: float
) -> dict[str, Any]:
    """One line of the table, after the check."""
    check(buffers, found.offsets, found.height)
    bound = found.lower_bound
    return {
        "instance": name,
        "buffers": len(buffers),
        "lower_bound": bound,
        "height": found.height,
        "percent_above": 100 * (found.height / bound - 1) if bound else 0.0,
        "capacity": capacity,
        "packed": None if capacity is None else found.height <= capacity,
        "seconds": seconds,
        "method": found.method,
    }


def file_row(path: Path, capacity: int | None, time_limit: float) -> dict[str, Any]:
    """Solve one file."""
    buffers = read(path)
    if capacity is None and (named := re.search(r"\.(\d+)\.csv$", path.name)):
        capacity = int(named[1])
    begin = time.perf_counter()
    found = solve(buffers, time_limit, capacity)
    return row_of(path.name, buffers, found, capacity, time.perf_counter() - begin)


def model_rows(model_type: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first block of each repeated stack of an architecture, alone and as a stack of layers."""
    config = AutoConfig.for_model(model_type, **WIDTHS.get(model_type, {}))
    kinds = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM)
    kind = next(k for k in kinds if type(config) in k._model_mapping)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=torch.bfloat16)
    rows = []
    for block in repeated_blocks(model):
        traced = trace_block(
            model, block, micro_batch=args.micro_batch, sequence_length=args.sequence_length, dtype=torch.bfloat16
        )
        begin = time.perf_counter()
        found = solve(traced.buffers, args.time_limit)
        rows.append(row_of(f"{model_type} {block}", traced.buffers, found, None, time.perf_counter() - begin))
        buffers, passes = stack(traced, args.layers)
        begin = time.perf_counter()
        found = solve_stack(buffers, passes, args.time_limit)
        rows.append(row_of(f"{model_type} {block} x {args.layers}", buffers, found, None, time.perf_counter() - begin))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV")
    parser.add_argument("--capacity", type=int, help="bytes to pack into; default: the number in the file's name")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds per instance")
    parser.add_argument("--model-type", action="append", default=[], help="a transformers architecture to trace")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    if not args.files and not args.model_type:
        parser.error("give CSV files, or architectures with --model-type")
    rows = [file_row(path, args.capacity, args.time_limit) for path in args.files]
    for model_type in args.model_type:
        rows += model_rows(model_type, args)
    mean = sum(r["percent_above"] for r in rows) / len(rows)
    text = json.dumps({"machine": machine.describe(), "mean_percent_above": mean, "rows": rows}, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
        return
    table = Table(title=f"{mean:.2f} % above the lower bound on average")
    for column in ("instance", "buffers", "lower bound", "best height", "% above", "packed", "seconds", "method"):
        table.add_column(column, justify="left" if column in ("instance", "method") else "right", overflow="fold")
    for r in rows:
        packed = {None: "", True: "yes", False: "no"}[r["packed"]]
        table.add_row(
            r["instance"], str(r["buffers"]), str(r["lower_bound"]), str(r["height"]), f"{r['percent_above']:.3f}",
            packed, f"{r['seconds']:.1f}", r["method"],
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 160).print(table)


if __name__ == "__main__":
    main()
