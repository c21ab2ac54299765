"""A drive that hangs during a run is reported after the time that the config gives it."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import reference
import zoo
from forcing import MACHINE
from offload.io import FaultyBackend, IOTimeout
from offload.planner.memory import bare_ram

import offload
from offload.engine import Engine, prepare

ROWS = 2


def test_a_hung_drive_is_reported_after_the_configured_time(fast_path: Path) -> None:
    model, batches = zoo.make("llama"), zoo.batches("llama", 2, ROWS)
    cfg = reference.config(fast_path / "run", ROWS, ROWS, **{"memory.io_timeout": 1.0, "memory.backend": "threads"})
    config = offload.Config.load(cfg)
    prepared = prepare(config, copy.deepcopy(model), MACHINE)
    cfg["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    config = offload.Config.load(cfg)
    prepared = prepare(config, copy.deepcopy(model), MACHINE)
    assert {unit.placement["exp_avg"] for unit in prepared.plan.units} == {"nvme"}
    engine = Engine.create(config, prepared=prepared)
    engine.step(batches[0])
    engine.flush()
    engine.store._backend = FaultyBackend(engine.store.backend, "read:hang")
    begin = time.monotonic()
    with pytest.raises(IOTimeout, match=r"file .*data.*, offset \d+"):
        engine.step(batches[1])
        engine.flush()
    assert 1.0 <= time.monotonic() - begin < 15
    engine.close()  # its store stays locked until the process ends: the drive may still write
