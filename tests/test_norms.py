"""Norms of gradients are torch's, to the bit, whichever kernel takes them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload import norms


@pytest.fixture(scope="module")
def norm() -> norms.Norms:
    found = norms.Norms()
    found.wait()
    return found


def test_the_compiled_kernel_is_in_use(norm: norms.Norms) -> None:
    assert norms.load() is not None and norm._kernel is norms.load()


@given(length=st.integers(1, 5000), seed=st.integers(0, 2**31), low=st.integers(-70, 0), high=st.integers(1, 60))
def test_bits_are_those_of_torch(norm: norms.Norms, length: int, seed: int, low: int, high: int) -> None:
    """Over all magnitudes, those included whose squares vanish or overflow."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(low, high, (length,), generator=generator).float())
    values = (torch.randn(length, generator=generator) * scale).bfloat16()
    expected = torch.linalg.vector_norm(values, dtype=torch.float32)
    found = norm(values)
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == expected.item()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows(norm: norms.Norms, bad: float) -> None:
    for at in (0, 11, 16):
        values = torch.ones(17, dtype=torch.bfloat16)
        values[at] = bad
        assert not math.isfinite(norm(values).item())


def test_a_kernel_with_other_bits_is_not_used() -> None:
    assert norms._equal_bits(lambda bits: float(torch.linalg.vector_norm(torch.from_numpy(bits).view(torch.bfloat16),
                                                                         dtype=torch.float32)))  # fmt: skip
    assert not norms._equal_bits(lambda bits: float(torch.from_numpy(bits).view(torch.bfloat16).double().norm()))
