"""The optimizer's arithmetic: chunks, thread counts and the split master change no bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload import adamw, adamw_jit
from offload.device import limit_lane_threads

HYPER = adamw.Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, coefficient=None)



@pytest.fixture(scope="module", params=["torch", "numba", "two threads"])
def kernel(request: pytest.FixtureRequest) -> Iterator[adamw.Kernel]:
    """Each implementation; the compiled one unconditionally, whatever was measured faster here."""
    if request.param != "torch":
        pytest.importorskip("numba")
    made = adamw.Kernel(threads=2 if request.param == "two threads" else 1, jit=False)
    if request.param != "torch":
        loaded = adamw_jit.load()
        assert loaded.jit is not None, loaded.reasons
        made._jit = adamw_jit.Jit(adamw_jit.compile_kernels(), loaded.jit.lanes)
    yield made
    made.close()


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


def spread(numel: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Random values of many magnitudes: 2**low to 2**high."""
    exponents = torch.randint(low, high + 1, (numel,), generator=generator)
    return torch.randn(numel, generator=generator) * torch.exp2(exponents.float())


def same_bits(mine: Tensor, theirs: Tensor) -> bool:
    """Equal to the bit; a NaN is as good as another."""
    number = ~theirs.isnan()
    return torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(
        mine[number].view(torch.int32), theirs[number].view(torch.int32)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    numels=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    chunk_elements=st.integers(1, 40).map(lambda blocks: 64 * blocks),
    split=st.booleans(),
    bf16_gradients=st.booleans(),
    lr=st.floats(1e-9, 10.0),
    beta1=st.one_of(st.just(0.9), st.floats(0.0, 0.999)),
    beta2=st.one_of(st.just(0.999), st.floats(0.0, 0.99999)),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    clip=st.one_of(st.none(), st.floats(1e-6, 1.0)),
    magnitude=st.sampled_from([(0, 0), (-30, 10), (-149, -100), (-149, 60)]),
    strange=st.booleans(),
)
def test_kernel_equals_torch(
    kernel: adamw.Kernel,
    seed: int,
    numels: list[int],
    chunk_elements: int,
    split: bool,
    bf16_gradients: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    magnitude: tuple[int, int],
    strange: bool,
) -> None:
    """Parameters of a unit, chunk by chunk, against torch.optim.AdamW(fused=True) on whole float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    wholes = [torch.nn.Parameter(spread(n, *magnitude, generator)) for n in numels]
    starts = [sum(-(-n // 64) * 64 for n in numels[:i]) for i in range(len(numels))]
    total = starts[-1] + numels[-1]
    master, grad = torch.zeros(total), torch.full((total,), 7.0)
    for whole, start in zip(wholes, starts, strict=True):
        master[start : start + whole.numel()] = whole.detach()
    exp_avg, exp_avg_sq = torch.zeros(total), torch.zeros(total)
    param, low = master.clone(), None
    if split:
        param, low = torch.empty(total, dtype=torch.bfloat16), torch.empty(total, dtype=torch.int16)
        adamw.split_master(master, param, low, exp_avg_sq, torch.empty(total, dtype=torch.int32))
    optimizer = torch.optim.AdamW(
        wholes, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True
    )
    coefficient = None if clip is None else torch.tensor(clip)
    hyper = adamw.Hyper(lr, beta1, beta2, eps, weight_decay, coefficient)
    for step in (1, 2, 3):
        for whole, start in zip(wholes, starts, strict=True):
            drawn = spread(whole.numel(), *magnitude, generator)
            if strange:
                drawn[::5], drawn[3::17], drawn[4::19] = 0.0, float("inf"), float("nan")
            if bf16_gradients:
                drawn = drawn.to(torch.bfloat16).float()
            grad[start : start + whole.numel()] = drawn
            whole.grad = drawn if coefficient is None else drawn * coefficient
        optimizer.step()
        given_grad = grad.to(torch.bfloat16) if bf16_gradients and split else grad
        kept = given_grad.clone()
        for at in range(0, total, chunk_elements):
            end = min(at + chunk_elements, total)
            pieces = [
                (max(start, at) - at, min(start + n, end) - at, step)
                for start, n in zip(starts, numels, strict=True)
                if start < end and start + n > at
            ]
            part = slice(at, end)
            kernel.step(
                param[part], None if low is None else low[part], given_grad[part], exp_avg[part], exp_avg_sq[part],
                pieces, hyper,
            )  # fmt: skip
        assert same_bits(given_grad.float(), kept.float())
    if low is not None:
        rounded, master = param.clone(), torch.empty(total)
        adamw.merge_master(param, low, exp_avg_sq, master, torch.empty(total, dtype=torch.int32))
        assert same_bits(rounded.float(), master.to(torch.bfloat16).float())
    else:
        master = param
    for whole, start in zip(wholes, starts, strict=True):
        part = slice(start, start + whole.numel())
        state = optimizer.state[whole]
        assert same_bits(master[part], whole.detach())
        assert same_bits(exp_avg[part], state["exp_avg"])
        assert same_bits(exp_avg_sq[part], state["exp_avg_sq"])


@pytest.mark.parametrize("weight", [0x3F80, 0x3F81, 0xBF80, 0x0000, 0x8000, 0x7F7F])
def test_kernel_marks_and_reads_ties(kernel: adamw.Kernel, weight: int) -> None:
    """With no gradient, no moments and no decay a master stays as it is, ties above even and odd halves too."""
    low_bits = torch.arange(2**16, dtype=torch.int32)
    bits = ((weight - 0x10000 if weight & 0x8000 else weight) << 16) | low_bits
    n = bits.numel()
    param, low = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
    exp_avg, exp_avg_sq, scratch = torch.zeros(n), torch.zeros(n), torch.empty(n, dtype=torch.int32)
    adamw.split_master(bits.view(torch.float32), param, low, exp_avg_sq, scratch)
    expected = [t.clone() for t in (param.view(torch.int16), low, exp_avg_sq.view(torch.int32))]
    hyper = adamw.Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, None)
    kernel.step(param, low, torch.zeros(n), exp_avg, exp_avg_sq, [(0, n, 1)], hyper)
    for mine, theirs in zip((param.view(torch.int16), low, exp_avg_sq.view(torch.int32)), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_outside_of_all_pieces_stays(kernel: adamw.Kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    param, low = torch.randn(512, generator=generator).to(torch.bfloat16), torch.arange(512, dtype=torch.int16)
    chunk = adamw.Chunk(param, low, torch.randn(512, generator=generator), torch.ones(512), torch.ones(512))
    before = chunk.clone()
    kernel.step(*(chunk.param, low, chunk.grad, chunk.exp_avg, chunk.exp_avg_sq), [(64, 100, 1), (256, 300, 4)], HYPER)
    changed = (chunk.exp_avg != before.exp_avg).nonzero().flatten().tolist()
    assert changed == [*range(64, 100), *range(256, 300)]
    same = chunk.exp_avg == before.exp_avg
    assert torch.equal(chunk.param[same], before.param[same])
    assert torch.equal(chunk.low[same], before.low[same])
    assert torch.equal(chunk.exp_avg_sq[same], before.exp_avg_sq[same])


def test_a_kernel_with_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees a multiply-add rounded in another place: a tail cut at the wrong length is enough."""
    pytest.importorskip("numba")
    monkeypatch.setattr(adamw_jit, "LANES", (1, 32))
    loaded = adamw_jit._load()
    assert loaded.jit is None
    assert "bits" in loaded.reasons["all"]


def test_without_numba_stock_operations_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> adamw_jit.Kernels:
        raise ImportError("numba")

    monkeypatch.setattr(adamw_jit, "compile_kernels", missing)
    monkeypatch.setattr(adamw_jit, "_loaded", None)
    kernel = adamw.Kernel()
    kernel.wait()
    assert "not installed" in kernel.reasons["all"]
    param = torch.ones(64)
    kernel.step(param, None, torch.ones(64), torch.zeros(64), torch.zeros(64), [(0, 64, 1)], HYPER)
    assert (param != 1).all()
    kernel.close()
