"""The engine against the same training with the model in the device's memory, to the bit.

The reference computes on the device with deterministic algorithms; its gradients are copied to the CPU, summed in
float32 there (bfloat16), clipped and stepped by torch's fused AdamW on float32 masters.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from benchmarks.gpu import ours
from benchmarks.gpu.case import Case
from benchmarks.step.plain import micro_batches
from benchmarks.step.setting import BETAS, EPS, LR, WEIGHT_DECAY
from offload.full_step import FullStep
from offload.state import WeightReader


def run(case: Case, directory: Path) -> dict[str, Any]:
    """Both trainings; which losses and weights are equal, and the largest differences."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = case.build("cpu", torch.float32)
    steps = case.warm + case.steps
    want_losses, want_norms, want = reference(copy.deepcopy(model), case, steps)
    cfg = offload.Config.load({k: v for k, v in case.config(directory).items() if k != "model"}
                              | {"model": {"dtype": case.dtype}})  # fmt: skip
    losses, norms = [], []
    with ours.opened(case, cfg, model) as engine:
        assert isinstance(engine._method, FullStep)
        engine._method._weights._poison = True
        for step in range(steps):
            result = engine.step(case.batch(step))
            losses.append(result.loss)
            norms.append(result.grad_norm)
        engine.flush()
        reader = WeightReader(engine._held.states, engine._held.staging, 60.0)
        slots = [slot for unit in engine._units for slot in unit.layout.params]
        got = {slot.name: reader.read(slot.name, 0, slot.numel).view(slot.shape) for slot in slots}
        planned = ours.described(engine.plan)
    apart = {name: (got[name].float() - w.float()).abs().max().item() for name, w in want.items() if name in got}
    return {
        "losses": losses,
        "reference_losses": want_losses,
        "losses_equal": losses == want_losses,
        "norms_equal": norms == want_norms,
        "weights_equal": all(torch.equal(got[name], w) for name, w in want.items() if name in got),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, want_losses, strict=True)),
        "largest_weight_difference": max(apart.values()),
        "planned": planned,
    }


def reference(model: nn.Module, case: Case, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms, and final weights in the compute dtype, on the CPU."""
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model = model.to(case.device)
    for p in model.parameters():  # buffers keep their dtype, as in a model that is loaded in half precision
        p.data = p.data.to(getattr(torch, case.dtype))
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for i, micro in enumerate(micro_batches(case.batch(step), case.micro_batch)):
            torch.manual_seed(offload.micro_seed(case.seed, step, i))
            moved = {name: x.to(case.device) for name, x in micro.items()}
            loss = model(**moved).loss / case.micro_batches
            total += loss.item()
            loss.backward()
            for p, master in zip(weights, masters, strict=True):
                if p.grad is None:
                    continue
                gradient = p.grad.float().cpu()
                master.grad = gradient if master.grad is None else master.grad + gradient
                p.grad = None
        limit = float("inf") if case.clip is None else case.clip
        norms.append(torch.nn.utils.clip_grad_norm_(masters, limit).item())
        optimizer.step()
        optimizer.zero_grad()
        for p, master in zip(weights, masters, strict=True):
            p.data.copy_(master.data)
        losses.append(total)
    return losses, norms, {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
