"""Out of memory, explained: what was asked for and for which unit, what memory is used for, and what would avoid it."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import psutil
import torch

from offload import tables
from offload.errors import OffloadError
from offload.io import Ledger, StoreError
from offload.memory import tree_pss
from offload.planner import Budgets, Plan, Workload, make_plan
from offload.planner.suggest import with_batch
from offload.prepare import Prepared
from offload.trace import Trace

MIB = 1 << 20
MOST = 3  # settings offered
UNKNOWN_SHARE = 0.1  # of the planned peak, to be saved where the error does not say how much was asked for
_ASKED = re.compile(r"allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB|B)\b")
_FACTOR = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class OutOfMemory(OffloadError):
    """Memory that the plan did not foresee was refused by the system or the device."""


@dataclass(frozen=True)
class Way:
    """A setting with which the plan needs less: its text, peak bytes in the tier that was full, tokens per second."""

    setting: str
    peak: int
    tokens_per_second: float
    on_resume: bool  # may be changed for a run that exists


@contextmanager
def explained(prepared: Prepared, ledger: Ledger, trace: Trace, step: int = 0) -> Iterator[None]:
    """Errors of the body that mean "out of memory" come out as OutOfMemory; all others as they are."""
    trace.interrupted = ""
    try:
        yield
    except Exception as error:
        cause = refused(error)
        if cause is None:
            raise
        raise OutOfMemory(explain(cause, prepared, ledger, trace, step)) from error


def refused(error: BaseException | None) -> BaseException | None:
    """The error, or the one that caused it, that says that an allocation was refused; None for any other error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        if (
            isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or (isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text))
            or (isinstance(error, (OSError, StoreError)) and error.errno == errno.ENOMEM)
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for, if the error says so."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _FACTOR[found[2]]) if found else None


def explain(error: BaseException, prepared: Prepared, ledger: Ledger, trace: Trace, step: int) -> str:
    """The message: request, ledger by category, plan, and settings that would avoid it."""
    plan = prepared.plan
    tier = "gpu" if isinstance(error, torch.OutOfMemoryError) and prepared.device == "cuda" else "cpu"
    asked = asked_bytes(error)
    what = f"{tables.size(asked)} ({asked:,} bytes)" if asked else "memory"
    when = f"in step {step}" if step else "at start-up"
    during = trace.interrupted or trace.doing
    lines = [f"out of memory: {what} refused {when}{f', {during}' if during else ''}: {_first_line(error)}"]
    for name, held in sorted(ledger.snapshot().items()):
        if name in ("gpu", "cpu", "cxl") and (total := sum(c["bytes"] for c in held.values())):
            parts = sorted(((c["bytes"], category) for category, c in held.items() if c["bytes"]), reverse=True)
            where = "gpu (an arena in RAM)" if name == "gpu" and prepared.device == "cpu" else name
            lines.append(
                f"  reserved in {where}: {tables.size(total)} of a budget of {tables.size(plan.budget_bytes[name])}: "
                + ", ".join(f"{category} {tables.size(n)}" for n, category in parts)
            )
    framework = plan.categories["gpu"].get("framework", 0)
    lines.append(f"  for PyTorch's own tensors inside a unit the plan has {tables.size(framework)}; this is beyond it")
    lines.append(f"  {_surroundings(tier)}")
    with suppress(MemoryError):
        found = ways(prepared, tier, asked or round(UNKNOWN_SHARE * plan.peak_bytes[tier]))
        if found:
            lines.append("each of these would avoid it (planned):")
        for i, way in enumerate(found, start=1):
            lines.append(
                f"  {i}. {way.setting}: {tier} peak {tables.size(way.peak)} instead of "
                f"{tables.size(plan.peak_bytes[tier])}, {way.tokens_per_second:,.0f} tokens/s instead of "
                f"{plan.tokens_per_second:,.0f}" + ("" if way.on_resume else "; in a new run")
            )
        if not found:
            lines.append(f"  no smaller setting helps; give the run more memory: {_more(tier)}")
    return "\n".join(lines)


def ways(prepared: Prepared, tier: str, nbytes: int) -> list[Way]:
    """Settings whose plan fits and peaks at least `nbytes` lower in `tier`, the fastest first.

    The smallest sufficient change of each kind; where those are fewer than three, larger ones too.
    """
    now = prepared.plan.peak_bytes[tier]
    first, further = [], []
    for kind in _kinds(prepared, tier, now - nbytes):
        enough = []
        for setting, workload, budgets, on_resume in kind:
            plan = _replan(prepared, workload, budgets)
            if plan.fits and plan.peak_bytes[tier] <= now - nbytes:
                enough.append(Way(setting, plan.peak_bytes[tier], plan.tokens_per_second, on_resume))
        first += enough[:1]
        further += enough[1:]
    first.sort(key=lambda way: -way.tokens_per_second)
    further.sort(key=lambda way: -way.tokens_per_second)
    return sorted([*first, *further][:MOST], key=lambda way: -way.tokens_per_second)


Case = tuple[str, Workload, Budgets, bool]


def _kinds(prepared: Prepared, tier: str, target: int) -> list[list[Case]]:
    """Changes that lower the peak, by kind; within a kind the smallest change first."""
    w, budgets = prepared.workload, prepared.budgets
    rows = w.micro_batches * w.micro_batch
    limit = max(0, target // MIB * MIB)
    lower = replace(budgets, gpu=limit) if tier == "gpu" else replace(budgets, cpu=limit)
    return [
        [(f"memory.{tier}: {limit // MIB}MiB", w, lower, True)],
        [
            (f"train.micro_batch_size: {n}", with_batch(w, n, w.sequence_length), budgets, False)
            for n in _halves(w.micro_batch, 1)
        ],
        [
            (f"train.global_batch_size: {n * w.micro_batch}", replace(w, micro_batches=n), budgets, False)
            for n in _halves(w.micro_batches, 1)
            if n * w.micro_batch < rows
        ],
        [
            (f"data.sequence_length: {n}", with_batch(w, w.micro_batch, n), budgets, False)
            for n in _halves(w.sequence_length, 32)
        ],
        [("train.max_grad_norm: null", replace(w, clipping=False), budgets, False)] if w.clipping else [],
    ]


def _halves(n: int, least: int) -> list[int]:
    found = []
    while (n := n // 2) >= least:
        found.append(n)
    return found


def _replan(prepared: Prepared, workload: Workload, budgets: Budgets) -> Plan:
    return make_plan(workload, budgets, prepared.hardware, "greedy", 0.0)


def _surroundings(tier: str) -> str:
    """What else decides whether memory can be had."""
    if tier == "gpu":
        free, total = torch.cuda.mem_get_info()
        return f"the device has {tables.size(free)} free of {tables.size(total)}, other programs included"
    text = f"this process takes {tables.size(tree_pss())} of RAM; the machine has "
    text += f"{tables.size(psutil.virtual_memory().available)} available"
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        mapped = psutil.Process().memory_info().vms
        text += f"; address space {tables.size(mapped)} of a limit of {tables.size(soft)} (ulimit -v)"
    return text


def _more(tier: str) -> str:
    if tier == "gpu":
        return "end other programs on the device"
    return "end other programs, or raise the limit of the process (ulimit -v) or of its control group"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
