"""What the planner decides for one unit, and the whole decision. Plain data: its costs are in `memory`, `timing`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from offload.planner.plan import UnitProfile, Workload

Role = Literal["weights", "state", "gradient"]
ROLES_OF: dict[Role, tuple[str, ...]] = {
    "weights": ("param", "frozen"),
    "state": ("master", "exp_avg", "exp_avg_sq"),
    "gradient": ("grad",),
}


@dataclass(frozen=True)
class UnitChoice:
    """One unit: the tier of its weights, of its optimizer state and of its waiting gradient, and its activations.

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
    def swapped(self) -> dict[str, float]:
        """Share of the saved bytes that each tier takes, where it takes any."""
        shares = {"cpu": self.swap_cpu, "cxl": self.swap_cxl, "nvme": self.swap_nvme}
        return {tier: share for tier, share in shares.items() if share > 0}

    def tier(self, role: Role) -> str:
        """Where `role` lives."""
        return str(getattr(self, role))

    def with_tier(self, role: Role, tier: str) -> UnitChoice:
        """The same with `role` in `tier`."""
        changed: Any = {role: tier}
        return replace(self, **changed)


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
    """The decision that needs the least RAM and device memory."""
    return Choice(tuple(recompute_all(u, w) for u in w.units), block_slots)


def everything_in_ram(w: Workload, block_slots: int = 2) -> Choice:
    """All homes in RAM, activations recomputed."""
    return Choice(
        tuple(replace(recompute_all(u, w), weights="cpu", state="cpu", gradient="cpu") for u in w.units), block_slots
    )


def swaps(unit: UnitChoice) -> bool:
    """Whether any of the unit's saved tensors leave the device."""
    return bool(unit.swapped)
