"""Zeroth-order runs against a plain in-memory loop, to the bit: losses, projected gradients and weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
import zo_reference
import zoo
from offload.planner import timing
from safetensors.torch import load_file
from test_exactness import assert_same
from torch import nn

import offload
from offload import zo, zo_noise
from offload.engine import Engine, prepare
from offload.units import find_units
from offload.zo_formats import Quantized

ROWS, STEPS = 2, 20


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    engine.flush()
    reader = engine._held.states.reader(engine._held.staging, 60.0)
    places = [place for unit in engine._units for place in unit.layout.params]
    return {p.name: reader.read(p.name, 0, p.numel).view(p.shape) for p in places}


def least_ram(cfg: dict[str, Any], model: nn.Module) -> int:
    """A budget that holds the buffers and nothing else: two slots, and all weights rest in the store."""
    memory = dict(cfg["memory"])
    for _ in range(2):  # the third slot goes first
        plan = prepare(offload.Config.load({**cfg, "memory": memory}), copy.deepcopy(model)).plan
        memory["cpu"] = plan.peak_bytes["cpu"] - plan.categories["cpu"].get("state", 0)
    return int(memory["cpu"])


def streamed(
    path: Path, model: nn.Module, batches: list[dict[str, Any]], total: int, section: dict[str, Any] | None = None,
    on_nvme: bool = False, **changes: Any,
) -> reference.Outcome:  # fmt: skip
    """Run the engine; every slot is filled with NaN when it is given back, so that a stale use would show."""
    outcome = reference.Outcome()
    cfg = zo_reference.config(path, ROWS, total, section, **changes)
    if on_nvme:
        cfg["memory"]["cpu"] = least_ram(cfg, model)
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        homes = [state.homes for state in engine._held.states.units]
        assert not any(homes) if on_nvme else all(homes)
        engine._method._stream._poison = True
        for batch in batches:
            result = engine.step(batch)
            outcome.losses.append(result.loss)
            outcome.norms.append(result.grad_norm)
        outcome.weights = weights(engine)
        for tier in ("gpu", "cpu", "nvme"):
            assert engine.ledger.peak(tier) <= engine.plan.peak_bytes[tier]
    return outcome


@pytest.mark.parametrize("on_nvme", [False, True], ids=["ram", "nvme"])
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3"])
def test_equal_to_the_plain_loop(name: str, on_nvme: bool, fast_path: Path) -> None:
    model, batches = zoo.make(name), zoo.batches(name, STEPS, ROWS)
    want = zo_reference.train(model, batches, ROWS)
    assert_same(streamed(fast_path / "run", model, batches, ROWS, on_nvme=on_nvme), want)
    assert len(set(want.losses)) == STEPS


@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral"])
def test_several_micro_batches_of_any_architecture(name: str, fast_path: Path) -> None:
    """Tied weights, an encoder that many blocks read, experts and router losses: exact here, no sum is reordered."""
    model, batches = zoo.make(name), zoo.batches(name, 4, 3 * ROWS)
    want = zo_reference.train(model, batches, ROWS, takes_total=name not in zoo.OWN_LOSS)
    assert_same(streamed(fast_path / "run", model, batches, 3 * ROWS, on_nvme=True), want)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "samples": ({"samples": 3}, {"samples": 3}),
    "clip": ({"clip": 0.5}, {"clip": 0.5}),
    "sign": ({"variant": "sign", "samples": 2}, {"variant": "sign", "samples": 2}),
    "momentum": ({"variant": "momentum"}, {"variant": "momentum"}),
    "adam": ({"variant": "adam"}, {"variant": "adam", "decay": 0.1}),
    "sparse": ({"variant": "sparse", "sparsity": 0.6}, {"variant": "sparse", "sparsity": 0.6}),
    "conservative": ({"variant": "conservative"}, {"variant": "conservative", "decay": 0.1}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_the_plain_loop(name: str, fast_path: Path) -> None:
    section, arguments = VARIANTS[name]
    model, batches = zoo.make("llama"), zoo.batches("llama", 5, 2 * ROWS)
    want = zo_reference.train(model, batches, ROWS, **arguments)
    decay = {"train.optimizer": {"lr": zo_reference.LR, "weight_decay": arguments.get("decay", 0.0)}}
    assert_same(streamed(fast_path / "run", model, batches, 2 * ROWS, section, name != "adam", **decay), want)


@pytest.mark.parametrize("section", [{}, {"samples": 2}, {"variant": "conservative"}, {"variant": "block"}])
def test_directions_are_planned_where_they_are_measured(
    section: dict[str, Any], fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the optimizer's lane, for as many normals as a step makes; it takes that and compute one after the other."""
    made: list[int] = []
    fill = zo_noise.fill

    def counted(out: torch.Tensor, *arguments: int) -> None:
        made.append(out.numel())
        fill(out, *arguments)

    monkeypatch.setattr(zo_noise, "compiled", lambda: None)  # so that all of it passes through `fill`
    monkeypatch.setattr(zo_noise, "fill", counted)
    cfg = zo_reference.config(fast_path / "run", ROWS, ROWS, section)
    with offload.wrap(zoo.make("llama"), cfg) as engine:
        first, *steps = zoo.batches("llama", 3, ROWS)
        engine.step(first)
        made.clear()
        for batch in steps:  # two: groups of units take turns
            engine.step(batch)
            row = engine.run.last_row
            assert row is not None and row["lane_seconds"]["optimizer"] > 0
        plan, normals = engine.plan, sum(made) / len(steps)  # before closing, which applies the last update
    planned = plan.lane_seconds["optimizer"] * timing.NORMALS_PER_SECOND["cpu"]
    assert planned == pytest.approx(normals, rel=0.01)  # some padding
    assert plan.step_seconds >= plan.lane_seconds["optimizer"] + plan.lane_seconds["compute"]


