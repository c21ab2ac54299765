"""A training loop of your own around `offload.wrap`: a small model, its own batches, resume and export. Runs on a CPU.

Run it with `python examples/python_loop.py [RUN_DIR]`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import offload

VOCABULARY, ROWS, LENGTH = 256, 8, 64


def batch(step: int) -> dict[str, torch.Tensor]:
    """One global batch: dimension 0 is train.global_batch_size. Bytes of a counting text stand for real data."""
    text = " ".join(str(n) for n in range(step * 100, step * 100 + ROWS * LENGTH)).encode()
    ids = torch.tensor(list(text[: ROWS * LENGTH])).view(ROWS, LENGTH)
    return {"input_ids": ids, "labels": ids.clone()}


def main(run: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCABULARY
        )
    )
    config = {
        "model": {"dtype": "float32"},
        "train": {
            "steps": 12,
            "micro_batch_size": 4,  # 8 rows per step: two micro-batches pass through each unit
            "global_batch_size": ROWS,
            "optimizer": {"lr": 3e-3},
            "schedule": {"name": "constant", "warmup_steps": 2},
        },
        "memory": {"device": "auto", "cpu": "1GiB"},
        "output": str(run),
    }
    with offload.wrap(model, config) as engine:  # takes ownership: the weights live in the engine's store from here on
        for step in range(8):
            result = engine.step(batch(step))
            print(f"step {result.step}  loss {result.loss:.4f}  grad norm {result.grad_norm:.3f}  lr {result.lr:.1e}")

    with offload.resume(run) as engine:  # another process, another day: the same next step
        for step in range(engine.completed_steps, 12):
            result = engine.step(batch(step))
            print(f"step {result.step}  loss {result.loss:.4f}")
        print(f"loss on unseen numbers: {engine.evaluate(batch(99)):.4f}")
        engine.save_pretrained(run / "model")

    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    print(f"saved {sum(p.numel() for p in trained.parameters()):,} parameters in {run / 'model'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory) / "run")
