"""Killed at any moment, a run goes on from its last commit and ends as if nothing had happened, to the bit.

Real processes of the real command get SIGKILL: from outside at random moments, and from within at exact requests of the
store. Every third one starts afresh; the others are forked from a process that has made the imports (see warm.py).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import (
    SCENARIOS,
    Kill,
    Outcome,
    Run,
    Scenario,
    after_step,
    at,
    check_survivor,
    engine_configuration,
    in_export,
    in_set_up,
    last_row,
    plan_of,
    same,
    torment,
    wait,
)
from warm import Warm

import offload
from offload import export
from offload.rundir import read_jsonl

KILLS = 20  # at least, of the 24 that are aimed at


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """In memory where there is such a place: what a kill leaves does not depend on the disk, the time does."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="offload-kill-", dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def moments(scenario: Scenario, generator: random.Random) -> list[Kill]:
    """Six moments: first load, first commit, a step, reads of a step or of the resume, an update or commit, export."""
    pick = generator.randrange
    load = at(f"write:{pick(12)}") if pick(2) else in_set_up(generator.uniform(0, 0.4))
    found = [load, at(f"sync:{pick(3)}"), after_step(1 + pick(3), generator.uniform(0, 0.15))]
    if scenario.all_on_nvme:
        found += [at(f"read:{pick(70)}"), at(f"sync:{pick(9)}") if pick(2) else at(f"write:{pick(60)}")]
    else:
        found += [at(f"read:{pick(24)}"), at(f"sync:{pick(3)}") if pick(2) else at(f"write:{pick(24)}")]
    return [*found, in_export(generator.uniform(0, 0.05))]


@dataclass
class Story:
    """A run that was never touched, one that was killed again and again, and what happened to it."""

    unbroken: Run
    killed: Run
    outcome: Outcome


def _tell(scenario: Scenario, seed: int, unbroken: Run, killed: Run, warm: Warm) -> Story:
    assert unbroken.finish(warm=warm) == 0, unbroken.output()
    return Story(unbroken, killed, torment(killed, moments(scenario, random.Random(seed)), warm))


@pytest.fixture(scope="module")
def stories(base: Path, warm: Warm) -> dict[str, Future[Story]]:
    """All scenarios, two at a time. The threads only watch processes: building models is for one thread at a time."""
    runs = [
        (Run.make(scenario, base / str(seed), "unbroken"), Run.make(scenario, base / str(seed), "killed"))
        for seed, scenario in enumerate(SCENARIOS)
    ]
    with ThreadPoolExecutor(2) as pool:
        return {
            scenario.name: pool.submit(_tell, scenario, seed, *runs[seed], warm)
            for seed, scenario in enumerate(SCENARIOS)
        }


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_killed_run_ends_like_an_unbroken_one(scenario: Scenario, stories: dict[str, Future[Story]]) -> None:
    story = stories[scenario.name].result()
    expected = story.unbroken.result()
    assert [row["step"] for row in expected["rows"]] == list(range(1, scenario.steps + 1))
    assert len({row["loss"] for row in expected["rows"]}) == scenario.steps
    assert same(expected, story.killed.result()) == [], story.outcome
    plan = plan_of(story.killed.config)
    on_nvme = [unit.placement["exp_avg"] == "nvme" for unit in plan.units if unit.name != "resident"]
    assert all(on_nvme) if scenario.all_on_nvme else not any(on_nvme)
    leftovers = [path.name for path in story.killed.path.iterdir() if path.name.startswith(".model")]
    assert leftovers == []


def test_there_were_enough_kills(stories: dict[str, Future[Story]]) -> None:
    outcomes = [stories[scenario.name].result().outcome for scenario in SCENARIOS]
    assert sum(len(outcome.kills) for outcome in outcomes) >= KILLS, outcomes
    names = " ".join(name for outcome in outcomes for name, _ in outcome.kills)
    assert all(kind in names for kind in ("write:", "read:", "sync:", "step", "export", "set-up"))


# ---- Ctrl-C ----


