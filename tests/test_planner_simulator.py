"""The event simulator by hand-made programs, and the simulated step: its bounds, its memory, what it scales with."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from offload.planner import Budgets, Hardware, UnitProfile, Workload, advise, make_plan
from offload.planner.choice import everything_in_ram, may_live_on_device, nothing_in_ram, to_device
from offload.planner.decide import decide
from offload.planner.memory import peaks, reserve
from offload.planner.plan import LANES
from offload.planner.prediction import predict
from offload.planner.profile import profile_model
from offload.planner.simulator import Program, run, waits
from offload.planner.timed import _give_back, _materialize, timed
from test_planner_plan import GIB, MACHINE, OFFERED, stack, workloads

from offload.units import find_units

CORES = [{"compute": 1.0, "optimizer": 0.5, "h2d": 0.5}, {"nvme_read": 1.0, "nvme_write": 1.0}]


def test_a_queue_is_first_in_first_out_and_waits_for_what_it_needs() -> None:
    p = Program([])
    a = p.add("a", 0, "one", "compute", 2.0)
    b = p.add("b", 0, "two", "h2d", 1.0)
    c = p.add("c", 0, "two", "h2d", 1.0, [a])
    d = p.add("d", 0, "two", "h2d", 1.0)  # behind c, though it waits for nothing
    e = p.add("e", 0, "one", "compute", 0.0, [b])
    times = run(p)
    assert times.end == [2.0, 1.0, 3.0, 4.0, 2.0] and times.begin[d] == 3.0 and times.begin[e] == 2.0
    assert times.begin[c] == 2.0


def test_lanes_cost_compute_more_than_each_other() -> None:
    """And what yields to compute is slower only beside it."""
    both = [{"compute": 1.0, "h2d": 1.0}, {"compute": 1.0, "h2d": 1.5}]
    p = Program(both, {"nvme_read": 0.5})
    p.add("fill", 0, "fill", "h2d", 1.0)
    p.add("swap in", 0, "swap in", "h2d", 1.0)
    assert run(p).end == [2.0, 2.0]  # as one after the other
    p = Program(both, {"nvme_read": 0.5})
    p.add("compute", 0, "compute", "compute", 4.0)
    p.add("fill", 0, "fill", "h2d", 1.0)
    assert run(p).end == pytest.approx([5.5, 2.5])
    p = Program([], {"nvme_read": 0.5})
    p.add("compute", 0, "compute", "compute", 1.0)
    p.add("read", 0, "read", "nvme_read", 1.0)
    assert run(p).end == [1.0, 1.5]


def test_what_runs_at_once_shares_a_resource() -> None:
    p = Program(CORES)
    p.add("compute", 0, "compute", "compute", 2.0)  # all cores: 1.5 wanted in all, each at two thirds
    p.add("update", 0, "optimizer", "optimizer", 1.0)
    times = run(p)
    assert times.end[1] == pytest.approx(1.5) and times.end[0] == pytest.approx(1.5 + 1.0)
    p = Program(CORES)
    p.add("update", 0, "optimizer", "optimizer", 1.0)  # two single threads do not disturb each other
    p.add("copy", 0, "fill", "h2d", 1.0)
    assert run(p).end == [1.0, 1.0]
    p = Program(CORES)
    p.add("read", 0, "read", "nvme_read", 1.0)  # half duplex
    p.add("write", 0, "write", "nvme_write", 3.0)
    assert run(p).end == pytest.approx([2.0, 4.0])


def test_waiting_is_told_by_lane() -> None:
    p = Program([])
    read = p.add("read", 0, "read", "nvme_read", 3.0)
    copy = p.add("copy", 0, "fill", "h2d", 1.0, [read])
    first = p.add("first", 0, "compute", "compute", 1.0)
    p.add("second", 0, "compute", "compute", 1.0, [first, copy])
    assert waits(p, run(p), "compute", 0.0) == {"h2d": pytest.approx(1.0), "nvme_read": pytest.approx(2.0)}


def test_operations_that_wait_for_each_other_are_named() -> None:
    p = Program([])
    p.add("a", 7, "one", "compute", 1.0, [1])
    p.add("b", 7, "two", "h2d", 1.0, [0])
    with pytest.raises(ValueError, match=r"\('a', 7\) waits for \(1,\)"):
        run(p)


@given(workloads())
@settings(max_examples=25, deadline=None)
def test_a_step_is_no_shorter_than_its_busiest_lane_and_no_longer_than_all_work(w: Workload) -> None:
    w = replace(w, commit_every=3)
    there = everything_in_ram(w, 3)
    units = zip(w.units, there.units, strict=True)
    there = replace(there, units=tuple(to_device(c) if may_live_on_device(u, w, OFFERED) else c for u, c in units))
    for choice in (nothing_in_ram(w), everything_in_ram(w, 3), there):
        found = predict(w, OFFERED, choice, memory=True)
        assert set(found.lane_seconds) == set(LANES)
        assert found.step_seconds >= max(found.lane_seconds.values()) * (1 - 1e-9)
        assert found.step_seconds <= 2.5 * sum(found.lane_seconds.values())  # half duplex, and cores shared
        assert sum(found.stall_seconds.values()) <= found.step_seconds * (1 + 1e-9)
        peak = peaks(w, reserve(w, choice.block_slots, choice), choice)["gpu"]
        assert max(n for _, n in found.memory["gpu"]) == peak["activations"] + peak["framework"]


@given(workloads(), st.sampled_from([0.25, 3.0]))
@settings(max_examples=15, deadline=None)
def test_a_machine_so_many_times_faster_takes_so_many_times_less(w: Workload, k: float) -> None:
    w = replace(w, commit_every=2)
    rates = ("h2d", "d2h", "ram", "nvme_read", "nvme_write", "adamw_parameters_per_second", "adamw_device", "cxl")
    faster = replace(
        OFFERED, matrix_flops={d: k * r for d, r in OFFERED.matrix_flops.items()},
        **{name: k * getattr(OFFERED, name) for name in rates},
    )  # fmt: skip
    choice = nothing_in_ram(w)
    first = replace(choice, units=(to_device(choice.units[0]), *choice.units[1:])) if w.units[0].trainable else choice
    for c in (choice, first):
        slow, fast = predict(w, OFFERED, c), predict(w, faster, c)
        assert fast.step_seconds == pytest.approx(slow.step_seconds / k, rel=1e-6)


def test_activations_are_kept_where_there_is_room_and_swapped_where_it_pays() -> None:
    units = tuple(
        UnitProfile(
            f"b{i}", "block", 12_000_000, 12_000_000, 0, forward_flops=4 * 10**11, boundary_bytes=8 << 20,
            workspace_forward=32 << 20, workspace_backward=200 << 20, saved=(8 << 20,) * 14,
        )
        for i in range(8)
    )  # fmt: skip
    w = Workload(units, 2, 1, 1024, "bfloat16", False, 1, "cuda", activations="plan")
    nvme = (("/a", 100 * GIB),)
    roomy = make_plan(w, Budgets(8 * GIB, 8 * GIB, 0, nvme), MACHINE)
    assert all(u.activations["keep"] == 1.0 for u in roomy.units)
    recomputed = make_plan(replace(w, activations="recompute"), Budgets(8 * GIB, 8 * GIB, 0, nvme), MACHINE)
    room = recomputed.peak_bytes["gpu"] + (600 << 20)
    tight = make_plan(w, Budgets(room, 8 * GIB, 0, nvme), MACHINE)
    assert tight.fits and any(u.activations["keep"] < 1.0 for u in tight.units)
    assert any(u.activations["swap_cpu"] > 0 for u in tight.units) and tight.buffer("activations.cpu")
    assert roomy.step_seconds <= tight.step_seconds < recomputed.step_seconds
    slow = make_plan(w, Budgets(room, 8 * GIB, 0, nvme), replace(MACHINE, h2d=5e7, d2h=5e7))
    assert any(u.activations["recompute"] > 0 for u in slow.units)
    for unit in (*tight.units, *slow.units):
        assert sum(unit.activations.values()) == pytest.approx(1.0)
        assert (2 * unit.activations["recompute"]).is_integer()
    assert all(u.activations["recompute"] == 1.0 for u in recomputed.units)


def long_sequence(blocks: int) -> tuple[Workload, Hardware, Budgets]:
    """One micro-batch; a block's forward takes half as long as its saved tensors' way to the drive, its backward as
    long; room on the device for two blocks on their way and for all boundaries, none in RAM."""
    units = tuple(
        UnitProfile(
            f"b{i}", "block", 10_000, 10_000, 0, boundary_bytes=1 << 20, workspace_forward=12 << 20,
            workspace_backward=30 << 20, saved=(20 << 20,), forward_seconds=0.05, backward_seconds=0.1,
            workspace_kept=8 << 20,
        )
        for i in range(blocks)
    )  # fmt: skip
    w = Workload(units, 1, 1, 8192, "float32", False, 1, "cuda", activations="plan")
    rate = (20 << 20) / 0.1
    hardware = replace(MACHINE, nvme_read=rate, nvme_write=rate, nvme_duplex=2.0)
    nvme = (("/a", 100 * GIB),)
    least = make_plan(replace(w, activations="recompute"), Budgets(GIB, GIB, 0, nvme), hardware).peak_bytes
    return w, hardware, Budgets(least["gpu"] + (75 << 20), least["cpu"], 0, nvme)


@pytest.mark.parametrize("solver", ["greedy", "mip"])
def test_swapped_and_recomputed_units_take_turns(solver: str) -> None:
    w, hardware, budgets = long_sequence(16)
    mix = decide(w, budgets, hardware, solver)
    swapped = [c.swap_nvme > 0 for c in mix.choice.units]
    assert 5 <= sum(swapped) <= 9 and not any(a and b for a, b in pairwise(swapped))

    def seconds(away: list[bool]) -> float:
        units = tuple(
            replace(c, keep=0.0, recompute=1.0 - s, swap_nvme=float(s))
            for c, s in zip(mix.choice.units, away, strict=True)
        )
        return predict(w, hardware, replace(mix.choice, units=units)).step_seconds

    best = mix.prediction.step_seconds
    assert best < 0.95 * min(seconds([False] * 16), seconds([True] * 16))
    assert best < 0.95 * seconds(sorted(swapped))  # side by side, compute waits for what leaves


def test_cxl_memory_takes_what_the_optimizer_does_not_touch_first() -> None:
    w = Workload(stack(12, 1024, 4096), 2, 1, 512, "bfloat16", True, 1, "cuda")
    nvme = (("/a", 100 * GIB),)
    without = decide(w, Budgets(8 * GIB, 600 << 20, 0, nvme), MACHINE)
    with_card = decide(w, Budgets(8 * GIB, 600 << 20, 400 << 20, nvme), MACHINE)
    assert any("cxl" in (c.weights, c.gradient) for c in with_card.choice.units)
    assert with_card.problem.peak(with_card.choice)["cxl"] <= 400 << 20
    assert with_card.prediction.step_seconds < without.prediction.step_seconds


def test_advice_is_planned_and_sorted() -> None:
    w = Workload(stack(8, 1024, 4096), 2, 1, 512, "bfloat16", True, 1, "cuda")
    budgets = Budgets(4 * GIB, 700 << 20, 0, (("/a", 100 * GIB),))
    found = advise(w, budgets, MACHINE, "greedy")
    assert found and all(a.speedup >= 1.05 for a in found)
    assert [a.speedup for a in found] == sorted((a.speedup for a in found), reverse=True)
    ssd = next(a for a in found if a.change == "a second SSD")
    drives = replace(MACHINE, nvme_read=2 * MACHINE.nvme_read, nvme_write=2 * MACHINE.nvme_write)
    before, after = (make_plan(w, budgets, hw, "greedy").tokens_per_second for hw in (MACHINE, drives))
    assert ssd.speedup == pytest.approx(after / before)


def test_units_are_not_timed_beyond_the_runs_budget(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = zoo.make("llama")
    units = [(u.name, u.kind, u.modules) for u in find_units(model)]
    profile = profile_model(model, units, micro_batch=2, sequence_length=16, dtype=torch.float32)
    found = timed(
        profile, model, units, replace(MACHINE, cpu_bytes=GIB), micro_batch=2, sequence_length=16,
        dtype=torch.float32, device="cpu", budget=1024,
    )  # fmt: skip
    assert found.costs == profile.costs and "too large to be timed" in found.notes[-1]


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("mixtral", False)])
def test_only_what_is_too_large_is_not_timed(
    name: str, tied: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of many words keeps no block from being timed; the loss behind the head is not run then either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []
    normal = torch.Tensor.normal_
    model = zoo.make(name, vocab_size=60_000, tie_word_embeddings=tied)
    monkeypatch.setattr(
        torch.Tensor, "normal_",
        lambda x, *args: (type(x) is torch.Tensor and made.append(x.nbytes), normal(x, *args))[1],
    )  # fmt: skip
    units = [(u.name, u.kind, u.modules) for u in find_units(model)]
    profile = profile_model(model, units, micro_batch=2, sequence_length=16, dtype=torch.float32)
    table, made[:] = 60_000 * model.config.hidden_size * 4, []
    found = timed(
        profile, model, units, replace(MACHINE, cpu_bytes=GIB), micro_batch=2, sequence_length=16,
        dtype=torch.float32, device="cpu", budget=table,
    )  # fmt: skip
    assert len(found.notes) == len(profile.notes) + 1 and "too large to be timed" in found.notes[-1]
    assert made and max(made) < table
    for unit, kind, _ in units:
        cost = found.costs[unit]
        if kind == "block":
            assert 0 < cost.forward_seconds < 5 and 0 < cost.backward_seconds < 5
        else:
            assert cost == profile.costs[unit]
    assert all(p.device.type == "cpu" and not p.is_meta for p in model.parameters())


def test_weights_for_timing_go_at_once() -> None:
    """Not with the next collection: the next unit's weights come beside them."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8, device="meta"))
    gc.disable()
    try:
        before = _materialize(layer, torch.float32, "cpu")
        made = weakref.ref(layer[0].weight)
        assert made() is not None and not layer[0].weight.is_meta
        _give_back(before)
        assert made() is None and layer[0].weight.is_meta
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_units_are_timed_for_real(name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = zoo.make(name)
    units = [(u.name, u.kind, u.modules) for u in find_units(model)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    profile = profile_model(model, units, micro_batch=2, sequence_length=16, dtype=torch.float32)
    machine: Hardware = replace(MACHINE, cpu_bytes=GIB)
    found = timed(
        profile, model, units, machine, micro_batch=2, sequence_length=16, dtype=torch.float32, device="cpu"
    )
    assert found.notes == profile.notes
    blocks = [found.costs[n] for n, kind, _ in units if kind == "block"]
    assert all(0 < b.forward_seconds < 5 and 0 < b.backward_seconds < 5 for b in blocks)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all("forward" not in vars(m) for m in model.modules())
