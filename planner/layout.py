"""Buffer layout (dynamic storage allocation): buffers with lifetimes and sizes in, offsets in one arena out.

The least any layout needs is the largest sum of sizes that live at one time; `solve` stops as soon as it is met. In
order: twelve greedy placements; for small cases a MIP; a depth-first search (`layout_search`) with several
orders and heights in turn; and a neighbourhood search that takes out the buffers around the peak and places them anew
by MIP (`layout_mip`). What shares no time with the rest is solved on its own.
"""

from __future__ import annotations

import math
import os
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from offload.planner import layout_mip
from offload.planner.layout_search import FOUND, MORE, NONE, Ints, Search

JIT_SECONDS = 5.0  # compiling the search takes about as long, once per machine
SEARCH_BUFFERS = 2000  # the search keeps tables of n * n


class Lifetime(NamedTuple):
    """A buffer of `size` bytes that lives on [lower, upper)."""

    lower: int
    upper: int
    size: int


@dataclass(frozen=True)
class Layout:
    """`offsets` of the buffers in their order, in an arena of `height` bytes; what found it; proven to be the least."""

    offsets: tuple[int, ...]
    height: int
    lower_bound: int
    method: str
    optimal: bool
    seconds: float


def lower_bound(buffers: Iterable[Lifetime]) -> int:
    """The largest sum of sizes that live at one time, bytes."""
    changes = [(b.lower, b.size) for b in buffers if b.upper > b.lower]
    changes += [(b.upper, -b.size) for b in buffers if b.upper > b.lower]
    live = most = 0
    for _, change in sorted(changes):
        live += change
        most = max(most, live)
    return most


def check(buffers: Sequence[Lifetime], offsets: Sequence[int], height: int) -> None:
    """Raises ValueError naming two buffers that share bytes while both live, or one outside of [0, height).

    Knows nothing of how the layout was made: one sweep over time with the live buffers in order of offset.
    """
    if len(offsets) != len(buffers):
        raise ValueError(f"{len(offsets)} offsets for {len(buffers)} buffers")
    events = []
    for i, (b, offset) in enumerate(zip(buffers, offsets, strict=True)):
        if b.size <= 0 or b.upper <= b.lower:
            continue
        if offset < 0 or offset + b.size > height:
            raise ValueError(f"buffer {i} at {offset} with {b.size} bytes is outside of the arena of {height} bytes")
        events += [(b.lower, 1, i), (b.upper, 0, i)]
    live: list[tuple[int, int]] = []  # (offset, buffer)
    for _, begins, i in sorted(events):
        at = bisect_left(live, (offsets[i], i))
        if not begins:
            del live[at]
            continue
        if at and offsets[live[at - 1][1]] + buffers[live[at - 1][1]].size > offsets[i]:
            raise ValueError(f"buffers {live[at - 1][1]} and {i} overlap at offset {offsets[i]}")
        if at < len(live) and offsets[i] + buffers[i].size > live[at][0]:
            raise ValueError(f"buffers {i} and {live[at][1]} overlap at offset {live[at][0]}")
        live.insert(at, (offsets[i], i))


