"""What the planner decides for one unit, and the whole decision. Plain data: its costs are in `memory`, `timing`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from offload.planner.plan import Hardware, UnitProfile, Workload

Role = Literal["weights", "state", "gradient"]
ROLES_OF: dict[Role, tuple[str, ...]] = {
    "weights": ("param", "frozen"),
    "state": ("master", "exp_avg", "exp_avg_sq"),
    "gradient": ("grad",),
}


@dataclass(frozen=True)
class UnitChoice:
    """One unit: the tier of its weights, of its optimizer state and of its waiting gradient, and its activations.

    All three in "gpu", or none: the unit lives on the device, where AdamW updates it.
    The five shares sum to 1 and mean what `UnitPlan.activations` says; `boundary` is the tier of the unit's outputs.
    """

    weights: str = "nvme"
    state: str = "nvme"
    gradient: str = "nvme"
    keep: float = 0.0
    recompute: float = 1.0
    swap_cpu: float = 0.0
    swap_cxl: float = 0.0
    swap_nvme: float = 0.0
    boundary: str = "gpu"

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:  # looked up many times for each time it is made
        return self._hash

    @property
    def on_device(self) -> bool:
        """Whether the unit lives on the device."""
        return self.state == "gpu"

    @cached_property
    def swapped(self) -> dict[str, float]:
        """Share of the saved bytes that each tier takes, where it takes any."""
        shares = {"cpu": self.swap_cpu, "cxl": self.swap_cxl, "nvme": self.swap_nvme}
        return {tier: share for tier, share in shares.items() if share > 0}

    def tier(self, role: Role) -> str:
        """Where `role` lives."""
        return str(getattr(self, role))

    def with_tier(self, role: Role, tier: str) -> UnitChoice:
        """The same with `role` in `tier`."""
        return _with_tier(self, role, tier)


@lru_cache(1 << 14)
def to_device(c: UnitChoice) -> UnitChoice:
    """The same for a unit that lives on the device."""
    return replace(c, weights="gpu", state="gpu", gradient="gpu")


def may_live_on_device(unit: UnitProfile, w: Workload, hw: Hardware) -> bool:
    """Whether AdamW on the device is offered for the unit."""
    return hw.adamw_device > 0 and w.zo is None and unit.trainable > 0 and unit.kind != "resident"


@lru_cache(1 << 14)
def _with_tier(c: UnitChoice, role: Role, tier: str) -> UnitChoice:
    changed: Any = {role: tier}
    return replace(c, **changed)


@dataclass(frozen=True)
class Choice:
    """The decision for every unit, in the order of `Workload.units`, and the number of block slots."""

    units: tuple[UnitChoice, ...]
    block_slots: int = 2

    def placed(self, role: Role, tier: str) -> frozenset[int]:
        """Indices of the units whose `role` lives in `tier`."""
        return frozenset(i for i, unit in enumerate(self.units) if unit.tier(role) == tier)


def recompute_all(unit: UnitProfile, w: Workload) -> UnitChoice:
    """Everything on NVMe, activations as the engine always can: run again, or kept where nothing is run again."""
    kept = float(unit.kept or unit.kind == "resident" or w.zo is not None)
    return UnitChoice(keep=kept, recompute=1.0 - kept)


def nothing_in_ram(w: Workload, block_slots: int = 2) -> Choice:
    """The decision that needs the least device memory, and the least RAM of those that stream."""
    return Choice(tuple(recompute_all(u, w) for u in w.units), block_slots)


def everything_in_ram(w: Workload, block_slots: int = 2) -> Choice:
    """All homes in RAM, activations recomputed."""
    return all_in_ram(nothing_in_ram(w, block_slots))


def all_in_ram(choice: Choice) -> Choice:
    """The same with all homes in RAM but those of units that live on the device."""
    return _homes_in(choice, "cpu")


def without_homes(choice: Choice) -> Choice:
    """The same with all homes on NVMe but those of units that live on the device."""
    return _homes_in(choice, "nvme")


def _homes_in(choice: Choice, tier: str) -> Choice:
    units = (c if c.on_device else replace(c, weights=tier, state=tier, gradient=tier) for c in choice.units)
    return replace(choice, units=tuple(units))


def runs(w: Workload, choice: Choice) -> list[tuple[int, UnitChoice, int]]:
    """Neighbours that cost the same under one choice: (the first such unit of all, its choice, how many in a row)."""
    latest: Choice | None
    found: list[tuple[int, UnitChoice, int]]
    latest, found = w.worked_out.get("latest runs", (None, []))
    if latest is choice:  # its bytes and its seconds are asked for one after the other
        return found
    found = []
    count, last_i, last_c = 0, -1, None
    for i, c in zip(w.alike, choice.units, strict=True):
        if i == last_i and (c is last_c or c == last_c):
            count += 1
            continue
        if last_c is not None:
            found.append((last_i, last_c, count))
        count, last_i, last_c = 1, i, c
    if last_c is not None:
        found.append((last_i, last_c, count))
    w.worked_out["latest runs"] = choice, found
    return found


def swaps(unit: UnitChoice) -> bool:
    """Whether any of the unit's saved tensors leave the device."""
    return bool(unit.swapped)
