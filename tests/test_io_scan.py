"""Copying a gradient and looking at it in one pass, against PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.io import NonFiniteError, copy_and_scan, first_non_finite
from offload.io.scan import PIECE


@settings(max_examples=40, deadline=None)
@given(
    numel=st.one_of(st.integers(0, 300), st.integers(PIECE - 2, PIECE + 2), st.integers(2 * PIECE, 3 * PIECE)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bad=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([math.inf, -math.inf, math.nan])), max_size=2
    ),
    seed=st.integers(0, 99),
)
def test_it_copies_exactly_and_sees_what_pytorch_sees(
    numel: int, dtype: torch.dtype, bad: list[tuple[float, float]], seed: int
) -> None:
    source = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for where, value in bad if numel else []:
        source[int(where * numel)] = value
    target = torch.full((numel,), 7.0)
    scan = copy_and_scan(target, source)
    assert torch.equal(target.view(torch.int32), source.float().view(torch.int32))
    assert scan.finite == bool(torch.isfinite(source).all()) == math.isfinite(scan.squares)
    if scan.finite:
        assert scan.squares == pytest.approx(float(source.double().square().sum()), rel=1e-5)
    assert copy_and_scan(target, target).finite == scan.finite


def test_large_values_are_finite_although_their_squares_are_not() -> None:
    source = torch.full((PIECE + 5,), torch.finfo(torch.float32).max)
    scan = copy_and_scan(torch.empty_like(source), source)
    assert scan.finite and scan.squares == pytest.approx((PIECE + 5) * torch.finfo(torch.float32).max ** 2)


def test_the_error_names_the_tensor_the_first_element_and_the_count() -> None:
    gradient = torch.zeros(2, PIECE, dtype=torch.bfloat16)
    gradient[1, 3] = math.inf
    gradient[1, 9] = math.nan
    error = first_non_finite("model.layers.3.mlp.up_proj.weight", gradient)
    assert isinstance(error, NonFiniteError)
    assert (error.name, error.index, error.count) == ("model.layers.3.mlp.up_proj.weight", PIECE + 3, 2)
    assert f"2 of {2 * PIECE} elements are inf or nan, the first is element {PIECE + 3} (inf)" in str(error)


def test_a_finite_tensor_whose_norm_overflows_is_no_error() -> None:
    gradient = torch.full((1000,), 1e30)
    assert not torch.isfinite(torch.linalg.vector_norm(gradient)) and first_non_finite("w", gradient) is None


def test_nothing_is_allocated_beside_the_tensors() -> None:
    source, target = torch.randn(8 * PIECE).to(torch.bfloat16), torch.empty(8 * PIECE)
    with torch.profiler.profile(profile_memory=True) as seen:
        copy_and_scan(target, source)
    made = [event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage > 0]
    assert sum(made) < 1024  # the scalars of the sums


def test_shapes_and_dtypes_are_checked() -> None:
    for target, source in (
        (torch.empty(4, dtype=torch.bfloat16), torch.empty(4)),
        (torch.empty(4), torch.empty(5)),
        (torch.empty(2, 2), torch.empty(2, 2)),
        (torch.empty(8)[::2], torch.empty(4)),
    ):
        with pytest.raises(ValueError, match="cannot scan"):
            copy_and_scan(target, source)
