"""Units that live on the device: what is reserved, what moves, when they are updated, and when that is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from offload.planner import Budgets, Buffers, UnitProfile, Workload, home_bytes, make_plan, reserve
from offload.planner.choice import Choice, all_in_ram, may_live_on_device, nothing_in_ram, to_device, without_homes
from offload.planner.decide import _nothing_to_choose, decide
from offload.planner.layout_arena import arena_layout, step_lifetimes
from offload.planner.memory import MIB, device_home, peaks
from offload.planner.pages import round_up
from offload.planner.placement import top_up
from offload.planner.plan import ZerothOrder
from offload.planner.prediction import predict
from offload.planner.schedule import Builder
from offload.planner.simulator import run
from offload.planner.timing import unit_work
from test_planner_plan import GIB, MACHINE, OFFERED, stack

NVME = (("/a", 100 * GIB),)


def moved(choice: Choice, *indices: int) -> Choice:
    units = tuple(to_device(c) if i in indices else c for i, c in enumerate(choice.units))
    return replace(choice, units=units)


def buffers(w: Workload, choice: Choice) -> dict[str, Buffers]:
    return {b.name: b for b in reserve(w, choice.block_slots, choice)}


def test_where_it_is_offered() -> None:
    unit, w = stack(1, 64, 512)[1], Workload(stack(1, 64, 512), 1, 1, 64)
    frozen, resident = replace(unit, trainable=0, frozen=64), replace(unit, kind="resident")
    assert may_live_on_device(unit, w, OFFERED)
    assert not any(may_live_on_device(u, w, OFFERED) for u in (frozen, resident))
    assert not may_live_on_device(unit, w, MACHINE)
    assert not may_live_on_device(unit, replace(w, zo=ZerothOrder((("param", 2, 1, True),))), OFFERED)


def test_a_unit_on_the_device_has_one_buffer_in_whole_pages() -> None:
    unit = replace(stack(1, 64, 512)[1], trainable=64 * 33, frozen=64)
    w = Workload((unit,), 2, 1, 512, "bfloat16", True, "auto", "cuda")
    weights, master, moment = (round_up(n) for n in (2 * (64 * 33 + 64), 2 * 64 * 33, 4 * 64 * 33))
    assert device_home(unit, w) == weights + master + 2 * moment
    assert device_home(unit, replace(w, dtype="float32")) == round_up(4 * (64 * 33 + 64)) + 2 * moment


@pytest.mark.parametrize("clipping", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_reserved_for_units_on_the_device(device: str, clipping: bool) -> None:
    w = Workload(stack(3, 256, 32000), 2, 1, 512, "bfloat16", clipping, "auto", device)  # type: ignore[arg-type]
    block, table = 12 * 256 * 256, 32000 * 256
    base = all_in_ram(nothing_in_ram(w))
    before, first, tables = (buffers(w, c) for c in (base, moved(base, 1), moved(base, 0, 4)))
    assert not any(name.startswith("state.") or name == "update.device" for name in before)
    assert before["update"].nbytes == 4096

    state = first["state.block.0"]
    assert (state.tier, state.count, state.nbytes) == ("gpu", 1, device_home(w.units[1], w))
    assert state.nbytes == sum(home_bytes(w.units[1], w).values()) == 12 * block
    assert first["weights.block"] == before["weights.block"]
    assert first["update.device"] == Buffers("update.device", "gpu", 1, 20 * MIB)
    held = first.get("gradients.held/block.0")
    assert held == (Buffers("gradients.held/block.0", "gpu", 1, 4 * block) if clipping else None)
    # first values of what lives on the device are made in the chunk buffers
    assert (first["update"].count, first["update"].nbytes) == (3, 12 * round_up(min(2 * MIB, table)))

    assert "weights.large" in before and "weights.large" not in tables
    assert ("gradients.large" in tables) == (not clipping)
    assert ("gradients.held/head" in tables) == clipping
    everything = buffers(w, moved(base, *range(5)))
    assert not any(name.startswith("weights.") for name in everything) and "resident" in everything
    assert ("gradients.block" in everything) == (not clipping)

    far = buffers(w, moved(nothing_in_ram(w), 1))
    assert far["update"].nbytes == (16 if clipping else 12) * 2 * MIB  # enough as they are


def test_a_held_units_gradient_has_its_buffer_once() -> None:
    w = Workload(stack(3, 256, 32000, tied=True), 1, 1, 512, "bfloat16", True, "auto", "cuda")
    found = [b for b in reserve(w, 2, moved(nothing_in_ram(w), 0)) if b.name.startswith("gradients.held/")]
    assert found == [Buffers("gradients.held/embedding", "gpu", 1, 2 * 32000 * 256)]


def test_peaks_and_the_arena_count_them_on_the_device() -> None:
    for device in ("cpu", "cuda"):
        w = Workload(stack(3, 256, 32000), 2, 1, 512, "bfloat16", True, "auto", device)  # type: ignore[arg-type]
        base = all_in_ram(nothing_in_ram(w))
        choice = moved(base, 1, 2)
        found, before = (peaks(w, reserve(w, 2, c), c) for c in (choice, base))
        home = sum(home_bytes(w.units[1], w).values())
        assert found["gpu"]["state"] == 2 * device_home(w.units[1], w)
        assert found["cpu"]["state"] == before["cpu"]["state"] - 2 * home
        assert found["gpu"]["update"] == 20 * MIB
        assert found["nvme"] == before["nvme"]  # the store keeps a copy of everything
        if device == "cpu":
            assert found["cpu"]["device"] == sum(found["gpu"].values())
        reserved = reserve(w, 2, choice)
        assert arena_layout(w, reserved).arena_bytes == sum(b.total for b in reserved if b.tier == "gpu")
        lives, end = step_lifetimes(w, reserved), 10
        assert lives["state.block.0", 0].lower == 0 and lives["state.block.0", 0].upper == end
        assert lives["gradients.held/block.0", 0].lower == 8  # of five units the second runs backward last but one


def test_the_plan_names_every_role_of_such_a_unit() -> None:
    w = Workload(stack(4, 512, 2048), 1, 1, 512, "bfloat16", True, "auto", "cuda", steps=100)
    plan = make_plan(w, Budgets(8 * GIB, 8 * GIB, 0, NVME), OFFERED)
    there = [u for u in plan.units if u.placement["master"] == "gpu"]
    assert there and plan.fits
    for unit in there:
        assert plan.unit(unit.name).placement == dict.fromkeys(
            ("param", "master", "exp_avg", "exp_avg_sq", "grad", "activation"), "gpu"
        )
        assert plan.buffer(f"state.{unit.name}") is not None
        assert len(plan.layout["offsets"][f"state.{unit.name}"]) == 1
    assert not plan.spill_gradients
    resident = plan.unit("resident").placement
    assert resident["master"] != "gpu"


def test_nothing_of_it_is_streamed_and_compute_updates_it() -> None:
    w = Workload(stack(3, 256, 32000), 2, 1, 512, "bfloat16", True, 4, "cuda")
    unit, c = w.units[1], nothing_in_ram(w).units[1]
    near, there = (unit_work(unit, x, w, OFFERED) for x in (c.with_tier("gradient", "cpu"), to_device(c)))
    assert there.fill == there.fill_read == there.fill_cxl == there.place == there.updated == 0
    assert there.state_read == there.state_write == there.gradient_nvme == there.state_cxl == 0
    assert there.device_seconds == unit.trainable / OFFERED.adamw_device and near.device_seconds == 0.0
    assert there.behind == there.copied_out == sum(home_bytes(unit, w).values())
    gradient = 4 * unit.trainable
    assert there.drain_seconds == pytest.approx(near.drain_seconds - gradient / OFFERED.ram)  # it has no home in RAM


@pytest.mark.parametrize("clipping", [True, False])
def test_when_it_is_updated(clipping: bool) -> None:
    """Without clipping right behind its backward, before its gradient goes out; else before anything of the next step.
    """
    w = Workload(stack(4, 512, 2048), 2, 1, 512, "bfloat16", clipping, 2, "cuda")
    choice = moved(all_in_ram(nothing_in_ram(w)), 0, 1, 2)
    builder = Builder(w, OFFERED, choice, 2)
    first_end, _ = builder.step(), builder.step()
    program = builder.program
    times = run(program)
    begun = builder.first_of_second

    def of(what: str, unit: int) -> list[int]:
        return [op for op in range(begun, len(program.lane)) if program.label[op] == (what, unit)]

    compute = [op for op in range(begun, len(program.lane)) if program.queue[op] == "compute"]
    for unit in (0, 1, 2):
        (update,) = of("update", unit)
        assert program.lane[update] == "compute" and program.seconds[update] > 0
        assert not of("fill", unit) and not of("read weights", unit) and not of("place weights", unit)
        (backward,), out = of("backward", unit), of("gradient", unit)
        if clipping:
            assert times.begin[update] >= times.end[first_end]
            assert compute.index(update) == unit
            assert times.begin[out[0]] >= times.end[backward]
        else:
            assert compute.index(update) == compute.index(backward) + 1
            assert times.begin[out[0]] >= times.end[update]
        copied, written = of("copy out", unit), of("write state", unit)
        assert len(copied) == len(written) > 0 and times.begin[copied[0]] >= times.end[update]
        assert all(program.lane[op] == "d2h" and program.queue[op] == "optimizer" for op in copied)
        behind = sum(home_bytes(w.units[unit], w).values()) / 2  # every second step
        assert sum(program.seconds[op] for op in copied) == pytest.approx(behind / OFFERED.d2h)
        assert sum(program.seconds[op] for op in written) == pytest.approx(behind / OFFERED.nvme_write)
    (there,) = of("update", 1)
    assert program.seconds[there] == w.units[1].trainable / OFFERED.adamw_device


def test_filling_homes_leaves_them_where_they_are() -> None:
    w = Workload(stack(4, 512, 2048), 2, 1, 512, "bfloat16", True, "auto", "cuda")
    choice = moved(nothing_in_ram(w), 0, 2)
    for change in (all_in_ram, without_homes):
        assert change(choice).placed("state", "gpu") == change(choice).placed("weights", "gpu") == {0, 2}
    d = decide(w, Budgets(8 * GIB, 8 * GIB, 0, NVME), MACHINE, "greedy")
    assert top_up(d.problem, choice).placed("gradient", "gpu") == {0, 2}


def bound_by_updates(blocks: int, rows: int) -> Workload:
    """All state finds room in RAM, and a step's compute is short beside the CPU's updates."""
    unit = UnitProfile(
        "", "block", 40_000_000, 40_000_000, 0, forward_flops=10**11, boundary_bytes=8 << 20,
        workspace_forward=32 << 20, workspace_backward=200 << 20, saved=(8 << 20,) * 14,
    )  # fmt: skip
    units = tuple(replace(unit, name=f"b{i}") for i in range(blocks))
    return Workload(units, rows, 1, 1024, "bfloat16", True, "auto", "cuda", steps=1000, activations="plan")


@pytest.mark.parametrize("solver", ["greedy", "mip"])
@pytest.mark.parametrize("clipping", [True, False])
def test_first_units_live_on_the_device_where_updates_are_the_bottleneck(solver: str, clipping: bool) -> None:
    w = replace(bound_by_updates(12, 1), clipping=clipping)
    budgets = Budgets(5 * GIB, 16 * GIB, 0, NVME)
    hw = replace(MACHINE, matrix_flops=dict.fromkeys(MACHINE.matrix_flops, 1e14), adamw_device=1e10)
    without = decide(w, budgets, replace(hw, adamw_device=0.0), solver)
    found = decide(w, budgets, hw, solver)
    there = found.choice.placed("state", "gpu")
    assert there == set(range(len(there))) and 3 <= len(there) < 12
    assert found.prediction.step_seconds < 0.85 * without.prediction.step_seconds
    assert found.problem.shortage(found.choice) == 0.0
    assert not without.choice.placed("state", "gpu")
    # with room for all, all that the CPU would have to do is done there
    roomy = decide(w, replace(budgets, gpu=24 * GIB), hw, solver)
    assert roomy.prediction.step_seconds < found.prediction.step_seconds


def test_nothing_moves_where_nothing_is_gained() -> None:
    w = bound_by_updates(6, 16)
    budgets = Budgets(8 * GIB, 16 * GIB, 0, NVME)
    slow = replace(MACHINE, adamw_device=1e6)  # slower than the CPU by far
    for solver in ("greedy", "mip"):
        found = decide(w, budgets, slow, solver)
        assert not found.choice.placed("state", "gpu")
        assert found.prediction.step_seconds == decide(w, budgets, MACHINE, solver).prediction.step_seconds


def test_all_in_ram_is_not_the_end_where_the_device_may_update() -> None:
    w = replace(bound_by_updates(6, 1), activations="recompute")
    budgets = Budgets(2 * GIB, 16 * GIB, 0, NVME)
    hw = replace(MACHINE, matrix_flops=dict.fromkeys(MACHINE.matrix_flops, 1e14))
    near = decide(w, budgets, hw, "greedy")
    assert near.choice == all_in_ram(near.choice) and _nothing_to_choose(near)
    offered = replace(near, problem=replace(near.problem, hw=replace(hw, adamw_device=1e10)))
    assert not _nothing_to_choose(offered)
    bound = replace(near.prediction, step_seconds=1.0, lane_seconds={**near.prediction.lane_seconds, "compute": 1.0})
    assert _nothing_to_choose(replace(offered, prediction=bound))  # compute has no rest
    there = moved(near.choice, *range(6))
    assert predict(w, replace(hw, adamw_device=1e10), there).step_seconds < near.prediction.step_seconds
