"""(b), (c) DeepSpeed on the CPU: ZeRO-3 with everything in RAM, and ZeRO-Infinity with everything on the SSD.

Gradient checkpointing has to be reentrant: with the other form the run on the SSD was seen to compute other losses,
without a word. On the SSD prefetching (`stage3_max_live_parameters` above 0) was seen to end in an assertion about
buffers. With `max_in_cpu` at 0, without which the parameters stay in RAM, so did reuse (`stage3_max_reuse_distance` at
its default, with 5 and with 8 buffers); small parameters that stay were not tried without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from offload.io import libaio
from torch import Tensor

from benchmarks.step.plain import micro_batches
from benchmarks.step.setting import BETAS, EPS, LR, WEIGHT_DECAY, Setting

OFF = (
    "stage3_max_live_parameters",
    "stage3_prefetch_bucket_size",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
PARAMETER_BUFFERS, STATE_BUFFERS = 5, 4  # DeepSpeed's defaults
NATIVE = ("cpu_adam", "async_io", "pin_memory", "deepspeed_shm_comm")  # the parts that it compiles and loads here


def config(setting: Setting, nvme: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration; `changes` are merged over it."""
    parameters: dict[str, Any] = {"device": "cpu", "pin_memory": False}
    optimizer: dict[str, Any] = {"device": "cpu", "pin_memory": False}
    if nvme is not None:
        parameters |= {"device": "nvme", "nvme_path": str(nvme), "max_in_cpu": 0}
        parameters |= {"buffer_count": PARAMETER_BUFFERS, "buffer_size": setting.largest_parameter}
        optimizer |= {"device": "nvme", "nvme_path": str(nvme), "buffer_count": STATE_BUFFERS}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setting.micro_batch,
        "gradient_accumulation_steps": setting.micro_batches,
        "gradient_clipping": setting.max_grad_norm or 0.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 20_000_000,
            "offload_param": parameters,
            "offload_optimizer": optimizer,
            **(dict.fromkeys(OFF, 0) if nvme is not None else {}),
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True},
        "steps_per_print": 1_000_000,
    }
    return _merged(made, changes)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def refuse_locks() -> None:
    """Raise where a build of one of the native parts is under way, or was killed: PyTorch waits for it without end."""
    if locks := [lock for folder in libaio._folders() for name in NATIVE if (lock := folder / name / "lock").exists()]:
        raise RuntimeError(
            f"{', '.join(map(str, locks))} says that a part of DeepSpeed is being built; if no build is running, one "
            "was killed: remove the file"
        )


def build() -> None:
    """Compile DeepSpeed's native parts, once (minutes); what cannot be had raises."""
    refuse_locks()
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    CPUAdamBuilder().load()
    AsyncIOBuilder().load()


@contextmanager
def opened(
    setting: Setting, model_dir: str, nvme: Path | None, changes: dict[str, Any]
) -> Iterator[Callable[[dict[str, Tensor]], float]]:
    """A function that takes one optimizer step on a global batch and returns its loss."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    if nvme is not None:
        nvme.mkdir(parents=True)
    settings = config(setting, nvme, changes)
    deepspeed.init_distributed("gloo")
    partitioned = HfDeepSpeedConfig(settings)  # while it lives, from_pretrained partitions what it loads
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())

    def step(batch: dict[str, Tensor]) -> float:
        total = 0.0
        for micro in micro_batches(batch, setting.micro_batch):
            loss = engine(**micro).loss
            total += loss.item() / setting.micro_batches
            engine.backward(loss)
            engine.step()
        return total

    yield step
    del partitioned
