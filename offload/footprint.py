"""What a process takes before the model matters: `python -m offload.footprint MODEL_TYPE` prints it in MiB.

A child process imports what a run imports and trains a two-layer toy of the architecture for one step in plain
PyTorch; its peak PSS is sampled from here. This process imports no framework itself, since shared pages count by half
for each of two processes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from offload import memory
from offload.errors import OffloadError

INTERVAL = 0.005  # seconds between samples

# What makes an architecture small, under the names that transformers' configurations use.
_SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "intermediate_size": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "d_ff": 128, "ffn_dim": 128,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "d_kv": 16, "word_embed_proj_dim": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 128,
    "n_positions": 128, "layer_types": None, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def measure(model_type: str) -> int:
    """Peak PSS in bytes of a process that trains a toy `model_type`. Raises RuntimeError with its error output."""
    command = [sys.executable, "-m", "offload.footprint", "--toy", model_type]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        peak = 0
        while child.poll() is None:
            peak = max(peak, memory.tree_pss(child.pid))
            time.sleep(INTERVAL)
        errors = child.stderr.read() if child.stderr else ""
    if child.returncode:
        raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit code {child.returncode}")
    return peak


def toy(model_type: str) -> None:
    """Import what a run imports; one optimizer step of a two-layer `model_type` in plain PyTorch, on CUDA if there is
    a device."""
    import torch
    from transformers import PreTrainedConfig

    import offload.train  # noqa: F401  (what the run imports)
    from offload import adamw_jit, models
    from offload.config_sections import ModelConfig

    adamw_jit.load()  # a compiler, where one is installed
    defaults = models.config_from_architecture({"model_type": model_type})
    parts = {name: getattr(defaults, name, None) for name in getattr(defaults, "sub_configs", {})}
    small: dict[str, Any] = {k: _small(v) for k, v in parts.items() if isinstance(v, PreTrainedConfig)}
    small = small or _small(defaults)
    described = ModelConfig(architecture={"model_type": model_type, **small}, dtype="float32")
    on_meta = models.build(described)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the driver and its libraries take RAM too
    model: Any = type(on_meta)(on_meta.config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.arange(64, device=device).remainder(500).reshape(1, 64)
    decoder = {"decoder_input_ids": ids} if on_meta.config.is_encoder_decoder else {}
    loss = model(input_ids=ids, labels=ids, **decoder).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _small(config: Any) -> dict[str, Any]:
    """The settings of `_SMALL` that this configuration has and lets be set."""
    settable = {
        k: v
        for k, v in _SMALL.items()
        if hasattr(config, k) and getattr(getattr(type(config), k, None), "fset", True) is not None
    }
    if hasattr(config, "qk_rope_head_dim"):  # the size of a head is then a sum of parts that stay as they are
        settable.pop("head_dim", None)
        settable["num_key_value_heads"] = settable["num_attention_heads"]
    return settable


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "--toy":
        try:
            toy(arguments[1])
        except OffloadError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m offload.footprint MODEL_TYPE   (llama, gpt2, ...)", file=sys.stderr)
        return 2
    try:
        print(-(-measure(arguments[0]) // 2**20))
    except RuntimeError as error:
        print(f"offload.footprint: {arguments[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
