"""Other systems on the same model, text and sizes: plain PyTorch, DeepSpeed, torchao, MegaTrain, MeZO in memory.

Each raises Missing where it is not installed. Gradient checkpointing is on wherever activations are not the system's
own business, reentrant (with the other form DeepSpeed's run on the SSD was seen to compute other losses).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Case
from benchmarks.step import zero
from benchmarks.step.plain import micro_batches
from benchmarks.step.setting import BETAS, EPS, LR, WEIGHT_DECAY

Step = Callable[[dict[str, Tensor]], float]
_HYPER: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


class MissingError(Exception):
    """The system cannot be run here; the message says why."""


def train(case: Case, directory: Path, tell: Any) -> dict[str, Any]:
    """The case's steps with its system; peaks of the allocator and of the driver."""
    from benchmarks.gpu.ours import DriverPeak, _peak_rss

    cuda = case.device == "cuda"
    if cuda:
        torch.ones(1, device="cuda")
    with DriverPeak(case.device) as driver:
        step, parameters = SYSTEMS[case.system](case, directory)
        tell("ready")
        for i in range(case.warm + case.steps):
            begin = time.perf_counter()
            loss = step({name: x.to(case.device) for name, x in case.batch(i).items()})
            if cuda:
                torch.cuda.synchronize()
            tell("step", step=i, loss=loss, seconds=time.perf_counter() - begin, tokens=case.rows * case.sequence)
        tell("finished", peak_rss=_peak_rss())
    found = {"parameters": parameters}
    if cuda:
        found["driver_peak_bytes"] = driver.peak
        found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
        found["allocator_peak_bytes"] = torch.cuda.max_memory_reserved()
    return found


def plain(case: Case, directory: Path) -> tuple[Step, int]:
    """Everything on the device: bfloat16 weights, float32 master and moments, fused AdamW."""
    model = _checkpointed(case.build(case.device, torch.bfloat16))
    weights = list(model.parameters())
    masters: list[Tensor] = [nn.Parameter(p.detach().float()) for p in weights]
    optimizer = torch.optim.AdamW(masters, fused=True, **_HYPER)

    def step(batch: dict[str, Tensor]) -> float:
        total = _accumulate(model, case, batch)
        for p, master in zip(weights, masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return total

    return step, sum(p.numel() for p in weights)


def deepspeed_cpu(case: Case, directory: Path) -> tuple[Step, int]:
    """ZeRO-3 with parameters and optimizer in RAM."""
    return _deepspeed(case, None)


def deepspeed_nvme(case: Case, directory: Path) -> tuple[Step, int]:
    """ZeRO-Infinity: parameters and optimizer on the SSD."""
    return _deepspeed(case, directory / "nvme")


def _deepspeed(case: Case, nvme: Path | None) -> tuple[Step, int]:
    _need("deepspeed")
    changes: dict[str, Any] = {}
    if case.device == "cuda":  # the defaults for prefetching and small parameters, and page-locked memory
        changes = {"zero_optimization": {"offload_param": {"pin_memory": True},
                                         "offload_optimizer": {"pin_memory": True}}}  # fmt: skip
    settings = zero.started(case.device, case, nvme, changes)
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        model = _checkpointed(case.build("cpu", torch.bfloat16))
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return zero.stepping(model, case, settings), count


def torchao(case: Case, directory: Path) -> tuple[Step, int]:
    """Weights on the device, optimizer and gradients in RAM; its states have the parameters' dtype, bfloat16."""
    _need("torchao")
    from torchao.optim import CPUOffloadOptimizer

    model = _checkpointed(case.build(case.device, torch.bfloat16))
    # With its gradients offloaded a second micro-batch would not be added: they stay on the device for M > 1.
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=case.micro_batches == 1, fused=True, **_HYPER
    )

    def step(batch: dict[str, Tensor]) -> float:
        total = _accumulate(model, case, batch)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step, sum(p.numel() for p in model.parameters())


def megatrain(case: Case, directory: Path) -> tuple[Step, int]:
    """MegaTrain (its package is called infinity): everything in RAM, layer by layer over the device."""
    _need("infinity", "MegaTrain (package infinity)")
    from infinity import CPUMasterConfig, CPUMasterModel

    config = CPUMasterConfig(
        model_name=case.shape, dataset_path="unused", max_seq_len=case.sequence, batch_size=case.micro_batch,
        gradient_accumulation_steps=case.micro_batches, num_steps=case.steps, learning_rate=LR,
        weight_decay=WEIGHT_DECAY, device=0, dtype=torch.bfloat16, attn_implementation="sdpa",
    )  # fmt: skip
    model = CPUMasterModel(case.build("cpu", torch.bfloat16), config)
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(model.get_parameters(), adamw_mode=True, **_HYPER)
    else:
        optimizer = torch.optim.AdamW(model.get_parameters(), fused=True, **_HYPER)

    def step(batch: dict[str, Tensor]) -> float:
        total = 0.0
        for micro in micro_batches(batch, case.micro_batch):
            loss, *_ = model.forward_and_backward(
                micro["input_ids"], torch.ones_like(micro["input_ids"]), micro["labels"]
            )
            total += float(loss) / case.micro_batches
        optimizer.step()
        sync = getattr(model, "_sync_params_to_gpu", None)  # of versions that keep copies on the device
        if sync is not None:
            sync()
        optimizer.zero_grad()
        model.zero_grad()
        return total

    return step, sum(p.numel() for p in model.get_parameters())


def mezo(case: Case, directory: Path) -> tuple[Step, int]:
    """MeZO with the model on the device: perturbed in place, noise drawn again from its seed."""
    model = case.build(case.device, getattr(torch, case.dtype))
    weights = list(model.parameters())
    draw = torch.Generator(case.device)

    def move(seed: int, scale: float) -> None:
        draw.manual_seed(seed)
        for p in weights:
            p.data.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype, device=p.device), alpha=scale)

    @torch.no_grad()
    def step(batch: dict[str, Tensor]) -> float:
        seed, losses = torch.randint(1 << 40, ()).item(), []
        for scale in (1e-3, -2e-3):
            move(int(seed), scale)
            parts = micro_batches(batch, case.micro_batch)
            losses.append(sum(model(**micro).loss / case.micro_batches for micro in parts).item())
        move(int(seed), 1e-3)
        move(int(seed), -LR * (losses[0] - losses[1]) / 2e-3)
        return float(sum(losses) / 2)

    return step, sum(p.numel() for p in weights)


SYSTEMS: dict[str, Callable[[Case, Path], tuple[Step, int]]] = {
    "plain": plain, "deepspeed-cpu": deepspeed_cpu, "deepspeed-nvme": deepspeed_nvme, "torchao": torchao,
    "megatrain": megatrain, "mezo": mezo,
}  # fmt: skip


def _need(package: str, name: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingError(f"{name or package} is not installed")


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model


def _accumulate(model: nn.Module, case: Case, batch: dict[str, Tensor]) -> float:
    total = 0.0
    for micro in micro_batches(batch, case.micro_batch):
        loss = model(**micro).loss / case.micro_batches
        total += loss.item()
        loss.backward()
    return total