def solve(buffers: Sequence[Lifetime], time_limit: float = 10.0, capacity: int | None = None) -> Layout:
    """A layout of least height, as near as `time_limit` seconds allow.

    `capacity` is a height worth reaching first; once it is reached the rest of the time goes into less. Buffers of no
    size or no life are put at 0. Raises ValueError for a negative size.
    """
    begin = time.perf_counter()
    deadline = begin + time_limit
    for i, b in enumerate(buffers):
        if b.size < 0:
            raise ValueError(f"buffer {i} has a size of {b.size} bytes")
    jit = time_limit >= JIT_SECONDS
    unit = math.gcd(*(b.size for b in buffers)) or 1
    parts = [_Part([(i, Lifetime(*buffers[i][:2], buffers[i].size // unit)) for i in p], jit) for p in _parts(buffers)]
    bound = max((part.bound for part in parts), default=0)
    offsets = [0] * len(buffers)
    height, method, optimal = 0, "none", True
    if capacity is not None:
        capacity = capacity // unit
    # the part with the highest bound first: the others need no more than it came to
    for part in sorted(parts, key=lambda part: -part.bound):
        found = _solve_part(part, max(bound, height), deadline, capacity)
        if found.height > height:
            height, method = found.height, found.method
            optimal = found.optimal
        for i, offset in zip(part.ids, found.offsets, strict=True):
            offsets[i] = offset * unit
    check(buffers, offsets, height * unit)
    optimal = optimal or height == bound
    return Layout(tuple(offsets), height * unit, bound * unit, method, optimal, time.perf_counter() - begin)


def _parts(buffers: Sequence[Lifetime]) -> Iterator[list[int]]:
    """Buffers by stretch of time between two moments at which nothing is live."""
    part: list[int] = []
    end = 0
    for i in sorted(range(len(buffers)), key=lambda i: buffers[i].lower):
        b = buffers[i]
        if b.size == 0 or b.upper <= b.lower:
            continue
        if part and b.lower >= end:
            yield sorted(part)
            part = []
        end = max(end, b.upper) if part else b.upper
        part.append(i)
    if part:
        yield sorted(part)


class _Part:
    """Buffers over sections of time: the largest sets of buffers that live at once, in order of time."""

    def __init__(self, members: Sequence[tuple[int, Lifetime]], jit: bool) -> None:
        self.jit = jit
        self.ids = [i for i, _ in members]
        self.buffers = [b for _, b in members]
        self.first, self.last = _sections(self.buffers)
        self.size = np.array([b.size for b in self.buffers], np.int64)
        self.load = np.zeros(int(self.last.max()), np.int64)
        for first, last, size in zip(self.first, self.last, self.size, strict=True):
            self.load[first:last] += size
        self.bound = int(self.load.max())

    def __len__(self) -> int:
        return len(self.buffers)


def _sections(buffers: Sequence[Lifetime]) -> tuple[Ints, Ints]:
    """Sections each buffer lives in, first <= s < last. A new one begins where something starts after an end."""
    starts, ends = {b.lower for b in buffers}, {b.upper for b in buffers}
    first, last, section, ended = {}, {}, -1, True
    for t in sorted(starts | ends):
        if t in ends:
            last[t], ended = section + 1, True
        if t in starts:
            section, ended = section + ended, False
            first[t] = section
    return (
        np.array([first[b.lower] for b in buffers], np.int64),
        np.array([last[b.upper] for b in buffers], np.int64),
    )


@dataclass
class _Found:
    offsets: list[int]
    height: int
    method: str
    optimal: bool = False


def _solve_part(part: _Part, target: int, deadline: float, capacity: int | None) -> _Found:
    """The lowest layout found of a part; `target` is a height below which nothing is gained."""
    best = _best_greedy(part, target, deadline)
    if best.height <= target or time.perf_counter() >= deadline:
        return best
    best = _try_merged(part, best, target, deadline, capacity)
    if best.height <= target:
        return best
    if len(part) <= layout_mip.provable():
        left = deadline - time.perf_counter()
        exact = layout_mip.solve(part.buffers, best.offsets, target, left / 2)
        if exact is not None and exact.height <= best.height:
            method = "mip" if exact.height < best.height else best.method
            best = _Found(exact.offsets, exact.height, method, exact.optimal)
        if best.height <= target or best.optimal:
            return best
    if len(part) <= SEARCH_BUFFERS:
        # what the search cannot do in two thirds of its time is left to the neighbourhoods
        now = time.perf_counter()
        best = _search(part, best, target, now + (deadline - now) * 2 / 3, capacity)
    if best.height > target and not best.optimal:
        best = _improve(part, best, target, deadline)
    return best


def _try_merged(part: _Part, best: _Found, target: int, deadline: float, capacity: int | None) -> _Found:
    """Spend a quarter of the time with buffers of equal sections as one: far fewer, though the optimum may be lost."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(part.first.tolist(), part.last.tolist(), strict=True)):
        groups.setdefault(key, []).append(i)
    if len(groups) == len(part):
        return best
    sums = [Lifetime(*key, sum(part.buffers[i].size for i in members)) for key, members in groups.items()]
    now = time.perf_counter()
    found = _solve_part(_Part(list(enumerate(sums)), part.jit), target, now + (deadline - now) / 4, capacity)
    if found.height >= best.height:
        return best
    offsets = [0] * len(part)
    for at, members in zip(found.offsets, groups.values(), strict=True):
        for i in members:
            offsets[i] = at
            at += part.buffers[i].size
    return _Found(offsets, found.height, f"{found.method}, equal lifetimes merged")


# ---- greedy ----


def _orders(part: _Part) -> Iterator[tuple[str, list[int]]]:
    n = range(len(part))
    life = [b.upper - b.lower for b in part.buffers]
    size = [b.size for b in part.buffers]
    crowd = [int(part.load[f:e].max()) for f, e in zip(part.first, part.last, strict=True)]
    keys: dict[str, Callable[[int], tuple[float, ...]]] = {
        "size": lambda i: (-size[i], -life[i]),
        "area": lambda i: (-size[i] * life[i], -size[i]),
        "contention": lambda i: (-crowd[i], -size[i] * life[i]),
        "lifetime": lambda i: (-life[i], -size[i]),
        "size and root of lifetime": lambda i: (-size[i] * math.sqrt(life[i]),),
        "birth": lambda i: (part.buffers[i].lower, -life[i]),
    }
    for name, key in keys.items():
        yield name, sorted(n, key=key)


def _best_greedy(part: _Part, target: int, deadline: float) -> _Found:
    """The lowest of six orders by two fits, as many as time allows; the first that needs no more than `target`."""
    best: _Found | None = None
    for name, order in _orders(part):
        for fit in ("first", "best"):
            offsets = _place(part, order, fit == "best")
            height = max(o + b.size for o, b in zip(offsets, part.buffers, strict=True))
            if best is None or height < best.height:
                best = _Found(offsets, height, f"greedy by {name}, {fit} fit")
            if best.height <= target or (len(part) > SEARCH_BUFFERS and time.perf_counter() > deadline):
                return best
    assert best is not None
    return best


def _place(part: _Part, order: Sequence[int], tightest: bool) -> list[int]:
    """Place in `order`: at the lowest gap that is wide enough, or at the tightest of all (the lowest of equals)."""
    n = len(part)
    offsets = [0] * n
    first, last, size = part.first, part.last, part.size
    # placed so far, in order of offset
    begin, end, at, top = (np.zeros(n, np.int64) for _ in range(4))
    for count, i in enumerate(order):
        meets = (begin[:count] < last[i]) & (first[i] < end[:count])
        bottoms, tops = at[:count][meets], top[:count][meets]
        covered = np.maximum.accumulate(np.concatenate(([0], tops)))  # below each placed one, and above the last
        room = bottoms - covered[:-1]
        wide = np.nonzero(room >= size[i])[0]
        if not len(wide):
            offset = int(covered[-1])
        elif tightest:
            offset = int(covered[wide[np.argmin(room[wide])]])
        else:
            offset = int(covered[wide[0]])
        offsets[i] = offset
        where = int(np.searchsorted(at[:count], offset))
        for column, value in ((begin, first[i]), (end, last[i]), (at, offset), (top, offset + size[i])):
            column[where + 1 : count + 1] = column[where:count].copy()
            column[where] = value
    return offsets


# ---- search over heights ----


class _Try:
    """Searches with several orders under one height, continued in turn; each round may try more placements."""

    def __init__(self, part: _Part, height: int) -> None:
        self.part, self.height, self.nodes = part, height, 500
        self.chunk = max(1, 50_000 // len(part))  # placements between two looks at the clock
        self.searches = [self._start(rank) for rank in _ranks(part)]
        self._random = random.Random(height)

    def _start(self, rank: Ints) -> Search:
        return Search(self.part.first, self.part.last, self.part.size, rank, self.height, self.part.jit)

    def round(self, pool: ThreadPoolExecutor, deadline: float) -> tuple[int, list[int]]:
        """NONE, FOUND with offsets, or MORE after one turn of every order, and of two random ones started anew."""
        anew = [self._start(_random_rank(self.part, self._random)) for _ in range(2)]

        def turn(search: Search) -> int:
            done, answer = 0, MORE
            while answer == MORE and done < self.nodes and time.perf_counter() < deadline:
                answer = search.advance(self.chunk)
                done += self.chunk
            return answer

        searches = self.searches + anew
        answers = list(pool.map(turn, searches))
        self.nodes = min(2 * self.nodes, 50_000)
        for answer, search in zip(answers, searches, strict=True):
            if answer == FOUND:
                return FOUND, search.offsets
        return (NONE if NONE in answers else MORE), []


def _ranks(part: _Part) -> list[Ints]:
    """Orders in which buffers of one lowest offset are tried: largest section, area, lifetime, size first."""
    life = np.array([b.upper - b.lower for b in part.buffers], np.int64)
    area = life.astype(float) * part.size
    crowd = np.array([part.load[f:e].max() for f, e in zip(part.first, part.last, strict=True)])
    span = part.last - part.first
    keys = ((crowd, life, area), (crowd, area, life), (life, area, crowd), (area,), (span, area), (part.size, life))
    return [_rank(np.lexsort([-k for k in reversed(key)])) for key in keys]


def _random_rank(part: _Part, source: random.Random) -> Ints:
    """By size to a random power, times lifetime to another, blurred."""
    a, b, blur = source.uniform(0, 1.5), source.uniform(0, 1.5), source.choice((0.0, 0.2, 0.6))
    score = [
        b * math.log(buffer.upper - buffer.lower) + a * math.log(buffer.size) + source.gauss(0, blur)
        for buffer in part.buffers
    ]
    return _rank(np.argsort([-s for s in score], kind="stable"))


def _rank(order: Ints) -> Ints:
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _search(part: _Part, best: _Found, target: int, deadline: float, capacity: int | None) -> _Found:
    """Search under `target`, under `capacity` and half way to the best known height, in turn, until time is up."""
    tries: dict[int, _Try] = {}
    least = target  # no layout is lower, or none lower is wanted
    proven = False  # that no layout is lower than `least`
    rounds = 0
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
        while time.perf_counter() < deadline and best.height > least:
            wanted = {least, (least + best.height) // 2, (least + 9 * (best.height - 1)) // 10}
            if capacity is not None and least <= capacity < best.height:
                wanted = {capacity} if rounds % 4 else {least, capacity}
            rounds += 1
            for height in sorted(wanted):
                if not least <= height < best.height:
                    continue
                if height not in tries:
                    tries[height] = _Try(part, height)
                answer, offsets = tries[height].round(pool, deadline)
                if answer == FOUND:
                    top = max(o + b.size for o, b in zip(offsets, part.buffers, strict=True))
                    best = _Found(offsets, top, "search")
                elif answer == NONE:
                    least, proven = height + 1, True
                if time.perf_counter() >= deadline:
                    break
            tries = {height: t for height, t in tries.items() if least <= height < best.height}
    best.optimal = best.optimal or (proven and best.height <= least)
    return best


# ---- neighbourhoods ----


def _improve(part: _Part, best: _Found, target: int, deadline: float) -> _Found:
    """Take out buffers around one that touches the peak, place them anew by MIP, and again until time is up."""
    source = random.Random(0)
    height = best.height
    count = layout_mip.provable()
    while height > target and (left := deadline - time.perf_counter()) > 0.2:
        offsets = best.offsets
        tops = [o + b.size for o, b in zip(offsets, part.buffers, strict=True)]
        peak = [i for i, top in enumerate(tops) if top == height]
        centre = source.choice(peak)
        near = np.nonzero((part.first < part.last[centre]) & (part.first[centre] < part.last))[0]
        others = [int(i) for i in near if int(i) not in peak]
        free = (peak + source.sample(others, min(len(others), max(0, count - len(peak)))))[:count]
        found = layout_mip.solve(part.buffers, offsets, target, min(left, 5.0), free)
        if found is None:
            break
        fewer = sum(o + b.size == height for o, b in zip(found.offsets, part.buffers, strict=True)) < len(peak)
        if found.height < height or fewer:
            method = best.method if best.method.endswith("neighbourhoods") else f"{best.method}, then neighbourhoods"
            best = _Found(found.offsets, found.height, method)
            height = found.height
    return best
