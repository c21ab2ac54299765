"""Runs that share a store path do not touch each other, and one run directory belongs to one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from killing import SCENARIOS, Run, engine_configuration, last_row, same, wait
from torch import Tensor
from warm import Warm

import offload
from offload.errors import OffloadError
from offload.run_place import RunLocked


def test_two_processes_on_one_store_path(fast_path: Path, warm: Warm) -> None:
    """Started together, one with a lock held against a third and a fourth; each ends as if it had been alone."""
    nvme, ram = SCENARIOS[0], SCENARIOS[3]
    alone = [Run.make(nvme, fast_path / "a", seed=1), Run.make(ram, fast_path / "b", seed=2)]
    for run, process in [(run, run.start(warm=warm)) for run in alone]:
        assert wait(process, run) == 0, run.output()
    shared = [
        Run.make(nvme, fast_path / "shared", "first", seed=1),
        Run.make(ram, fast_path / "shared", "second", seed=2),
    ]
    assert shared[0].config["memory"]["nvme"] == shared[1].config["memory"]["nvme"]
    processes = [run.start(warm=warm, faults="read:delay=0.02;write:delay=0.02") for run in shared]
    while last_row(shared[0]) < 1:
        assert processes[0].poll() is None, shared[0].output()
    os.kill(processes[0].pid, signal.SIGSTOP)  # it holds its lock until the others have been refused

    refused = [
        (shared[0].start(*arguments, warm=warm, log=log), code, fast_path / "shared" / log, message)
        for arguments, log, code, message in (
            (["--resume"], "third.log", 1, f"in use by process {processes[0].pid}"),
            ([], "fourth.log", 2, "already holds a run"),
        )
    ]
    for process, code, told, message in refused:
        assert process.wait(100) == code, told.read_text()
        assert message in told.read_text() and "Traceback" not in told.read_text()
    assert processes[0].poll() is None, shared[0].output()
    os.kill(processes[0].pid, signal.SIGCONT)

    for run, process in zip(shared, processes, strict=True):
        assert wait(process, run) == 0, run.output()
    for one, other in zip(alone, shared, strict=True):
        assert same(one.result(), other.result()) == []
    assert len(list((fast_path / "shared" / "ssd").iterdir())) == 2


def _batches(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 256, (2, 32), generator=generator) for _ in range(4)]
    return [{"input_ids": x, "labels": x} for x in ids]


def test_two_engines_in_one_process(fast_path: Path) -> None:
    """Step by step in turn, on one store path: the same losses and weights as one after the other."""
    alone = []
    for seed in (1, 2):
        with offload.wrap(None, engine_configuration(SCENARIOS[0], fast_path / str(seed), "run", seed)) as engine:
            losses = [engine.step(batch).loss for batch in _batches(seed)]
            engine.save_pretrained(fast_path / str(seed) / "model")
        alone.append(losses)
    first, second = (
        offload.wrap(None, engine_configuration(SCENARIOS[0], fast_path / "shared", f"run-{seed}", seed))
        for seed in (1, 2)
    )
    together: list[list[float]] = [[], []]
    with first, second:
        for one, other in zip(_batches(1), _batches(2), strict=True):
            together[0].append(first.step(one).loss)
            together[1].append(second.step(other).loss)
        first.save_pretrained(fast_path / "shared" / "model-1")
        second.save_pretrained(fast_path / "shared" / "model-2")
    assert together == alone
    for seed in (1, 2):
        weights = [fast_path / str(seed) / "model", fast_path / "shared" / f"model-{seed}"]
        assert len({(path / "model.safetensors").read_bytes() for path in weights}) == 1


def test_a_run_in_use_is_refused_within_one_process_too(fast_path: Path) -> None:
    config = engine_configuration(SCENARIOS[0], fast_path, "run", 0)
    batch = _batches(0)[0]
    with offload.wrap(None, config) as engine:
        before = engine.step(batch).loss
        with pytest.raises(RunLocked, match=r"in use by process \d+"):
            offload.resume(fast_path / "run")
        with pytest.raises(OffloadError, match="already holds a run"):
            offload.wrap(None, config)
        engine.step(batch)  # the learning rate of the first step is 0
        assert engine.step(batch).loss < before  # it is none the worse for it
    with offload.resume(fast_path / "run") as engine:
        assert engine.completed_steps == 3


def test_a_failed_second_run_leaves_the_first_alone(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set-up on the same store path that ends in an error removes what is its own, and that only."""
    with offload.wrap(None, engine_configuration(SCENARIOS[0], fast_path, "first", 1)) as engine:
        engine.step(_batches(1)[0])
        engine.commit()
        with monkeypatch.context() as environment:
            environment.setenv("OFFLOAD_FAULTS", "write:ENOSPC:after=3")
            with pytest.raises(Exception, match="ENOSPC"):
                offload.wrap(None, engine_configuration(SCENARIOS[0], fast_path, "second", 2))
        assert len(list((fast_path / "ssd").iterdir())) == 1
        assert not (fast_path / "second").exists()
        assert engine.store.verify() == []
        engine.step(_batches(1)[1])
    with offload.resume(fast_path / "first") as engine:
        assert engine.completed_steps == 2
