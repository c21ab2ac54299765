"""Bi-level layout of a stack (after MEMO): each layer pass solved alone, then the whole with every pass as one buffer.

A pass is a layer's forward or its backward. What is born and dies within a pass is placed in the pass's own small
arena; identical passes share one solution. What outlives its pass is placed beside these arenas.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from offload.planner.layout import Layout, Lifetime, check, lower_bound, solve


def solve_stack(buffers: Sequence[Lifetime], passes: Sequence[tuple[int, int]], time_limit: float = 10.0) -> Layout:
    """A layout of `buffers`, of which those inside one of `passes` (begin, end; in order, apart) are placed together.

    A pass counts with its largest need for as long as it lasts, though what it leaves behind grows meanwhile. Where
    that alone would exceed the lower bound, at the last layers as a rule, the pass is opened: its buffers are placed
    with the rest. A greedy layout of everything at once is taken where it is lower. The method says how many different
    passes were solved and how many opened.
    """
    begin = time.perf_counter()
    bound = lower_bound(buffers)
    starts = [p[0] for p in passes]
    inner: list[list[int]] = [[] for _ in passes]
    outer: list[int] = []
    for i, b in enumerate(buffers):
        at = bisect_right(starts, b.lower) - 1
        if at >= 0 and b.upper <= passes[at][1]:
            inner[at].append(i)
        else:
            outer.append(i)
    keys = [_relative(buffers, members, start) for members, start in zip(inner, starts, strict=True)]
    different = {key for key in keys if key}
    solved = {key: solve(key, time_limit / 2 / len(different)) for key in different}
    boxes = {
        at: Lifetime(min(b.lower for b in key) + starts[at], max(b.upper for b in key) + starts[at], solved[key].height)
        for at, key in enumerate(keys)
        if key
    }
    opened = {at for at in boxes if lower_bound(_during(buffers, outer, boxes, at)) > bound}
    single = outer + [i for at in sorted(opened) for i in inner[at]]
    boxed = [at for at in boxes if at not in opened]
    left = time_limit - (time.perf_counter() - begin)
    top = solve([buffers[i] for i in single] + [boxes[at] for at in boxed], left)
    offsets = [0] * len(buffers)
    for i, offset in zip(single, top.offsets, strict=False):
        offsets[i] = offset
    for at, base in zip(boxed, top.offsets[len(single) :], strict=True):
        for i, offset in zip(inner[at], solved[keys[at]].offsets, strict=True):
            offsets[i] = base + offset
    check(buffers, offsets, top.height)
    if top.height > bound:
        flat = solve(buffers, 0.0)  # greedy only
        if flat.height < top.height:
            return replace(flat, method=f"one level: {flat.method}", seconds=time.perf_counter() - begin)
    method = f"two levels: {len(different)} different passes of {len(passes)}, {len(opened)} opened; {top.method}"
    return Layout(tuple(offsets), top.height, bound, method, top.height == bound, time.perf_counter() - begin)


def _during(buffers: Sequence[Lifetime], outer: Sequence[int], boxes: dict[int, Lifetime], at: int) -> list[Lifetime]:
    """The box of one pass and what lives outside of passes at the same time, cut to the pass."""
    lower, upper, _ = box = boxes[at]
    return [box] + [
        Lifetime(max(b.lower, lower), min(b.upper, upper), b.size)
        for b in (buffers[i] for i in outer)
        if b.lower < upper and lower < b.upper
    ]


def _relative(buffers: Sequence[Lifetime], members: Sequence[int], start: int) -> tuple[Lifetime, ...]:
    return tuple(Lifetime(buffers[i].lower - start, buffers[i].upper - start, buffers[i].size) for i in members)
