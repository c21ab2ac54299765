"""(b), (c) DeepSpeed on the CPU: ZeRO-3 with everything in RAM, and ZeRO-Infinity with everything on the SSD.

Gradient checkpointing has to be reentrant: with the other form the run on the SSD was seen to compute other losses,
without a word. On the SSD prefetching (`stage3_max_live_parameters` above 0) was seen to end in an assertion about
buffers. With `max_in_cpu` at 0, without which the parameters stay in RAM, so did reuse (`stage3_max_reuse_distance` at
its default, with 5 and with 8 buffers); small parameters that stay were not tried without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

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


class Sizes(Protocol):
    """What DeepSpeed has to know of a setting, here, or of a case of `benchmarks.gpu`."""

    @property
    def micro_batch(self) -> int: ...
    @property
    def micro_batches(self) -> int: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def largest_parameter(self) -> int: ...


def config(setting: Sizes, nvme: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
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
    folders = libaio.build_folders()
    if locks := [lock for folder in folders for name in NATIVE if (lock := folder / name / "lock").exists()]:
        raise RuntimeError(
            f"{', '.join(map(str, locks))} says that a part of DeepSpeed is being built; if no build is running, one "
            "was killed: remove the file"
        )


def _imported(device: str) -> Any:
    """The package, with this process as a world of its own: it reads the environment when it is imported."""
    refuse_locks()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "RANK": "0", "LOCAL_RANK": "0",
                   "WORLD_SIZE": "1"}  # fmt: skip
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    return deepspeed


def build() -> None:
    """Compile DeepSpeed's native parts, once (minutes); what cannot be had raises."""
    _imported("cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    CPUAdamBuilder().load()
    AsyncIOBuilder().load()


def started(device: str, setting: Sizes, nvme: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
    """Make this process a world of its own, before the model is made; returns its configuration (see `config`)."""
    deepspeed = _imported(device)
    if nvme is not None:
        nvme.mkdir(parents=True)
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
    return config(setting, nvme, changes)


def stepping(model: Any, setting: Sizes, settings: dict[str, Any]) -> Callable[[dict[str, Tensor]], float]:
    """A function that takes one optimizer step of a partitioned model on a global batch and returns its loss."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())

    def step(batch: dict[str, Tensor]) -> float:
        total = 0.0
        for micro in micro_batches(batch, setting.micro_batch):
            loss = engine(**micro).loss
            total += loss.item() / setting.micro_batches
            engine.backward(loss)
            engine.step()
        return total

    return step


@contextmanager
def opened(
    setting: Setting, model_dir: str, nvme: Path | None, changes: dict[str, Any]
) -> Iterator[Callable[[dict[str, Tensor]], float]]:
    """A function that takes one optimizer step on a global batch and returns its loss."""
    settings = started("cpu", setting, nvme, changes)
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    partitioned = HfDeepSpeedConfig(settings)  # while it lives, from_pretrained partitions what it loads
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    yield stepping(model, setting, settings)
    del partitioned
