"""Before anything is written: the model on meta, its units, the workload they make, and the plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from offload import models
from offload.config import Config
from offload.device import keep_to_the_plan
from offload.errors import ConfigError, OffloadError
from offload.planner import Budgets, Hardware, Plan, UnitProfile, Workload, make_plan, probe
from offload.planner.profile import profile_model
from offload.units import Unit, find_units

# What is planned for when the config has no data section: batches then come from the caller.
DEFAULT_SEQUENCE_LENGTH = 1024
# Planned for where the length of the run follows from the data (`train.epochs`).
UNKNOWN_STEPS = 1_000_000
# GPU memory that `memory.gpu: auto` leaves to the CUDA context and libraries.
GPU_ROOM = 1 << 30


@dataclass
class Prepared:
    """A model cut into units and a plan for it; nothing is written yet."""

    config: Config
    model: nn.Module
    units: list[Unit]
    workload: Workload
    hardware: Hardware
    plan: Plan
    device: str
    dtype: torch.dtype
    store_budgets: tuple[tuple[str, int], ...]  # bytes per store path, `auto` resolved

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What a step's gradients are summed in: the compute dtype for one micro-batch, else float32."""
        return self.dtype if self.workload.micro_batches == 1 else torch.float32


def prepare(cfg: Config, model: nn.Module | None = None, hardware: Hardware | None = None) -> Prepared:
    """Build (or take) the model, cut it into units and plan. Writes nothing.

    Args:
        model: a model that is in memory or on meta; None builds the one the config describes, on meta.
        hardware: plan for this machine (a preset) instead of the one at hand.
    Raises ConfigError for what the config gets wrong; a plan that does not fit is returned with `fits` false.
    """
    if model is None and cfg.model is None:
        raise ConfigError("model: missing; give model.path, model.architecture, or a model to offload.wrap")
    device = device_name(cfg, hardware)
    if device == "cpu":
        keep_to_the_plan()
    if model is None:
        assert cfg.model is not None
        model = models.build(cfg.model)
    elif getattr(model, "offload_engine", None) is not None:
        raise OffloadError("this model belongs to an engine already; close that one, or wrap a fresh model")
    else:
        models.prepare_for_training(model)
        for module in model.modules():  # units are run again by the engine; doing it twice would only cost time
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]
    dtype = compute_dtype(cfg, model)
    units = find_units(model)
    workload = _workload(cfg, model, units, dtype, device)
    if hardware is None:
        hardware = probe(device, [Path(p.path) for p in cfg.store_paths()])
    budgets = _budgets(cfg, hardware, device)
    plan = make_plan(workload, budgets, hardware, cfg.planner.solver, cfg.planner.time_limit)
    return Prepared(cfg, model, units, workload, hardware, plan, device, dtype, budgets.nvme)


def device_name(cfg: Config, hardware: Hardware | None = None) -> str:
    """ "cuda" or "cpu": what `memory.device` says, or what there is; ConfigError for a CUDA that is not there.

    With `hardware`, what that machine has counts instead.
    """
    available = torch.cuda.is_available() if hardware is None else hardware.gpu_bytes > 0
    if cfg.memory.device == "auto":
        return "cuda" if available else "cpu"
    if cfg.memory.device == "cuda" and not available:
        raise ConfigError("memory.device: got 'cuda', but PyTorch finds no CUDA device here; accepted: 'cpu' or 'auto'")
    return cfg.memory.device


def compute_dtype(cfg: Config, model: nn.Module) -> torch.dtype:
    """`model.dtype` of the config, or, without a model section, the dtype of the given model."""
    if cfg.model is not None:
        return getattr(torch, cfg.model.dtype)
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = found.pop() if len(found) == 1 else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"model.dtype: the given model is in {dtype}; accepted: bfloat16, float32 (set model.dtype)")
    return dtype


def _workload(cfg: Config, model: nn.Module, units: list[Unit], dtype: torch.dtype, device: str) -> Workload:
    integer = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if integer:
        raise ConfigError(
            f"model: {integer[0]} holds integers; quantized models cannot be trained here, load it in bfloat16"
        )
    length = _sequence_length(cfg, model)
    profile = profile_model(
        model,
        [(u.name, u.kind, u.modules) for u in units],
        micro_batch=cfg.train.micro_batch_size,
        sequence_length=length,
        dtype=dtype,
        device=device,
    )
    profiles = []
    for unit in units:
        cost = profile.costs[unit.name]
        profiles.append(
            UnitProfile(
                unit.name,
                unit.kind,
                unit.layout.parameters,
                unit.layout.trainable_elements,
                unit.layout.frozen_elements,
                unit.held or cost.visits > 1,
                cost.forward_flops,
                cost.boundary_bytes,
                cost.workspace_forward,
                cost.workspace_backward,
                max(1, cost.visits),
                cost.kept,
            )
        )
    return Workload(
        tuple(profiles),
        micro_batches=-(-cfg.train.global_batch_size // cfg.train.micro_batch_size),
        micro_batch=cfg.train.micro_batch_size,
        sequence_length=length,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        clipping=cfg.train.max_grad_norm is not None,
        commit_every=cfg.train.commit_every,
        device="cuda" if device == "cuda" else "cpu",
        steps=UNKNOWN_STEPS if cfg.train.steps is None else max(1, cfg.train.steps),
        shared_bytes=profile.shared_bytes,
        notes=tuple(profile.notes),
    )


def _sequence_length(cfg: Config, model: nn.Module) -> int:
    if cfg.data is not None:
        return cfg.data.sequence_length
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return min(DEFAULT_SEQUENCE_LENGTH, longest) if isinstance(longest, int) else DEFAULT_SEQUENCE_LENGTH


def _budgets(cfg: Config, hardware: Hardware, device: str) -> Budgets:
    """The config's budgets; `auto` takes what the machine has free."""
    nvme = [
        (entry.path, _free_disk(Path(entry.path)) if entry.size == "auto" else int(entry.size))
        for entry in cfg.store_paths()
    ]
    cpu = hardware.cpu_bytes if cfg.memory.cpu == "auto" else int(cfg.memory.cpu)
    if cfg.memory.gpu != "auto":
        gpu = int(cfg.memory.gpu)
    else:  # on the CPU the device's arena is part of the RAM budget
        gpu = cpu if device == "cpu" else max(0, hardware.gpu_bytes - GPU_ROOM)
    return Budgets(gpu, cpu, 0, tuple(nvme))


def _free_disk(path: Path) -> int:
    """Bytes free on the file system of `path`, or of its nearest parent that exists, less a reserve of 2 %."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = psutil.disk_usage(os.fspath(path))
    return max(0, usage.free - usage.total // 50)
