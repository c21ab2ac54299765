"""AdamW on flat chunks, to the bit what `torch.optim.AdamW(fused=True)` computes on whole tensors.

A bfloat16 run keeps its float32 master without storing it: weight = bfloat16 by round to nearest even, and
low = int16(bits(master) - (bits(weight) << 16)). Round-to-nearest-even leaves one ambiguous case, an exact tie that was
rounded down (low would be +32768, which wraps to -32768); it is marked in the sign bit of `exp_avg_sq`, which is never
negative. 12 bytes per parameter hold what 14 hold elsewhere, and no value is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements updated at a time: the arrays of one pass stay in a core's second-level cache.
CACHE_ELEMENTS = 64 * 1024


@dataclass(frozen=True)
class Hyper:
    """What one optimizer step needs beside the tensors; `coefficient` is the clipping factor (fp32 scalar) or None."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    coefficient: Tensor | None


def fused_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    hyper: Hyper,
) -> None:
    """One AdamW step in place on float32 tensors of equal shapes; `steps` counts from 1, gradients are clipped already.

    Exact against whole tensors if each piece starts at a multiple of 64 elements of its tensor (`offload.layout`).
    """
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [torch.tensor(float(step)) for step in steps],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
    )


def merge_master(weight: Tensor, low: Tensor, exp_avg_sq: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Rebuild the float32 master into `out` and clear the tie marks in `exp_avg_sq`. Allocates nothing.

    Args:
        weight: bfloat16 [n]. low: int16 [n]. exp_avg_sq: float32 [n], changed in place. out: float32 [n], written.
        scratch: int32 [n], overwritten.
    """
    bits = out.copy_(weight).view(torch.int32)
    bits.add_(scratch.copy_(low))
    torch.bitwise_right_shift(exp_avg_sq.view(torch.int32), 31, out=scratch)  # -1 where marked, else 0
    bits.sub_(scratch, alpha=65536)
    exp_avg_sq.abs_()


def split_master(master: Tensor, weight: Tensor, low: Tensor, exp_avg_sq: Tensor, scratch: Tensor) -> None:
    """Write the float32 master [n] as its bfloat16 rounding and low half, and mark ties in `exp_avg_sq`.

    A NaN stays a NaN, though not the same one.

    Args:
        master: float32 [n]. weight: bfloat16 [n], written. low: int16 [n], written.
        exp_avg_sq: float32 [n], non-negative, its sign bit written. scratch: int32 [n], overwritten.
    """
    weight.copy_(master)
    scratch.view(torch.float32).copy_(weight)
    torch.sub(master.view(torch.int32), scratch, out=scratch)
    low.copy_(scratch)
    exp_avg_sq.view(torch.int32).bitwise_or_(scratch.eq_(32768).bitwise_left_shift_(31))
