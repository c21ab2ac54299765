"""Plain PyTorch, written out: the loop that the engine has to match to the bit. Nothing here uses the engine."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup
from transformers.loss.loss_utils import ForCausalLMLoss

import offload
from offload.state import WeightReader

LR, WARMUP, STEPS, DECAY, NORM, SEED = 1e-3, 2, 5, 0.1, 1.0, 17


@dataclass
class Outcome:
    """What a run gave, for comparison."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def counted(model: nn.Module, micro: dict[str, Tensor]) -> int:
    """Targets that count in a micro-batch's loss."""
    labels = micro["labels"]
    if labels.dim() == 1:
        return labels.shape[0]
    shifts = getattr(model, "loss_function", None) is ForCausalLMLoss and not model.config.is_encoder_decoder
    return int(((labels[:, 1:] if shifts else labels) != -100).sum())


def micro_batches(batch: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    parts = {name: tensor.split(rows) for name, tensor in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(next(iter(parts.values()))))]


def scaled_loss(model: nn.Module, micro: dict[str, Tensor], n: list[int], i: int, takes_total: bool) -> Tensor:
    if len(set(n)) == 1:
        return model(**micro).loss / len(n)
    if takes_total:
        return model(**micro, num_items_in_batch=sum(n)).loss
    return model(**micro).loss * (n[i] / sum(n))


def train(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    rows: int,
    *,
    takes_total: bool = True,
    max_grad_norm: float | None = NORM,
    lr: float = LR,
    steps: int = STEPS,
    warmup: int = WARMUP,
    weight_decay: float = DECAY,
    dtype: torch.dtype = torch.float32,
    keep: nn.Module | None = None,
) -> Outcome:
    """Ordinary gradient accumulation with AdamW. In bfloat16 the model computes on roundings of a float32 master.

    Trains a copy, or `keep` itself where it is given.
    """
    model = (copy.deepcopy(model) if keep is None else keep).train()
    model.config.use_cache = False
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = trained
    if dtype != torch.float32:
        masters = [nn.Parameter(p.detach().float().clone()) for p in trained]
        for p in model.parameters():
            p.data = p.data.to(dtype)
    optimizer = torch.optim.AdamW(masters, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    outcome = Outcome()
    for step, batch in enumerate(batches):
        micros = micro_batches(batch, rows)
        n = [counted(model, micro) for micro in micros]
        losses = []
        for i, micro in enumerate(micros):
            torch.manual_seed(offload.micro_seed(SEED, step, i))
            loss = scaled_loss(model, micro, n, i, takes_total)
            losses.append(loss.item())
            loss.backward()
            if masters is not trained:
                for p, master in zip(trained, masters, strict=True):
                    if p.grad is not None:
                        gradient = p.grad.float()
                        master.grad = gradient if master.grad is None else master.grad + gradient
                        p.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters, float("inf") if max_grad_norm is None else max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if masters is not trained:
            for p, master in zip(trained, masters, strict=True):
                p.data.copy_(master.data)
        outcome.losses.append(sum(losses))
        outcome.norms.append(norm.item())
    outcome.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return outcome


def config(path: Any, rows: int, total: int, **changes: Any) -> dict[str, Any]:
    """The engine's configuration for the same run; `changes` are dotted keys."""
    cfg: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "train": {
            "steps": STEPS,
            "micro_batch_size": rows,
            "global_batch_size": total,
            "optimizer": {"lr": LR, "weight_decay": DECAY},
            "schedule": {"name": "cosine", "warmup_steps": WARMUP},
            "max_grad_norm": NORM,
            "seed": SEED,
        },
        "memory": {"device": "cpu"},
        "planner": {"activations": "recompute"},  # the way with the most traps; others are asked for
        "output": str(path),
    }
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = cfg
        for section in sections:
            place = place[section]
        place[name] = value
    return cfg


def weights(engine: offload.engine.Engine) -> dict[str, Tensor]:
    """The engine's current weights by parameter name."""
    engine.flush()
    reader = WeightReader(engine._held.states, engine._held.staging, 60.0)
    slots = [slot for unit in engine._units for slot in unit.layout.params]
    return {slot.name: reader.read(slot.name, 0, slot.numel).view(slot.shape) for slot in slots}
