"""What one unit takes: in a slot, in its homes, on the drive. Sizes in bytes, those of homes in whole pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offload.planner.choice import ROLES_OF, Role
from offload.planner.pages import round_up
from offload.planner.plan import UnitProfile, Workload


def weight_bytes(unit: UnitProfile, w: Workload) -> int:
    """The unit's trainable and frozen weights in the compute dtype; zeroth-order: its slot, any form of them fits."""
    if w.zo:
        stored = sum(n for role, n in home_bytes(unit, w).items() if role != "frozen")
        return max(stored, round_up(unit.trainable * w.itemsize)) + unit.frozen * w.itemsize
    return (unit.trainable + unit.frozen) * w.itemsize


def gradient_bytes(unit: UnitProfile, w: Workload) -> int:
    """One step's summed gradient of the unit."""
    return 0 if w.zo else unit.trainable * w.gradient_itemsize


def home_bytes(unit: UnitProfile, w: Workload) -> dict[str, int]:
    """Bytes by role of the unit's state in its home (RAM, or one side of its store extents); each buffer whole pages.

    Roles: param, frozen, master (bfloat16 only: the low half of the float32 value), exp_avg, exp_avg_sq. Zeroth-order
    runs store what `ZerothOrder.roles` says.
    """
    if w.zo:
        sizes = {role: -(-unit.trainable * nbytes // per) for role, nbytes, per, _ in w.zo.roles}
        sizes["frozen"] = unit.frozen * w.itemsize
        return {role: round_up(n) for role, n in sizes.items() if n}
    sizes = {"param": unit.trainable * w.itemsize, "frozen": unit.frozen * w.itemsize}
    if w.dtype == "bfloat16":
        sizes["master"] = unit.trainable * 2
    sizes["exp_avg"] = sizes["exp_avg_sq"] = unit.trainable * 4
    return {role: round_up(n) for role, n in sizes.items() if n}


def gradient_home(unit: UnitProfile, w: Workload) -> int:
    """Bytes of the unit's gradient while it waits for the global norm; 0 without clipping."""
    return round_up(gradient_bytes(unit, w)) if w.clipping else 0


def item_bytes(unit: UnitProfile, role: Role, w: Workload) -> int:
    """Memory that a home of the unit's weights, optimizer state or waiting gradient takes.

    Zeroth-order: all that is stored of a unit travels with its weights, and counts as them.
    """
    if role == "gradient":
        return gradient_home(unit, w)
    home = home_bytes(unit, w)
    if w.zo:
        return sum(home.values()) if role == "weights" else 0
    return sum(home.get(name, 0) for name in ROLES_OF[role])


def item_sizes(w: Workload) -> Sequence[Mapping[Role, int]]:
    """`item_bytes` of every unit, by role."""
    if "items" not in w.worked_out:
        first = {i: {role: item_bytes(w.units[i], role, w) for role in ROLES_OF} for i in set(w.alike)}
        w.worked_out["items"] = tuple(first[i] for i in w.alike)
    found: Sequence[Mapping[Role, int]] = w.worked_out["items"]
    return found


def store_bytes(unit: UnitProfile, w: Workload) -> int:
    """Bytes of the unit's durable extents: two sides of everything that is updated, one of what is frozen."""
    once = {"frozen"} | {role for role, _, _, written in (w.zo.roles if w.zo else ()) if not written}
    return sum(n if role in once else 2 * n for role, n in home_bytes(unit, w).items())
