"""Sources of weights: random numbers, checkpoints in every form, models in memory; and what damaged ones are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from descriptions import (
    ARCHITECTURES,
    Described,
    in_memory,
    in_own_process,
    on_meta,
    parameters,
    peak_growth,
    randomised,
    read_all,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offload import conversion, models
from offload.deferred_init import DeferredInit, whole_functions_deferred
from offload.errors import WeightsError
from offload.names import base_tensors
from offload.tensor_files import TensorFiles
from offload.weights import CheckpointSource, LoadedSource, RandomSource, load_buffers, open_weights

# --- random weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_weights_equal_those_of_a_model_in_memory(name: str) -> None:
    model = on_meta(name)
    expected = parameters(in_memory(model, seed=3))
    before = torch.get_rng_state()
    source = RandomSource(model, 3)
    assert sorted(source.order) == sorted(expected)
    for order in (source.order, list(expected), list(expected)[::-1]):
        for parameter in order:
            values = read_all(source, parameter, expected[parameter].numel())
            assert values.dtype == torch.float32
            assert torch.equal(values, expected[parameter]), parameter
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_larger_than_a_block() -> None:
    model = on_meta("llama", vocab_size=24001, hidden_size=132, head_dim=32, pad_token_id=5)  # 3.02 blocks of 2**20
    expected = parameters(in_memory(model, seed=3))
    source = RandomSource(model, 3)
    for parameter in source.order:
        assert torch.equal(read_all(source, parameter, expected[parameter].numel(), 300_001), expected[parameter])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9)), max_size=12))
def test_random_weights_may_be_read_in_any_order(reads: list[tuple[int, int, int]]) -> None:
    model = on_meta("gpt_oss")
    expected = parameters(in_memory(model, seed=1))
    source = RandomSource(model, 1)
    names = list(expected)
    for which, first, number in reads:
        values = expected[names[which % len(names)]]
        start = first % values.numel()
        count = number % (values.numel() - start + 1)
        assert torch.equal(source.read(names[which % len(names)], start, count), values[start : start + count])
    source.close()


def _growth_of_reading() -> float:
    model = on_meta("llama", hidden_size=1024, intermediate_size=4096, vocab_size=16000)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) > 60e6
    with peak_growth() as grown:
        source = RandomSource(model, 0)
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
            for start in range(0, sizes[name], 1 << 20):
                source.read(name, start, min(1 << 20, sizes[name] - start))
        return grown()


def test_random_weights_take_little_memory() -> None:
    assert in_own_process(_growth_of_reading) < 32  # MiB; the embedding alone has 62


class Odd(nn.Module):
    """Initialises its parameters in ways that no model combines."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(300, 300))
        self.b = nn.Parameter(self.a.detach().clone() * 2)
        self.c = nn.Parameter(torch.empty(300, 300))
        self.d = nn.Parameter(torch.randn(5) + 1, requires_grad=False)
        self.e = nn.Parameter(torch.empty(4, 4, 3))
        self.f = nn.Embedding(700, 128, padding_idx=3)
        self.g = nn.Conv1d(4, 4, 3)
        self.h = nn.Parameter(torch.empty(257, 260))
        self.i = nn.Parameter(torch.zeros(300, 300))
        self.register_buffer("seen", torch.zeros(3))
        with torch.no_grad():
            self.a.mul_(3).clamp_(max=1)
            self.a[0].fill_(self.b[1, 1].item())
            self.seen.copy_(self.a[2, :3])
            nn.init.orthogonal_(self.c)
            self.c[:, 1:3].normal_()
            nn.init.dirac_(self.e)
            nn.init.sparse_(self.h, 0.3)
            self.i.exponential_().bernoulli_(0.25)
            self.d.copy_(torch.randn(5))
            nn.init.trunc_normal_(self.g.weight, std=0.5, a=-0.1, b=0.1)
            self.b.t().uniform_()
        self.j = nn.Parameter(torch.where(self.c > 0, torch.randn_like(self.c), self.a.t()).detach())
        self.k = self.j


