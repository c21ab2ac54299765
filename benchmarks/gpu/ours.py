"""This engine under a case's plan: what its steps took, moved and held, beside what was planned."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from offload.io.directfile import DirectFile
from offload.planner.activations import can_choose
from offload.planner.choice import may_live_on_device, to_device
from offload.planner.decide import as_plan, decide
from offload.planner.memory import bare_ram
from offload.planner.prediction import predict
from torch import nn

import offload
from benchmarks.gpu import profiled
from benchmarks.gpu.case import Case
from offload.engine import Engine, Prepared, prepare


@contextmanager
def opened(case: Case, cfg: offload.Config, model: nn.Module | None = None) -> Iterator[Engine]:
    """The engine under the plan that the case asks for. Raises DoesNotFit."""
    if case.sparse:  # the disk has less room than the durable copies would take: only what is written takes any
        DirectFile.reserve = _extend  # type: ignore[assignment]
    prepared = planned(case, cfg, model)
    if case.place == "nvme":
        cpu, model = bare_ram(prepared.workload, prepared.plan), model if model is not None else prepared.model
        for _ in range(3):  # with less RAM other slots and activations are chosen, which may take somewhat more
            cfg = offload.Config.load(cfg, [f"memory.cpu={cpu}"])
            prepared = planned(case, cfg, model)
            cpu += prepared.plan.shortfall_bytes.get("cpu", 0)
    with Engine.create(cfg, prepared=prepared) as engine:
        yield engine


def fitting(case: Case, directory: Path) -> Case:
    """The case with the largest micro-batch, its own or a power of two smaller, whose plan fits; the same rows."""
    while case.micro_batch > 1 and not prepare(offload.Config.load(case.config(directory))).plan.fits:
        rows = case.micro_batch // 2
        case = replace(case, micro_batch=rows, micro_batches=case.rows // rows)
    return case


def planned(case: Case, cfg: offload.Config, model: nn.Module | None = None) -> Prepared:
    """The run under the case's budgets, its units and its activations where the case wants them."""
    prepared = prepare(cfg, model)
    if case.place == "device":
        return on_device(prepared)
    if case.place != "auto":
        prepared = streamed(prepared)
    return swapped(prepared, case.activations == "swap-nvme") if case.activations.startswith("swap") else prepared


def _extend(file: DirectFile, nbytes: int) -> None:
    """In place of reserving space: a file with holes."""
    with open(file.path, "r+b") as raw:
        raw.truncate(nbytes)


def on_device(prepared: Prepared) -> Prepared:
    """The run with every unit on the device, whatever the planner would choose."""
    hardware = replace(prepared.hardware, adamw_device=prepared.hardware.adamw_device or 1.0)
    w, mix = prepared.workload, decide(prepared.workload, prepared.budgets, hardware)
    units = tuple(
        to_device(c) if may_live_on_device(u, w, hardware) else c
        for u, c in zip(w.units, mix.choice.units, strict=True)
    )
    choice = replace(mix.choice, units=units)
    plan = as_plan(replace(mix, choice=choice, prediction=predict(w, hardware, choice)), 0.0)
    return replace(prepared, plan=plan)


def streamed(prepared: Prepared) -> Prepared:
    """The run with no unit on the device."""
    if not any(u.placement.get("exp_avg") == "gpu" for u in prepared.plan.units):
        return prepared
    hardware = replace(prepared.hardware, adamw_device=0.0)
    return replace(
        prepared, hardware=hardware, plan=as_plan(decide(prepared.workload, prepared.budgets, hardware), 0.0)
    )


