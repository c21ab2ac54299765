"""What would make the step faster: the plan made again for a changed machine or changed settings, and compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from offload.planner.decide import Decision, decide
from offload.planner.plan import Advice, Budgets, Hardware, Workload
from offload.planner.suggest import with_batch

WORTH = 1.05  # tokens per second with the change over those without, at least this to be named
GIB = 1 << 30

Case = tuple[str, str, Workload, Budgets, Hardware]  # (kind, change, what to plan)


def advise(
    w: Workload, budgets: Budgets, hw: Hardware, solver: str = "auto", time_limit: float = 10.0
) -> tuple[Advice, ...]:
    """Changes that bring more tokens per second, each planned with the same solver, the most helpful first."""

    def tokens_per_second(w: Workload, budgets: Budgets, hw: Hardware) -> float:
        found = decide(w, budgets, hw, solver, time_limit)
        return w.tokens / found.prediction.step_seconds if _fits(found) and found.prediction.step_seconds else 0.0

    now = tokens_per_second(w, budgets, hw)
    if not now:
        return ()
    found: dict[str, Advice] = {}
    for kind, text, changed, other_budgets, machine in _cases(w, budgets, hw):
        advice = Advice(text, tokens_per_second(changed, other_budgets, machine) / now)
        # of one kind the larger change only where it brings much more
        if advice.speedup >= WORTH * (found[kind].speedup if kind in found else 1.0):
            found[kind] = advice
    return tuple(sorted(found.values(), key=lambda a: -a.speedup))


def _fits(d: Decision) -> bool:
    return all(room >= 0 for room in d.problem.room(d.choice).values())


def _gib(nbytes: int) -> str:
    """As a config takes it: `96`, `4000`, `1.5`."""
    gib = nbytes / GIB
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.3g}"


def _cases(w: Workload, budgets: Budgets, hw: Hardware) -> Iterator[Case]:
    drives = max(1, len(budgets.nvme))
    share = (drives + 1) / drives
    more = replace(hw, nvme_read=hw.nvme_read * share, nvme_write=hw.nvme_write * share)
    yield "drives", ("a second SSD" if drives == 1 else "one more SSD"), w, budgets, more
    for factor in (2, 4):
        ram = factor * budgets.cpu
        gpu = factor * budgets.gpu if w.device == "cpu" else budgets.gpu
        yield "ram", f"memory.cpu of {_gib(ram)}GiB", w, replace(budgets, cpu=ram, gpu=gpu), hw
    for factor in (2, 4):
        rows = factor * w.micro_batches * w.micro_batch
        larger = replace(w, micro_batches=factor * w.micro_batches)
        yield "batch", f"train.global_batch_size {rows}", larger, budgets, hw
    if w.micro_batches > 1:
        doubled = with_batch(w, 2 * w.micro_batch, w.sequence_length)
        yield "micro-batch", f"train.micro_batch_size {2 * w.micro_batch}", doubled, budgets, hw
    if w.clipping:
        yield "clipping", "train.max_grad_norm null (no clipping)", replace(w, clipping=False), budgets, hw
    rates = {dtype: 2 * rate for dtype, rate in hw.matrix_flops.items()}
    faster = tuple(
        replace(u, forward_seconds=u.forward_seconds / 2, backward_seconds=u.backward_seconds / 2) for u in w.units
    )
    yield "device", "a device twice as fast", replace(w, units=faster), budgets, replace(hw, matrix_flops=rates)
