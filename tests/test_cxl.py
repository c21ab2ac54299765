"""State and activations in (emulated) CXL memory: the numbers of plain PyTorch, its budget kept, and commits whole."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import forcing
import pytest
import reference
import torch
import zo_reference
import zoo
from forcing import MACHINE, fractions
from offload.io import HostTier, numa
from offload.planner import make_plan
from offload.planner.memory import bare_ram, reserve
from offload.planner.pages import PAGE
from test_activations import Moved, assert_same, trained
from test_exactness import assert_same as assert_same_zo

import offload
from offload import activation_uses, host_tiers, report_memory
from offload.config_sections import CxlConfig
from offload.engine import Engine, prepare
from offload.errors import ConfigError
from offload.state import role_sizes

ROWS = 2
ROOM = 64 << 20
CARD = {"size": ROOM, "emulate": True, "bandwidth": 4 << 30}
ALL = {role: "cxl" for role in ("param", "master", "exp_avg", "exp_avg_sq", "grad")}


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' outputs are small enough to be left where they are."""
    monkeypatch.setattr(activation_uses, "SMALLEST", 1)


def watched(tier: HostTier) -> list[int]:
    """Sizes of the tier's transfers, from now on."""
    sizes: list[int] = []
    assert tier.pace is not None
    own = tier.pace.ends

    def ends(nbytes: int, began: float) -> float:
        sizes.append(nbytes)
        return own(nbytes, began)

    tier.pace.ends = ends  # type: ignore[method-assign]
    return sizes


def held(engine: Engine, tier: str) -> dict[str, int]:
    return {name: sizes["peak"] for name, sizes in engine.ledger.snapshot().get(tier, {}).items()}


