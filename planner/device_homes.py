"""Which units live on the device, the greedy way: the first ones of the forward.

They come last in backward, where nothing hides their updates, and first in the next forward, which waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from offload.planner.activations import refitted
from offload.planner.choice import Choice, may_live_on_device, to_device, without_homes
from offload.planner.placement import Problem, fillings, leanest, top_up


def offered(p: Problem, choice: Choice) -> bool:
    """Whether any unit that the choice has elsewhere may live on the device."""
    units = zip(p.w.units, choice.units, strict=True)
    return p.hw.adamw_device > 0 and any(not c.on_device and may_live_on_device(u, p.w, p.hw) for u, c in units)


def with_units_there(p: Problem, choice: Choice) -> list[Choice]:
    """`choice` with its first one, two, four, ... units on the device, and as many as fit; their RAM goes to others.

    Kept activations make room where there is none. Once with every unit in its turn, once without the large tables,
    which may take more than they bring.
    """
    allowed = [i for i, u in enumerate(p.w.units) if may_live_on_device(u, p.w, p.hw)]
    blocks = [i for i in allowed if p.w.units[i].kind in ("block", "other")]
    found: list[Choice] = []
    for order in (allowed, blocks) if blocks != allowed else (allowed,):
        streamed = without_homes(choice)
        for count in _counts(p, streamed, order):
            near = refitted(p, _moved(choice, order[:count]))
            bare = refitted(p, _moved(streamed, order[:count]))
            tried = [c for c in dict.fromkeys((near, top_up(p, near), *fillings(p, bare))) if p.shortage(c) == 0.0]
            if tried:
                found.append(min(tried, key=p.score))
    return list(dict.fromkeys(found))


def _moved(choice: Choice, units: Sequence[int]) -> Choice:
    there = set(units)
    return replace(choice, units=tuple(to_device(c) if i in there else c for i, c in enumerate(choice.units)))


def _counts(p: Problem, streamed: Choice, order: Sequence[int]) -> Iterator[int]:
    """Powers of two up to the most of `order` that fit, and those."""

    def fits(count: int) -> bool:
        moved = refitted(p, _moved(streamed, order[:count]))
        return any(p.shortage(c) == 0.0 for c in leanest(p, moved))

    few, many = 0, len(order) + 1
    if order and fits(len(order)):  # then there are no slots, perhaps
        few = len(order)
    while few + 1 < many:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    count = 1
    while count < few:
        yield count
        count *= 2
    if few:
        yield few
