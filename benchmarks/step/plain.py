"""(a) Plain PyTorch, everything in memory: the reference loop for bfloat16 (weights rounded from a float32 master)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.step.setting import BETAS, EPS, LR, WEIGHT_DECAY, Setting


@contextmanager
def opened(setting: Setting, model_dir: str, checkpointing: bool) -> Iterator[Callable[[dict[str, Tensor]], float]]:
    """A function that takes one optimizer step on a global batch and returns its loss."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).train()
    for p in model.parameters():
        p.data = p.data.clone()  # out of the file's mapping, which would count as memory
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    weights = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch: dict[str, Tensor]) -> float:
        total = 0.0
        for micro in micro_batches(batch, setting.micro_batch):
            loss = model(**micro).loss / setting.micro_batches
            total += loss.item()
            loss.backward()
            for p, master in zip(weights, masters, strict=True):
                if p.grad is None:
                    continue
                if master.grad is None:
                    master.grad = p.grad.float()
                else:
                    master.grad += p.grad
                p.grad = None
        if setting.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters, setting.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for p, master in zip(weights, masters, strict=True):
            p.data.copy_(master.data)
        return total

    yield step


def micro_batches(batch: dict[str, Tensor], rows: int) -> list[dict[str, Any]]:
    """The global batch cut along dimension 0, in order."""
    parts = {name: tensor.split(rows) for name, tensor in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(parts["input_ids"]))]