def pages(nbytes: int) -> int:
    return -(-nbytes // 4096) * 4096


@pytest.mark.parametrize(
    ("homes", "micro_batches", "dtype", "clip"),
    [
        ({"param": "cxl"}, 1, "float32", 1.0),
        ({"param": "cxl"}, 3, "bfloat16", None),
        (ALL, 1, "bfloat16", 1.0),
        (ALL, 3, "float32", 1.0),
        ({**ALL, "param": "nvme"}, 1, "bfloat16", None),
    ],
)
def test_homes_in_cxl_memory(
    homes: dict[str, str], micro_batches: int, dtype: str, clip: float | None, fast_path: Path
) -> None:
    model, total = zoo.make("llama"), ROWS * micro_batches
    batches = zoo.batches("llama", 3, total)
    want = reference.train(model, batches, ROWS, dtype=getattr(torch, dtype), max_grad_norm=clip)
    engine = forcing.engine(
        fast_path / "run", model, ROWS, total,
        {"model.dtype": dtype, "train.max_grad_norm": clip, "memory.cxl": CARD, "train.commit_every": 2}, homes=homes,
    )  # fmt: skip
    moved = watched(engine._prepared.tiers["cxl"])
    expected: dict[str, int] = {}
    for unit in engine._units:
        sizes = role_sizes(unit, getattr(torch, dtype))
        if clip and unit.trainable:
            sizes["grad"] = sizes["param"] if micro_batches == 1 else 4 * unit.layout.trainable_elements
        for role, nbytes in sizes.items():
            if homes.get(role) == "cxl":
                expected[role] = expected.get(role, 0) + pages(nbytes)
    assert held(engine, "cxl") == expected
    assert_same(trained(engine, batches), want)
    assert sum(moved) > len(batches) * sum(expected.values())  # every step reads and writes what lives there
    row = json.loads((fast_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["peak_bytes"]["cxl"] == sum(expected.values())


@pytest.mark.parametrize(
    ("activations", "boundary"),
    [(fractions(cxl=1.0), "cxl"), (fractions(keep=0.2, cpu=0.3, cxl=0.3, nvme=0.2), "gpu"), (fractions(), "cxl")],
)
def test_activations_in_cxl_memory(activations: dict[str, float], boundary: str, fast_path: Path) -> None:
    model, batches = zoo.make("llama", attention_dropout=0.1), zoo.batches("llama", 2, 3 * ROWS)
    want = reference.train(model, batches, ROWS)
    engine = forcing.engine(
        fast_path / "run", model, ROWS, 3 * ROWS, {"memory.cxl": CARD}, activations=activations, boundary=boundary,
        cxl=forcing.ROOM,
    )  # fmt: skip
    moved, through = Moved(engine), watched(engine._prepared.tiers["cxl"])
    assert held(engine, "cxl") == {"swapped activations": forcing.ROOM}
    assert_same(trained(engine, batches), want)
    assert moved.taken == moved.given
    assert moved.taken["cxl"] > 0 and sum(through) == 2 * moved.taken["cxl"]


def small_ram(cfg: dict[str, Any], model: Any, chunks: bool = True) -> int:
    """A budget for the buffers and nothing of the state; without `chunks` only for buffers of a run whose state all has
    homes in RAM or on the card, where the optimizer works on it in place: of a toy that is less than any home."""
    prepared = prepare(offload.Config.load(cfg), copy.deepcopy(model), MACHINE)
    w = prepared.workload
    ring = next(b for b in reserve(w) if b.name == "update")
    return bare_ram(w, prepared.plan) - (0 if chunks else ring.count * (ring.nbytes - PAGE))


@pytest.mark.parametrize("method", ["full", "zo"])
def test_a_plan_that_uses_the_card_is_run_within_its_budget(method: str, fast_path: Path) -> None:
    """No forcing: state that RAM has no room for goes to the card, and every peak stays within the plan's."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 3, ROWS)
    make = reference.config if method == "full" else zo_reference.config
    cfg = make(fast_path / "run", ROWS, ROWS, **{"planner.activations": "auto"} if method == "full" else {})
    cfg["memory"] |= {"cpu": small_ram(cfg, model), "cxl": CARD}
    config = offload.Config.load(cfg)
    prepared = prepare(config, copy.deepcopy(model), MACHINE)
    assert "CXL memory: cxl (emulated in RAM at 4.29497 GB/s and 400 ns)" in prepared.plan.notes
    assert 0 < prepared.plan.peak_bytes["cxl"] <= prepared.plan.budget_bytes["cxl"] == ROOM
    if method == "full":
        want = reference.train(model, batches, ROWS)
        engine = Engine.create(config, prepared=prepared)
        assert_same(trained(engine, batches), want)
    else:
        want = zo_reference.train(model, batches, ROWS)
        got = reference.Outcome()
        with Engine.create(config, prepared=prepared) as engine:
            engine._method._stream._poison = True  # type: ignore[union-attr]
            for batch in batches:
                result = engine.step(batch)
                got.losses.append(result.loss)
                got.norms.append(result.grad_norm)
            engine.flush()
            reader = engine._held.states.reader(engine._held.staging, 60.0)
            places = [place for unit in engine._units for place in unit.layout.params]
            got.weights = {p.name: reader.read(p.name, 0, p.numel).view(p.shape) for p in places}
        assert_same_zo(got, want)
    assert any(tier.name == "cxl" for state in engine._held.states.units for tier in state.tiers.values())
    for tier in ("gpu", "cpu", "cxl", "nvme"):
        assert engine.ledger.peak(tier) <= engine.plan.peak_bytes[tier]
    memory = json.loads((fast_path / "run/memory.json").read_text())
    assert memory["tiers"]["cxl"]["budget"] == ROOM
    assert memory["tiers"]["cxl"]["peak"] == engine.ledger.peak("cxl") > 0
    rows = {row["name"] for row in report_memory.section(memory, {})["tiers"]}
    assert "cxl (emulated in RAM at 4.29497 GB/s and 400 ns)" in rows


def test_weights_go_to_the_card_before_what_the_optimizer_touches(fast_path: Path) -> None:
    """RAM has room for optimizer state and gradients or for the weights as well as some of them: the weights move."""
    model = zoo.make("llama")
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **{"model.dtype": "bfloat16", "memory.cxl": CARD})
    bare = small_ram({**cfg, "memory": {"device": "cpu"}}, model, chunks=False)
    prepared = prepare(offload.Config.load(cfg), copy.deepcopy(model), MACHINE)
    w = prepared.workload
    state = sum(pages(n) for u in prepared.units for r, n in role_sizes(u, torch.bfloat16).items() if r != "param")
    gradients = sum(pages(2 * u.layout.trainable_elements) for u in prepared.units)
    slots = prepared.plan.buffer("weights.block")
    room = bare + state + gradients - (slots.count - 2) * slots.nbytes  # or the third slot would go for some weights
    for solver in ("greedy", "mip"):
        plan = make_plan(w, replace(prepared.budgets, cpu=room), MACHINE, solver)
        assert {unit.placement["param"] for unit in plan.units} == {"cxl"}
        assert {unit.placement["exp_avg"] for unit in plan.units} == {"cpu"}


def test_the_simulated_step_knows_bandwidth_and_latency(fast_path: Path) -> None:
    model = zoo.make("llama")
    seconds = []
    for change in ({}, {"bandwidth": 4 << 20}, {"latency": 0.01}):
        cfg = reference.config(fast_path / "run", ROWS, ROWS, **{"memory.cxl": {**CARD, **change}})
        cfg["memory"]["cpu"] = small_ram({**cfg, "memory": {"device": "cpu"}}, model, chunks=False)
        cfg["memory"]["nvme"] = None
        slow_drive = replace(MACHINE, nvme_read=1e6, nvme_write=1e6)  # the card is better at any of these
        seconds.append(prepare(offload.Config.load(cfg), copy.deepcopy(model), slow_drive).plan.step_seconds)
    fast, narrow, late = seconds
    assert narrow > 3 * fast
    assert late > fast + 0.01


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_run_that_ends_between_two_commits_goes_on_from_the_last(clip: float | None, fast_path: Path) -> None:
    """What lived on the card is in the commit: step 3 is lost, and the state of step 2 comes back."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 5, ROWS)
    want = reference.train(model, batches, ROWS, max_grad_norm=clip)
    how = (fast_path / "run", model, ROWS, ROWS)
    changes = {"memory.cxl": CARD, "train.commit_every": 2, "train.max_grad_norm": clip}
    first = forcing.engine(*how, changes, homes=ALL)
    losses = [first.step(batch).loss for batch in batches[:3]]
    first.flush()
    with pytest.raises(RuntimeError, match="0 elements"):
        first.step({name: tensor[:0] for name, tensor in batches[3].items()})
    first._held.abort()  # as if it had been killed: closing it must not commit
    first.close()
    again = forcing.prepared(*how, changes, homes=ALL)
    with Engine.resume(fast_path / "run", prepared=again) as engine:
        assert engine.completed_steps == 2
        assert held(engine, "cxl")["exp_avg"] > 0
        losses = losses[:2] + [engine.step(batch).loss for batch in batches[2:]]
        weights = reference.weights(engine)
    assert losses == want.losses
    assert not [name for name in want.weights if not torch.equal(weights[name], want.weights[name])]


# ---- which memory it is ----


def test_a_real_node_is_found_and_measured() -> None:
    """The machine's own node stands for the card: pages are bound to it, and its rate is measured."""
    here = numa.nodes()
    if not here:
        pytest.skip("the system does not describe its NUMA nodes")
    section = CxlConfig(node=here[0].node, size=1 << 20)
    tier = host_tiers.host_tiers(section)["cxl"]
    assert tier.nodes == (here[0].node,) and not tier.emulated
    found = host_tiers.with_rates(MACHINE, tier)
    assert found.cxl != MACHINE.cxl and found.cxl_latency == 0.0
    assert "measured" in found.source["cxl"]
    assert host_tiers.with_rates(MACHINE, tier, here=False) == MACHINE  # a preset's own rate


def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory.cxl: NUMA node 77 does not exist.*memory.cxl.emulate"):
        host_tiers.host_tiers(CxlConfig(node=77, size=1 << 20))
