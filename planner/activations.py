"""What happens to activations: candidates to keep, swap or recompute, the greedy way (after MEMO and Ratel).

Keep on the device from the last unit back while there is room: those are used again first. Of the rest swap a share,
boundaries first where the device is short, and recompute what remains. The shares are swept and judged by step time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from offload.planner.choice import Choice, UnitChoice, nothing_in_ram
from offload.planner.placement import Problem
from offload.planner.plan import UnitProfile, Workload

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # swept: of the room that is kept in, and of the rest that is swapped


def candidates(p: Problem) -> list[Choice]:
    """Choices that differ in activations, nothing in RAM yet; the first recomputes everything on the device."""
    base = nothing_in_ram(p.w, p.block_slots)
    if p.w.activations == "recompute" or not any(can_choose(u) for u in p.w.units):
        return [base]
    found: list[Choice] = [base]
    tiers = [t for t in ("cpu", "cxl", "nvme") if p.limit[t] > 0]
    for bounded in _boundaries(p, base, tiers):
        for tier in ("", *tiers):
            for share in SHARES[1:] if tier else SHARES[:1]:
                moved = _swapped(p.w, bounded, tier, share)
                most = _most_kept(p, moved)
                found += [_kept(p.w, moved, kept * most) for kept in ((1.0,) if tier else SHARES)]
    return list(dict.fromkeys(found))


def can_choose(unit: UnitProfile) -> bool:
    """Whether anything of the unit's activations is to be decided."""
    return unit.kind != "resident" and not unit.kept and unit.saved_bytes > 0


def _boundaries(p: Problem, base: Choice, tiers: list[str]) -> Iterator[Choice]:
    """Boundaries on the device, and, in each other tier, those of the fewest first units that make it fit, and all."""
    yield base
    movable = [i for i, u in enumerate(p.w.units) if u.boundary_bytes and u.kind != "resident"]
    for tier in tiers:
        def moved(count: int, tier: str = tier) -> Choice:
            units = list(base.units)
            for i in movable[:count]:
                units[i] = replace(units[i], boundary=tier)
            return replace(base, units=tuple(units))

        few, many = 0, len(movable)
        while few < many:
            middle = (few + many) // 2
            if p.room(moved(middle))["gpu"] >= 0:
                many = middle
            else:
                few = middle + 1
        if 0 < few < len(movable):
            yield moved(few)
        yield moved(len(movable))


def _swapped(w: Workload, base: Choice, tier: str, share: float) -> Choice:
    """`share` of what all units save goes to `tier`; recomputation in whole micro-batches, spread evenly over the units
    so that transfers always have compute beside them."""
    if not tier:
        return base
    units, m, due = list(base.units), w.micro_batches, 0.0
    for i, unit in enumerate(w.units):
        if can_choose(unit):
            due += (1.0 - share) * m
            again = int(due + 1e-4)
            due -= again
            units[i] = shares(units[i], w, 0.0, {tier: 1.0 - again / m})
    return replace(base, units=tuple(units))


def shares(c: UnitChoice, w: Workload, keep: float, swapped: Mapping[str, float]) -> UnitChoice:
    """`c` with these shares of the saved bytes (`swapped` by tier), the rest recomputed in whole micro-batches.

    A part of a micro-batch that would have to be recomputed is swapped, or kept where nothing is swapped.
    """
    return _shares(c, w.micro_batches, keep, tuple(swapped.items()))


@lru_cache(1 << 14)
def _shares(c: UnitChoice, m: int, keep: float, swapped: tuple[tuple[str, float], ...]) -> UnitChoice:
    away = {tier: share for tier, share in swapped if share}
    rest = max(0.0, 1.0 - keep - sum(away.values()))
    again = int(rest * m + 1e-4) / m  # a solver's counts are whole to its tolerance only
    rest -= again
    if away:
        away[next(iter(away))] += rest
    elif keep:
        keep += rest
    else:
        again = 1.0
    total = keep + sum(away.values())
    if total:  # to the last bit
        scale = (1.0 - again) / total
        keep, away = keep * scale, {tier: share * scale for tier, share in away.items()}
    return replace(
        c,
        keep=keep,
        recompute=again,
        swap_cpu=away.get("cpu", 0.0),
        swap_cxl=away.get("cxl", 0.0),
        swap_nvme=away.get("nvme", 0.0),
    )


def _kept(w: Workload, base: Choice, micro_batches: float) -> Choice:
    """`micro_batches` (of all units together) stay on the device, the last units' first."""
    units, left = list(base.units), int(micro_batches)
    for i in range(len(units) - 1, -1, -1):
        if left <= 0:
            break
        if can_choose(w.units[i]):
            take = min(left, w.micro_batches)
            left -= take
            part, c = take / w.micro_batches, units[i]
            units[i] = shares(c, w, part, {tier: share * (1 - part) for tier, share in c.swapped.items()})
    return replace(base, units=tuple(units))


def refitted(p: Problem, choice: Choice) -> Choice:
    """The choice, or where it does not fit with no more kept on the device than there is room for beside the rest."""
    if p.w.activations == "recompute" or not _short(p, choice):
        return choice
    units = zip(p.w.units, choice.units, strict=True)
    bare = replace(choice, units=tuple(shares(c, p.w, 0.0, c.swapped) if can_choose(u) else c for u, c in units))
    return bare if _short(p, bare) else _kept(p.w, bare, _most_kept(p, bare))


def _short(p: Problem, choice: Choice) -> bool:
    """Whether the device's memory is short, or RAM where that is the same."""
    room = p.room(choice)
    return room["gpu"] < 0 or (p.w.device == "cpu" and room["cpu"] < 0)


def _most_kept(p: Problem, base: Choice) -> float:
    """The most micro-batches that can be kept beside `base` within the device's and RAM's budget."""
    def fits(count: int) -> bool:
        return not _short(p, _kept(p.w, base, count))

    few, many = 0, p.w.micro_batches * sum(can_choose(u) for u in p.w.units)
    if fits(many):
        return many
    while few + 1 < many:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few
