"""Where weights, optimizer state and waiting gradients live: fixed orders to fill memory in, the greedy way.

Everything durable also has its extents in the store; a home in RAM or CXL memory saves the traffic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from offload.planner.choice import Choice, Role, all_in_ram
from offload.planner.memory import peaks, reserve
from offload.planner.plan import Budgets, Buffers, Hardware, Workload
from offload.planner.timing import Estimate, estimate, whole_step
from offload.planner.unit_bytes import item_sizes

Item = tuple[int, Role]
ROLES: tuple[Role, ...] = ("weights", "state", "gradient")
# What the optimizer works on stays in RAM while it can: weights, which are only streamed, go to CXL memory first.
ROLES_FOR_CXL: tuple[Role, ...] = ("weights", "gradient", "state")
TOUCHED: tuple[Role, ...] = ("gradient", "state")


@dataclass(frozen=True)
class Problem:
    """What is to be decided: a workload on a machine within budgets, with a number of block slots."""

    w: Workload
    hw: Hardware
    budgets: Budgets
    block_slots: int = 2

    def buffers(self, choice: Choice) -> tuple[Buffers, ...]:
        """What the engine reserves for the choice."""
        return reserve(self.w, self.block_slots, choice)

    def categories(self, choice: Choice) -> dict[str, dict[str, int]]:
        """Peak bytes by tier and category."""
        return peaks(self.w, self.buffers(choice), choice, len(self.budgets.nvme))

    def peak(self, choice: Choice) -> dict[str, int]:
        """Peak bytes by tier."""
        return {tier: sum(sizes.values()) for tier, sizes in self.categories(choice).items()}

    @cached_property
    def limit(self) -> dict[str, int]:
        """Budget by tier."""
        return self.budgets.by_tier()

    def room(self, choice: Choice) -> dict[str, int]:
        """Bytes left by tier; negative where the choice does not fit."""
        peak = self.peak(choice)
        return {tier: self.limit[tier] - peak[tier] for tier in peak}

    def shortage(self, choice: Choice) -> float:
        """By how much the choice exceeds the budgets, in shares of each, added up; 0 where it fits."""
        return sum(-room / max(1, self.limit[tier]) for tier, room in self.room(choice).items() if room < 0)

    def estimate(self, choice: Choice) -> Estimate:
        """The two-stage estimate of the choice."""
        return estimate(self.w, self.hw, whole_step(self.w, self.hw, choice))

    def score(self, choice: Choice) -> tuple[float, float, int]:
        """Estimated seconds, then bytes over NVMe, then bytes in CXL memory that belong in RAM: the less the better."""
        found = self.estimate(choice)
        return found.step_seconds, found.nvme_bytes, self.misplaced(choice)

    def misplaced(self, choice: Choice) -> int:
        """Bytes in CXL memory that the optimizer works on, which wants them near."""
        if not self.limit["cxl"]:
            return 0
        found = zip(item_sizes(self.w), choice.units, strict=True)
        return sum(sizes[role] for sizes, c in found for role in TOUCHED if c.tier(role) == "cxl")


def orders(w: Workload) -> Iterator[list[Item]]:
    """Fixed orders to fill RAM in. The longest prefix that fits only grows with RAM."""
    backwards = range(len(w.units) - 1, -1, -1)
    blocks = [i for i in backwards if w.units[i].kind in ("block", "other")]
    rest = sorted(set(backwards) - set(blocks), key=lambda i: (home(i, w), -i))
    # small leftovers before the large embedding and head, so that a large one blocks nothing behind it
    for units in (blocks + rest, rest + blocks):
        gradients: list[Item] = [(i, "gradient") for i in units]
        weights: list[Item] = [(i, "weights") for i in units]
        state: list[Item] = [(i, "state") for i in units]
        both = [item for pair in zip(weights, state, strict=True) for item in pair]
        yield gradients + both
        yield both + gradients
        yield [x for trio in zip(gradients, weights, state, strict=True) for x in trio]
        yield weights + gradients + state
        yield gradients + state  # on device "cpu" weights are read into their slot, from RAM they are copied


def home(i: int, w: Workload) -> int:
    """Bytes of the unit's weights and state."""
    sizes = item_sizes(w)[i]
    return sizes["weights"] + sizes["state"]


def fill(w: Workload, base: Choice, order: list[Item], room: Mapping[str, int]) -> Choice:
    """`base` with the longest prefix of `order` that fits into RAM, and then into CXL memory what still fits there."""
    units, left, sizes = list(base.units), room.get("cpu", 0), item_sizes(w)
    for i, role in order:
        if units[i].tier(role) != "nvme":
            continue
        need = sizes[i][role]
        if need > left:
            break
        left -= need
        units[i] = units[i].with_tier(role, "cpu")
    return fill_cxl(w, replace(base, units=tuple(units)), order, room.get("cxl", 0), ROLES_FOR_CXL)


def fill_cxl(w: Workload, base: Choice, order: list[Item], room: int, roles: Sequence[Role]) -> Choice:
    """`base` with what it leaves on NVMe, of these roles one after the other, in `room` bytes of CXL memory."""
    units, sizes = list(base.units), item_sizes(w)
    for wanted in roles if room > 0 else ():
        for i, role in order:
            need = sizes[i][role]
            if role == wanted and units[i].tier(role) == "nvme" and 0 < need <= room:
                room -= need
                units[i] = units[i].with_tier(role, "cxl")
    return replace(base, units=tuple(units))


def top_up(p: Problem, choice: Choice) -> Choice:
    """The choice with whatever else fits into RAM, in the first order: it spares the drive, and the optimizer CXL
    memory."""
    units, room, sizes = list(choice.units), p.room(choice)["cpu"], item_sizes(p.w)
    for i, role in next(orders(p.w)):
        need = sizes[i][role]
        far = units[i].tier(role) == "nvme" or (role in TOUCHED and units[i].tier(role) == "cxl")
        if far and need <= room:
            room -= need
            units[i] = units[i].with_tier(role, "cpu")
    return replace(choice, units=tuple(units))


def leanest(p: Problem, base: Choice) -> Iterator[Choice]:
    """`base` and what may take less RAM: with homes in CXL memory, or all in RAM, there are no chunk buffers."""
    yield base
    if (room := p.room(base)["cxl"]) > 0:
        yield fill_cxl(p.w, base, next(orders(p.w)), room, ROLES_FOR_CXL)
    yield all_in_ram(base)


def fillings(p: Problem, base: Choice) -> list[Choice]:
    """`base` with its homes placed in each of the fixed orders, as far as the budgets allow: RAM first and, where there
    is CXL memory, also with the weights in it first."""
    room, found = p.room(base), [base]
    if min(p.room(everything := all_in_ram(base)).values()) >= 0:  # only then the optimizer needs no chunk buffers
        found.append(everything)
    for order in orders(p.w):
        found.append(fill(p.w, base, order, room))
        if room["cxl"] > 0:
            streamed = fill_cxl(p.w, base, order, room["cxl"], ("weights",))
            found.append(fill(p.w, streamed, order, p.room(streamed)))
    return found
