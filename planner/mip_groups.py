"""Groups of equal units in the mixed-integer program, and the choice that their solved counts stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from offload.planner.activations import shares
from offload.planner.choice import Choice, Role, to_device
from offload.planner.placement import ROLES
from offload.planner.plan import UnitProfile, Workload

NOTHING = 1e-9  # of a micro-batch: what a solver leaves where it means 0


@dataclass
class Group:
    """Units that cost and save the same, and the variables that count them."""

    members: list[int]
    unit: UnitProfile
    roles: dict[tuple[Role, str], Any]  # (role, tier): units that have it there
    boundaries: dict[str, Any]
    there: Any = None  # units on the device, where that is offered
    kept: Any = 0  # of micro-batches of all members
    recomputed: Any = 0
    swapped: dict[str, Any] | None = None
    any_again: Any = 0  # whether any is recomputed
    any_swap: Any = 0
    any_kept: Any = 0  # where what they save needs room in forward
    forward: tuple[int, int] = (0, 0)  # the framework's bytes of a pass beyond one without grad: kept, swapped


def chosen(groups: Sequence[Group], base: Choice, tiers: Sequence[str], w: Workload) -> Choice:
    """The solved counts as a choice: of each group the last units first, but on the device the first, whose updates
    nothing hides; what is recomputed is spread evenly among what is swapped, so that transfers always have compute
    beside them."""
    units = list(base.units)
    m = w.micro_batches
    for g in groups:
        last_first = sorted(g.members, reverse=True)
        there = 0 if g.there is None else round(g.there.value() or 0)
        for i in sorted(g.members)[:there]:
            units[i] = to_device(units[i])
        for role in ROLES:
            at = 0
            for tier in tiers:
                if (role, tier) not in g.roles:
                    continue
                count = round(g.roles[role, tier].value() or 0)
                for i in last_first[at : at + count]:
                    units[i] = units[i].with_tier(role, tier)
                at += count
        at = 0
        for tier, x in g.boundaries.items():
            count = round(x.value() or 0)
            for i in sorted(g.members)[at : at + count]:
                units[i] = replace(units[i], boundary=tier)
            at += count
        if g.swapped is None:
            continue
        kept = float(g.kept.value() or 0)
        away = {tier: float(x.value() or 0) for tier, x in g.swapped.items()}
        away = {tier: x if x > NOTHING else 0.0 for tier, x in away.items()}
        again = round(g.recomputed.value() or 0) / max(1e-9, len(g.members) * m - kept)  # of what is not kept
        due = 0.0
        for i in last_first:
            part = min(kept, float(m))
            kept -= part
            left, taken = m - part, {}
            due += again * left
            whole = min(int(due + 1e-6), int(left + 1e-6))  # spread evenly, in whole micro-batches
            due -= whole
            left -= whole
            for tier in away:
                taken[tier] = min(away[tier], left)
                away[tier] -= taken[tier]
                left -= taken[tier]
            units[i] = shares(units[i], w, part / m, {tier: n / m for tier, n in taken.items()})
    return replace(base, units=tuple(units))
