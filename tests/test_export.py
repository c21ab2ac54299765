"""Hugging Face directories written from streams: the same bits and the same layout as transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from descriptions import ARCHITECTURES, in_memory, in_own_process, on_meta, parameters, peak_growth, randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from offload import models
from offload.errors import WeightsError
from offload.tensor_files import TensorFiles
from offload.weights import CheckpointSource, LoadedSource, RandomSource, save_pretrained


def layout(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    files = TensorFiles(directory)
    files.close()
    return {name: (t.shape, t.dtype) for name, t in files.tensors.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_written_as_transformers_does_and_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    made = randomised(on_meta(name))
    made.save_pretrained(tmp_path / "theirs")
    model = on_meta(name)
    for buffer_name, buffer in model.named_buffers():  # persistent ones are saved too
        buffer.copy_(made.get_buffer(buffer_name))
    save_pretrained(model, tmp_path / "ours", LoadedSource(made))
    assert layout(tmp_path / "ours") == layout(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    loaded, info = type(made).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    kept = {key: p for key, p in parameters(made).items() if name != "marian" or "embed_positions" not in key}
    assert all(torch.equal(parameters(loaded)[key], p) for key, p in kept.items())


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt_oss", "t5", "deepseek_v3"])
def test_shards(name: str, tmp_path: Path) -> None:
    made = randomised(on_meta(name))
    save_pretrained(made, tmp_path / "out", LoadedSource(made), max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    found = layout(tmp_path / "out")
    sizes = {key: torch.Size(shape).numel() * dtype.itemsize for key, (shape, dtype) in found.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values()), "total_parameters": made.num_parameters()}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded = type(made).from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(parameters(loaded)[key], p) for key, p in parameters(made).items())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200_000))
def test_no_shard_is_too_large(tmp_path_factory: Any, limit: int) -> None:
    out = tmp_path_factory.mktemp("export") / "out"
    made = in_memory(on_meta("qwen3_moe"), torch.bfloat16)
    save_pretrained(made, out, LoadedSource(made), max_shard_bytes=limit)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
    source = CheckpointSource(out, on_meta("qwen3_moe"))
    assert all(torch.equal(source.read(key, 0, p.numel()), p) for key, p in parameters(made).items())
    source.close()


def test_auto_classes_configuration_and_tokenizer(tmp_path: Path) -> None:
    model = on_meta("llama")
    model.generation_config.max_new_tokens = 17
    model.generation_config.temperature = 0.5  # which generation_config.save_pretrained refuses without sampling
    tokenizer = transformers.ByT5Tokenizer()
    save_pretrained(model, tmp_path / "out", RandomSource(model, 1), tokenizer=tokenizer, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_cache"] is True and model.config.use_cache is False
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 17 and loaded.config.use_cache
    expected = parameters(in_memory(model, seed=1))
    assert all(torch.equal(p, expected[key].bfloat16()) for key, p in parameters(loaded).items())
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reloaded("text")["input_ids"] == tokenizer("text")["input_ids"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    made = randomised(on_meta("mixtral"), torch.float16)
    made.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    model = on_meta("mixtral", "float32")
    source = CheckpointSource(tmp_path / "in", model)
    save_pretrained(model, tmp_path / "out", source)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float32
    assert all(torch.equal(p.float(), parameters(loaded)[key]) for key, p in parameters(made).items())


def test_model_from_pretrained_is_written_in_the_format_it_came_in(tmp_path: Path) -> None:
    randomised(on_meta("qwen3_moe")).save_pretrained(tmp_path / "in")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "in")
    save_pretrained(model, tmp_path / "out", LoadedSource(model))
    assert layout(tmp_path / "out") == layout(tmp_path / "in")


class Failing:
    def read(self, name: str, start: int, count: int) -> Tensor:
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        return torch.zeros(count, dtype=torch.bfloat16)


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path) -> None:
    model = on_meta("llama")
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "out", Failing())
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_taken(tmp_path: Path) -> None:
    model = in_memory(on_meta("llama"))
    out, partial = tmp_path / "out", tmp_path / "out.tmp"
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(WeightsError, match="not an empty directory"):
        save_pretrained(model, out, LoadedSource(model))
    (out / "file").unlink()
    partial.mkdir()
    with pytest.raises(WeightsError, match=r"out\.tmp is in the way"):
        save_pretrained(model, out, LoadedSource(model))
    assert partial.exists()
    (partial / ".unfinished-export").touch()  # what a killed export leaves
    (partial / "model-00001-of-00009.safetensors").touch()
    save_pretrained(model, out, LoadedSource(model))
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert not partial.exists()
    with pytest.raises(WeightsError, match="not an empty directory"):
        save_pretrained(model, out / "config.json", LoadedSource(model))


class _Constant:
    def read(self, name: str, start: int, count: int) -> Tensor:
        return torch.ones(count, dtype=torch.bfloat16)


def _growth_of_saving_and_loading(path: Path) -> tuple[float, float]:
    model = on_meta("llama", hidden_size=1024, intermediate_size=4096, vocab_size=16000)
    total = 2 * sum(p.numel() for p in model.parameters())
    with peak_growth() as grown:
        save_pretrained(model, path, _Constant())
        assert (path / "model.safetensors").stat().st_size > total > 100 << 20
        saving = grown()
        source = CheckpointSource(path, model)
        for name, p in model.named_parameters():
            for start in range(0, p.numel(), 1 << 20):
                source.read(name, start, min(1 << 20, p.numel() - start))
        return saving, grown()


def test_little_memory(tmp_path: Path) -> None:
    assert max(in_own_process(_growth_of_saving_and_loading, tmp_path / "out")) < 32  # MiB


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter(use_dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = randomised(on_meta("qwen3_moe"), torch.float32)
    base.save_pretrained(tmp_path / "base")

    def reloaded_base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "use_dora": use_dora}
    model = peft.get_peft_model(reloaded_base(), peft.LoraConfig(**lora, task_type="CAUSAL_LM"))
    models.prepare_for_training(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    save_pretrained(model, tmp_path / "out", LoadedSource(model))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("out", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == json.loads(
        (tmp_path / "theirs" / "adapter_config.json").read_text()
    )
    loaded = peft.PeftModel.from_pretrained(reloaded_base(), tmp_path / "out")
    expected = parameters(model)
    assert all(torch.equal(p, expected[name]) for name, p in parameters(loaded).items())
    ids = torch.arange(3, 12)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
