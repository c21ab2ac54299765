"""Deciding: where every byte lives, what every tier peaks at, how long a step takes. Numbers in, a `Plan` out."""

from offload.planner.advice import advise
from offload.planner.decide import make_plan
from offload.planner.hardware import Hardware, available_ram, load_hardware, preset_names, probe
from offload.planner.memory import is_large, reserve
from offload.planner.plan import (
    Advice,
    Budgets,
    Buffers,
    Plan,
    Profile,
    UnitCost,
    UnitPlan,
    UnitProfile,
    Workload,
    ZerothOrder,
)
from offload.planner.profile import profile_model
from offload.planner.unit_bytes import gradient_home, home_bytes

__all__ = [
    "Advice",
    "Budgets",
    "Buffers",
    "Hardware",
    "Plan",
    "Profile",
    "UnitCost",
    "UnitPlan",
    "UnitProfile",
    "Workload",
    "ZerothOrder",
    "advise",
    "available_ram",
    "gradient_home",
    "home_bytes",
    "is_large",
    "load_hardware",
    "make_plan",
    "preset_names",
    "probe",
    "profile_model",
    "reserve",
]
