"""What one pass over memory costs: checksums, the fused gradient copy, and filling with and without huge pages.

    python -m benchmarks.passes --json --out benchmarks/results/passes.json

CPU seconds per GB (1e9 bytes) of one thread, the middle of `--repeats`. "ring" is memory the size of a transfer chunk,
used again and again as the engine's rings are; "large" is far beyond every cache. The floor is a pass that only reads.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from offload.io import BLOCK, STRIPE, Ledger, allocate, copy_and_scan
from offload.io.sums import summer

from benchmarks import machine

LARGE = 512 << 20
GRADIENT = 64 << 20  # elements


def cost(work: Callable[[], object], nbytes: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of this thread per GB; the samples too."""
    work()
    samples = []
    for _ in range(repeats):
        began = time.thread_time()
        work()
        samples.append((time.thread_time() - began) / (nbytes / 1e9))
    return {"seconds_per_gb": round(statistics.median(samples), 4), "samples": [round(s, 4) for s in samples]}


def checksums(repeats: int) -> dict[str, Any]:
    """The store's own function over its blocks, and a pass that only reads."""
    result: dict[str, Any] = {}
    for name, size in (("ring", STRIPE), ("large", LARGE)):
        with allocate(size, Ledger()) as buffer:
            buffer.tensor.random_(0, 256)
            view, words = buffer.tensor.numpy().data, buffer.tensor.view(torch.int64)
            sums = np.zeros(size // BLOCK, np.uint64)
            rounds = max(1, LARGE // size)
            compute = summer(sums)

            def hashed(rounds: int = rounds, compute: Any = compute, view: Any = view) -> None:
                for _ in range(rounds):
                    compute(view)

            def read(rounds: int = rounds, words: torch.Tensor = words) -> None:
                for _ in range(rounds):
                    words.sum()

            result[name] = {
                "xxh3": cost(hashed, rounds * size, repeats),
                "read_floor": cost(read, rounds * size, repeats),
            }
            del view, words, hashed, read
    return result


def gradient_copies(repeats: int) -> dict[str, Any]:
    """Landing a gradient, per GB of float32 landed: the copy alone, fused, and in separate passes."""
    result: dict[str, Any] = {}
    target = torch.zeros(GRADIENT)
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(GRADIENT).to(dtype)

        def separate(source: torch.Tensor = source) -> None:
            target.copy_(source)
            torch.isfinite(target).all()
            torch.linalg.vector_norm(target)

        works: dict[str, Callable[[], object]] = {
            "copy": lambda source=source: target.copy_(source),  # type: ignore[misc]
            "fused": lambda source=source: copy_and_scan(target, source),  # type: ignore[misc]
            "separate": separate,
        }
        found = {name: cost(work, 4 * GRADIENT, repeats) for name, work in works.items()}
        result[str(dtype).removeprefix("torch.")] = found
    return result


def pages(repeats: int) -> dict[str, Any]:
    """Filling fresh memory, and one more pass over it. The first fill of a machine's life may be slower."""
    result: dict[str, Any] = {}
    for name, advice in (("small", mmap.MADV_NOHUGEPAGE), ("huge", mmap.MADV_HUGEPAGE)):
        fills, reads = [], []
        for _ in range(repeats + 1):
            mapping = mmap.mmap(-1, LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise(advice)
            tensor = torch.from_numpy(np.frombuffer(mapping, np.int64))
            began = time.thread_time()
            tensor.fill_(3)
            between = time.thread_time()
            tensor.sum()
            reads.append((time.thread_time() - between) / (LARGE / 1e9))
            fills.append((between - began) / (LARGE / 1e9))
            del tensor
            mapping.close()
        result[name] = {
            "first_fill": round(fills[0], 3), "fill": round(statistics.median(fills[1:]), 3),
            "read": round(statistics.median(reads[1:]), 4),
        }  # fmt: skip
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "checksums": checksums(arguments.repeats),
        "gradient_copies": gradient_copies(arguments.repeats),
        "pages": pages(arguments.repeats),
        "machine": machine.describe(),
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        for where, found in result["checksums"].items():
            print(f"checksum {where:6}", {name: x["seconds_per_gb"] for name, x in found.items()}, "CPU s per GB")
        for dtype, found in result["gradient_copies"].items():
            print(f"landing {dtype:9}", {name: x["seconds_per_gb"] for name, x in found.items()}, "CPU s per GB")
        for kind, found in result["pages"].items():
            print(f"{kind} pages", found, "CPU s per GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
