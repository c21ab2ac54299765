"""(d), (e) This engine: everything in RAM, and everything on the SSD with the smallest RAM budget that it accepts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.step.setting import BETAS, EPS, LR, WEIGHT_DECAY, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from offload.engine import Engine

MIB = 1 << 20
TEXT = Path(__file__).parent.parent.parent / "examples" / "quickstart.txt"


def config(
    setting: Setting, model_dir: str, directory: Path, cpu: int | str, max_grad_norm: float | None, commit_every: Any
) -> dict[str, Any]:
    """The engine's configuration; `cpu` is its RAM budget."""
    return {
        "model": {"path": model_dir, "dtype": "bfloat16"},
        # The batches are given to the engine; this section says how long they are.
        "data": {"path": str(TEXT), "format": "text", "tokenizer": "bytes", "sequence_length": setting.sequence},
        "train": {
            "steps": 1000,
            "micro_batch_size": setting.micro_batch,
            "global_batch_size": setting.rows,
            "max_grad_norm": max_grad_norm,
            "optimizer": {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "commit_every": commit_every,
            "seed": setting.seed,
        },
        "memory": {"device": "cpu", "cpu": cpu, "nvme": [{"path": str(directory / "store"), "size": "auto"}]},
        "output": str(directory / "run"),
    }


def smallest_budget(described: dict[str, Any]) -> int:
    """The smallest `memory.cpu` with which the configuration fits, in whole MiB of bytes.

    What the plan is short of at 1 MiB is the first guess; the rest is bisection.
    """
    from offload.config import Config
    from offload.prepare import prepare

    def plan(mib: int) -> Any:  # not `offload.plan`, which plans a dozen more for its advice
        return prepare(Config.load({**described, "memory": {**described["memory"], "cpu": mib * MIB}})).plan

    tight = plan(1)
    if tight.fits:
        return MIB
    other = {tier: n for tier, n in tight.shortfall_bytes.items() if tier not in ("cpu", "gpu")}
    if other:
        raise RuntimeError(f"the plan is short of {other} bytes")
    guess = 1 + max(1, -(-max(tight.shortfall_bytes.values()) // MIB))
    below, above = 1, guess
    while not plan(above).fits:
        if above > 1 << 22:
            raise RuntimeError(f"the plan does not fit {above} MiB of RAM: {plan(above).shortfall_bytes}")
        below, above = above, 2 * above
    if above == guess and not plan(above - 1).fits:
        below = above - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if plan(middle).fits else (middle, above)
    return above * MIB


@contextmanager
def opened(described: dict[str, Any]) -> Iterator[tuple[Engine, Callable[[dict[str, Tensor]], float]]]:
    """The engine, and a function that takes one step on a global batch and returns its loss."""
    import offload

    with offload.wrap(None, described) as engine:
        yield engine, lambda batch: engine.step(batch).loss


def found(directory: Path, setting: Setting) -> dict[str, Any]:
    """What the run directory says: the plan's budget and prediction, and per measured step the busy lanes."""
    run = directory / "run"
    plan = json.loads((run / "plan.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][setting.warm :]
    memory = json.loads((run / "memory.json").read_text())
    return {
        "budget_bytes": plan["budget_bytes"]["cpu"],
        "planned_peak_bytes": plan["peak_bytes"]["cpu"],
        "planned_step_seconds": plan["step_seconds"],
        "placements": sorted({tier for unit in plan["units"] for tier in unit["placement"].values()}),
        "recomputed": any(unit["activations"].get("recompute", 0.0) > 0 for unit in plan["units"]),
        "lane_seconds": [row["lane_seconds"] for row in rows],
        "counted_io_bytes": [row["io_bytes"] for row in rows],
        "memory": memory,
    }