@pytest.mark.parametrize("backwards", [False, True])
def test_deferred_initialisation_of_anything(backwards: bool) -> None:
    torch.manual_seed(11)
    expected = Odd()
    after = torch.rand(3)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    mode, orthogonal = DeferredInit(11), nn.init.orthogonal_
    with models.parameters_as(mode.adopt), whole_functions_deferred(mode), mode:
        made = Odd()
        drawn = torch.rand(3)
    assert torch.equal(drawn, after) and torch.equal(made.seen, expected.seen) and made.k is made.j
    names = [name for name, _ in made.named_parameters()]
    assert names == [name for name, _ in expected.named_parameters()]
    for name in names[::-1] if backwards else names:
        p, wanted = made.get_parameter(name), expected.get_parameter(name)
        assert p.is_meta and p.requires_grad == wanted.requires_grad
        assert torch.equal(mode.value(p.detach()), wanted), name
        assert torch.equal(torch.cat(list(mode.blocks(p.detach()))), wanted.reshape(-1)), name
    assert torch.equal(before, torch.get_rng_state())
    assert nn.init.orthogonal_ is orthogonal and not nn.Linear(2, 2).weight.is_meta


def test_random_weights_of_a_model_that_is_not_as_configured() -> None:
    model = on_meta("llama")
    model.lm_head = nn.Linear(48, 140, bias=False, device="meta")
    with pytest.raises(WeightsError, match=r"lm_head\.weight has shape \(140, 48\)"):
        RandomSource(model, 0)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> dict[str, Tensor]:
    """Write a checkpoint with transformers; the values that it holds."""
    made = randomised(on_meta(name), dtype)
    made.save_pretrained(tmp_path, **options)
    return parameters(made)


def check(source: CheckpointSource, expected: dict[str, Tensor]) -> None:
    assert sorted(source.order) == sorted(expected)
    for name in source.order:
        values = read_all(source, name, expected[name].numel())
        assert values.dtype == expected[name].dtype and torch.equal(values, expected[name]), name
    source.close()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "marian"])
