"""Small models of the architectures that the engine is checked on, and batches with unequal numbers of targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

VOCABULARY = 256
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {**_TOKENS, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "attention_dropout": 0.1},
    "qwen3": {**_SMALL, "head_dim": 16},
    "gpt2": {**_GPT, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {
        **_TOKENS,
        "hidden_size": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 48,
        "dropout": 0.1,
    },
    "gemma3_text": {**_SMALL, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8},
    "mixtral": {**_SMALL, "num_local_experts": 4, "output_router_logits": True},
    "qwen3_moe": {**_SMALL, **_MOE, "head_dim": 16},
    "gpt_oss": {**_SMALL, "num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
    "phi3": {**_SMALL, "resid_pdrop": 0.1},
    "gpt_neox": {
        **_TOKENS,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.1,
    },
    "bert": {
        **_TOKENS,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 3,
    },
    "t5": {
        **_TOKENS,
        "d_model": 48,
        "d_ff": 96,
        "d_kv": 12,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}

# Models whose gradients are summed in another order than autograd's, because the schedule has to (DESIGN: exceptions):
# a weight used by two units with several micro-batches, and an encoder output read by many decoder blocks.
TIED = {"gpt2", "opt", "gemma3_text", "t5"}
ENCODER_DECODER = {"t5"}

# Models whose forward hands num_items_in_batch to a loss function that takes it.
OWN_LOSS = {"bert", "t5"}


def make(name: str, **changes: Any) -> PreTrainedModel:
    """A model with random float32 weights, the same for the same arguments."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    if name == "bert":
        return AutoModelForSequenceClassification.from_config(config)
    if name == "t5":
        return AutoModelForSeq2SeqLM.from_config(config)
    return AutoModelForCausalLM.from_config(config)


def batches(name: str, count: int, rows: int, length: int = 24) -> list[dict[str, Tensor]]:
    """Global batches: unequal numbers of counted targets per row, padding at the end of some rows."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 5 :] = 0
        if name == "bert":
            labels = torch.randint(0, 3, (rows,), generator=generator)
        else:
            labels = ids.masked_fill(mask == 0, -100)
            labels[rows - 1, : length // 3] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found
