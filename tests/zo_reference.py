"""Zeroth-order steps in plain PyTorch, written out: the loop that the engine has to match to the bit.

Everything is in memory; of the engine only the public noise and seeds are used. Weights at rest are kept in `dtype`,
arithmetic on them is float32, and the model computes in its own dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import reference
import torch
from reference import SEED, Outcome, counted, micro_batches, scaled_loss
from torch import Tensor, nn

import offload
from offload import zo

EPS, LR = 1e-3, 1e-3


def config(path: Any, rows: int, total: int, section: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The engine's configuration for the same run."""
    cfg = reference.config(
        path, rows, total,
        **{"train.schedule": {"name": "constant", "warmup_steps": 0}, "train.optimizer": {"lr": LR}, **changes},
    )  # fmt: skip
    cfg["train"]["method"] = "zo"
    cfg["zo"] = {"eps": EPS, **(section or {})}
    return cfg


def losses(model: nn.Module, batch: dict[str, Tensor], rows: int, step: int, takes_total: bool) -> float:
    """The loss of one global batch with the weights that are in the model."""
    micros = micro_batches(batch, rows)
    n = [counted(model, micro) for micro in micros]
    found = []
    for i, micro in enumerate(micros):
        torch.manual_seed(offload.micro_seed(SEED, step, i))
        found.append(scaled_loss(model, micro, n, i, takes_total).item())
    return sum(found)


@torch.no_grad()
def train(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    rows: int,
    *,
    takes_total: bool = True,
    samples: int = 1,
    eps: float = EPS,
    lr: float = LR,
    decay: float = 0.0,
    clip: float = float("inf"),
    dtype: torch.dtype = torch.float32,
    variant: str = "sgd",
    active: Callable[[str, int], bool] = lambda name, step: True,
    sparsity: float = 0.75,
) -> Outcome:
    """Two perturbed forward passes per direction, each from the clean weights, and one update per step, on a copy."""
    model = copy.deepcopy(model).train()
    model.config.use_cache = False
    parameters = dict(model.named_parameters())
    tuned = {n for n, p in parameters.items() if p.requires_grad}
    clean = {n: p.detach().clone().to(dtype if n in tuned else p.dtype) for n, p in parameters.items()}
    thresholds = {n: zo.magnitude_threshold(w, sparsity) for n, w in clean.items()}
    moments: dict[str, Any] = {n: torch.zeros_like(clean[n], dtype=torch.float32) for n in tuned}
    optimizers = {n: None for n in tuned}
    outcome = Outcome()

    def direction(name: str, seed: int) -> Tensor:
        z = zo.noise(seed, name, 0, clean[name].shape)
        return z * (clean[name].float().abs() <= thresholds[name]) if variant == "sparse" else z

    def load(weights: dict[str, Tensor]) -> None:
        for name in tuned:
            parameters[name].copy_(weights[name])

    def updated(step: int, draws: list[tuple[int, float]]) -> dict[str, Tensor]:
        new = {}
        for name in tuned:
            if not active(name, step):
                new[name] = clean[name]
                continue
            w = clean[name].float()
            g = sum(direction(name, seed) * (projected / samples) for seed, projected in draws)
            if variant == "adam":
                if optimizers[name] is None:
                    p = nn.Parameter(w.clone())
                    optimizers[name] = (p, torch.optim.AdamW([p], lr=lr, weight_decay=decay, fused=True))
                p, optimizer = optimizers[name]
                p.grad = g
                optimizer.step()
                new[name] = p.detach().clone()
                continue
            if variant == "sign":
                g = g.sign()
            if variant == "momentum":
                moments[name] = g = moments[name] * 0.9 + g
            if decay:
                g = g + w * decay
            new[name] = (w - g * lr).to(dtype)
        return new

    for step, batch in enumerate(batches):
        seeds = [zo.direction_seed(SEED, step, i) for i in range(samples)]
        found = []
        for seed in seeds:
            for sign in (1, -1):
                load({n: clean[n].float() + direction(n, seed) * (sign * eps) if active(n, step) else clean[n]
                      for n in tuned})  # fmt: skip
                found.append(losses(model, batch, rows, step, takes_total))
        projected = [max(-clip, min(clip, (found[2 * i] - found[2 * i + 1]) / (2 * eps))) for i in range(samples)]
        draws = list(zip(seeds, projected, strict=True))
        if variant == "conservative":
            choices = [clean, updated(step, draws), updated(step, [(seed, -g) for seed, g in draws])]
            tried = []
            for weights in choices:
                load(weights)
                tried.append(losses(model, batch, rows, step, takes_total))
            clean.update({n: choices[tried.index(min(tried))][n] for n in tuned})
        else:
            clean.update(updated(step, draws))
        outcome.losses.append(sum(found) / len(found))
        outcome.norms.append(sum(abs(g) for g in projected) / len(projected))
    outcome.weights = {n: w.to(parameters[n].dtype) for n, w in clean.items()}
    return outcome
