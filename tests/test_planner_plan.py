"""Properties of plans: budgets hold, more never hurts, what does not fit is explained, JSON is lossless."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from offload.planner import (
    Budgets,
    Hardware,
    Plan,
    UnitProfile,
    Workload,
    gradient_home,
    home_bytes,
    load_hardware,
    make_plan,
    reserve,
)
from offload.planner.activation_bytes import away_bytes, forward_workspace, kept_bytes, saved_room
from offload.planner.activations import shares
from offload.planner.choice import Choice, Role, UnitChoice, all_in_ram, nothing_in_ram
from offload.planner.memory import FRAMEWORK_FIXED, FRAMEWORK_MARGIN, MIB, device_home, moments, peaks
from offload.planner.prediction import predict
from offload.planner.timing import whole_step

GIB = 1 << 30
MACHINE = Hardware("test", 8 * GIB, 8 * GIB, {"bfloat16": 1e12, "float32": 2e11}, 2e10, 2e10, 1e10, 2e9, 1e9, 2e9)


OFFERED = replace(MACHINE, adamw_device=1e10)  # AdamW on the device, too
MACHINES = st.sampled_from([MACHINE, OFFERED])

# Operations that share a resource can delay each other when one of them gets faster, and a block slot has to pay.
ROUGHLY = 0.02


def stack(
    blocks: int, width: int, vocabulary: int, tied: bool = False, frozen: bool = False
) -> tuple[UnitProfile, ...]:
    """Units like those of a decoder with `blocks` equal blocks."""
    per_block, table = 12 * width * width, vocabulary * width

    def counts(n: int) -> dict[str, int]:
        padded = -(-n // 64) * 64
        return {"parameters": n, "trainable": 0 if frozen else padded, "frozen": padded if frozen else 0}

    boundary, logits = 512 * width * 2, 512 * vocabulary * 2
    embedding = UnitProfile("embedding", "embedding", **counts(table), held=tied, boundary_bytes=boundary)
    if tied:
        embedding = replace(embedding, visits=2, kept=True, workspace_backward=7 * logits)
    middle = tuple(
        UnitProfile(
            f"block.{i}", "block", **counts(per_block), forward_flops=1024 * per_block, boundary_bytes=boundary,
            workspace_forward=4 * boundary, workspace_backward=20 * boundary,
        )
        for i in range(blocks)
    )  # fmt: skip
    head = UnitProfile(
        "head", "head", **counts(table), forward_flops=1024 * table, workspace_backward=7 * logits, kept=True
    )
    norm = UnitProfile("resident", "resident", width, -(-width // 64) * 64, 0)
    return (embedding, *middle, *(() if tied else (head,)), norm)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    units = stack(
        draw(st.integers(1, 12)), 64 * draw(st.integers(1, 24)), 64 * draw(st.integers(4, 500)),
        draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip
    return Workload(
        units, draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([128, 512])),
        draw(st.sampled_from(["bfloat16", "float32"])), draw(st.booleans()),
        draw(st.sampled_from(["auto", 1, 7])), draw(st.sampled_from(["cpu", "cuda"])), draw(st.integers(1, 1000)),
        shared_bytes=draw(st.sampled_from([0, 1 << 20])),
    )  # fmt: skip


bytes_of_ram = st.integers(1 << 26, 16 * GIB)


@given(workloads(), bytes_of_ram, bytes_of_ram, st.integers(0, 40 * GIB), st.sampled_from(["greedy", "mip"]), MACHINES)
@settings(max_examples=60, deadline=None)
def test_a_plan_that_fits_exceeds_no_budget_and_adds_up(
    w: Workload, gpu: int, cpu: int, nvme: int, solver: str, hw: Hardware
) -> None:
    budgets = Budgets(gpu, cpu, 0, (("/a", nvme // 2), ("/b", nvme - nvme // 2)))
    plan = make_plan(w, budgets, hw, solver)
    limits = budgets.by_tier()
    assert plan.fits == all(plan.peak_bytes[t] <= limits[t] for t in limits)
    assert plan.fits != bool(plan.shortfall_bytes)
    for tier, peak in plan.peak_bytes.items():
        assert peak == sum(plan.categories[tier].values())
    for unit in plan.units:
        assert sum(unit.activations.values()) == pytest.approx(1.0)
        assert unit.placement["activation"] == "gpu"
    assert plan.layout["arena_bytes"] == sum(b.total for b in plan.buffers if b.tier == "gpu")
    assert plan.layout["lower_bound_bytes"] <= plan.layout["arena_bytes"]
    assert plan.peak_bytes["gpu"] >= plan.layout["arena_bytes"]
    homes = sum(
        n
        for u, p in zip(w.units, plan.units, strict=True)
        for role, n in home_bytes(u, w).items()
        if p.placement["param" if role == "frozen" else role] == "cpu"
    )
    waiting = sum(gradient_home(u, w) for u, p in zip(w.units, plan.units, strict=True) if p.placement["grad"] == "cpu")
    assert plan.categories["cpu"].get("state", 0) == homes
    assert plan.categories["cpu"].get("gradient homes", 0) == waiting
    there = [u for u, p in zip(w.units, plan.units, strict=True) if p.placement["master"] == "gpu"]
    assert plan.categories["gpu"].get("state", 0) == sum(device_home(u, w) for u in there)
    assert not there or hw is OFFERED
    assert plan.spill_gradients == any(p.placement["grad"] == "nvme" for p in plan.units)


@given(workloads(), bytes_of_ram, bytes_of_ram, MACHINES)
@settings(max_examples=60, deadline=None)
def test_more_ram_never_predicts_a_slower_step(w: Workload, one: int, other: int, hw: Hardware) -> None:
    nvme = (("/a", 1 << 50),)
    less, more = (make_plan(w, Budgets(GIB, cpu, 0, nvme), hw, "greedy") for cpu in sorted((one, other)))
    assert more.step_seconds <= less.step_seconds * (1 + ROUGHLY)


@given(workloads(), bytes_of_ram, bytes_of_ram, bytes_of_ram)
@settings(max_examples=40, deadline=None)
def test_more_device_memory_never_predicts_a_slower_step(w: Workload, cpu: int, one: int, other: int) -> None:
    nvme = (("/a", 1 << 50),)
    less, more = (make_plan(w, Budgets(gpu, cpu, 0, nvme), OFFERED, "greedy") for gpu in sorted((one, other)))
    assume(less.fits)
    assert more.step_seconds <= less.step_seconds * (1 + ROUGHLY)


@given(
    workloads(), bytes_of_ram, st.sampled_from(["h2d", "d2h", "ram", "nvme_read", "nvme_write", "adamw_device"]),
    MACHINES,
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_never_predicts_a_slower_step(w: Workload, cpu: int, lane: str, hw: Hardware) -> None:
    budgets = Budgets(GIB, cpu, 0, (("/a", 1 << 50),))
    faster = replace(hw, **{lane: 2 * getattr(hw, lane)})
    w = replace(w, commit_every=5)
    assert make_plan(w, budgets, faster, "greedy").step_seconds <= make_plan(
        w, budgets, hw, "greedy"
    ).step_seconds * (1 + ROUGHLY)


@given(workloads(), bytes_of_ram, MACHINES)
@settings(max_examples=40, deadline=None)
def test_json_gives_back_the_same_plan(w: Workload, cpu: int, hw: Hardware) -> None:
    plan = make_plan(w, Budgets(GIB, cpu, 0, (("/a", 64 * GIB),)), hw, "greedy")
    data = plan.to_json()
    assert Plan.from_json(json.loads(json.dumps(data))) == plan
    assert ("shortfall_bytes" in data) == (not plan.fits)


@given(workloads(), bytes_of_ram, st.integers(0, 8 * GIB))
@settings(max_examples=40, deadline=None)
def test_the_suggested_budgets_are_exactly_enough(w: Workload, cpu: int, nvme: int) -> None:
    budgets = Budgets(256 << 20, cpu, 0, (("/a", nvme),))
    plan = make_plan(w, budgets, MACHINE, "greedy")
    assume(not plan.fits)
    short = plan.shortfall_bytes
    raised = Budgets(
        budgets.gpu + short.get("gpu", 0), cpu + short.get("cpu", 0), 0, (("/a", nvme + short.get("nvme", 0)),)
    )
    assert make_plan(w, raised, MACHINE, "greedy").fits
    assert any("set memory." in s for s in plan.suggestions)


def test_a_shortfall_is_told_per_tier_with_settings_that_fit() -> None:
    w = Workload(stack(4, 1024, 32000), 2, 8, 512, "bfloat16", True, "auto", "cuda")
    plan = make_plan(w, Budgets(600 << 20, GIB, 0, (("/mnt/a", 1 << 30),)), MACHINE)
    assert not plan.fits
    assert plan.shortfall_bytes["nvme"] == plan.peak_bytes["nvme"] - (1 << 30)
    nvme = (1 << 30) + plan.shortfall_bytes["nvme"]
    assert "memory.nvme at /mnt/a to" in plan.suggestions[0] and str(nvme) in plan.suggestions[0]

    enough = Budgets(600 << 20, GIB, 0, (("/mnt/a", nvme),))
    plan = make_plan(w, enough, MACHINE)
    assert set(plan.shortfall_bytes) == {"gpu"}
    micro = [s for s in plan.suggestions if "micro_batch_size" in s or "sequence_length" in s]
    assert micro, plan.suggestions


@pytest.mark.parametrize("solver", ["greedy", "auto"])
def test_what_comes_nearest_is_shown_where_nothing_fits(solver: str) -> None:
    """Outputs that may wait on NVMe are not counted as missing on the device."""
    units = tuple(
        replace(u, boundary_bytes=32 << 20, saved=(32 << 20,) * 4) if u.kind == "block" else u
        for u in stack(16, 1024, 4096)
    )
    w = Workload(units, 8, 1, 512, "bfloat16", True, "auto", "cuda", activations="plan")
    nvme = (("/a", 1 << 40),)
    away = make_plan(w, Budgets(4 * GIB, 4 * GIB, 0, nvme), MACHINE, "greedy").peak_bytes["gpu"]
    assert away < 4 * GIB <= sum(8 * u.boundary_bytes for u in units)
    plan = make_plan(w, Budgets(256 << 20, 4 * GIB, 0, nvme), MACHINE, solver)
    assert set(plan.shortfall_bytes) == {"gpu"} and plan.shortfall_bytes["gpu"] < GIB
    assert any(u.placement["activation"] != "gpu" for u in plan.units)
    assert str(plan.peak_bytes["gpu"]) in plan.suggestions[0]
    raised = Budgets(plan.peak_bytes["gpu"], 4 * GIB, 0, nvme)
    assert make_plan(w, raised, MACHINE, solver).fits


def test_units_that_cost_the_same_are_alike_whatever_was_looked_up() -> None:
    one, other = (UnitProfile(name, "block", 64, 64, 0, saved=(1, 2)) for name in "ab")
    assert one.saved_bytes == 3  # cached in the one, not in the other
    assert one.key == other.key != replace(other, saved=(1, 3)).key


def test_buffers_are_those_of_the_widest_unit_of_each_class() -> None:
    w = Workload(stack(3, 256, 32000), 2, 1, 512, "bfloat16", True, "auto", "cpu")
    block, table = 12 * 256 * 256, 32000 * 256
    found = {b.name: b for b in reserve(w)}
    assert (found["weights.block"].count, found["weights.block"].nbytes) == (2, 2 * block)
    assert (found["weights.large"].count, found["weights.large"].nbytes) == (1, 2 * table)
    assert found["gradients.block"].nbytes == 4 * block  # more than one micro-batch: summed in float32
    assert found["gradients.large"].nbytes == 4 * table
    assert "landing" not in found  # the slots are host memory themselves
    assert {b.name: b for b in reserve(replace(w, device="cuda"))}["landing"].nbytes == 4 * table
    assert (found["update"].count, found["update"].nbytes) == (3, 16 * (2 << 20))
    assert found["resident"].nbytes == 4096 + 4096
    assert {b.tier for b in found.values()} == {"gpu", "cpu"}

    tied = {b.name: b for b in reserve(replace(w, units=stack(3, 256, 32000, tied=True), micro_batches=1))}
    assert tied["gradients.held/embedding"].nbytes == 2 * table
    assert "gradients.large" not in tied and tied["weights.large"].nbytes == 2 * table


def test_chunk_buffers_hold_the_roles_that_any_unit_has_on_nvme() -> None:
    """What has a home is updated there; frozen units have nothing to update."""
    w = Workload(stack(3, 256, 32000), 2, 1, 512, "bfloat16", True, "auto", "cpu")
    frozen = replace(w.units[0], name="frozen", trainable=0, frozen=64)
    w = replace(w, units=(frozen, *w.units))
    far = nothing_in_ram(w)
    near = replace(all_in_ram(far), units=(far.units[0], *all_in_ram(far).units[1:]))

    def per_element(choice: Choice, w: Workload = w) -> float:
        ring = next(b for b in reserve(w, 2, choice) if b.name == "update")
        assert ring.count == 3
        return ring.nbytes / (2 << 20)

    def with_far(*roles: Role) -> Choice:
        unit = near.units[2]
        for role in roles:
            unit = unit.with_tier(role, "nvme")
        return replace(near, units=(*near.units[:2], unit, *near.units[3:]))

    assert per_element(far) == 16
    assert per_element(near) == 4096 / (2 << 20)  # the least there is
    assert per_element(with_far("weights")) == 2
    assert per_element(with_far("state")) == 10
    assert per_element(with_far("gradient")) == 4
    assert per_element(with_far("weights", "state")) == 12
    assert per_element(with_far("weights", "state", "gradient"), replace(w, clipping=False)) == 12
    assert per_element(far, replace(w, dtype="float32", micro_batches=1)) == 16


@pytest.mark.parametrize("where", ["cxl", "cpu"])
def test_a_run_fits_without_chunk_buffers_where_it_would_not_with_them(where: str) -> None:
    """All state on a card, or a small model all in RAM: what fits is planned, and what is short is that choice's."""
    card = 8 * GIB if where == "cxl" else 0
    w = Workload(stack(1 if where == "cpu" else 4, 256, 512, tied=True), 1, 1, 128, "bfloat16", True, "auto", "cpu")
    nvme = (("/mnt", 64 * GIB),)
    streamed = peaks(w, reserve(w), nothing_in_ram(w))["cpu"]
    roomy = make_plan(w, Budgets(8 * GIB, 8 * GIB, card, nvme), MACHINE, "greedy")
    least = sum(n for name, n in streamed.items() if name != "update") + 3 * 4096
    if where == "cpu":
        least += sum(roomy.categories["cpu"][name] for name in ("state", "gradient homes"))
    assert least < sum(streamed.values())
    found = make_plan(w, Budgets(8 * GIB, least, card, nvme), MACHINE)
    assert found.fits and found.head_chunks <= 1 and found.peak_bytes["cpu"] <= least
    short = make_plan(w, Budgets(8 * GIB, least - MIB, card, nvme), MACHINE)
    assert not short.fits and short.shortfall_bytes["cpu"] <= MIB and short.suggestions


