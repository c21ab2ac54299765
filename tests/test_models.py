"""Models without weights: what is on meta, what is real, which class, and what a wrong description is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from descriptions import ARCHITECTURES, Described, in_memory, on_meta, peak_growth
from torch import nn

from offload import models
from offload.errors import ConfigError, WeightsError


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_on_meta_and_buffers_as_in_memory(name: str, dtype: str) -> None:
    model = on_meta(name, dtype)
    expected = in_memory(model, getattr(torch, dtype))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", getattr(torch, dtype))}
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in expected.named_parameters()]
    buffers = dict(model.named_buffers())
    for buffer_name, buffer in expected.named_buffers():
        assert buffers[buffer_name].dtype == buffer.dtype and torch.equal(buffers[buffer_name], buffer), buffer_name
    assert len(buffers) == len(list(expected.named_buffers()))
    assert model.training
    assert getattr(model.config, "use_cache", False) is False


def test_rotary_frequencies_stay_float32() -> None:
    frequencies = on_meta("llama").model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, 1.0 / 10000.0 ** (torch.arange(0, 12, 2).float() / 12))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "gemma3_text", "opt", "bart"])
def test_tied_embeddings_are_one_parameter(name: str) -> None:
    model = on_meta(name)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_state_space_parameters_take_the_compute_dtype() -> None:
    model = on_meta("mamba")
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({"model_type": "llama"}, "LlamaForCausalLM"),
        ({"model_type": "bart"}, "BartForConditionalGeneration"),
        ({"model_type": "bert"}, "BertForMaskedLM"),
        ({"model_type": "bert", "is_decoder": True}, "BertLMHeadModel"),
        ({"model_type": "bert", "architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
    ],
)
def test_class(architecture: dict[str, Any], expected: str) -> None:
    assert type(models.build(Described(architecture=architecture))).__name__ == expected


def test_attention_implementation() -> None:
    described = Described(architecture=ARCHITECTURES["llama"], attn_implementation="eager")
    assert models.build(described).config._attn_implementation == "eager"
    described.attn_implementation = "flash"
    with pytest.raises(ConfigError, match="cannot be built"):
        models.build(described)


def test_a_large_model_takes_no_memory_and_leaves_the_random_numbers() -> None:
    large = {**ARCHITECTURES["llama"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 40}
    state = torch.get_rng_state()
    on_meta("llama")  # imports
    with peak_growth() as grown:
        model = models.build(Described(architecture={**large, "num_attention_heads": 64, "vocab_size": 128256}))
        assert sum(p.numel() for p in model.parameters()) > 30e9
        assert grown() < 64
    assert torch.equal(state, torch.get_rng_state())


def test_directory(tmp_path: Path) -> None:
    source = in_memory(on_meta("llama"))
    source.generation_config.max_new_tokens = 11
    source.config.save_pretrained(tmp_path)
    source.generation_config.save_pretrained(tmp_path)
    described = Described(path=tmp_path)
    model = models.build(described)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.generation_config.max_new_tokens == 11
    assert model.config.use_cache is False
    assert models.original_config(model).use_cache is True
    assert models.locate(described) == tmp_path
    models.prepare_for_training(model)  # a second time must not lose the original value
    assert models.original_config(model).use_cache is True


def test_caches_of_parts_are_switched_off() -> None:
    vision = {key: ARCHITECTURES["vit"][key] for key in ARCHITECTURES["vit"] if key not in ("architectures",)}
    text = {**ARCHITECTURES["llama"], "use_cache": True}
    vision["model_type"] = "clip_vision_model"
    parts = {"text_config": text, "vision_config": vision, "architectures": ["LlavaForConditionalGeneration"]}
    model = models.build(Described(architecture={"model_type": "llava", **parts}))
    assert model.config.text_config.use_cache is False
    assert models.original_config(model).text_config.use_cache is True


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({}, "model_type is missing"),
        ({"model_type": "lama"}, "model_type: 'lama' is unknown; did you mean 'llama'"),
        ({"model_type": "llama", "hiden_size": 3}, "hiden_size: LlamaConfig has no such setting; .* 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": "x"}, "'hidden_size' expected int, got str"),
        ({"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}, "not a multiple of"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"model_type": "llama", "architectures": ["BertForMaskedLM"]}, "needs model_type 'bert'"),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "n_layer": 3}}, "text_config.n_layer"),
        ({"model_type": "clip_vision_model"}, "name the class"),
    ],
)
def test_wrong_architecture(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(Described(architecture=architecture))


@pytest.mark.parametrize(
    "settings",
    [{"rope_theta": 5e5}, {"torch_dtype": "bfloat16"}, {"num_labels": 4}, {"_name_or_path": "x"}, {"head_dim": 16}],
)
def test_settings_that_are_no_fields_of_the_class(settings: dict[str, Any]) -> None:
    models.config_from_architecture({"model_type": "qwen3_moe", **settings})


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no directory './nothing'"):
        models.build(Described(path="./nothing"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        models.build(Described(path=tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="peft adapter"):
        models.build(Described(path=tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        models.build(Described(path=tmp_path))
    with pytest.raises(ConfigError, match="both unset"):
        models.build(Described())


def test_hub_that_does_not_have_it_or_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"on the hub|hub could not be reached"):
        models.build(Described(path="no-such-organisation-0/no-such-model"))


def test_remote_code_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    settings = {**ARCHITECTURES["llama"], "model_type": "own", "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps({**settings, "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        models.build(Described(path=directory))
    model = models.build(Described(path=directory, trust_remote_code=True))
    assert type(model).__name__ == "OwnForCausalLM"
    assert all(p.is_meta for p in model.parameters())


def test_a_parameter_registered_twice_is_substituted_once() -> None:
    shared = nn.Parameter(torch.ones(3), requires_grad=False)
    with models.parameters_as(lambda tensor: torch.empty_like(tensor, device="meta")):
        first, second = nn.Module(), nn.Module()
        first.weight, second.weight = shared, shared
    assert first.weight is second.weight and first.weight.is_meta and not first.weight.requires_grad
    after = nn.Linear(2, 2)
    assert not after.weight.is_meta


def test_adapters_around_a_model_on_meta_get_first_values() -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    model = peft.get_peft_model(on_meta("llama"), peft.LoraConfig(**settings))
    models.prepare_for_training(model)
    values = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert values and not any(p.is_meta for p in values.values())
    for name, p in values.items():
        is_zero = "lora_B" in name or "lora_embedding_A" in name
        assert bool((p == 0).all()) == is_zero, name
        if "lora_A" in name:
            assert p.abs().max() <= 48**-0.5 and p.std() > 0.4 * 48**-0.5
    before = {name: p.clone() for name, p in values.items()}
    models.prepare_for_training(model)  # values that are there are left alone
    assert all(torch.equal(before[name], p) for name, p in values.items())
    for wrong in ({"use_dora": True}, {"init_lora_weights": "eva"}):
        with pytest.raises(WeightsError, match="load the base model first"):
            models.prepare_for_training(peft.get_peft_model(on_meta("llama"), peft.LoraConfig(**settings, **wrong)))
