"""Depth-first search for offsets under a given height, over canonical layouts only.

After M. D. Moffitt, "MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning" (ASPLOS
2023): buffers are placed in rising order of offset, each as low as what is already placed lets it; no hole is left that
another buffer would fill; what remains is cut into parts that share no time; a node is dropped when some section of
time cannot hold what is left in it. Beyond the paper: a buffer that was passed over has to end up on top of a
neighbour, which raises its lowest offset, and a section's bound is the makespan of its buffers with the lowest offsets
as release times.

The kernel is compiled by numba where that is importable; without it the same code runs as Python, about 40 times
slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOUND, NONE, MORE = 1, 0, 2  # a layout; there is none; the node limit came first
PATIENCE = 2_000_000  # neighbours looked at in plain Python before numba is imported: small cases do without

Ints = NDArray[np.int64]

# columns of a frame, the state of one level of the search
_LO, _HI = 0, 1  # the sections of the part that the level places a buffer of
_KEY = 2  # lowest offset and rank of the last buffer tried, as one number: offset * n + rank
_BUFFER = 3  # the buffer that is placed, or -1
_TRAIL = 4  # length of the trail before it was
_BACK = 5  # the level whose placement made the part: where to go on when the part has no layout
_PENDING, _USED = 6, 7  # other parts still to be done, a linked list in `items`; and the items in use
_FREE = 8  # the placement raised nobody's lowest offset, so that no other choice can do better


class Search:
    """A search that can be continued: `advance` until it answers FOUND or NONE.

    `first`, `last`: [n] the sections each buffer lives in, first <= s < last; `size`: [n] > 0; `rank`: [n], a
    permutation: of two buffers with one lowest offset, the lower rank is tried first. `jit`: compile the kernel if that
    was not done yet and the search is not over soon; it takes seconds.
    """

    def __init__(self, first: Ints, last: Ints, size: Ints, rank: Ints, height: int, jit: bool = True) -> None:
        n, sections = len(size), int(last.max(initial=0))
        self.height = height
        self.nodes = 0
        starts, near = _neighbours(first, last)
        self._patience = PATIENCE // (1 + len(near)) if jit else sys.maxsize
        self._fixed: tuple[Any, ...] = (first, last, size, rank, starts, near, height)
        self._low = np.zeros(n, np.int64)
        crossing = np.zeros(sections + 1, np.int64)  # buffers left that live on both sides of a section's start
        for i in range(n):
            crossing[first[i] + 1 : last[i]] += 1
        frames = np.zeros((n + 2, 9), np.int64)
        items = np.zeros((2 * n + 4, 4), np.int64)  # parts: sections from and to, level that made it, next item
        trail = np.zeros((1 + len(near) // 2, 2), np.int64)  # raised buffers with their former lowest offset
        depth = np.full(2, -1, np.int64)  # the level the search is at, and the length of the trail
        self._state: tuple[Any, ...] = (
            self._low, np.zeros(n, np.bool_), crossing, frames, trail, items, depth,
            np.zeros((3, n + sections + 1), np.int64),
        )  # fmt: skip

    def advance(self, nodes: int) -> int:
        """Try up to `nodes` placements more: FOUND, NONE or MORE. After NONE or FOUND the search is over."""
        answer = MORE
        while answer == MORE and nodes > 0:
            patient = self.nodes < self._patience and not _compiled.cache_info().currsize
            part = min(nodes, self._patience) if patient else nodes
            kernel: Callable[..., int] = _advance if patient else _compiled()
            answer = int(kernel(*self._fixed, *self._state, part))
            self.nodes += part
            nodes -= part
        return answer

    @property
    def offsets(self) -> list[int]:
        """The layout, after FOUND."""
        return [int(x) for x in self._low]


def _neighbours(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """For each buffer the others that live in one of its sections: starts [n + 1] and ids, concatenated."""
    meets = (first[:, None] < last[None, :]) & (first[None, :] < last[:, None])
    np.fill_diagonal(meets, False)
    starts = np.concatenate(([0], np.cumsum(meets.sum(axis=1)))).astype(np.int64)
    return starts, np.nonzero(meets)[1].astype(np.int64)


@cache
def _compiled() -> Callable[..., int]:
    try:
        from numba import njit
    except ImportError:
        return _advance
    try:
        return njit(cache=True, nogil=True)(_advance)
    except RuntimeError:  # no directory to keep the compiled code in
        return njit(nogil=True)(_advance)


def _advance(
    first: Ints, last: Ints, size: Ints, rank: Ints, starts: Ints, near: Ints, height: int, low: Ints, placed: Any,
    crossing: Ints, frames: Ints, trail: Ints, items: Ints, depth: Ints, scratch: Ints, nodes: int,
) -> int:  # fmt: skip
    n = len(size)
    load, ids, release = scratch[0], scratch[1], scratch[2]
    level, length = depth[0], depth[1]
    if level < 0:  # the first call: everything is one part
        level, length = 0, 0
        frames[0, :] = (0, len(crossing) - 1, -1, -1, 0, -1, -1, 0, 0)
        for i in range(n):
            if size[i] > height:
                return NONE
    while nodes > 0:
        nodes -= 1
        frame = frames[level]
        lo, hi, key = frame[_LO], frame[_HI], frame[_KEY]
        free = False
        if frame[_BUFFER] >= 0:  # take back what was tried last
            free = frame[_FREE] == 1
            i = frame[_BUFFER]
            frame[_BUFFER] = -1
            placed[i] = False
            crossing[first[i] + 1 : last[i]] += 1
            while length > frame[_TRAIL]:
                length -= 1
                low[trail[length, 0]] = trail[length, 1]
        # the next buffer by lowest offset and rank, unless it would leave a hole below it that another one fills
        best, chosen, lid = np.int64(2**62), -1, np.int64(2**62)
        if not free:
            for j in range(n):
                if not placed[j] and first[j] >= lo and last[j] <= hi:
                    lid = min(lid, low[j] + size[j])
                    k = low[j] * n + rank[j]
                    if key < k < best:
                        best, chosen = k, j
        if chosen < 0 or low[chosen] >= lid:
            # the part has no layout: back to what made it, past all that was placed since then in other parts
            back = frame[_BACK]
            if back < 0:
                return NONE
            for f in range(level - 1, back, -1):
                j = frames[f, _BUFFER]
                placed[j] = False
                crossing[first[j] + 1 : last[j]] += 1
            while length > frames[back + 1, _TRAIL]:
                length -= 1
                low[trail[length, 0]] = trail[length, 1]
            level = back
            continue
        i = chosen
        frame[_KEY], frame[_BUFFER] = best, i
        placed[i] = True
        crossing[first[i] + 1 : last[i]] -= 1
        above, before = low[i] + size[i], length
        for e in range(starts[i], starts[i + 1]):
            j = near[e]
            if not placed[j] and low[j] < above:
                trail[length, 0], trail[length, 1] = j, low[j]
                length += 1
                low[j] = above
        frame[_FREE] = 1 if length == before else 0

        # whether every section can still hold what is left in it, when keys up to this one were passed over
        floor, count, holds = low[i], 0, True
        load[lo:hi] = floor
        for j in range(n):
            if placed[j] or first[j] < lo or last[j] > hi:
                continue
            at = low[j]
            if at * n + rank[j] <= best:
                at = height
                for e in range(starts[j], starts[j + 1]):
                    if not placed[near[e]]:
                        at = min(at, max(low[near[e]], floor) + size[near[e]])
            if at + size[j] > height:
                holds = False
                break
            release[j] = at
            ids[count] = j
            count += 1
        if holds:
            for k in np.argsort(release[ids[:count]]):
                j = ids[k]
                for s in range(first[j], last[j]):
                    load[s] = max(load[s], release[j]) + size[j]
                    if load[s] > height:
                        holds = False
                if not holds:
                    break
        if not holds:
            continue

        # what is left falls into parts where no buffer lives on both sides of a section's start
        pending, used, begin = frame[_PENDING], frame[_USED], lo
        for s in range(lo + 1, hi + 1):
            if s < hi and crossing[s] > 0:
                continue
            for j in ids[:count]:
                if first[j] >= begin and last[j] <= s:
                    items[used, :] = (begin, s, level, pending)
                    pending = used
                    used += 1
                    break
            begin = s
        if pending < 0:
            return FOUND
        origin = items[pending, 2]
        frames[level + 1, :] = (
            items[pending, 0], items[pending, 1], frames[origin, _KEY], -1, length, origin, items[pending, 3], used, 0,
        )  # fmt: skip
        level += 1
    depth[0], depth[1] = level, length
    return MORE
