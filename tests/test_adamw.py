"""The optimizer's arithmetic: chunks, thread counts and the split master change no bit."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload import adamw
from offload.device import limit_lane_threads

HYPER = adamw.Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, coefficient=None)


def split_and_merge(bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(master, its bfloat16 weight, the master rebuilt) for float32 bit patterns; moments come through unchanged."""
    master = bits.view(torch.float32).clone()
    n = master.numel()
    weight, low = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
    moment = torch.rand(n)
    kept, scratch, rebuilt = moment.clone(), torch.empty(n, dtype=torch.int32), torch.empty(n)
    adamw.split_master(master, weight, low, moment, scratch)
    adamw.merge_master(weight, low, moment, rebuilt, scratch)
    assert torch.equal(moment, kept)
    return master, weight, rebuilt


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFF])
def test_split_master_over_all_exponents_and_ties(low: int) -> None:
    """Every sign, exponent and upper mantissa with each lower half; 0x8000 is a tie, rounded down or up."""
    bits = (torch.arange(2**16, dtype=torch.int32) << 16) | low
    master, weight, rebuilt = split_and_merge(bits)
    number = ~master.isnan()
    assert torch.equal(weight.view(torch.int16)[number], master.to(torch.bfloat16).view(torch.int16)[number])
    assert torch.equal(rebuilt.view(torch.int32)[number], bits[number])
    assert rebuilt[~number].isnan().all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=300))
def test_split_master_of_any_bits(values: list[int]) -> None:
    bits = torch.tensor(values, dtype=torch.int32)
    master, _, rebuilt = split_and_merge(bits)
    number = ~master.isnan()
    assert torch.equal(rebuilt.view(torch.int32)[number], bits[number])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 20), st.integers(1, 3))
def test_chunks_equal_whole_tensors(numel: int, blocks: int, steps: int) -> None:
    """Pieces that start at multiples of 64 elements give what torch.optim.AdamW(fused=True) gives on the whole."""
    generator = torch.Generator().manual_seed(numel)
    whole = torch.nn.Parameter(torch.randn(numel, generator=generator))
    mine, exp_avg, exp_avg_sq = whole.detach().clone(), torch.zeros(numel), torch.zeros(numel)
    optimizer = torch.optim.AdamW([whole], lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(1, steps + 1):
        whole.grad = torch.randn(numel, generator=generator)
        optimizer.step()
        for start in range(0, numel, 64 * blocks):
            part = slice(start, min(start + 64 * blocks, numel))
            adamw.fused_step([mine[part]], [whole.grad[part]], [exp_avg[part]], [exp_avg_sq[part]], [step], HYPER)
    assert torch.equal(mine, whole.detach())


def test_one_thread_lanes_change_no_bit() -> None:
    """Lanes run on one OpenMP thread; the norm and the update must not depend on it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 700_001, generator=generator)
    threads = torch.get_num_threads()

    def work() -> tuple[Tensor, Tensor]:
        master, exp_avg, exp_avg_sq = values[0].clone(), torch.zeros(700_001), torch.zeros(700_001)
        adamw.fused_step([master], [values[1]], [exp_avg], [exp_avg_sq], [1], HYPER)
        return master, torch.linalg.vector_norm(values[2])

    lane: list[tuple[Tensor, Tensor]] = []
    seen: list[int] = []

    def on_lane() -> None:
        limit_lane_threads()
        seen.append(torch.get_num_threads())
        lane.append(work())

    thread = threading.Thread(target=on_lane)
    thread.start()
    thread.join()
    master, norm = work()
    assert torch.equal(lane[0][0], master)
    assert torch.equal(lane[0][1], norm)
    assert seen == [1]
    assert torch.get_num_threads() == threads