def test_groups_of_units_take_turns(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 5, ROWS)
    place = {p.name: unit.index for unit in find_units(model) for p in unit.layout.params}
    want = zo_reference.train(model, batches, ROWS, active=lambda name, step: place[name] % 2 == step % 2)
    assert_same(streamed(fast_path / "run", model, batches, ROWS, {"variant": "block", "blocks": 2}), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rests_and_travels_in_two_bytes(dtype: torch.dtype, fast_path: Path) -> None:
    """Updates that bfloat16 would round away at this learning rate are there because it is large enough."""
    model, batches = zoo.make("qwen3").to(dtype), zoo.batches("qwen3", 4, ROWS)
    want = zo_reference.train(model, batches, ROWS, dtype=dtype, eps=1e-2)
    changes = {"model.dtype": str(dtype).removeprefix("torch.")}
    assert_same(streamed(fast_path / "run", model, batches, ROWS, {"eps": 1e-2}, on_nvme=True, **changes), want)
    started = dict(model.named_parameters())
    assert any(not torch.equal(want.weights[n], p) for n, p in started.items())


def test_a_float32_rest_under_bfloat16_compute(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 4, ROWS)
    model.to(torch.bfloat16)
    want = zo_reference.train(model, batches, ROWS, dtype=torch.float32)
    section = {"weights": "float32"}
    assert_same(
        streamed(fast_path / "run", model, batches, ROWS, section, on_nvme=True, **{"model.dtype": "bfloat16"}), want
    )


def test_units_of_several_store_blocks(fast_path: Path) -> None:
    """An embedding of 10 MB: loading, streaming and reading back in parts that end anywhere."""
    model, batches = zoo.make("llama", vocab_size=50_001), zoo.batches("llama", 2, ROWS)
    want = zo_reference.train(model, batches, ROWS)
    assert_same(streamed(fast_path / "run", model, batches, ROWS, on_nvme=True), want)


def adapted() -> peft.PeftModel:
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        zoo.make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return wrapped


def test_lora_parameters_only(fast_path: Path) -> None:
    model, batches = adapted(), zoo.batches("llama", 5, 2 * ROWS)
    want = zo_reference.train(model, batches, ROWS)
    for on_nvme in (False, True):
        assert_same(streamed(fast_path / str(on_nvme), model, batches, 2 * ROWS, on_nvme=on_nvme), want)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, want.weights[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "section",
    [{"weights": "float8", "rounding": "stochastic"}, {"weights": "bfloat16", "rounding": "stochastic"}],
    ids=lambda section: section["weights"],
)
def test_few_bits_and_stochastic_rounding(section: dict[str, Any], fast_path: Path) -> None:
    """The weights are those that the log gives again; a step too small for the format moves some of them, not all."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 4, ROWS)
    changes = {"train.optimizer": {"lr": 1e-5}}
    got = streamed(fast_path / "run", model, batches, ROWS, section, on_nvme=True, **changes)
    cfg = offload.Config.load(zo_reference.config(fast_path / "run", ROWS, ROWS, section, **changes))
    again, first = copy.deepcopy(model), copy.deepcopy(model)
    zo.replay(again, fast_path / "run", cfg)
    assert all(torch.equal(p, got.weights[name]) for name, p in again.named_parameters())
    zo.replay(first, [], cfg)
    moved = [(p != got.weights[name]).float().mean().item() for name, p in first.named_parameters() if p.dim() > 1]
    assert all(0.001 < share < 0.6 for share in moved)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_learn_by_their_scales(bits: int, fast_path: Path) -> None:
    """QZO against a plain loop over the scales, with a clipped directional derivative."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 4, 2 * ROWS)
    section = {"variant": "qzo", "bits": bits, "clip": 0.5}
    got = streamed(fast_path / "run", model, batches, 2 * ROWS, section, on_nvme=True)
    format = Quantized(bits=bits)
    plain = copy.deepcopy(model).train()
    plain.config.use_cache = False
    linear = {n: p for n, p in plain.named_parameters() if n.startswith("model.layers") and p.dim() > 1}
    parts, scales = {}, {}
    for name, p in linear.items():
        integers, scales[name] = format.quantize(p.detach().reshape(-1))
        parts[name] = {"param": integers}

    @torch.no_grad()
    def load(moved: dict[str, torch.Tensor]) -> None:
        for name, p in linear.items():
            p.copy_(format.weights(parts[name], slice(0, p.numel()), moved[name]).view(p.shape))

    for step, batch in enumerate(batches):
        seed = zo.direction_seed(reference.SEED, step)
        z = {name: zo.noise(seed, name, 0, s.shape) for name, s in scales.items()}
        pair = []
        for epsilon in (zo_reference.EPS, -zo_reference.EPS):
            load({name: s + z[name] * epsilon for name, s in scales.items()})
            with torch.no_grad():
                pair.append(zo_reference.losses(plain, batch, ROWS, step, True))
        g = max(-0.5, min(0.5, (pair[0] - pair[1]) / (2 * zo_reference.EPS)))
        scales = {name: s - z[name] * g * zo_reference.LR for name, s in scales.items()}
        assert got.losses[step] == sum(pair) / 2
        assert got.norms[step] == abs(g)
    load(scales)
    assert all(torch.equal(got.weights[name], p) for name, p in plain.named_parameters())


# ---- what is saved, evaluated and gone on with has every update ----


def test_the_pending_update_is_saved_and_evaluated(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 4, ROWS)
    cfg = zo_reference.config(fast_path / "run", ROWS, ROWS, **{"model.dtype": "float32"})
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        for step, batch in enumerate(batches[:3]):
            engine.step(batch)
            if step == 1:
                evaluated = engine.evaluate(batches[3])
        engine.save_pretrained(fast_path / "saved")
        again = engine.evaluate(batches[3])
    want = zo_reference.train(model, batches[:3], ROWS)
    saved = load_file(fast_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], want.weights[name]) for name in saved)
    for steps, loss in ((2, evaluated), (3, again)):
        trained = copy.deepcopy(model).eval()
        trained.load_state_dict(zo_reference.train(model, batches[:steps], ROWS).weights)
        with torch.no_grad():
            assert trained(**batches[3]).loss.item() == loss