def test_state_goes_to_ram_when_there_is_room_and_commits_are_then_spread() -> None:
    w = Workload(stack(6, 512, 8000), 2, 1, 512, "bfloat16", True, "auto", "cuda", steps=500)
    nvme = (("/a", 100 * GIB),)
    plenty = make_plan(w, Budgets(4 * GIB, 64 * GIB, 0, nvme), MACHINE)
    assert all(u.placement["exp_avg"] == "cpu" for u in plenty.units) and not plenty.spill_gradients
    assert plenty.buffer("weights.block").count == 3  # type: ignore[union-attr]
    assert plenty.commit_every > 1
    without_homes = make_plan(w, Budgets(4 * GIB, 0, 0, nvme), MACHINE).peak_bytes["cpu"]
    scarce = make_plan(w, Budgets(4 * GIB, without_homes, 0, nvme), MACHINE)
    assert scarce.fits and scarce.spill_gradients and scarce.commit_every == 1
    assert all(u.placement["exp_avg"] == "nvme" for u in scarce.units)
    assert scarce.step_seconds > plenty.step_seconds


def test_bytes_per_parameter_with_everything_on_nvme() -> None:
    """12 written and 14 read without clipping, 16 and 18 with float32 gradients spilled, 14 and 16 with bfloat16 ones;
    12 and 14 with gradients waiting in RAM."""
    units = tuple(replace(u, kept=False) for u in stack(8, 1024, 64) if u.kind == "block")
    parameters = sum(u.trainable for u in units)
    for clipping, micro, gradient, written, read in (
        (False, 2, "nvme", 12, 14), (True, 2, "nvme", 16, 18), (True, 1, "nvme", 14, 16), (True, 2, "cpu", 12, 14),
    ):  # fmt: skip
        w = Workload(units, micro, 1, 512, "bfloat16", clipping, 1, "cuda")
        choice = nothing_in_ram(w)
        choice = replace(choice, units=tuple(c.with_tier("gradient", gradient) for c in choice.units))
        step = whole_step(w, MACHINE, choice)
        assert (step.forward.nvme_write + step.backward.nvme_write) / parameters == pytest.approx(written, rel=1e-3)
        assert (step.forward.nvme_read + step.backward.nvme_read) / parameters == pytest.approx(read, rel=1e-3)
        # the last blocks are still in their slots when backward begins, the first ones when the next step does
        simulated = predict(w, MACHINE, choice)
        assert simulated.lane_seconds["nvme_write"] * MACHINE.nvme_write / parameters == pytest.approx(written)
        fewer = 2 * choice.block_slots * units[0].trainable / parameters
        simulated_read = simulated.lane_seconds["nvme_read"] * MACHINE.nvme_read / parameters
        assert read - 2 * fewer - 1e-6 <= simulated_read <= read - fewer + 1e-6


