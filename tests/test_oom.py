"""Allocations beside the plan that the system refuses: really refused, by a limit of the address space."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload import oom

# A block that in its second step takes twice as much memory as there is address space left.
PROGRAM = """
import json, resource, sys
import psutil, torch
import offload
from offload import adamw_jit

MIB = 2**20
adamw_jit.load()  # maps its code now, not under the limit
engine = offload.wrap(None, json.loads(sys.argv[1]))
torch.manual_seed(0)
batch = {"input_ids": torch.randint(0, 8000, (8, 64)), "labels": torch.randint(0, 8000, (8, 64))}
engine.step(batch)
mlp = engine.model.model.layers[1].mlp
usual = mlp.forward
mlp.forward = lambda x: usual(x) + torch.zeros(24 * MIB // 4).sum()
limit = psutil.Process().memory_info().vms + 12 * MIB
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    engine.step(batch)
except offload.oom.OutOfMemory as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error)
    mlp.forward = usual
    engine.close()
    with offload.resume(sys.argv[2]) as again:
        print("resumed at", again.completed_steps)
"""


def test_a_refused_allocation_is_explained(tmp_path: Path) -> None:
    # Large blocks are mapped when they are asked for and unmapped when they are given back: nothing is left over.
    allocator = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    config = {
        "model": {
            "architecture": {
                "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "vocab_size": 8000, "tie_word_embeddings": False,
            },
            "dtype": "float32",
        },
        "data": {"path": "none.jsonl", "sequence_length": 64},
        "train": {
            "steps": 4, "micro_batch_size": 8, "global_batch_size": 8, "schedule": {"name": "constant"},
            "head_chunks": 0, "commit_every": 1,
        },
        "memory": {"device": "cpu", "cpu": "600MiB"},
        "planner": {"activations": "recompute"},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(config), str(tmp_path / "run")],
        env=os.environ | allocator, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout
    asked = r"out of memory: 24 MiB \(25,165,824 bytes\) refused in step 2, forward of model\.layers\.1: "
    assert re.match(asked, told), told
    assert re.search(r"reserved in gpu \(an arena in RAM\): .* of a budget of .*: .*weights", told)
    assert re.search(r"reserved in cpu: .* of a budget of 600 MiB: .*update", told)
    assert "(ulimit -v)" in told
    ways = re.findall(r"^  \d\. (.*?): cpu peak ([\d.]+) MiB instead of ([\d.]+) MiB, ([\d,]+) tokens/s", told, re.M)
    assert len(ways) == 3, told
    assert all(float(now) - float(peak) >= 23.9 for _, peak, now, _ in ways), told
    assert any(setting.startswith("train.micro_batch_size: ") for setting, *_ in ways)
    assert "resumed at 1" in told


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), 2684354560),
        (MemoryError("Unable to allocate 1.00 MiB for an array with shape"), 2**20),
        (OSError(12, "Cannot allocate memory"), None),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, asked: int | None) -> None:
    outer = RuntimeError("a lane failed")
    outer.__cause__ = error
    found = oom.refused(outer)
    assert found is error and oom.asked_bytes(error) == asked
    assert oom.refused(ValueError("no")) is None and oom.refused(OSError(28, "No space left on device")) is None
