"""The decision as a mixed-integer program through PuLP (HiGHS if importable, else CBC).

Units that cost and save the same are one group, solved by counts, so that 80 equal blocks cost what one does.
Variables of a group: how many units have each role in each tier, how many live on the device, how many boundaries wait
in each tier, how many (unit, micro-batch) pairs are recomputed (whole), kept and swapped (continuous: rows). The
objective is the two-stage estimate: each stage lasts as long as its busiest resource. Bytes are in units of the budget,
seconds in units of the worst step: raw numbers break the solvers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pulp
from offload.planner.activation_bytes import forward_workspace, kept_room, kept_workspace
from offload.planner.activations import can_choose, shares
from offload.planner.choice import Choice, UnitChoice, may_live_on_device, nothing_in_ram, to_device
from offload.planner.memory import (
    DEVICE_SCRATCH,
    FRAMEWORK_MARGIN,
    device_home,
    filled_bytes,
    is_large,
    moments,
    store_staging,
    streamed_bytes,
)
from offload.planner.mip_groups import Group, chosen
from offload.planner.pages import PAGE, round_up
from offload.planner.placement import ROLES, Problem, top_up
from offload.planner.plan import UnitProfile
from offload.planner.solver import SolverFailed, run
from offload.planner.timing import Step, copy_rates, lanes, stage_resources, unit_step
from offload.planner.unit_bytes import gradient_bytes, gradient_home, item_bytes, weight_bytes

GAP = 1e-6
TOLERANCE = 1e-6  # by which solvers may exceed a constraint


@dataclass(frozen=True)
class Solution:
    """A choice that keeps the budgets, and what the solver said of it."""

    choice: Choice
    optimal: bool
    seconds: float


def solve(p: Problem, time_limit: float, start: Choice | None = None) -> Solution:
    """The best choice found from `start` on. Raises SolverFailed when the solver crashes or ends with no incumbent."""
    begin = time.perf_counter()
    model = _Model(p)
    if start is not None:
        model.begin_from(start)
    optimal = run(model.problem, time_limit, GAP)
    choice = chosen(model.groups, model.base, model.tiers, p.w)
    if min(p.room(choice)[tier] for tier in ("gpu", "cpu", "cxl")) < 0:
        raise SolverFailed("the solution exceeds a budget by the solver's tolerance")
    best = min(choice, top_up(p, choice), key=p.score)
    return Solution(best, optimal, time.perf_counter() - begin)


class _Model:
    def __init__(self, p: Problem) -> None:
        self.p, self.w = p, p.w
        self.base = nothing_in_ram(p.w, p.block_slots)
        self.problem = pulp.LpProblem("plan", pulp.LpMinimize)
        self.tiers = [t for t in ("cpu", "cxl") if p.limit[t] > 0]
        self.outer = [t for t in ("cpu", "cxl", "nvme") if p.limit[t] > 0]
        self.room = p.room(self.base)
        self.used: dict[str, list[Any]] = {tier: [] for tier in ("gpu", "cpu", "cxl", "nvme")}
        self.loads: dict[tuple[str, str], list[Any]] = {}  # (stage, lane): seconds
        self.behind: dict[str, list[Any]] = {"nvme_write": [], "d2h": []}  # seconds of each commit
        self.base_steps = [
            unit_step(u, c, p.w, p.hw) for u, c in zip(p.w.units, self.base.units, strict=True)
        ]
        self.plans_activations = p.w.activations == "plan"
        self.groups = self._groups()
        self.any_there = self._any_there()
        self._slots()
        self._chunks()
        self._objective()
        self._capacities()

    def _binary(self, name: str) -> Any:
        return self.problem.add_variable(name, 0, 1, "Integer")

    def _groups(self) -> list[Group]:
        members: dict[int, list[int]] = {}
        for i, first in enumerate(self.w.alike):
            members.setdefault(first, []).append(i)
        return [self._group(number, group) for number, group in enumerate(members.values())]

    def _group(self, number: int, members: list[int]) -> Group:
        w, n = self.w, len(members)
        unit, c = w.units[members[0]], self.base.units[members[0]]
        add, m = self.problem.add_variable, w.micro_batches
        group = Group(members, unit, {}, {})
        for role in ROLES:
            if not item_bytes(unit, role, w):
                continue
            for tier in self.tiers:
                x = group.roles[role, tier] = add(f"{role}_{tier}_{number}", 0, n, "Integer")
                self._count(x, unit, c, c.with_tier(role, tier), {tier: item_bytes(unit, role, w)})
        if may_live_on_device(unit, w, self.p.hw):
            group.there = add(f"there_{number}", 0, n, "Integer")
            waits = 0 if unit.held else gradient_home(unit, w)
            self._count(group.there, unit, c, to_device(c), {"gpu": device_home(unit, w) + waits})
        for role in ROLES if len(self.tiers) > 1 or group.there is not None else ():
            if placed := [group.roles[role, t] for t in self.tiers if (role, t) in group.roles]:
                self.problem += pulp.lpSum(placed) <= n - (0 if group.there is None else group.there)
        if not self.plans_activations:
            return group
        if unit.boundary_bytes and unit.kind != "resident":
            for tier in self.outer:
                x = group.boundaries[tier] = add(f"boundary_{tier}_{number}", 0, n, "Integer")
                moved = m * round_up(unit.boundary_bytes)
                self._count(x, unit, c, replace(c, boundary=tier), {tier: moved, "gpu": -m * unit.boundary_bytes})
            self.problem += pulp.lpSum(group.boundaries.values()) <= n
        if can_choose(unit):
            self._activations(group, number, c)
        return group

    def _activations(self, group: Group, number: int, c: UnitChoice) -> None:
        """Shares in micro-batches of all the group's units; per micro-batch costs are those of a unit over M."""
        w, unit, n = self.w, group.unit, len(group.members)
        m, add = w.micro_batches, self.problem.add_variable
        group.recomputed = add(f"recomputed_{number}", 0, n * m, "Integer")
        group.kept = add(f"kept_{number}", 0, n * m)
        group.swapped = {t: add(f"swapped_{t}_{number}", 0, n * m) for t in self.outer}
        total = [group.recomputed, group.kept, *group.swapped.values()]
        self.problem += pulp.lpSum(total) == n * m
        kept = replace(c, keep=1.0, recompute=0.0)
        self._count(group.kept, unit, c, kept, {"gpu": kept_room(unit, 1.0)}, 1 / m)
        for tier, x in group.swapped.items():
            swapped = shares(c, w, 0.0, {tier: 1.0})
            padded = round_up(unit.saved_bytes) + PAGE * (1 + len(unit.saved))
            self._count(x, unit, c, swapped, {tier: padded}, 1 / m)
        swaps = pulp.lpSum(group.swapped.values())
        group.any_again, group.any_swap = self._binary(f"any_again_{number}"), self._binary(f"any_swap_{number}")
        self.problem += swaps <= n * m * group.any_swap
        for tier in group.swapped:  # of the one unit that is divided between tiers, every piece begins on a page
            self.used[tier].append((m * PAGE * (2 + len(unit.saved)), group.any_swap))
        self.problem += group.recomputed <= n * m * group.any_again
        again = 0.5 if m > 1 else 0.0  # as much as where some micro-batches are run again
        more_kept, more_swapped = (
            forward_workspace(unit, replace(c, keep=keep, recompute=again, swap_cpu=away), w) - unit.workspace_forward
            for keep, away in ((1.0 - again, 0.0), (0.0, 1.0 - again))
        )
        margin = FRAMEWORK_MARGIN[w.device]
        group.forward = round(margin * more_kept) + 1, round(margin * more_swapped) + 1
        if more_kept:
            group.any_kept = self._binary(f"any_kept_{number}")
            self.problem += group.kept <= n * m * group.any_kept

    def _count(
        self, x: Any, unit: UnitProfile, old: UnitChoice, new: UnitChoice, nbytes: dict[str, int], factor: float = 1.0
    ) -> None:
        """One more of `x` changes the step from that of `old` to that of `new` (times factor), and the tiers' bytes."""
        change = Step()
        change.add(unit_step(unit, new, self.w, self.p.hw), factor)
        change.add(unit_step(unit, old, self.w, self.p.hw), -factor)
        for stage in ("forward", "backward"):
            for lane, seconds in lanes(getattr(change, stage), self.w, self.p.hw).items():
                if seconds:
                    self.loads.setdefault((stage, lane), []).append(seconds * x)
        if change.behind:
            self.behind["nvme_write"].append(change.behind / self.p.hw.nvme_write * x)
        if change.copied_out:
            self.behind["d2h"].append(change.copied_out / copy_rates(self.w, self.p.hw)[1] * x)
        for tier, n in nbytes.items():
            self._take(tier, n, x)

    def _take(self, tier: str, n: int, x: Any) -> None:
        """One of `x` takes `n` bytes of the tier."""
        if n:
            self.used[tier].append((n, x))
            if self.w.device == "cpu" and tier == "gpu":
                self.used["cpu"].append((n, x))

    def _any_there(self) -> Any:
        """Whether any unit lives on the device; None where that is not offered."""
        found = [g for g in self.groups if g.there is not None]
        if not found:
            return None
        there = self._binary("any_there")
        self.problem += pulp.lpSum(g.there for g in found) <= sum(len(g.members) for g in found) * there
        self._take("gpu", DEVICE_SCRATCH, there)
        return there

    def _slots(self) -> None:
        """Slots are as large as the largest of those units that do not live on the device; the base has them all.

        Of each size a binary says whether a slot of it is needed, and so every smaller one.
        """
        w = self.w
        if self.any_there is None:
            return
        sizes = {"weights": weight_bytes, "gradients": gradient_bytes}
        for b in self.p.buffers(self.base):
            what, _, kind = b.name.partition(".")
            if what not in sizes or kind not in ("block", "large") or (what == "gradients" and not w.clipping):
                continue
            users: dict[int, list[Group]] = {}
            for g in self.groups:
                waits = what == "gradients" and g.unit.held  # in a buffer of its own
                if g.unit.kind != "resident" and is_large(g.unit, w) == (kind == "large") and not waits:
                    users.setdefault(round_up(sizes[what](g.unit, w)), []).append(g)
            larger: Any = 0
            widest = sorted((n for n in users if n), reverse=True)
            for n, smaller in zip(widest, [*widest[1:], 0], strict=True):
                if any(g.there is None for g in users[n]):
                    break
                needed = self._binary(f"slot_{what}_{kind}_{n}")
                for g in users[n]:
                    self.problem += len(g.members) - g.there <= len(g.members) * needed
                self.problem += needed >= larger
                self._take("gpu", b.count * (n - smaller), needed)
                for tier in ("gpu", "cpu") if w.device == "cpu" else ("gpu",):
                    self.room[tier] += b.count * (n - smaller)
                larger = needed

    def _chunks(self) -> None:
        """The optimizer's chunk buffers hold each role that any trainable unit has on NVMe; the base has them all."""
        if not self.tiers or self.w.zo:
            return
        w, ring = self.w, [b for b in self.p.buffers(self.base) if b.name == "update"]
        sizes = {role: n for role, n in streamed_bytes(w, self.base).items() if n}
        groups = [g for g in self.groups if g.unit.trainable]
        whole, taken = sum(b.total for b in ring), []
        for role, nbytes in sizes.items():
            stored = self._binary(f"stored_{role}")
            for g in groups:
                n = len(g.members)
                elsewhere = [g.roles[role, t] for t in self.tiers] + ([] if g.there is None else [g.there])
                self.problem += n - pulp.lpSum(elsewhere) <= n * stored
            taken.append((whole * nbytes // sum(sizes.values()), stored))
            self.room["cpu"] += taken[-1][0]
        if self.any_there is not None and whole:  # state on the device passes through them
            share = self.problem.add_variable("chunks", 0, 1)
            self.problem += share >= pulp.lpSum(n / whole * stored for n, stored in taken)
            self.problem += share >= filled_bytes(w) / sum(sizes.values()) * self.any_there
            taken = [(whole, share)]
        self.used["cpu"] += taken
        self.room["cpu"] -= sum(b.count for b in ring) * PAGE  # the least there is

    def _objective(self) -> None:
        """Write-behind is priced only for a given commit interval ("auto" keeps it under a tenth of the step)."""
        p = self.p
        base = Step()
        for step in self.base_steps:
            base.add(step)
        scale = p.estimate(self.base).step_seconds or 1.0
        behind: dict[str, Any] = {}
        if p.w.commit_every != "auto":
            self.behind["nvme_write"].append(base.behind / p.hw.nvme_write)
            behind = {lane: 0.5 / p.w.commit_every * pulp.lpSum(terms) for lane, terms in self.behind.items()}
        stages = {name: self.problem.add_variable(f"seconds_{name}", 0) for name in ("forward", "backward")}
        for stage, longest in stages.items():
            fixed = lanes(getattr(base, stage), p.w, p.hw)
            for shares_of in stage_resources(p.w, p.hw):
                load = []
                for lane, share in shares_of.items():
                    load.append(share * fixed[lane] / scale)
                    load += [share / scale * term for term in self.loads.get((stage, lane), [])]
                    if lane in behind:
                        load.append(share / scale * behind[lane])
                self.problem += longest >= pulp.lpSum(load)
        self.problem.setObjective(pulp.lpSum(stages.values()))

    def _capacities(self) -> None:
        """Every tier's bytes; the device's at the worst moment of forward and of backward, with all that waits."""
        w = self.w
        shared = ("gpu", "cpu") if w.device == "cpu" else ("gpu",)  # what takes room where the device's memory counts
        base = list(moments(w, self.base))
        known = max((x.activations + x.framework for x in base), default=0)
        waiting = max((x.activations for x in base), default=0)
        staged = self._staging() if self.plans_activations else []
        for tier, terms in self.used.items():
            if tier not in shared or not self.plans_activations:
                self._capacity(terms, self.room[tier])
                continue
            free = self.room[tier] + known - waiting
            chosen = {i for g in self.groups if g.swapped is not None for i in g.members}
            fixed = max((x.framework for x in base if not (x.backward and x.unit in chosen)), default=0)
            self._capacity(terms + staged, free - fixed)
            for g in self.groups:
                if g.swapped is None:
                    continue
                margin, members = FRAMEWORK_MARGIN[w.device], set(g.members)
                forward, backward = (
                    max(x.framework for x in base if x.backward == back and x.unit in members)
                    for back in (False, True)
                )
                least = backward - round(margin * max(0, g.unit.workspace_backward - kept_workspace(g.unit)))
                self._capacity(terms + staged, free - least)
                # what autograd saves lies beside the workspace where forward makes it, until it has left or been copied
                # away, and where backward does: then the group's last units, which are those that are kept, are done
                for more, any_such in zip(g.forward, (g.any_kept, g.any_swap), strict=True):
                    self._capacity([*terms, *staged, (more, any_such)], free - forward)
                # on a CPU what is kept has memory of its own all the time
                earlier = terms if w.device == "cpu" else [(n, x) for n, x in terms if x is not g.kept]
                own = (w.micro_batches - 1) * g.unit.saved_bytes
                self._capacity([*earlier, *staged, (backward - least + own, g.any_again)], free - least)

    def _staging(self) -> list[tuple[float, Any]]:
        """Two buffers on the device for the largest micro-batch that comes back; 1 unit of the variable is the most."""
        w = self.w
        back = self.problem.add_variable("coming_back", 0)
        away = self._binary("any_away")
        moved = [x for g in self.groups for x in g.boundaries.values()]
        boundary = max((u.boundary_bytes for u in w.units), default=0)
        if moved:
            self.problem += pulp.lpSum(moved) <= len(w.units) * away
        most = max((u.saved_bytes + PAGE * (2 + len(u.saved)) for u in w.units if can_choose(u)), default=1)
        for g in self.groups:
            if g.swapped is not None:
                self.problem += back >= (g.unit.saved_bytes + PAGE * (2 + len(g.unit.saved))) / most * g.any_swap
        return [(2 * most, back), (2 * round_up(boundary), away), (store_staging(w), self._any_stored())]

    def _any_stored(self) -> Any:
        """Whether any activations go to NVMe."""
        stored = self._binary("any_stored")
        for g in self.groups:
            n = len(g.members)
            if "nvme" in g.boundaries:
                self.problem += g.boundaries["nvme"] <= n * stored
            if g.swapped is not None and "nvme" in g.swapped:
                self.problem += g.swapped["nvme"] <= n * self.w.micro_batches * stored
        return stored

    def _capacity(self, terms: list[tuple[float, Any]], room: int) -> None:
        terms = [(n, x) for n, x in terms if n]
        if terms:
            scale = float(max(abs(room), max(abs(n) for n, _ in terms), 1))
            self.problem += pulp.lpSum(n / scale * x for n, x in terms) <= room / scale - TOLERANCE

    def begin_from(self, start: Choice) -> None:
        """Give the homes the counts of `start`; the solver looks for the activations that go with them.

        Not the activations too: their bytes are bounded from above here, so that those of `start` are too many in half
        of all cases, and solvers drop a start that is not feasible.
        """
        for g in self.groups:
            for (role, tier), x in g.roles.items():
                x.setInitialValue(sum(start.units[i].tier(role) == tier for i in g.members))
            if g.there is not None:
                g.there.setInitialValue(sum(start.units[i].on_device for i in g.members))
