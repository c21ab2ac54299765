"""The Python entry points: `offload.wrap`, `offload.resume` and `offload.plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.config import Config
from offload.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from offload.engine import Engine
    from offload.planner.plan import Plan

    Source = str | Path | Mapping[str, Any] | Config


def wrap(model: nn.Module | None, config: Source) -> Engine:
    """An engine that fine-tunes `model` within the budgets of `config`, in a new run directory.

    `model`: any transformers or peft model, loaded or on meta; None builds the one that the config names. The engine
    takes ownership: the model's parameters live in the engine's store from here on. Raises ConfigError and DoesNotFit
    before anything is written.
    """
    from offload.engine import Engine

    return Engine.create(Config.load(config), model)


def resume(run_dir: str | Path, model: nn.Module | None = None) -> Engine:
    """The engine of an existing run, at its last committed step. Raises ConfigError when there is no such run.

    `model`: built as before the run, where the run directory alone cannot say how (peft models).
    """
    from offload.engine import Engine

    return Engine.resume(Path(run_dir), model)


def plan(config: Source, hardware: str | Path | None = None) -> Plan:
    """What a run of `config` would place where, its peaks in bytes, its times in seconds and what would help it.

    `hardware`: a preset ("rtx4090") or a file instead of this machine; budgets in the config override its capacities.
    Writes nothing. Raises ConfigError.
    """
    from offload.advice import advised
    from offload.planner import load_hardware
    from offload.prepare import prepare

    cfg = Config.load(config)
    machine = None
    if hardware is not None:
        try:
            machine = load_hardware(hardware, ssds=len(cfg.store_paths()))
        except ValueError as error:
            raise ConfigError(f"--hardware {hardware}: {error}") from None
    made = prepare(cfg, hardware=machine)
    return advised(made).plan if made.plan.fits else made.plan