def test_the_peaks_are_the_worst_of_the_moments() -> None:
    """Though neighbours that are alike are added up at once: with what differs from unit to unit, too."""
    generator = random.Random(0)
    for _ in range(50):
        units = tuple(
            replace(
                u, boundary_bytes=generator.choice([0, u.boundary_bytes]), saved=(4096,) * generator.choice([2, 2, 9])
            )
            for u in stack(generator.randint(1, 9), 64, 512, tied=generator.random() < 0.5)
        )
        w = Workload(
            units, generator.choice([1, 4]), 1, 512, "bfloat16", generator.random() < 0.5, activations="plan",
            device=generator.choice(["cpu", "cuda"]),
        )  # fmt: skip
        choice = nothing_in_ram(w)
        changed = [shares(c, w, *generator.choice([(0.5, {"cpu": 0.25}), (1.0, {}), (0.0, {})])) for c in choice.units]
        tiers = [generator.choice(["gpu", "cpu", "nvme"]) for _ in changed]
        homes = [generator.choice(["cpu", "cxl", "nvme"]) for _ in changed]
        choice = replace(choice, units=tuple(
            replace(c, boundary=tier, weights=home, state=home, gradient=home)
            for c, tier, home in zip(changed, tiers, homes, strict=True)
        ))  # fmt: skip
        found = peaks(w, reserve(w, 2, choice), choice)
        worst = max(moments(w, choice), key=lambda moment: moment.activations + moment.framework)
        kept = sum(b.total for b in reserve(w, 2, choice) if b.name == "activations.kept")
        inner = sum(kept_bytes(u, c, w) for u, c in zip(units, choice.units, strict=True))
        assert kept >= inner > 0 or not inner or w.device == "cuda"
        assert found["gpu"].get("activations", 0) == worst.activations + kept
        assert found["gpu"]["framework"] == worst.framework
        pairs = list(zip(units, homes, strict=True))
        for tier in ("cpu", "cxl"):
            state = sum(sum(home_bytes(u, w).values()) for u, home in pairs if home == tier)
            assert found[tier].get("state", 0) == state
            waiting = sum(gradient_home(u, w) for u, home in pairs if home == tier)
            assert found[tier].get("gradient homes", 0) == waiting
        for tier in ("cpu", "nvme"):
            away = sum(away_bytes(u, c, tier, w) for u, c in zip(units, choice.units, strict=True))
            reserved = {b.name: b.nbytes for b in reserve(w, 2, choice)}
            assert reserved.get(f"activations.{tier}", 0) == away


