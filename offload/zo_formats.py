"""How zeroth-order weights rest and travel: as they are computed with, or in fewer bits.

Perturbation and update are float32 arithmetic on the values that the stored bits stand for. After every update the
values are rounded to the format, to nearest even or stochastically; perturbed weights are rounded to nearest even in
the compute dtype and live for one forward pass only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload.config import Config
from offload.config_sections import ZoConfig

GROUP = 64  # values that share a scale; parameters begin at multiples of it (offload.layout.ALIGN)
# Stored bits of each format's mantissa, and the exponent of its smallest normal number.
_MANTISSA = {torch.bfloat16: (7, -126), torch.float16: (10, -14), torch.float8_e4m3fn: (3, -6)}
_FLOAT8_LARGEST = 448.0
_BIAS = 127


@dataclass(frozen=True)
class Role:
    """One stored tensor of a unit's trainable space: `nbytes` bytes for every `per` elements; `written` by steps."""

    name: str
    nbytes: int
    per: int
    written: bool
    dtype: torch.dtype

    def size(self, elements: int) -> int:
        """Bytes for this many elements, a multiple of 64."""
        return -(-elements * self.nbytes // self.per)


@dataclass(frozen=True)
class Format:
    """Weights stored as a floating-point type with no scales."""

    dtype: torch.dtype
    stochastic: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role("param", self.dtype.itemsize, 1, True, self.dtype),)

    @property
    def exact(self) -> bool:
        """Whether values in the store are the float32 values themselves."""
        return self.dtype == torch.float32

    def read(self, parts: dict[str, Tensor], span: slice, out: Tensor) -> Tensor:
        """The values of elements `span` (which begins at a multiple of 64): float32, in `out` or where they are."""
        stored = parts["param"][span]
        return stored if self.exact else out.copy_(stored)

    def round(self, values: Tensor, uniform: Tensor | None) -> None:
        """Round float32 values in place to what can be stored; `uniform` in [0, 1) makes it stochastic."""
        if self.exact:
            return
        if uniform is None:
            values.copy_(values.to(self.dtype))
        else:
            _round_stochastically(values, uniform, *_MANTISSA[self.dtype])

    def write(self, parts: dict[str, Tensor], span: slice, values: Tensor) -> None:
        """Store values that `round` has made."""
        if not self.exact:
            parts["param"][span].copy_(values)


@dataclass(frozen=True)
class Float8(Format):
    """float8_e4m3fn with a power of two per 64 values, the smallest with which the largest of them fits."""

    dtype: torch.dtype = torch.float8_e4m3fn

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role("param", 1, 1, True, self.dtype), Role("scale", 1, GROUP, True, torch.uint8))

    def read(self, parts: dict[str, Tensor], span: slice, out: Tensor) -> Tensor:
        scale = _power(parts["scale"][_groups(span)].to(torch.int32) - _BIAS)
        return out.copy_(parts["param"][span]).mul_(scale.repeat_interleave(GROUP)[: out.numel()])

    def round(self, values: Tensor, uniform: Tensor | None) -> None:
        scale = self._scales(values).repeat_interleave(GROUP)[: values.numel()]
        values.div_(scale)
        super().round(values, uniform)
        values.clamp_(-_FLOAT8_LARGEST, _FLOAT8_LARGEST).mul_(scale)

    def write(self, parts: dict[str, Tensor], span: slice, values: Tensor) -> None:
        scale = self._scales(values)
        parts["param"][span].copy_(values / scale.repeat_interleave(GROUP)[: values.numel()])
        parts["scale"][_groups(span)].copy_((torch.frexp(scale).exponent - 1 + _BIAS).to(torch.uint8))

    def _scales(self, values: Tensor) -> Tensor:
        largest = _padded(values).view(-1, GROUP).abs().amax(1)
        fraction, exponent = torch.frexp(largest / _FLOAT8_LARGEST)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # a power of two fits as it is
        return _power(exponent.clamp_(-100, 100))


@dataclass(frozen=True)
class Quantized(Format):
    """Integers of 8 or 4 bits times a float32 scale per 64 of them; steps change the scales alone (QZO).

    Shang et al., Fine-tuning Quantized Neural Networks with Zeroth-order Optimization, 2025. The integers come from
    rounding to nearest, symmetric around zero; two of 4 bits share a byte, the first in the low half.
    """

    dtype: torch.dtype = torch.float32  # of what steps change
    bits: int = 8

    @property
    def roles(self) -> tuple[Role, ...]:
        packed = Role("param", 1, 8 // self.bits, False, torch.int8 if self.bits == 8 else torch.uint8)
        return (packed, Role("scale", 4, GROUP, True, torch.float32))

    def quantize(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Packed integers and scales of float32 values [n], n a multiple of 64."""
        top = 2 ** (self.bits - 1) - 1
        groups = values.view(-1, GROUP)
        scale = groups.abs().amax(1) / top
        whole = torch.where(scale > 0, scale, 1.0)[:, None]
        integers = (groups / whole).round_().clamp_(-top, top).to(torch.int8).view(-1)
        if self.bits == 4:
            half = integers.view(torch.uint8) & 15
            integers = half[0::2] | half[1::2] << 4
        return integers, scale

    def integers(self, parts: dict[str, Tensor], span: slice) -> Tensor:
        """The integers of elements `span` as float32, one per element."""
        if self.bits == 8:
            return parts["param"][span].float()
        packed = parts["param"][span.start // 2 : -(-span.stop // 2)]
        pairs = torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[: span.stop - span.start]
        return ((pairs ^ 8).to(torch.int16) - 8).float()  # the fourth bit is the sign

    def weights(self, parts: dict[str, Tensor], span: slice, scales: Tensor) -> Tensor:
        """The weights that the integers of `span` and these scales stand for."""
        return self.integers(parts, span).mul_(scales.repeat_interleave(GROUP)[: span.stop - span.start])


def make_format(cfg: Config, compute: torch.dtype) -> Format:
    """The format that a configuration with `train.method: zo` asks for."""
    zo = cfg.zo or ZoConfig()
    if zo.variant == "qzo":
        return Quantized(bits=zo.bits)
    stochastic = zo.rounding == "stochastic"
    if zo.weights == "float8":
        return Float8(stochastic=stochastic)
    return Format(compute if zo.weights == "auto" else getattr(torch, zo.weights), stochastic)


def freeze_unquantized(model: nn.Module) -> None:
    """Leave only the weights of linear layers inside the repeated blocks to be quantized; the rest stays as it is."""
    quantized = {
        id(layer.weight)
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack.modules()
        if isinstance(layer, nn.Linear)
    }
    for p in model.parameters():
        p.requires_grad_(id(p) in quantized)


def _groups(span: slice) -> slice:
    return slice(span.start // GROUP, -(-span.stop // GROUP))


def _padded(values: Tensor) -> Tensor:
    missing = -values.numel() % GROUP
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def _power(exponent: Tensor) -> Tensor:
    """2 ** exponent, exactly, for exponents of normal float32 numbers."""
    return ((exponent + _BIAS) << 23).view(torch.float32)


def _round_stochastically(values: Tensor, uniform: Tensor, mantissa: int, smallest: int) -> None:
    """Round down or up to neighbours with `mantissa` stored bits, with the probability that keeps the mean."""
    exponent = ((values.view(torch.int32) >> 23) & 255) - _BIAS
    step = _power((exponent.clamp_(min=smallest) - mantissa).clamp_(min=-126))
    values.div_(step).add_(uniform).floor_().mul_(step)
