"""What a zeroth-order method does along its random directions: how it perturbs, and how it steps.

All of them estimate the gradient as the mean of (loss(w + eps z) - loss(w - eps z)) / (2 eps) z over the directions z
of a step (Malladi et al., Fine-Tuning Language Models with Just Forward Passes, 2023) and differ in the use they make
of it.
Each works on pieces of parameters in float32; a piece is a function of the clean weights, the moments and the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offload import adamw, zo_noise
from offload.adamw import Hyper
from offload.config import Config
from offload.config_sections import OptimizerConfig, ZoConfig

# Values of a parameter that its magnitude threshold is taken from, evenly spaced.
THRESHOLD_SAMPLES = 1 << 20


@dataclass(frozen=True)
class Update:
    """One step's update: all that has to be known of it, beside the weights it changes. `step` counts from 0.

    `draws` holds a (seed, projected gradient) for every direction.
    """

    step: int
    lr: float
    draws: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Branch:
    """Weights to run a forward pass with: clean, moved by `epsilon` along a direction, or as they would be updated."""

    seed: int = 0
    epsilon: float = 0.0
    update: Update | None = None


@dataclass
class Piece:
    """Consecutive values of one parameter (for a quantized one, of its scales).

    Args:
        key: `zo_noise.name_key` of the parameter. offset: the first value's place in the parameter.
        values: float32 [n]. states: moments by role, float32 [n]. noise, estimate: float32 [n], overwritten.
        threshold: see `Sparse`.
    """

    key: int
    offset: int
    values: Tensor
    states: Mapping[str, Tensor]
    noise: Tensor
    estimate: Tensor
    threshold: float = 0.0


class Variant:
    """MeZO-SGD: w <- w - lr (g z + decay w), as the authors' code computes it; the others change parts of it."""

    states: tuple[str, ...] = ()
    needs_threshold = False
    tries_both_ways = False  # evaluates the step, and its opposite, before it takes one of them

    def __init__(self, zo: ZoConfig, optimizer: OptimizerConfig) -> None:
        self.zo = zo
        self.optimizer = optimizer

    def active(self, unit: int, step: int) -> bool:
        """Whether a step perturbs and updates the unit of this index."""
        return True

    def direction(self, piece: Piece, seed: int) -> Tensor:
        """The direction at this piece, in `piece.noise`."""
        zo_noise.fill(piece.noise, seed, piece.key, piece.offset)
        return piece.noise

    def perturb(self, piece: Piece, seed: int, epsilon: float, out: Tensor) -> None:
        """The values plus epsilon times the direction, in `out`: a multiplication and an addition, each rounded."""
        zo_noise.add(out, piece.values, piece.noise, seed, piece.key, piece.offset, epsilon)

    def apply(self, piece: Piece, update: Update) -> None:
        """Take the step on this piece."""
        if len(update.draws) == 1 and self._steps_along_the_direction:
            seed, projected = update.draws[0]  # in one pass: the same operations, w + ((z g) -lr)
            zo_noise.add(piece.values, piece.values, piece.noise, seed, piece.key, piece.offset, projected, -update.lr)
            return
        for i, (seed, projected) in enumerate(update.draws):
            share = self.direction(piece, seed).mul_(projected / len(update.draws))
            if i == 0:
                piece.estimate.copy_(share)
            else:
                piece.estimate.add_(share)
        self.step(piece, update)

    @property
    def _steps_along_the_direction(self) -> bool:
        plain = type(self).step is Variant.step and type(self).direction is Variant.direction
        return plain and not self.optimizer.weight_decay

    def step(self, piece: Piece, update: Update) -> None:
        """Move the values by the estimated gradient in `piece.estimate`, which may be overwritten."""
        if self.optimizer.weight_decay:
            piece.estimate.add_(torch.mul(piece.values, self.optimizer.weight_decay, out=piece.noise))
        piece.values.sub_(piece.estimate.mul_(update.lr))


class Sign(Variant):
    """ZO-signSGD: only the sign of the estimate counts (Liu et al. 2019)."""

    def step(self, piece: Piece, update: Update) -> None:
        piece.estimate.sign_()
        super().step(piece, update)


class Momentum(Variant):
    """ZO-SGD with momentum: m <- beta1 m + g, w <- w - lr m."""

    states = ("exp_avg",)

    def step(self, piece: Piece, update: Update) -> None:
        m = piece.states["exp_avg"]
        piece.estimate.copy_(m.mul_(self.optimizer.betas[0]).add_(piece.estimate))
        super().step(piece, update)


class Adam(Variant):
    """ZO-AdamW: the optimizer of full fine-tuning on the estimate."""

    states = ("exp_avg", "exp_avg_sq")

    def step(self, piece: Piece, update: Update) -> None:
        o = self.optimizer
        hyper = Hyper(update.lr, o.betas[0], o.betas[1], o.eps, o.weight_decay, None)
        moments = [piece.states[role] for role in self.states]
        adamw.fused_step(
            [piece.values], [piece.estimate], [moments[0]], [moments[1]], [update.step + 1], hyper
        )  # fmt: skip


class Sparse(Variant):
    """Sparse-MeZO (Liu et al. 2024): only values of small magnitude are perturbed and updated.

    The mask is made anew from the clean weights each time; kept is one threshold per parameter, from its first values.
    """

    needs_threshold = True

    def direction(self, piece: Piece, seed: int) -> Tensor:
        noise = super().direction(piece, seed)
        return noise.mul_(piece.values.abs().le_(piece.threshold))

    def perturb(self, piece: Piece, seed: int, epsilon: float, out: Tensor) -> None:
        torch.add(piece.values, self.direction(piece, seed).mul_(epsilon), out=out)

    def apply(self, piece: Piece, update: Update) -> None:
        if self.optimizer.weight_decay == 0.0:
            super().apply(piece, update)
            return
        kept = piece.values.abs() > piece.threshold  # decay is part of the update: large values have none
        before = piece.values[kept]
        super().apply(piece, update)
        piece.values[kept] = before


class Block(Variant):
    """Block-coordinate: `zo.blocks` groups of units take turns; unit i belongs to group i modulo their number."""

    def active(self, unit: int, step: int) -> bool:
        return unit % self.zo.blocks == step % self.zo.blocks


class Conservative(Variant):
    """ZO-SGD-Cons: of the step, its opposite and none, the one after which this batch's loss is lowest is taken."""

    tries_both_ways = True


# QZO steps like MeZO-SGD; what it steps on are the scales of quantized weights (see `zo_formats`).
_VARIANTS: dict[str, type[Variant]] = {
    "sgd": Variant, "sign": Sign, "momentum": Momentum, "adam": Adam, "sparse": Sparse, "block": Block,
    "conservative": Conservative, "qzo": Variant,
}  # fmt: skip


def make_variant(cfg: Config) -> Variant:
    """The variant that a configuration with `train.method: zo` asks for."""
    zo = cfg.zo or ZoConfig()
    return _VARIANTS[zo.variant](zo, cfg.train.optimizer)


def magnitude_threshold(values: Tensor, sparsity: float) -> float:
    """The magnitude that a share `sparsity` of a parameter's values exceeds: a quantile of evenly spaced ones."""
    flat = values.reshape(-1)
    sample = flat[:: -(-flat.numel() // THRESHOLD_SAMPLES)].float().abs()
    rank = max(1, round((1.0 - sparsity) * sample.numel()))
    return float(sample.kthvalue(rank).values)
