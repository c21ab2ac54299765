"""Zeroth-order fine-tuning: what a user needs to reproduce a run, or to rebuild its weights from the log.

A step draws its directions from numbers that depend on the seed, the step, the parameter's name and the place within
the parameter, and on nothing else: not on the device, the order, the chunking, or the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from offload import zo_noise
from offload.config import Config
from offload.loss import micro_seed
from offload.units import find_units
from offload.zo_formats import freeze_unquantized, make_format
from offload.zo_log import read_log
from offload.zo_pieces import Pieces
from offload.zo_variants import Branch, Piece, Update, magnitude_threshold, make_variant

__all__ = [
    "Branch", "Piece", "Update", "direction_seed", "magnitude_threshold", "noise", "read_log", "replay",
]  # fmt: skip

_DIRECTIONS = 0x7A65726F7468  # keeps directions and dropout apart


def direction_seed(seed: int, step: int, sample: int = 0) -> int:
    """The seed of direction `sample` of step `step` (both from 0) of a run with `train.seed` = `seed`: 63 bits."""
    return micro_seed(seed ^ _DIRECTIONS, step, sample)


def noise(seed: int, name: str, offset: int, shape: int | Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Standard normals of a direction: elements [offset, offset + size) of the flattened parameter `name`.

    Args:
        seed: `direction_seed` of the direction.
        name: of the parameter, as in `model.named_parameters()`.
        offset: first element. shape: of the result, float32.
    The values are those of `offload.zo_noise`, to the bit on every device.
    """
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    out = torch.empty(dims, dtype=torch.float32, device=device)
    zo_noise.fill(out.view(-1), seed, zo_noise.name_key(name), offset)
    return out


def replay(model: nn.Module, log: str | Path | Sequence[Update], config: Config) -> None:
    """Make the weights of a run again, in memory: apply the updates of its log to the weights it began with, in place.

    Args:
        model: with the first weights of the run in memory, in any floating dtype.
        log: a run directory, a log file, or updates from step 0 on.
        config: of the run. Formats in few bits are rounded to as in the run; the result is in the parameters' dtype.
    """
    updates = list(log) if isinstance(log, Sequence) and not isinstance(log, str) else read_log(log)
    compute = getattr(torch, config.model.dtype) if config.model is not None else torch.float32
    format, variant = make_format(config, compute), make_variant(config)
    if config.zo is not None and config.zo.variant == "qzo":
        freeze_unquantized(model)
    pieces = Pieces(format, variant, compute, "cpu", config.train.seed)
    for unit in find_units(model):
        slot = torch.zeros(pieces.trainable_bytes(unit.layout), dtype=torch.uint8)
        parts = pieces.parts(unit.layout, slot)
        pairs = [(p, s) for p, s in zip(unit.parameters, unit.layout.params, strict=True) if s.trainable]
        for p, s in pairs:
            pieces.encode(parts, slice(s.offset, s.offset + s.numel), p.detach().float().reshape(-1))
        pieces.advance(unit.layout, slot, [u for u in updates if variant.active(unit.index, u.step)])
        with torch.no_grad():
            for p, s in pairs:
                p.copy_(pieces.decode(parts, slice(s.offset, s.offset + s.numel)).view(s.shape))
