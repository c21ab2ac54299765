"""Bytes reserved over bytes needed for the host memory of three models, beside two other ways of reserving it.

    python -m benchmarks.pinned --json --out benchmarks/results/pinned.json

Needed: the parameters' own bytes. Ours: what the ledger holds after every buffer was really allocated (untouched memory
costs nothing, so no RAM of that size is needed). Power of two: each buffer rounded up as PyTorch's pinned allocator
does. Equal slots: each buffer as large as the largest of its kind, as a pool whose slots fit any tensor has it.
Weights are bfloat16, with AdamW, clipping and two micro-batches or more (float32 gradients).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.io import Ledger, allocate
from offload.planner.memory import is_large, reserve
from offload.planner.plan import UnitProfile, Workload
from offload.planner.unit_bytes import gradient_home, home_bytes

from benchmarks import machine
from offload import models
from offload.config import Config
from offload.units import find_units

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "Llama-3-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """One buffer: its kind, what the tensors in it need, and what the planner asks for; bytes."""

    kind: str
    needed: int
    asked: int


def workload(architecture: dict[str, Any]) -> Workload:
    """The model's units as the planner sees them; nothing is traced, sizes are all that counts here."""
    model_config = Config.load({"model": {"architecture": architecture, "dtype": "bfloat16"}}).model
    assert model_config is not None
    units = [
        UnitProfile(u.name, u.kind, u.layout.parameters, u.layout.trainable_elements, u.layout.frozen_elements, u.held)
        for u in find_units(models.build(model_config))
    ]
    return Workload(tuple(units), micro_batches=2, micro_batch=1, sequence_length=1024, dtype="bfloat16")


def slots(w: Workload) -> Iterator[Buffer]:
    """What units pass through: the slots of each class, and the buffers of the optimizer and the transfers."""
    streamed = [u for u in w.units if u.kind != "resident"]
    groups = {
        "block": [u for u in streamed if not is_large(u, w)],
        "large": [u for u in streamed if is_large(u, w)],
    }
    for buffers in reserve(w):
        name, _, group = buffers.name.partition(".")
        if name in ("weights", "gradients") and group in groups:
            most = max(u.parameters for u in groups[group])
            needed = most * (w.itemsize if name == "weights" else w.gradient_itemsize)
        elif name == "landing":
            needed = 4 * max(u.parameters for u in w.units)
        else:
            needed = buffers.nbytes  # chunks, whose size is a choice and not a tensor's
        kind = name if name in ("weights", "gradients") else buffers.name
        yield from [Buffer(kind, needed, buffers.nbytes)] * buffers.count


def homes(w: Workload) -> Iterator[Buffer]:
    """The whole state in RAM: one buffer per unit and role."""
    itemsize = {"param": 2, "master": 2, "exp_avg": 4, "exp_avg_sq": 4}
    for unit in w.units:
        for role, nbytes in home_bytes(unit, w).items():
            yield Buffer(role, unit.parameters * itemsize[role], nbytes)
        yield Buffer("grad", unit.parameters * w.gradient_itemsize, gradient_home(unit, w))


def compare(buffers: list[Buffer]) -> dict[str, Any]:
    """Bytes needed, and reserved in each way, with the ratios."""
    needed = sum(b.needed for b in buffers)
    ledger, held = Ledger(), []
    try:
        for b in buffers:
            held.append(allocate(b.asked, ledger, "cpu", b.kind))
        ours = ledger.in_use("cpu")
    finally:
        for buffer in held:
            buffer.free()
    largest = {b.kind: max(x.needed for x in buffers if x.kind == b.kind) for b in buffers}
    reserved = {
        "ours": ours,
        "power_of_two": sum(1 << (b.needed - 1).bit_length() for b in buffers),
        "equal_slots": sum(largest[b.kind] for b in buffers),
    }
    return {
        "buffers": len(buffers), "needed_bytes": needed, "reserved_bytes": reserved,
        "ratio": {name: round(nbytes / needed, 5) for name, nbytes in reserved.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"models": {}, "machine": machine.describe()}
    for name, architecture in MODELS.items():
        w = workload(architecture)
        result["models"][name] = {"slots": compare(list(slots(w))), "homes": compare(list(homes(w)))}
    result["worst_ratio"] = max(x["ratio"]["ours"] for sets in result["models"].values() for x in sets.values())
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        print(f"{'model':14}{'set':8}{'needed GiB':>12}{'ours':>10}{'power of 2':>12}{'equal slots':>13}")
        for name, sets in result["models"].items():
            for what, found in sets.items():
                ratio = found["ratio"]
                print(
                    f"{name:14}{what:8}{found['needed_bytes'] / 2**30:12.2f}{ratio['ours']:10.4f}"
                    f"{ratio['power_of_two']:12.3f}{ratio['equal_slots']:13.3f}"
                )
    return 0 if result["worst_ratio"] <= 1.02 else 1


if __name__ == "__main__":
    sys.exit(main())
