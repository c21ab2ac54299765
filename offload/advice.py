"""What would make a run faster, for its report: planned before a long run, after a short one, or with the report of a
run that did not come to its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offload.config import Config
from offload.errors import described
from offload.planner import Budgets, advise
from offload.prepare import Prepared, prepare
from offload.run_data import RunData

ADVISED_SECONDS = 60.0  # planned length of a run from which on its plan is compared with others before it starts
ADVISED_AFTER = 10.0  # seconds that a short run took from which on two more, at its end, are worth it


def advised(prepared: Prepared) -> Prepared:
    """The plan with what would make it faster; by the quick solver, which is within a few percent.

    It is a dozen plans: two seconds for a small model, fifteen for one of eighty layers.
    """
    advice = advise(prepared.workload, prepared.budgets, prepared.hardware, "greedy")
    return replace(prepared, plan=replace(prepared.plan, advice=advice, advised=True))


def advised_if_long(prepared: Prepared) -> Prepared:
    """As `advised`, where what the run is planned to take is worth the wait; a short run's is planned after it."""
    planned = prepared.plan.step_seconds * (prepared.config.train.steps or 0)
    return advised(prepared) if planned >= ADVISED_SECONDS and prepared.plan.fits else prepared


def with_advice(data: RunData) -> tuple[RunData, str]:
    """The run with a plan that holds advice, planned now if need be; and why there is none, empty if there is."""
    if not data.plan or data.plan.get("advised") or data.plan.get("advice"):
        return data, ""
    if data.process:
        return data, f"the run is going on in process {data.process}, which planning would slow down"
    if not data.config.get("model"):
        return data, "the run's model came from a program, and its config does not describe it"
    try:
        found = advised(_again(data)).plan
    except Exception as error:  # whatever is missing here must not cost the report
        return data, f"the run cannot be planned again here: {described(error)}"
    if not found.fits:
        return data, "on this machine, as it is now, the plan does not fit"
    advice: list[dict[str, Any]] = found.to_json()["advice"]
    return replace(data, plan={**data.plan, "advice": advice, "advised": True}), ""


def _again(data: RunData) -> Prepared:
    """The run prepared again, quickly, within the bytes that it was planned for."""
    budget = data.plan["budget_bytes"]
    sets = [f"memory.{tier}={budget[tier]}" for tier in ("gpu", "cpu")]
    prepared = prepare(Config.load(data.config, [*sets, "planner.solver=greedy"]))
    given = prepared.budgets
    whole = sum(size for _, size in given.nvme) or 1
    nvme = tuple((path, size * budget["nvme"] // whole) for path, size in given.nvme)
    return replace(prepared, budgets=Budgets(given.gpu, given.cpu, given.cxl, nvme))
