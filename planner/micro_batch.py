"""How many rows pass through the model at a time: the largest micro-batch that pays, of a given global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from offload.planner.plan import Plan

# A step may be slower by this share for the sake of a larger micro-batch: unit times are not known any better, and
# fewer micro-batches are fewer launches, copies and sums, which are not all timed.
PAYS = 0.01
GIVE_UP = 2  # sizes in a row that are slower than the best, after which no larger one is looked at


def sizes(global_batch: int) -> list[int]:
    """Micro-batches worth a look, ascending: divisors of the global batch, each at least twice the one before."""
    found: list[int] = []
    for rows in range(1, global_batch + 1):
        if global_batch % rows == 0 and (not found or rows >= 2 * found[-1]):
            found.append(rows)
    return found


def largest_that_pays(global_batch: int, planned: Callable[[int], Plan]) -> int:
    """The micro-batch size whose step is the fastest; of those that are as fast within `PAYS`, the largest.

    Sizes are tried upwards until one does not fit, because larger ones need more, or several were slower.
    `planned` makes the plan for a size. Where even one row does not fit, the answer is 1.
    """
    seconds: dict[int, float] = {}
    slower = 0
    for rows in sizes(global_batch):
        plan = planned(rows)
        if not plan.fits:
            break
        seconds[rows] = plan.step_seconds
        slower = slower + 1 if plan.step_seconds > (1 + PAYS) * min(seconds.values()) else 0
        if slower == GIVE_UP:
            break
    if not seconds:
        return 1
    enough = (1 + PAYS) * min(seconds.values())
    return max(rows for rows, step in seconds.items() if step <= enough)


def noted(plan: Plan, global_batch: int, rows: int) -> Plan:
    """The plan with a note of the size that was chosen for it."""
    note = f"train.micro_batch_size: {rows} chosen, {global_batch // rows} to a step"
    return replace(plan, notes=(*plan.notes, note))
