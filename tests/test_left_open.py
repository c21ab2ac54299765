"""A program that ends without closing its engine ends as programs do: its own error, its exit code, nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload import left_open
from offload.engine import Engine

PROGRAM = """
import json, sys
import torch
import offload

engine = offload.wrap(None, json.loads(sys.argv[1]))
torch.manual_seed(0)
batch = {"input_ids": torch.randint(0, 64, (4, 16)), "labels": torch.randint(0, 64, (4, 16))}
for _ in range(2):
    engine.step(batch)
if sys.argv[2] == "between":
    raise ValueError("of the program")
if sys.argv[2] == "within":
    def forward(*_):
        raise ValueError("of the program")
    engine.model.model.layers[1].mlp.forward = forward
    engine.step(batch)
"""
ENDS = {"between": 2, "within": 0}  # where the error comes, and the step that is then the last committed one


def config(run: Path) -> dict[str, object]:
    return {
        "model": {
            "architecture": {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
                "num_attention_heads": 2, "vocab_size": 64,
            },
            "dtype": "bfloat16",
        },
        "train": {
            "steps": 9, "micro_batch_size": 2, "global_batch_size": 4, "max_grad_norm": None, "commit_every": 5,
            "schedule": {"name": "constant"},
        },
        "memory": {"device": "cpu", "cpu": "600MiB", "nvme": [{"path": str(run / "store"), "size": "1GiB"}]},
        "output": str(run),
    }  # fmt: skip


def test_a_program_that_does_not_close(tmp_path: Path) -> None:
    """With updates under way: the last whole step is committed; where a step failed, the last commit stays."""
    programs = {
        end: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(config(tmp_path / end)), end],
            stderr=subprocess.PIPE, text=True,
        )
        for end in ENDS
    }  # fmt: skip
    for end, step in ENDS.items():
        _, errors = programs[end].communicate(timeout=300)
        assert programs[end].returncode == 1, errors
        assert "Traceback (most recent call last)" in errors and "ValueError: of the program" in errors
        assert "terminate called" not in errors and "Exception ignored" not in errors
        assert errors.splitlines()[-1].endswith(
            f"{end} was left open; closed at step {step}: call close(), or use the engine in a `with`"
        )
        (manifest,) = (tmp_path / end / "store").glob("*/manifest.json")
        assert json.loads(manifest.read_text().splitlines()[1])["meta"]["step"] == step


def test_a_forked_child_leaves_the_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    closes: list[int] = []
    monkeypatch.setattr(Engine, "close", lambda self: closes.append(os.getpid()))
    engine = object.__new__(Engine)
    left_open.opened(engine)
    try:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        left_open._close_all()
        assert not closes
    finally:
        left_open.closed(engine)
