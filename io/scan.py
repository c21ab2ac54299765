"""One pass over a gradient: copy it, learn whether it is finite, and sum its squares, with nothing allocated beside it.

A piece that fits a core's cache is copied and then read again from there, so main memory is passed once. Both answers
come from one reduction: the sum of squares is finite if every element is, unless a square overflows float32, which the
rare look at such a piece decides (after MemAscend's fused overflow check, which tests exponent bits instead).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 128 * 1024
"""Elements copied at a time: half a MiB of float32."""


class NonFiniteError(ArithmeticError):
    """A tensor holds infinities or NaNs: `name`, `index` of the first (flattened), and `count` of them."""

    def __init__(self, name: str, index: int, count: int, numel: int, value: float) -> None:
        self.name = name
        self.index = index
        self.count = count
        super().__init__(
            f"{name} is not finite: {count} of {numel} elements are inf or nan, the first is element {index} ({value})"
        )


@dataclass(frozen=True)
class Scan:
    """`squares`: the sum of all squares (float32 within a piece, float64 across; inf or nan if an element is);
    `finite`: whether every element is."""

    squares: float
    finite: bool


def copy_and_scan(target: Tensor, source: Tensor) -> Scan:
    """target[:] = source, and what the bytes are. Both 1-D, contiguous, on the CPU and of one length; `target` float32,
    `source` of any floating dtype, or `target` itself to scan what is there. Raises ValueError otherwise.
    """
    wrong = (
        target.dtype != torch.float32 or target.dim() != 1 or target.shape != source.shape or not target.is_contiguous()
    )
    if wrong:
        raise ValueError(
            f"cannot scan {source.dtype} {tuple(source.shape)} into {target.dtype} {tuple(target.shape)}: needs 1-D "
            "tensors of one length, the target float32 and contiguous"
        )
    in_place = target.data_ptr() == source.data_ptr()
    total, finite = 0.0, True
    for start in range(0, target.numel(), PIECE):
        piece = target[start : start + PIECE]
        if not in_place:
            piece.copy_(source[start : start + PIECE])
        squares = torch.dot(piece, piece).item()
        if not math.isfinite(squares):
            wide = piece.double()
            squares = torch.dot(wide, wide).item()  # float32's largest value squared is far below float64's
            finite = finite and math.isfinite(squares)
        total += squares
    return Scan(total, finite)


def first_non_finite(name: str, tensor: Tensor) -> NonFiniteError | None:
    """The error that says where `tensor` is not finite, and how often; None if it is (its norm may have overflowed)."""
    flat = tensor.detach().reshape(-1)
    first, count = -1, 0
    for start in range(0, flat.numel(), PIECE):
        bad = ~torch.isfinite(flat[start : start + PIECE])
        found = int(bad.sum())
        if found and first < 0:
            first = start + int(bad.int().argmax())
        count += found
    return NonFiniteError(name, first, count, flat.numel(), float(flat[first])) if count else None