def swapped(prepared: Prepared, to_nvme: bool) -> Prepared:
    """The run with all inner activations of every block moved out, whatever the planner would choose."""
    w = replace(prepared.workload, activations="plan")
    mix = decide(w, prepared.budgets, prepared.hardware)
    share: dict[str, Any] = {"keep": 0.0, "recompute": 0.0, "swap_cpu": float(not to_nvme), "swap_nvme": float(to_nvme)}
    units = tuple(
        replace(c, **share) if can_choose(u) else c for u, c in zip(w.units, mix.choice.units, strict=True)
    )
    choice = replace(mix.choice, units=units)
    plan = as_plan(replace(mix, choice=choice, prediction=predict(w, prepared.hardware, choice)), 0.0)
    return replace(prepared, workload=w, plan=plan)


def described(plan: Any) -> dict[str, Any]:
    """What was planned, in short: peaks and seconds, and how many units' shares are kept, swapped or recomputed."""
    shares = [unit.activations for unit in plan.units]
    return {
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "step_seconds": plan.step_seconds,
        "lane_seconds": plan.lane_seconds,
        "activations": {name: round(sum(s[name] for s in shares), 2) for name in shares[0]},
        "placements": sorted({tier for unit in plan.units for tier in unit.placement.values()}),
    }


class DriverPeak:
    """The device memory in use by all programs, as the driver counts it, sampled; a context manager.

    `peak`: bytes above what there was when it was made.
    """

    def __init__(self, device: str) -> None:
        self.peak = 0
        self._cuda = device == "cuda"
        self._stop = threading.Event()
        self._before = self._used()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _used(self) -> int:
        if not self._cuda:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._used() - self._before)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def train(case: Case, directory: Path, tell: Any) -> dict[str, Any]:
    """The case's steps, by either method; `tell` hears of each."""
    cuda = case.device == "cuda"
    case = fitting(case, directory) if case.fits else case
    cfg = offload.Config.load(case.config(directory))
    found: dict[str, Any] = {"allocator": [], "micro_batch": case.micro_batch}
    with ExitStack() as stack:
        if cuda:
            torch.ones(1, device="cuda")  # the context is not counted
        driver = stack.enter_context(DriverPeak(case.device))
        engine = stack.enter_context(opened(case, cfg))
        tell("ready")
        rows = []
        for step in range(case.warm + case.steps):
            last = step == case.warm + case.steps - 1
            with profiled.recorded(engine._trace, directory, cuda and case.profile and last) as record:
                result = engine.step(case.batch(step))
            tell("step", step=step, loss=result.loss, seconds=result.seconds, tokens=result.tokens)
            rows.append(engine.run.last_row)
            if cuda:
                stats = torch.cuda.memory_stats()
                found["allocator"].append(
                    {name: stats[name] for name in ("reserved_bytes.all.current", "num_device_alloc",
                                                    "num_alloc_retries") if name in stats}
                )  # fmt: skip
        engine.flush()
        tell("finished", peak_rss=_peak_rss())
        found["rows"] = rows
        found["parameters"] = sum(unit.layout.parameters for unit in engine._units)
        found["planned"] = described(engine.plan)
        found["reserved_peak_bytes"] = {tier: engine.ledger.peak(tier) for tier in ("gpu", "cpu", "nvme")}
        if cuda:
            found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
            found["allocator_peak_bytes"] = torch.cuda.max_memory_reserved()
            found["driver_peak_bytes"] = driver.peak
        if case.profile:
            found["profile"] = record.result(engine._prepared.hardware)
        engine.write_memory()
        engine.run.write_trace(engine._trace.events())
        if case.sparse:  # to end as usual would write all state of RAM to a disk without room for it
            engine._failed = True
    return found


def longest(case: Case, directory: Path) -> dict[str, Any]:
    """The longest sequence, a power of two times the case's, that is planned to fit, by how activations are handled."""
    found: dict[str, int] = {}
    for activations in ("auto", "recompute", "swap"):
        length = case.sequence
        while True:
            tried = replace(case, sequence=length, activations=activations)
            prepared = planned(tried, offload.Config.load(tried.config(directory)))
            if not prepared.plan.fits or length > case.sequence << 8:
                break
            found[activations] = length
            length *= 2
    return {"longest": found}


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
