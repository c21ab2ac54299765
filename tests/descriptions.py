"""Descriptions of small models, as `model.architecture` has them, and what the tests of weights share."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload import models

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16}
_MOE = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_TWO_STACKS: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "vocab_size": 131,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "model_type": "llama", "num_key_value_heads": 2},
    "llama_tied": {**_SMALL, "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {**_GROUPED, "model_type": "qwen3"},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 131,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        **{key: _SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
        "model_type": "opt",
        "ffn_dim": 80,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 48,
    },
    "gemma3_text": {
        **_GROUPED,
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**_SMALL, "model_type": "phi3", "num_key_value_heads": 2},
    "gpt_neox": {**_SMALL, "model_type": "gpt_neox"},
    "mixtral": {**_GROUPED, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_MOE, "model_type": "qwen3_moe"},
    "gpt_oss": {**_GROUPED, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_SMALL,
        "model_type": "deepseek_v3",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 131, "state_size": 4},
    "bert": {**_SMALL, "model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 3},
    "t5": {
        "model_type": "t5",
        "d_model": 48,
        "d_ff": 80,
        "d_kv": 12,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 131,
        "decoder_start_token_id": 0,
    },
    "bart": {**_TWO_STACKS, "model_type": "bart"},
    "marian": {**_TWO_STACKS, "model_type": "marian", "decoder_vocab_size": 131},
    "vit": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
}


@dataclass
class Described:
    """The `model` section of a configuration."""

    path: str | Path | None = None
    architecture: dict[str, Any] | None = None
    dtype: str = "bfloat16"
    trust_remote_code: bool = False
    attn_implementation: str | None = None


def on_meta(name: str, dtype: str = "bfloat16", **changes: Any) -> PreTrainedModel:
    """The named small model without weights."""
    return models.build(Described(architecture={**ARCHITECTURES[name], **changes}, dtype=dtype))


def in_memory(model: PreTrainedModel, dtype: torch.dtype = torch.float32, seed: int = 7) -> PreTrainedModel:
    """What transformers makes in memory of the same configuration."""
    torch.manual_seed(seed)
    return type(model)._from_config(models.original_config(model), dtype=dtype)


def randomised(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """As `in_memory`, with no two parameters alike (constant initial values would hide mix-ups)."""
    made = in_memory(model, dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape))
    return made


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Flat values by name."""
    return {name: p.detach().reshape(-1) for name, p in model.named_parameters()}


def read_all(source: Any, name: str, numel: int, step: int = 1000) -> Tensor:
    """A parameter, read in slices."""
    return torch.cat([source.read(name, start, min(step, numel - start)) for start in range(0, numel, step)])


@contextmanager
def peak_growth() -> Iterator[Callable[[], float]]:
    """Gives a function that tells by how many MiB this process's memory grew at most since the beginning."""

    def status(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    yield lambda: (status("VmHWM") - before) / 1024


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` (of a module) gives in a fresh interpreter.

    For memory: what was freed before leaves a heap with holes, whose pages the system took back; whoever allocates
    next fills them, and the process grows by more than what is alive. There are none where larger allocations stay
    outside of the heap from the start.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
        result = own.submit(function, *args)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        return result.result(timeout=100)
