"""A minimal transformers model whose block is given: for what a real architecture does only now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY, WIDTH, DEPTH = 64, 32, 3


class ToyConfig(PreTrainedConfig):
    model_type = "offload_toy"


class Toy(PreTrainedModel):
    """Embedding, blocks, norm, head; `around` runs the blocks (default: one after the other)."""

    config_class = ToyConfig

    def __init__(self, block: Callable[[], nn.Module], around: Callable[..., Tensor] | None = None) -> None:
        super().__init__(ToyConfig())
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self._around = around

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> CausalLMOutput:
        hidden = self.embed_tokens(input_ids)
        if self._around is not None:
            hidden = self._around(self, hidden, **kwargs)
        else:
            for layer in self.layers:
                hidden = layer(hidden)
        logits = self.lm_head(self.norm(hidden))
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))


class Block(nn.Module):
    """A residual block with a buffer, an attribute and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(hidden)))


def make(block: Callable[[], nn.Module] = Block, around: Callable[..., Tensor] | None = None) -> Toy:
    torch.manual_seed(0)
    return Toy(block, around)


def batches(count: int, rows: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, VOCABULARY, (rows, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x.roll(-1, 1)} for x in ids]
