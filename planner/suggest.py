"""What would fit when a plan does not: the nearest budgets and settings, each planned before it is offered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from offload.planner.plan import Budgets, Hardware, UnitProfile, Workload

Fits = Callable[[Workload, Budgets, Hardware], bool]


def with_batch(w: Workload, micro_batch: int, sequence_length: int) -> Workload:
    """The workload at another micro-batch or sequence length, the rows of a global batch unchanged.

    An estimate from above when sizes shrink: of a backward workspace, up to one gradient of the unit's parameters does
    not scale; the rest, and everything else, scales with tokens.
    """
    ratio = micro_batch * sequence_length / (w.micro_batch * w.sequence_length)

    def scaled(unit: UnitProfile) -> UnitProfile:
        fixed = min(unit.workspace_backward, unit.trainable * w.itemsize)
        kept = min(unit.workspace_kept, fixed)
        return replace(
            unit,
            forward_flops=round(unit.forward_flops * ratio),
            boundary_bytes=round(unit.boundary_bytes * ratio),
            workspace_forward=round(unit.workspace_forward * ratio),
            workspace_backward=fixed + round((unit.workspace_backward - fixed) * ratio),
            workspace_kept=kept + round((unit.workspace_kept - kept) * ratio),
            workspace_graph=round(unit.workspace_graph * ratio),
            workspace_unsaved=round(unit.workspace_unsaved * ratio),
            saved=tuple(round(n * ratio) for n in unit.saved),
            forward_seconds=unit.forward_seconds * ratio,
            backward_seconds=unit.backward_seconds * ratio,
        )

    return replace(
        w,
        units=tuple(scaled(u) for u in w.units),
        micro_batch=micro_batch,
        micro_batches=-(-w.micro_batches * w.micro_batch // micro_batch),
        sequence_length=sequence_length,
        shared_bytes=round(w.shared_bytes * ratio),
        logits_bytes=round(w.logits_bytes * ratio),
    )


def _raised(budgets: Budgets, shortfall: dict[str, int]) -> Budgets:
    """The budgets with exactly the missing bytes added, NVMe's to its first path."""
    nvme = budgets.nvme or (("", 0),)
    missing = shortfall.get("nvme", 0)
    return replace(
        budgets,
        gpu=budgets.gpu + shortfall.get("gpu", 0),
        cpu=budgets.cpu + shortfall.get("cpu", 0),
        nvme=((nvme[0][0], nvme[0][1] + missing), *nvme[1:]) if missing else budgets.nvme,
    )


def readable(nbytes: int) -> str:
    """Bytes in the largest binary unit under which the number is at least 1, and exactly."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f}{unit} ({nbytes} bytes)"
    return f"{nbytes} bytes"


def _smaller(w: Workload) -> Iterator[tuple[str, Workload]]:
    """Settings that need less, nearest first: each a message and its workload."""
    micro, length = w.micro_batch // 2, w.sequence_length // 2
    while micro >= 1:
        yield f"set train.micro_batch_size to {micro}", with_batch(w, micro, w.sequence_length)
        micro //= 2
    while length >= 64:
        batch = ", train.micro_batch_size to 1" if w.micro_batch > 1 else ""
        yield f"set data.sequence_length to {length}{batch}", with_batch(w, 1, length)
        length //= 2


def suggestions(
    w: Workload, budgets: Budgets, hw: Hardware, shortfall: dict[str, int], fits: Fits
) -> list[str]:
    """Nearest settings that fit, each planned before it is offered."""
    found: list[str] = []
    raised = _raised(budgets, shortfall)
    if fits(w, raised, hw):
        changes = []
        for tier in shortfall:
            if tier == "nvme":
                where = f" at {raised.nvme[0][0]}" if raised.nvme[0][0] else ""
                changes.append(f"memory.nvme{where} to {readable(raised.nvme[0][1])}")
            else:
                changes.append(f"memory.{tier} to {readable(raised.by_tier()[tier])}")
        found.append("set " + " and ".join(changes))
    for text, smaller in _smaller(w):
        if fits(smaller, budgets, hw):
            found.append(text)
            break
    return found
