"""A unit's costs from parameter shapes alone, from above: for models whose forward cannot be traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from offload.planner.plan import UnitCost
from torch import nn

UnitModules = tuple[str, str, Sequence[nn.Module]]  # (name, kind, boundary modules)


def estimate_costs(
    model: nn.Module, units: Sequence[UnitModules], tokens: int, sequence_length: int, compute: torch.dtype
) -> dict[str, UnitCost]:
    """A bound from parameter shapes, for models that cannot be traced.

    Every matrix keeps its input and output for backward, with a gradient of each; attention keeps four score matrices
    per head; the last unit's output is kept in its own dtype and four times in float32 (upcast, softmax, gradients).
    """
    size = compute.itemsize
    config = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    hidden = int(getattr(config, "hidden_size", 0) or max(min(p.shape) for p in model.parameters() if p.dim() > 1))
    costs: dict[str, UnitCost] = {}
    last = max((i for i, (_, kind, modules) in enumerate(units) if modules and kind != "resident"), default=-1)
    for i, (name, kind, modules) in enumerate(units):
        cost = costs[name] = UnitCost()
        if not modules:
            continue
        parameters = list({id(p): p for m in modules for p in m.parameters()}.values())
        matrices = [p for p in parameters if p.dim() > 1]
        width = sum(p.shape[-1] + p.shape[-2] for p in matrices)
        scores = 4 * heads * tokens * sequence_length * size if kind == "block" else 0
        gradient = max((p.numel() for p in parameters), default=0) * size
        lookup = kind == "embedding" and len(modules) == 1
        cost.visits = len(modules)
        cost.kept = i == last
        cost.boundary_bytes = tokens * hidden * size
        if not lookup:
            cost.forward_flops = 2 * tokens * sum(p.numel() for p in matrices) + (
                4 * tokens * sequence_length * hidden if kind == "block" else 0
            )
        cost.workspace_forward = tokens * (hidden if lookup else width) * size + scores
        cost.workspace_backward = 2 * cost.workspace_forward + gradient
        cost.workspace_kept = cost.workspace_forward + gradient
        cost.saved = (cost.workspace_forward,)
        if kind == "head" or len(modules) > 1:
            vocabulary = max((p.shape[0] for p in matrices), default=0)
            cost.workspace_backward = tokens * vocabulary * (2 * size + 16) + gradient
    return costs
