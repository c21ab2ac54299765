"""Buffer layout: no overlap, never under the bound, the optimum where it can be known, real blocks at the bound."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.planner import Budgets, UnitProfile, Workload, layout_mip, load_hardware, make_plan
from offload.planner.layout import Layout, Lifetime, check, lower_bound, solve
from offload.planner.layout_arena import arena_layout, step_lifetimes
from offload.planner.layout_search import FOUND, MORE, NONE, Search
from offload.planner.layout_stack import solve_stack
from offload.planner.layout_trace import repeated_blocks, stack, trace_block
from offload.planner.memory import reserve
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import layout as benchmark

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


def naive_overlap(buffers: Sequence[Lifetime], offsets: Sequence[int]) -> bool:
    return any(
        a.lower < b.upper and b.lower < a.upper and x < y + b.size and y < x + a.size and a.size and b.size
        and a.lower < a.upper and b.lower < b.upper
        for (a, x), (b, y) in itertools.combinations(list(zip(buffers, offsets, strict=True)), 2)
    )  # fmt: skip


def brute_force(buffers: Sequence[Lifetime]) -> int:
    """The least height: in some order, placing each buffer as low as those before it allow gives an optimum."""
    best = sum(b.size for b in buffers)
    for order in itertools.permutations(range(len(buffers))):
        tops: dict[int, int] = {}
        for i in order:
            below = [
                top for j, top in tops.items()
                if buffers[i].lower < buffers[j].upper and buffers[j].lower < buffers[i].upper
            ]  # fmt: skip
            tops[i] = max(below, default=0) + buffers[i].size
        best = min(best, max(tops.values()))
    return best


def instance(source: random.Random, count: int, length: int = 40, size: int = 50) -> list[Lifetime]:
    buffers = []
    for _ in range(count):
        lower = source.randrange(length)
        buffers.append(Lifetime(lower, lower + 1 + source.randrange(length - lower), 1 + source.randrange(size)))
    return buffers


def packed(source: random.Random, height: int, length: int, count: int) -> list[Lifetime]:
    """A rectangle cut at random, so that a layout without a gap exists."""
    pieces = [(0, length, 0, height)]
    while len(pieces) < count:
        lower, upper, bottom, top = pieces.pop(source.randrange(len(pieces)))
        if source.random() < 0.5 and upper - lower > 1:
            cut = source.randrange(lower + 1, upper)
            pieces += [(lower, cut, bottom, top), (cut, upper, bottom, top)]
        elif top - bottom > 1:
            cut = source.randrange(bottom + 1, top)
            pieces += [(lower, upper, bottom, cut), (lower, upper, cut, top)]
        else:
            pieces.append((lower, upper, bottom, top))
    return [Lifetime(lower, upper, top - bottom) for lower, upper, bottom, top in pieces]


lifetimes = st.builds(
    lambda lower, life, size: Lifetime(lower, lower + life, size),
    st.integers(0, 30), st.integers(0, 12), st.integers(0, 9).map(lambda n: 512 * n),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(lifetimes, max_size=14), st.randoms(use_true_random=False))
def test_a_layout_is_valid_in_any_order(buffers: list[Lifetime], source: random.Random) -> None:
    shuffled = source.sample(buffers, len(buffers))
    for case in (buffers, shuffled):
        found = solve(case, time_limit=0.2)
        assert not naive_overlap(case, found.offsets)
        tops = [o + b.size for o, b in zip(found.offsets, case, strict=True) if b.upper > b.lower]
        assert found.height == max(tops, default=0) >= found.lower_bound == lower_bound(buffers)


@settings(max_examples=40, deadline=None)
@given(st.lists(lifetimes.filter(lambda b: b.size > 0 and b.upper > b.lower), min_size=2, max_size=6))
def test_small_instances_reach_the_optimum(buffers: list[Lifetime]) -> None:
    found = solve(buffers, time_limit=10)
    assert found.optimal and found.height == brute_force(buffers)


@settings(max_examples=80, deadline=None)
@given(st.lists(lifetimes, min_size=1, max_size=8), st.data())
def test_the_check_finds_what_a_comparison_of_all_pairs_finds(buffers: list[Lifetime], data: st.DataObject) -> None:
    offsets = data.draw(st.lists(st.integers(0, 20).map(lambda n: 512 * n), min_size=len(buffers),
                                 max_size=len(buffers)))  # fmt: skip
    height = max(o + b.size for o, b in zip(offsets, buffers, strict=True))
    if naive_overlap(buffers, offsets):
        with pytest.raises(ValueError, match="overlap at offset"):
            check(buffers, offsets, height)
    else:
        check(buffers, offsets, height)
        live = [(o + b.size) for o, b in zip(offsets, buffers, strict=True) if b.size and b.upper > b.lower]
        if live:
            with pytest.raises(ValueError, match="outside of the arena"):
                check(buffers, offsets, max(live) - 1)


def searched(buffers: Sequence[Lifetime], height: int) -> int:
    """The search alone, each distinct time a section of its own."""
    import numpy as np

    columns = np.array(buffers, np.int64)
    search = Search(columns[:, 0], columns[:, 1], columns[:, 2], np.arange(len(buffers)), height)
    answer = search.advance(100_000)
    if answer == FOUND:
        check(buffers, search.offsets, height)
    return answer


def test_the_search_alone_proves_the_optimum() -> None:
    """Its pruning drops no layout: under the optimum it finds none, at the optimum one."""
    source = random.Random(5)
    for _ in range(60):
        buffers = instance(source, source.randrange(3, 7), length=6, size=9)
        best = brute_force(buffers)
        assert searched(buffers, best) == FOUND
        assert searched(buffers, best - 1) == NONE


def test_the_search_goes_on_where_it_stopped() -> None:
    import numpy as np

    columns = np.array(packed(random.Random(2), 40, 20, 14), np.int64)
    whole, parts = (Search(columns[:, 0], columns[:, 1], columns[:, 2], np.arange(14), 40) for _ in range(2))
    assert whole.advance(20_000) == FOUND
    answers = [MORE]
    while answers[-1] == MORE:
        answers.append(parts.advance(1))
    assert answers[-1] == FOUND and parts.offsets == whole.offsets


CP_SAT = pytest.param(
    True, marks=pytest.mark.skipif(layout_mip.provable() < 100, reason="CP-SAT is an extra"), id="cp_sat"
)


@pytest.mark.parametrize("cp_sat", [pytest.param(False, id="mip"), CP_SAT])
@pytest.mark.parametrize("seed", range(3))
def test_the_mip_equals_brute_force(seed: int, cp_sat: bool) -> None:
    buffers = instance(random.Random(seed), 6, length=6, size=9)
    worst = [sum(b.size for b in buffers[:i]) for i in range(6)]
    found = layout_mip.solve(buffers, worst, 0, 20, cp_sat=cp_sat)
    assert found is not None and found.optimal and found.height == brute_force(buffers)
    check(buffers, found.offsets, found.height)


def test_the_mip_moves_only_what_it_may_and_is_never_worse() -> None:
    buffers = [Lifetime(0, 4, 3), Lifetime(0, 2, 2), Lifetime(2, 4, 5), Lifetime(1, 3, 1)]
    start = [0, 10, 3, 9]
    found = layout_mip.solve(buffers, start, 0, 10, free=[1, 3], cp_sat=False)
    assert found is not None and found.offsets[0] == 0 and found.offsets[2] == 3
    check(buffers, found.offsets, found.height)
    assert found.height == 9  # buffer 3 meets buffer 2, which stays at 3 to 8
    again = layout_mip.solve(buffers, found.offsets, 0, 10, free=[1], cp_sat=False)
    assert again is not None and again.height <= found.height


@pytest.mark.parametrize("seed", range(3))
def test_rectangles_cut_at_random_are_packed_without_a_gap(seed: int) -> None:
    buffers = packed(random.Random(seed), 64, 40, 24)
    found = solve(buffers, time_limit=20)
    assert found.height == 64 == found.lower_bound and found.optimal
    assert not naive_overlap(buffers, found.offsets)


def test_the_time_limit_is_kept_and_greedy_is_the_floor() -> None:
    buffers = instance(random.Random(1), 120, size=97)
    begin = time.perf_counter()
    greedy = solve(buffers, time_limit=0.0)
    assert time.perf_counter() - begin < 1 and greedy.method.startswith("greedy")
    begin = time.perf_counter()
    longer = solve(buffers, time_limit=0.5)
    assert time.perf_counter() - begin < 3
    assert longer.lower_bound <= longer.height <= greedy.height


def test_times_at_which_nothing_lives_split_the_problem() -> None:
    one = packed(random.Random(4), 32, 30, 12)
    later = [Lifetime(b.lower + 100, b.upper + 100, 2 * b.size) for b in one]
    found = solve(one + later, time_limit=10)
    assert found.height == found.lower_bound == 64


def test_negative_sizes_are_refused_and_nothing_needs_nothing() -> None:
    with pytest.raises(ValueError, match="buffer 1 has a size of -4"):
        solve([Lifetime(0, 1, 4), Lifetime(0, 1, -4)])
    assert solve([]).height == 0 and solve([Lifetime(3, 3, 8), Lifetime(0, 2, 0)]).height == 0


def on_meta(model_type: str, **keys: Any) -> Any:
    config = AutoConfig.for_model(model_type, **keys)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [("llama", SMALL), ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}), ("qwen3_moe", SMALL | EXPERTS)],
)
def test_traced_blocks_and_their_stack_meet_the_bound(model_type: str, keys: dict[str, Any]) -> None:
    model = on_meta(model_type, **keys)
    (name,) = repeated_blocks(model)
    block = trace_block(model, name, micro_batch=2, sequence_length=64, dtype=torch.bfloat16)
    hidden = 2 * 64 * 64 * 2  # [2, 64, 64] in bfloat16
    saved = [b for b in block.buffers if b.lower < block.middle < b.upper]
    assert 0 < block.middle < block.end and sum(b.size for b in saved) >= 8 * hidden
    assert max(b.upper for b in block.buffers) == block.end and min(b.lower for b in block.buffers) == 0
    alone = solve(block.buffers, 40)
    assert alone.height <= 1.001 * alone.lower_bound
    assert not naive_overlap(block.buffers, alone.offsets)
    buffers, passes = stack(block, 6)
    assert lower_bound(buffers) >= 6 * sum(b.size for b in saved)
    whole = solve_stack(buffers, passes, 40)
    assert whole.lower_bound == lower_bound(buffers) <= whole.height <= 1.001 * whole.lower_bound
    check(buffers, whole.offsets, whole.height)


def test_identical_passes_share_one_solution() -> None:
    block = packed(random.Random(3), 16, 10, 8)
    carried = [Lifetime(10 * i, 90, 4) for i in range(8)]
    buffers = [Lifetime(b.lower + 10 * i, b.upper + 10 * i, b.size) for i in range(8) for b in block] + carried
    found = solve_stack(buffers, [(10 * i, 10 * i + 10) for i in range(8)], 5)
    assert found.height == found.lower_bound == 16 + 8 * 4
    if found.method.startswith("two levels"):
        assert "1 different passes of 8" in found.method
    per_pass = [tuple(o - min(found.offsets[8 * i : 8 * i + 8]) for o in found.offsets[8 * i : 8 * i + 8])
                for i in range(7)]  # fmt: skip
    assert len(set(per_pass)) == 1


def test_a_block_that_is_not_reached_is_named() -> None:
    model = on_meta("llama", **SMALL)
    model.model.spare = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"does not come to its module 'model\.spare'"):
        trace_block(model, "model.spare", micro_batch=1, sequence_length=8, dtype=torch.float32)


def workload(micro_batches: int = 2, tied: bool = False, boundary: int = 1 << 20) -> Workload:
    block = UnitProfile("", "block", 1 << 20, 1 << 20, 0, boundary_bytes=boundary, workspace_backward=1 << 20)
    units = [replace(block, name="embedding", kind="embedding", trainable=1 << 22, held=tied)]
    units += [replace(block, name=f"layers.{i}") for i in range(6)]
    if not tied:
        units.append(replace(block, name="head", kind="head", trainable=1 << 22, boundary_bytes=0, kept=True))
    units.append(UnitProfile("rest", "resident", 64, 64, 0))
    return Workload(tuple(units), micro_batches, 1, 128, device="cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_slots_alone_cannot_share_and_the_arena_says_so(tied: bool) -> None:
    w = workload(tied=tied)
    buffers = reserve(w)
    arena = arena_layout(w, buffers)
    assert arena.arena_bytes == arena.lower_bound_bytes == sum(b.total for b in buffers if b.tier == "gpu")
    assert set(arena.places) == {(b.name, k) for b in buffers if b.tier == "gpu" for k in range(b.count)}
    spans = sorted(arena.places.values())
    assert all(offset % 4096 == 0 for offset, _ in spans)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


def test_gradients_may_lie_where_late_boundaries_were() -> None:
    w = workload(micro_batches=8, boundary=1 << 22)
    buffers = reserve(w)
    arena, lives = arena_layout(w, buffers, boundaries=True), step_lifetimes(w, buffers, boundaries=True)
    total = sum(b.size for b in lives.values())
    assert arena.lower_bound_bytes <= arena.arena_bytes < total
    assert arena.arena_bytes == arena.lower_bound_bytes
    names = list(lives)
    check([lives[n] for n in names], [arena.places[n][0] for n in names], arena.arena_bytes)
    first, last = lives["activations/embedding", 0], lives["activations/layers.5", 0]
    assert first.lower < last.lower and last.upper < first.upper  # grow in forward, shrink in backward


def test_the_plan_has_the_arena_of_its_buffers() -> None:
    w = workload()
    plan = make_plan(w, Budgets(1 << 30, 1 << 34), load_hardware("rtx4090"))
    arena = arena_layout(w, plan.buffers)
    assert plan.layout["arena_bytes"] == arena.arena_bytes and isinstance(arena.layout, Layout)
    assert plan.layout["lower_bound_bytes"] == arena.lower_bound_bytes > plan.layout["one_unit_bytes"] > 0
    assert plan.layout["offsets"] == {
        b.name: [arena.places[b.name, k][0] for k in range(b.count)] for b in plan.buffers if b.tier == "gpu"
    }


def test_the_benchmark_reads_files_and_names_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "cut.48.csv"
    buffers = packed(random.Random(6), 48, 20, 12)
    path.write_text("id,lower,upper,size\n" + "".join(f"{i},{a},{b},{c}\n" for i, (a, b, c) in enumerate(buffers)))
    row = benchmark.file_row(path, None, 10)
    assert row["height"] == row["lower_bound"] == row["capacity"] == 48 and row["packed"] and row["buffers"] == 12
    path.write_text("id,lower,upper,size\n0,1,x,3\n")
    with pytest.raises(ValueError, match=r"cut\.48\.csv:2"):
        benchmark.read(path)
