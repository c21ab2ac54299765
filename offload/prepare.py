"""Before anything is written: the model on meta, its units, the workload they make, and the plan."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

from offload import heap, models, rates
from offload.compiled import refuse_without_compilers
from offload.config import Config
from offload.device import keep_to_the_plan, optimizer_threads
from offload.errors import ConfigError, OffloadError
from offload.head_loss import HeadLoss, find_head
from offload.host_tiers import host_tiers, with_rates
from offload.io import HostTier
from offload.planner import Budgets, Hardware, Plan, UnitProfile, Workload, ZerothOrder, make_plan, probe
from offload.planner.memory import PROGRAM_RUN
from offload.planner.micro_batch import largest_that_pays, noted
from offload.planner.profile import profile_model
from offload.planner.timed import timed
from offload.planner.tracer import Head
from offload.units import Unit, find_units
from offload.zo_formats import freeze_unquantized
from offload.zo_pieces import Pieces, make_pieces

# What is planned for when the config has no data section: batches then come from the caller.
DEFAULT_SEQUENCE_LENGTH = 1024
# Planned for where the length of the run follows from the data (`train.epochs`).
UNKNOWN_STEPS = 1_000_000
# GPU memory that `memory.gpu: auto` leaves to the CUDA context and libraries.
GPU_ROOM = 1 << 30
_DTYPES: dict[torch.dtype, Literal["bfloat16", "float16", "float32"]] = {
    torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32",
}  # fmt: skip


@dataclass
class Prepared:
    """A model cut into units and a plan for it; nothing is written yet.

    `config` is the one that was given, but for `train.micro_batch_size: auto`, which is the planner's choice here.
    """

    config: Config
    model: nn.Module
    units: list[Unit]
    workload: Workload
    hardware: Hardware
    plan: Plan
    device: str
    dtype: torch.dtype
    budgets: Budgets  # bytes, `auto` resolved
    tiers: dict[str, HostTier]  # host memories that homes and activations may lie in, by name
    zo: Pieces | None = None  # train.method zo: how weights rest, and the arithmetic on them

    @property
    def store_budgets(self) -> tuple[tuple[str, int], ...]:
        """Bytes per store path."""
        return self.budgets.nvme

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
    if cfg.train.compile and hardware is None:
        refuse_without_compilers(device)
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
    if cfg.train.method == "zo" and cfg.zo is not None and cfg.zo.variant == "qzo":
        freeze_unquantized(model)
    units = find_units(model)
    zo = make_pieces(cfg, dtype, device) if cfg.train.method == "zo" else None
    here = hardware is None
    if hardware is None:
        optimizer = partial(rates.adamw, threads=optimizer_threads(device))
        paths = [Path(p.path) for p in cfg.store_paths()]
        # On a CPU no unit lives on the device: its memory is RAM, and the copies that would be spared are cheap.
        on_device = rates.adamw_on_device if device == "cuda" else None
        measured = probe(device, paths, adamw=optimizer, adamw_device=on_device)
        hardware = rates.with_known_bits(measured, device)
    tiers = host_tiers(cfg.memory.cxl, here)
    hardware = with_rates(hardware, tiers.get("cxl"), here)
    budgets, machine = _budgets(cfg, hardware, device), hardware
    known: dict[int, Workload] = {}

    def workload_of(rows: int) -> Workload:
        if rows not in known:
            known[rows] = _workload(cfg, model, units, dtype, device, budgets, machine if here else None, zo, rows)
        return known[rows]

    size = cfg.train.micro_batch_size
    rows = size if size != "auto" else largest_that_pays(
        cfg.train.global_batch_size, lambda n: make_plan(workload_of(n), budgets, machine, "greedy")
    )  # fmt: skip
    workload = workload_of(rows)
    if here and device == "cpu":
        left = heap.left_by_planning() + PROGRAM_RUN
        workload = replace(workload, program_bytes=max(workload.program_bytes, left))
    plan = make_plan(workload, budgets, hardware, cfg.planner.solver, cfg.planner.time_limit)
    if "cxl" in tiers:
        plan = replace(plan, notes=(*plan.notes, f"CXL memory: {tiers['cxl'].describe()}"))
    if size == "auto":
        plan = noted(plan, cfg.train.global_batch_size, rows)
        cfg = cfg.with_micro_batch_size(rows)
    workload = workload.in_chunks(plan.head_chunks) if plan.head_chunks else workload
    return Prepared(cfg, model, units, workload, hardware, plan, device, dtype, budgets, tiers, zo)


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


def _workload(
    cfg: Config,
    model: nn.Module,
    units: list[Unit],
    dtype: torch.dtype,
    device: str,
    budgets: Budgets,
    here: Hardware | None,
    zo: Pieces | None,
    rows: int,
) -> Workload:
    """The step's workload with micro-batches of `rows`; on this machine (`here`) its units are timed, for another one
    they are counted."""
    integer = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if integer:
        raise ConfigError(
            f"model: {integer[0]} holds integers; quantized models cannot be trained here, load it in bfloat16"
        )
    length = _sequence_length(cfg, model)
    modules = [(u.name, u.kind, u.modules) for u in units]
    backward = zo is None
    profile = profile_model(
        model, modules, micro_batch=rows, sequence_length=length, dtype=dtype, device=device, backward=backward,
        head=_head(cfg, model, units) if backward else None, whole_rows=cfg.data is not None and cfg.data.whole_rows,
    )  # fmt: skip
    if here is not None:
        profile = timed(
            profile, model, modules, here,
            micro_batch=rows, sequence_length=length, dtype=dtype, device=device, backward=backward,
            budget=budgets.cpu if device == "cpu" else budgets.gpu,
        )  # fmt: skip
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
                cost.saved if backward else (),
                cost.forward_seconds,
                cost.backward_seconds,
                cost.workspace_kept,
                cost.workspace_graph,
                cost.workspace_unsaved,
            )
        )
    workload = Workload(
        tuple(profiles),
        micro_batches=-(-cfg.train.global_batch_size // rows),
        micro_batch=rows,
        sequence_length=length,
        dtype=_DTYPES[dtype],
        clipping=cfg.train.max_grad_norm is not None and zo is None,
        commit_every=cfg.train.commit_every,
        device="cuda" if device == "cuda" else "cpu",
        steps=UNKNOWN_STEPS if cfg.train.steps is None else max(1, cfg.train.steps),
        shared_bytes=profile.shared_bytes,
        activations="plan" if cfg.planner.activations == "auto" and zo is None else "recompute",
        notes=tuple(profile.notes),
        logits_bytes=profile.logits_bytes,
        zo=_zeroth_order(zo) if zo else None,
    )
    chunks = cfg.train.head_chunks
    return workload if chunks == "auto" or not profile.logits_bytes else workload.in_chunks(int(chunks))


def _head(cfg: Config, model: nn.Module, units: list[Unit]) -> Head | None:
    """The head to trace together with the loss. Its gradient goes to a slot that the plan reserves apart."""
    module = find_head(model, units) if cfg.train.head_chunks != 0 else None
    if module is None:
        return None
    # Its own weight stands for the slot; a sum being there already needs the more memory of the two.
    return module, HeadLoss(1, lambda p: (p.detach(), True), strict=True, sample=True).logits


def _zeroth_order(pieces: Pieces) -> ZerothOrder:
    """What the planner has to know of a zeroth-order step."""
    samples, tries = pieces.variant.zo.samples, pieces.variant.tries_both_ways
    roles = tuple((role.name, role.nbytes, role.per, role.written) for role in pieces.roles)
    candidates = 3 if tries else 0
    active = 1 / pieces.variant.zo.blocks if pieces.variant.zo.variant == "block" else 1.0
    walks = 2 if tries else 1
    return ZerothOrder(roles, 2 * samples + candidates, max(2 * samples, candidates), walks, samples, active)


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
    cxl = cfg.memory.cxl
    if cfg.memory.cpu == "auto":  # an emulated tier takes its bytes from RAM
        cpu = max(0, hardware.cpu_bytes - (cxl.size if cxl and cxl.emulate else 0))
    else:
        cpu = int(cfg.memory.cpu)
    if cfg.memory.gpu != "auto":
        gpu = int(cfg.memory.gpu)
    else:  # on the CPU the device's arena is part of the RAM budget
        gpu = cpu if device == "cpu" else max(0, hardware.gpu_bytes - GPU_ROOM)
    return Budgets(gpu, cpu, cxl.size if cxl else 0, tuple(nvme))


def _free_disk(path: Path) -> int:
    """Bytes free on the file system of `path`, or of its nearest parent that exists, less a reserve of 2 %."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = psutil.disk_usage(os.fspath(path))
    return max(0, usage.free - usage.total // 50)