def test_forward_has_room_for_what_autograd_saves() -> None:
    """On a CPU for one pass's, where an earlier pass's makes room as it leaves; on a GPU for both."""
    saved, graph, unsaved = 60 * MIB, 70 * MIB, 20 * MIB
    unit = replace(
        stack(1, 64, 512)[1], workspace_forward=30 * MIB, saved=(6 * MIB,) * 10, workspace_graph=graph,
        workspace_unsaved=unsaved, workspace_kept=10 * MIB,
    )  # fmt: skip
    again, kept = UnitChoice(), UnitChoice(keep=1.0, recompute=0.0)
    swapped, mixed = UnitChoice(recompute=0.0, swap_cpu=1.0), UnitChoice(recompute=0.5, swap_cpu=0.5)
    for device, choice, forward, room in (
        ("cpu", again, 30 * MIB, 0),
        ("cpu", kept, graph, graph - unsaved),
        ("cpu", swapped, saved + unsaved, saved),
        ("cpu", mixed, saved + 30 * MIB, saved),  # micro-batches that are run again pass beside what leaves, too
        ("cuda", again, 30 * MIB, 0),
        ("cuda", kept, 30 * MIB, 0),  # counted among what waits
        ("cuda", swapped, graph + saved, saved),
    ):
        w = Workload((unit,), 2, 1, 512, "bfloat16", activations="plan", device=device)  # type: ignore[arg-type]
        assert (forward_workspace(unit, choice, w), saved_room(unit, choice, w)) == (forward, room), (device, choice)
        moment = next(iter(moments(w, Choice((choice,)))))
        margin, fixed = FRAMEWORK_MARGIN[device], FRAMEWORK_FIXED[device]
        assert moment.framework == round(forward * margin) + fixed


def test_a_solver_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"planner\.solver"):
        make_plan(Workload(stack(1, 64, 256), 1, 1, 64), Budgets(GIB, GIB), MACHINE, "simplex")


def test_a_workload_names_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="micro_batches"):
        Workload(stack(1, 64, 256), 0, 1, 64)
    with pytest.raises(ValueError, match="two units of one name"):
        Workload((*stack(1, 64, 256), *stack(1, 64, 256)), 1, 1, 64)


def test_a_plan_of_another_version_is_refused() -> None:
    plan = make_plan(Workload(stack(1, 64, 256), 1, 1, 64), Budgets(GIB, GIB), load_hardware("rtx4090"), "greedy")
    data = plan.to_json()
    del data["buffers"]
    with pytest.raises(ValueError, match="buffers"):
        Plan.from_json(data)
