"""What is trained: one Llama with random weights, random tokens with some order in them, and the sizes of a step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 352, "num_attention_heads": 4,
            "vocab_size": 512},
    "271m": {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 2816, "num_attention_heads": 16,
             "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 5632, "num_attention_heads": 32,
           "vocab_size": 32000},
}  # fmt: skip
LR, BETAS, EPS, WEIGHT_DECAY = 1.0e-4, (0.9, 0.999), 1.0e-8, 0.1


@dataclass(frozen=True)
class Setting:
    """One comparison. `steps` are measured, after `warm` that are not; `micro_batch` rows of `sequence` tokens."""

    size: str
    sequence: int = 256
    micro_batch: int = 2
    micro_batches: int = 1
    max_grad_norm: float | None = None
    warm: int = 2
    steps: int = 3
    seed: int = 17

    @property
    def key(self) -> str:
        """Tells results of one setting from those of another."""
        return f"{self.size}-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]}"

    @property
    def rows(self) -> int:
        """Rows of a global batch."""
        return self.micro_batch * self.micro_batches

    @property
    def largest_parameter(self) -> int:
        """Elements of the embedding, which no other parameter exceeds; a multiple of 1024."""
        shape = ARCHITECTURES[self.size]
        return shape["vocab_size"] * shape["hidden_size"]

    def architecture(self) -> dict[str, Any]:
        """The model as a transformers configuration."""
        shape = ARCHITECTURES[self.size]
        heads = {"num_key_value_heads": shape["num_attention_heads"]}
        longest = max(2048, self.sequence)
        rest = {"max_position_embeddings": longest, "tie_word_embeddings": False, "use_cache": False}
        return {"model_type": "llama", **shape, **heads, **rest}

    def batch(self, step: int) -> dict[str, Tensor]:
        """The global batch of one step: int64 [rows, sequence]. Small numbers are the frequent ones."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        even = torch.rand(self.rows, self.sequence, generator=generator)
        ids = (even**4 * ARCHITECTURES[self.size]["vocab_size"]).long()
        return {"input_ids": ids, "labels": ids.clone()}


def make_model(setting: Setting, directory: Path) -> None:
    """Write the model, random weights in bfloat16, as a Hugging Face directory, whole or not at all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(setting.seed)
    described = setting.architecture()
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    unfinished = directory.with_name(directory.name + ".part")
    model.save_pretrained(unfinished)
    unfinished.rename(directory)