@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[2]], ids=lambda scenario: scenario.name)
def test_ctrl_c_commits_or_drops_the_step_whole(
    scenario: Scenario, stories: dict[str, Future[Story]], base: Path, warm: Warm
) -> None:
    slow = "read:delay=0.02;write:delay=0.02;sync:delay=0.02"
    run = Run.make(scenario, base / "ctrl-c" / scenario.name)
    process = run.start(faults=slow, warm=warm)
    _until(lambda: last_row(run) >= 1, process, run)
    process.send_signal(signal.SIGINT)
    assert wait(process, run) == 130, run.output()
    assert "stopping after this step" in run.output() and "go on with --resume" in run.output()
    assert "Traceback" not in run.output()
    first = check_survivor(run, 0)
    assert first is not None and 1 <= first < scenario.steps and last_row(run) == first  # finished, and committed

    process = run.start("--resume", faults=slow)
    _until(lambda: last_row(run) >= first + 1, process, run)
    process.send_signal(signal.SIGINT)
    _until(lambda: "stopping after this step" in run.output(), process, run)
    process.send_signal(signal.SIGINT)
    assert wait(process, run) == 130, run.output()
    assert "Traceback" not in run.output()
    second = check_survivor(run, first)
    assert second is not None and second < scenario.steps

    assert run.finish("--resume", warm=warm) == 0, run.output()
    assert same(stories[scenario.name].result().unbroken.result(), run.result()) == []


def test_ctrl_c_while_loading_leaves_nothing(base: Path, warm: Warm) -> None:
    run = Run.make(SCENARIOS[0], base / "loading", "deep/er/run")
    process = run.start(faults="write:delay=0.2", warm=warm)
    _until(lambda: any((base / "loading" / "ssd").glob("*/data-0.bin")), process, run)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert wait(process, run) == 130, run.output()
    assert "Traceback" not in run.output()
    left = sorted(path.name for path in (base / "loading").rglob("*"))
    assert left == ["deep", "er", "run.log", "run.yaml", "text.txt"]


def _until(condition: Any, process: Any, run: Run) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, f"ended before its moment, with {process.returncode}:\n{run.output()}"
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.005)


# ---- moments too short to be hit from outside ----


def test_the_row_of_a_step_is_written_before_its_commit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick the commit: a kill between the two would leave a step without its row."""
    directory = base / "order"
    with offload.wrap(None, engine_configuration(SCENARIOS[1], directory)) as engine:
        append, seen = engine.run.append_metrics, []

        def late(row: dict[str, Any]) -> None:
            time.sleep(0.3)
            seen.append((row["step"], engine.store.meta["step"]))
            append(row)

        monkeypatch.setattr(engine.run, "append_metrics", late)
        ids = torch.arange(32).view(1, 32)
        for _ in range(3):
            engine.step({"input_ids": ids, "labels": ids})
    assert [step for step, _ in seen] == [1, 2, 3] and all(committed < step for step, committed in seen), seen
    assert [row["step"] for row in read_jsonl(directory / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_torn_row_is_dropped(stories: dict[str, Future[Story]], base: Path, warm: Warm) -> None:
    """The last line of metrics.jsonl may be half written; the run goes on, and each step stands once."""
    run = Run.make(SCENARIOS[2], base / "torn")
    process = run.start(warm=warm, faults="sync:kill:after=5")  # in the second commit, of step 3
    assert wait(process, run) == -signal.SIGKILL
    assert check_survivor(run, 0) == 0
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss": 5.1')
    assert run.finish("--resume", warm=warm) == 0, run.output()
    assert same(stories[SCENARIOS[2].name].result().unbroken.result(), run.result()) == []


def test_an_export_that_was_killed_as_it_ended_can_be_repeated(
    base: Path, stories: dict[str, Future[Story]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last sync and the renaming."""
    run = stories[SCENARIOS[1].name].result().unbroken
    out = base / "exported"

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with offload.resume(run.path) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(export.os, "rename", killed)
            patch.setattr(export.shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up
            with pytest.raises(Killed):
                engine.save_pretrained(out)
        assert not out.exists()
        engine.save_pretrained(out)
    assert (out / "model.safetensors").read_bytes() == (run.path / "model" / "model.safetensors").read_bytes()
    assert [path.name for path in base.iterdir() if "exported" in path.name] == ["exported"]
    assert not list(out.glob(".*"))


def test_offload_export_can_be_killed(base: Path, stories: dict[str, Future[Story]], warm: Warm) -> None:
    run = stories[SCENARIOS[0].name].result().unbroken
    out = base / "out"
    for rule in ("read:kill:after=0", "read:kill:after=4"):
        process = run.start(str(run.path), str(out), command="export", faults=rule, warm=warm)
        assert wait(process, run) == -signal.SIGKILL, run.output()
        assert not out.exists()
    assert run.finish(str(run.path), str(out), command="export", warm=warm) == 0, run.output()
    assert (out / "model.safetensors").read_bytes() == (run.path / "model" / "model.safetensors").read_bytes()
