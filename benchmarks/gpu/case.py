"""One case: which system, which model, on how much text at a time, within which budgets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.step.setting import BETAS, EPS, LR, WEIGHT_DECAY

if TYPE_CHECKING:
    from torch import Tensor

GIB = 1 << 30
NEVER = 1_000_000  # steps between commits: what lives in RAM is not written within a benchmark
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {**_LLAMA, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 176, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 512},
    "tiny": {**_LLAMA, "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1408,
             "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096},
    "1b": {**_LLAMA, "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 5632,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "qwen3-4b": {"model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                 "tie_word_embeddings": True, "rope_theta": 1e6},
    "llama-3.1-8b": {**_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5},
}  # fmt: skip
# Of OPT: hidden size, layers, heads, and the GPU memory (GB) that ZO2 publishes for it.
OPT = {"toy": (64, 3, 4, None), "1.3b": (2048, 24, 32, 3.75), "6.7b": (4096, 32, 32, 4.99),
       "13b": (5120, 40, 40, 6.18), "30b": (7168, 48, 56, 8.86)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A case. Sizes in bytes; `sequence` tokens per row; `cap` bounds the device memory of the process.

    `system` is "ours" or the name of a peer; `task` what it does: "train", "exact", "zo" or "longest".
    `place`: "auto" (the planner's choice), "ram" (the same, but no unit lives on the device), "nvme" (nor does any
    state fit into the RAM budget) or "device" (all units live there).
    `activations`: "auto", "recompute", "swap" (to RAM) or "swap-nvme", all of every block.
    `fits`: halve the micro-batch, for as many more, until the plan fits.
    """

    name: str
    shape: str
    sequence: int
    device: str
    cap: int
    text: str
    task: str = "train"
    system: str = "ours"
    dtype: str = "bfloat16"
    micro_batch: int = 1
    micro_batches: int = 1
    clip: float | None = None
    dropout: float = 0.0
    place: str = "auto"
    activations: str = "auto"
    compile: bool = False
    cpu: int | str = "auto"
    warm: int = 1
    steps: int = 3
    profile: bool = False
    sparse: bool = False
    fits: bool = False
    seed: int = 17
    model: dict[str, Any] = field(default_factory=dict)  # keys of the transformers config that differ

    @property
    def rows(self) -> int:
        """Rows of a global batch."""
        return self.micro_batch * self.micro_batches

    @property
    def max_grad_norm(self) -> float | None:
        """The clipping limit, as the peers' settings call it."""
        return self.clip

    @property
    def largest_parameter(self) -> int:
        """Elements of the embedding, which no other parameter exceeds."""
        shape = self.architecture()
        return int(shape["vocab_size"] * shape["hidden_size"])

    def architecture(self) -> dict[str, Any]:
        """The model as a transformers configuration."""
        longest = max(2048, self.sequence)
        rest: dict[str, Any] = {"max_position_embeddings": longest, "use_cache": False}
        if self.shape.startswith("opt-"):
            hidden, layers, heads, _ = OPT[self.shape.removeprefix("opt-")]
            shape = {
                "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
                "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "vocab_size": 50272, "dropout": self.dropout,
            }  # fmt: skip
        else:
            shape = {**SHAPES[self.shape], "attention_dropout": self.dropout}
        return {**shape, **rest, **self.model}

    def build(self, device: str, dtype: Any) -> Any:
        """The model with random weights on `device`."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        described = self.architecture()
        config = AutoConfig.for_model(described.pop("model_type"), **described)
        torch.manual_seed(self.seed)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).train()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The global batch of one step: int64 [rows, sequence], the text's bytes as tokens, from its start again when
        it ends."""
        import torch

        text = torch.frombuffer(bytearray(Path(self.text).read_bytes()), dtype=torch.uint8).long()
        count = self.rows * self.sequence
        at = (torch.arange(count) + step * count) % len(text)
        ids = text[at].view(self.rows, self.sequence)
        return {"input_ids": ids, "labels": ids.clone()}

    def config(self, directory: Path) -> dict[str, Any]:
        """The engine's configuration; batches and, where there is one, the model are given to it."""
        nvme = {"path": str(directory / "store"), "size": "4TiB" if self.sparse else "auto"}
        found: dict[str, Any] = {
            "model": {"architecture": self.architecture(), "dtype": self.dtype},
            "data": {"path": self.text, "format": "text", "tokenizer": "bytes", "sequence_length": self.sequence},
            "train": {
                "steps": 1000, "micro_batch_size": self.micro_batch, "global_batch_size": self.rows,
                "max_grad_norm": self.clip, "compile": self.compile, "commit_every": NEVER, "seed": self.seed,
                "optimizer": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
                "schedule": {"name": "constant", "warmup_steps": 0},
            },
            "memory": {"device": self.device, "gpu": self.cap, "cpu": self.cpu, "nvme": [nvme]},
            "planner": {"activations": "recompute" if self.activations == "recompute" else "auto"},
            "output": str(directory / "run"),
        }  # fmt: skip
        if self.task == "zo":
            found["train"] |= {"method": "zo", "max_grad_norm": 1.0}
            found["zo"] = {"eps": 1e-3}
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Case:
        """The case of a job's file."""
        return cls(**json.loads(path.read_text())["case"])
