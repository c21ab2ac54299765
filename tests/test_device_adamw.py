"""AdamW in stock operations of the device: every rounding is the CPU kernel's."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import adamw, device_adamw
from offload.device_adamw import DeviceAdamW, Form

CPU = torch.device("cpu")
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def kernel(elements: int = 64) -> DeviceAdamW:
    """The form that this CPU needs, with windows of so many elements."""
    form = device_adamw.find(CPU)
    assert form is not None
    return DeviceAdamW(form, torch.empty(elements * 52, dtype=torch.uint8))


def rounded(value: Fraction) -> float:
    """The nearest float32, ties to even; infinite beyond the largest."""
    largest = Fraction(float(np.finfo(np.float32).max))
    if abs(value) > largest:
        beyond = abs(value) >= largest + Fraction(2) ** 103  # half of the last place
        return math.copysign(math.inf if beyond else float(largest), value)
    near = np.float32(float(value))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    finite = [x for x in around if np.isfinite(x)]
    return float(min(finite, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.int32)) & 1)))


@settings(max_examples=300, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_a_multiply_add_has_one_rounding(factor: float, x: float, y: float) -> None:
    expected = rounded(Fraction(factor) * Fraction(x) + Fraction(y))
    for given_factor in (factor, torch.tensor([factor])):
        out = torch.empty(1)
        kernel()._multiply_add(given_factor, torch.tensor([x]), torch.tensor([y]), out=out)
        assert out.item() == expected


@pytest.mark.parametrize("tiny", [2.0**-90, -(2.0**-90)])
def test_a_multiply_add_beside_a_tie(tiny: float) -> None:
    """The product is the middle between two float32, and what is added is lost in float64: it decides all the same."""
    factor, x = 1.0 + 2.0**-12, 1.0 + 2.0**-12  # their product is 1 + 2^-11 + 2^-24
    out = torch.empty(1)
    kernel()._multiply_add(torch.tensor([factor]), torch.tensor([x]), torch.tensor([tiny]), out=out)
    assert out.item() == 1.0 + 2.0**-11 + (2.0**-23 if tiny > 0 else 0.0)


@settings(max_examples=100, deadline=None)
@given(st.floats(min_value=0, width=32, allow_infinity=False))
def test_a_root_is_rounded_once(x: float) -> None:
    out = torch.empty(1)
    kernel()._root(torch.tensor([x]), out=out)
    assert out.item() == float(np.sqrt(np.float32(x)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700), st.integers(1, 4), st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.booleans(),
    st.sampled_from([0.9, 0.5, 0.3, 0.0]),
)  # fmt: skip
def test_steps_equal_the_cpu_kernel(
    numel: int, steps: int, dtype: str, clipped: bool, narrow: bool, beta1: float
) -> None:
    """Over parameters of every length, in windows of 64 elements; the gradient in the compute dtype or in float32."""
    generator = torch.Generator().manual_seed(numel)
    split = dtype == "bfloat16"
    low = torch.randint(-(2**15), 2**15, (numel,), generator=generator, dtype=torch.int16)
    weights = torch.randn(numel, generator=generator).to(getattr(torch, dtype))
    mine = adamw.Chunk(weights, low if split else None, torch.empty(0), torch.zeros(numel), torch.zeros(numel))
    theirs = mine.clone()
    worker, reference = kernel(), adamw.Stock()
    for step in range(1, steps + 1):
        gradient = torch.randn(numel, generator=generator).to(torch.bfloat16 if split and narrow else torch.float32)
        hyper = adamw.Hyper(1e-2, beta1, 0.999, 1e-8, 0.1, torch.tensor(0.3) if clipped else None)
        for chunk, run in ((mine, worker), (theirs, reference)):
            full = adamw.Chunk(chunk.param, chunk.low, gradient, chunk.exp_avg, chunk.exp_avg_sq)
            run.part(full, [(0, numel, step)], hyper)
    assert mine.same_bits(theirs)


def test_a_device_that_rounds_otherwise_is_refused() -> None:
    """On this CPU `addcmul` rounds twice, so that the form for devices that contract is not its own."""
    assert device_adamw.find(CPU) == Form(device_adamw.find(CPU).lanes, single=False)  # type: ignore[union-attr]
    scratch = torch.empty(1 << 20, dtype=torch.uint8)
    assert not device_adamw._equal_bits(DeviceAdamW(Form(8, single=True), scratch), CPU)


def test_the_rate_is_measured() -> None:
    assert device_adamw.rate(CPU) > 1e6