def test_checkpoint_in_shards(name: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, name, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    check(CheckpointSource(tmp_path, on_meta(name)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_checkpoint_in_one_file(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = saved(tmp_path, name, dtype)
    check(CheckpointSource(tmp_path, on_meta(name)), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_checkpoint_in_the_modules_own_format(name: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, name, save_original_format=False)
    check(CheckpointSource(tmp_path, on_meta(name)), expected)


def test_experts_are_fused_as_from_pretrained_does(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    loaded = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    check(CheckpointSource(tmp_path, on_meta("qwen3_moe")), parameters(loaded))


def test_base_checkpoint_in_a_model_with_a_tied_head(tmp_path: Path) -> None:
    made = randomised(on_meta("llama_tied"))
    made.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    check(CheckpointSource(tmp_path, on_meta("llama_tied")), parameters(made))


def test_checkpoint_with_a_head_in_a_base_model(tmp_path: Path) -> None:
    saved(tmp_path, "llama_tied")
    base = models.build(Described(architecture={**ARCHITECTURES["llama_tied"], "architectures": ["LlamaModel"]}))
    expected = {f"model.{name}": p for name, p in base.named_parameters()}
    source = CheckpointSource(tmp_path, base)
    assert sorted(f"model.{name}" for name in source.order) == sorted(expected)


def test_head_that_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    randomised(on_meta("bert")).bert.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"has no classifier\.weight, classifier\.bias") as caught:
        CheckpointSource(tmp_path, on_meta("bert"))
    assert "head for this task" in str(caught.value) and "BertForSequenceClassification as M" in str(caught.value)


def test_legacy_names(tmp_path: Path) -> None:
    expected = saved(tmp_path, "bert")
    old = load_file(tmp_path / "model.safetensors")
    renamed = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in old.items()
    }
    renamed["bert.embeddings.position_ids"] = torch.arange(32)  # a buffer that is computed today
    assert renamed.keys() != old.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    check(CheckpointSource(tmp_path, on_meta("bert")), expected)


def change(tmp_path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")


def test_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    expected = saved(tmp_path, "llama_tied")
    change(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    check(CheckpointSource(tmp_path, on_meta("llama_tied")), expected)


def test_tied_weight_stored_twice(tmp_path: Path) -> None:
    expected = saved(tmp_path, "llama_tied")
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check(CheckpointSource(tmp_path, on_meta("llama_tied")), expected)
    change(tmp_path, lambda t: t["lm_head.weight"][-1, -1].add_(1))
    with pytest.raises(WeightsError, match=r"different weights for .*tie_word_embeddings to false"):
        CheckpointSource(tmp_path, on_meta("llama_tied"))


def test_positions_a_checkpoint_may_lack(tmp_path: Path) -> None:
    expected = saved(tmp_path, "marian")
    model = on_meta("marian")
    lacking = {name for name in expected if name.endswith("embed_positions.weight")}
    assert len(lacking) == 2 and not lacking & load_file(tmp_path / "model.safetensors").keys()
    expected.update({name: values for name, values in parameters(in_memory(model)).items() if name in lacking})
    source = CheckpointSource(tmp_path, model)
    assert sorted([*source.order, *lacking]) == sorted(expected)
    for name, values in expected.items():
        assert torch.equal(read_all(source, name, values.numel()), values), name
    assert not model.get_parameter("model.encoder.embed_positions.weight").requires_grad


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"it has no model\.norm\.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "the model has no extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"norm\.weight has shape \(47,\).*\(48,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "is stored as torch.int8"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}), "stored as torch.float8"),
        (lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight"), r"gate_up_proj cannot be made from 7"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.2.up_proj.weight": torch.ones(24, 47)}),
            r"gate_up_proj cannot be made from 8 .*belong",
        ),
        (
            lambda t: [t.pop(f"model.layers.0.mlp.experts.3.{n}_proj.weight") for n in ("up", "gate", "down")],
            r"gate_up_proj made from .* has shape \(3, 48, 48\), the model's .* \(4, 48, 48\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(edit: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", torch.float32)
    change(tmp_path, edit)
    with pytest.raises(WeightsError, match=message) as caught:
        CheckpointSource(tmp_path, on_meta("qwen3_moe"))
    assert "Qwen3MoeForCausalLM" in str(caught.value) or "configuration" in str(caught.value)


def test_all_that_does_not_fit_is_in_one_message(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    with pytest.raises(WeightsError, match=r"it has no .* and 23 more; the model has no .* and 16 more\."):
        CheckpointSource(tmp_path, on_meta("gpt_neox"))


def test_quantised_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    model = on_meta("llama")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(WeightsError, match="quantised"):
        CheckpointSource(tmp_path, model)


def test_persistent_buffers(tmp_path: Path) -> None:
    made = randomised(on_meta("deepseek_v3"))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    made.get_buffer(name).copy_(torch.arange(4.0))
    made.save_pretrained(tmp_path)
    model = on_meta("deepseek_v3")
    dtype = model.get_buffer(name).dtype
    load_buffers(tmp_path, model)
    assert torch.equal(model.get_buffer(name), made.get_buffer(name)) and model.get_buffer(name).dtype == dtype
    change(tmp_path, lambda t: t.pop(name))
    with pytest.raises(WeightsError, match="e_score_correction_bias"):
        load_buffers(tmp_path, model)


def test_reading_from_several_threads(tmp_path: Path) -> None:
    expected = saved(tmp_path, "mixtral")
    source = CheckpointSource(tmp_path, on_meta("mixtral"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: read_all(source, name, expected[name].numel(), 777), expected))
    assert all(map(torch.equal, found, expected.values()))


def test_transformers_version_is_one_the_adapter_was_checked_with() -> None:
    assert transformers.__version__ in conversion.TESTED_VERSIONS, (
        "run the tests of weights and export with this version, then add it to conversion.TESTED_VERSIONS"
    )


# --- files ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]),
    st.data(),
)
def test_slices_of_files(tmp_path_factory: Any, shapes: list[list[int]], dtype: torch.dtype, data: Any) -> None:
    directory = tmp_path_factory.mktemp("files")
    tensors = {f"t{i}": (torch.randn(shape) * 50).abs().to(dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    files = TensorFiles(directory)
    assert {name: (t.shape, t.dtype) for name, t in files.tensors.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    name = data.draw(st.sampled_from(sorted(tensors)))
    start = data.draw(st.integers(0, tensors[name].numel()))
    count = data.draw(st.integers(0, tensors[name].numel() - start))
    assert torch.equal(files.read(name, start, count), tensors[name].reshape(-1)[start : start + count])
    files.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_or_damaged_header_is_named(tmp_path_factory: Any, data: Any) -> None:
    directory = tmp_path_factory.mktemp("files")
    path = directory / "model.safetensors"
    save_file({"a": torch.arange(5.0), "b": torch.ones(3, 2)}, path)
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        position = data.draw(st.integers(0, length - 1))
        content[position] = data.draw(st.integers(0, 255).filter(lambda value: value != content[position]))
        path.write_bytes(content)
        try:
            TensorFiles(directory).close()  # another name or dtype of the same size is a sound header too
            return
        except WeightsError as error:
            assert "model.safetensors" in str(error)
            return
    with pytest.raises(WeightsError, match=r"model\.safetensors is (truncated|no complete)"):
        TensorFiles(directory)


def test_file_cut_while_it_is_read(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    source = CheckpointSource(tmp_path, on_meta("llama"))
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(WeightsError, match=r"ends at byte .*shorter while being read"):
        for name in source.order:
            source.read(name, 0, 48)


def test_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    saved(tmp_path, "llama", max_shard_size="50KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(WeightsError, match=f"names {first.name}, which is not there"):
        CheckpointSource(tmp_path, on_meta("llama"))
    first.write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["model.layers.9.mlp"] = first.name
    index.write_text(json.dumps(entries))
    with pytest.raises(WeightsError, match=r"model\.layers\.9\.mlp is in .*, but it is not"):
        CheckpointSource(tmp_path, on_meta("llama"))
    index.write_text("{}")
    with pytest.raises(WeightsError, match="damaged"):
        CheckpointSource(tmp_path, on_meta("llama"))


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    saved(tmp_path, "llama", max_shard_size="50KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(WeightsError, match="is in both"):
        CheckpointSource(tmp_path, on_meta("llama"))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*\n.*LlamaForCausalLM as M; M\.from_pretrained\("):
        CheckpointSource(tmp_path, on_meta("llama"))


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights to load"):
        CheckpointSource(tmp_path, on_meta("llama"))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(WeightsError, match="only a peft adapter"):
        CheckpointSource(tmp_path, on_meta("llama"))
    with pytest.raises(WeightsError, match="neither a transformers model"):
        CheckpointSource(tmp_path, nn.Linear(2, 2))


# --- models in memory and adapters ----------------------------------------------------------------------------------


def test_model_in_memory() -> None:
    model = randomised(on_meta("gpt2"))
    expected = {name: values.clone() for name, values in parameters(model).items()}
    source = open_weights(model)
    assert isinstance(source, LoadedSource) and source.order == list(expected)
    for name in list(expected):
        shape = model.get_parameter(name).shape
        assert torch.equal(read_all(source, name, expected[name].numel()), expected[name])
        source.release(name)
        assert model.get_parameter(name).shape == shape
        assert model.get_parameter(name).untyped_storage().nbytes() == 2
    assert source.order == []
    with pytest.raises(WeightsError, match=r"transformer\.wte\.weight is on the meta device"):
        LoadedSource(on_meta("gpt2"))


@pytest.mark.parametrize("stored", [True, False])
def test_adapter_in_memory_around_a_base_on_meta(stored: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = on_meta("qwen3_moe")
    made = randomised(base) if stored else in_memory(base, seed=5)
    made.save_pretrained(tmp_path)
    expected = parameters(made)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, lora)
    with pytest.raises(WeightsError, match=r"lora_A.* belongs to an adapter"):
        open_weights(model, tmp_path if stored else None, 5)
    models.prepare_for_training(model)
    source = open_weights(model, tmp_path if stored else None, 5)
    assert sorted(source.order) == sorted(name for name, _ in model.named_parameters())
    tensors = base_tensors(model)
    assert len(tensors) == len(expected) + 1  # lm_head, and its copy that is trained
    for t in tensors:
        assert torch.equal(read_all(source, t.name, t.tensor.numel()), expected[t.base_name]), t
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(read_all(source, name, p.numel()), p.detach().reshape(-1))
    source.close()