def test_replay_makes_the_weights_again_from_the_log(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 6, ROWS)
    cfg = zo_reference.config(fast_path / "run", ROWS, ROWS, {"variant": "adam"})
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        for batch in batches:
            engine.step(batch)
        want = weights(engine)
    assert (fast_path / "run" / "zo.jsonl").stat().st_size < 120 * 6
    again = copy.deepcopy(model)
    zo.replay(again, fast_path / "run", offload.Config.load(cfg))
    assert all(torch.equal(p, want[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize("variant", ["momentum", "sparse"])
def test_resume_from_the_log_where_nothing_was_committed_since(variant: str, fast_path: Path) -> None:
    """The store stands at step 0 and the log at step 7: what is in between is taken again."""
    model, batches = zoo.make("llama"), zoo.batches("llama", 9, ROWS)
    changes = {"train.commit_every": 1000}
    cfg = zo_reference.config(fast_path / "run", ROWS, ROWS, {"variant": variant}, **changes)
    engine = offload.wrap(copy.deepcopy(model), cfg)
    for batch in batches[:7]:
        engine.step(batch)
    engine._failed = True  # ends without a commit, as a killed process does
    engine.close()
    with offload.resume(fast_path / "run") as resumed:
        assert (resumed.committed_step, resumed.completed_steps) == (0, 7)
        losses = [resumed.step(batch).loss for batch in batches[7:]]
        got = weights(resumed)
    want = zo_reference.train(model, batches, ROWS, variant=variant)
    assert losses == want.losses[7:]
    assert all(torch.equal(got[name], w) for name, w in want.weights.items())


def test_two_slots_are_enough_and_all_the_device_needs(fast_path: Path) -> None:
    """Under a tight budget: two units, the activations of one, and copies of the leftovers; RAM does not grow."""
    peaks = []
    for layers in (4, 12):
        model = zoo.make("llama", num_hidden_layers=layers)
        cfg = zo_reference.config(fast_path / str(layers), ROWS, ROWS)
        cfg["memory"]["cpu"] = least_ram(cfg, model)
        with offload.wrap(copy.deepcopy(model), cfg) as engine:
            for batch in zoo.batches("llama", 3, ROWS):
                engine.step(batch)
            largest = max(unit.layout.trainable_elements * 4 for unit in engine._units)
            held = engine.ledger.snapshot()["gpu"]
            assert held["weights"]["peak"] <= 2 * (largest + 4096)
            assert set(held) == {"weights", "resident", "activations"} and held["activations"]["bytes"] == 0
            peaks.append(engine.ledger.peak("cpu"))
    assert peaks[0] == peaks[1]
