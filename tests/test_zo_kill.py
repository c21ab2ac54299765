"""Zeroth-order runs killed at any moment end as if nothing had happened; two processes give the numbers of one."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from killing import HANGS, Run, Scenario, after_step, at, check_survivor, kill, last_row
from warm import Warm, WarmProcess

import offload
from offload.errors import ConfigError, OffloadError
from offload.train import INTERRUPTED
from offload.zo_log import encode
from offload.zo_processes import Processes, check_settings, common_log
from offload.zo_variants import Update

ZO: dict[str, Any] = {"method": "zo", "schedule": {"name": "constant", "warmup_steps": 0}}
SCENARIOS = (
    Scenario("nvme", {**ZO, "global_batch_size": 2}, True, steps=8),
    Scenario("RAM, commit every 5", {**ZO, "global_batch_size": 1, "commit_every": 5}, False, steps=8),
)


def comparable(run: Run) -> dict[str, Any]:
    """Rows and exported files. (The store may hold the last update applied, or in its manifest, still to come.)"""
    found = run.result()
    return {"rows": found["rows"], "model": found["model"]}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_killed_run_ends_like_an_unbroken_one(scenario: Scenario, fast_path: Path, warm: Warm) -> None:
    unbroken = Run.make(scenario, fast_path, "unbroken")
    assert unbroken.finish(warm=warm) == 0, unbroken.output()
    killed = Run.make(scenario, fast_path, "killed")
    committed, kills = None, 0
    for moment in (at("sync:1"), at("write:14"), after_step(5, 0.0)):
        if kill(killed, moment, warm):
            committed, kills = check_survivor(killed, committed), kills + 1
    assert kills >= 2
    assert killed.finish("--resume", warm=warm) == 0, killed.output()
    assert comparable(killed) == comparable(unbroken)
    assert [row["step"] for row in killed.rows()] == list(range(1, scenario.steps + 1))


def start_two(run: Run, path: Path, warm: Warm, *arguments: str) -> list[WarmProcess]:
    """`offload train` of a run as `torchrun --nproc-per-node 2` starts it; they print to rank0.log and rank1.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        warm.start(
            ["train", str(run.file), "--yes", *arguments],
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, path, path / f"rank{rank}.log",
        )
        for rank in range(2)
    ]  # fmt: skip


def ended_two(processes: list[WarmProcess], path: Path, code: int = 0) -> None:
    codes = [process.wait(HANGS) for process in processes]
    assert codes == [code, code], [(path / f"rank{rank}.log").read_text() for rank in range(2)]


def in_two_processes(run: Run, path: Path, warm: Warm, *arguments: str) -> None:
    """`offload train` of a run in two processes, to its end."""
    ended_two(start_two(run, path, warm, *arguments), path)


def second_of(run: Run) -> Run:
    """The run directory of the second process."""
    return Run({**run.config, "output": f"{run.path}-rank1"}, run.file)


def test_two_processes_give_the_numbers_of_one(fast_path: Path, warm: Warm) -> None:
    """One has the plus and one the minus branches; they exchange losses, and both end with the weights of one."""
    scenario = Scenario("processes", {**ZO, "global_batch_size": 2}, False, steps=6)
    alone = Run.make(scenario, fast_path / "one")
    together = Run.make(scenario, fast_path / "two")
    in_two_processes(together, fast_path, warm)
    assert alone.finish(warm=warm) == 0, alone.output()
    assert comparable(together) == comparable(alone)
    second = second_of(together)
    assert (second.path / "zo.jsonl").read_text() == (together.path / "zo.jsonl").read_text()
    assert not (second.path / "model").exists()
    assert together.state() == second.state()


def test_a_run_goes_on_in_more_processes_or_fewer(fast_path: Path, warm: Warm) -> None:
    """A process that is new, or was left out for some steps, makes those steps again from the first one's log."""
    scenario = Scenario("processes", {**ZO, "global_batch_size": 2}, False, steps=8)
    unbroken = Run.make(scenario, fast_path / "one")
    assert unbroken.finish(warm=warm) == 0, unbroken.output()
    changing = Run.make(scenario, fast_path / "two")
    assert changing.finish("--steps", "2", warm=warm) == 0, changing.output()
    in_two_processes(changing, fast_path, warm, "--resume", "--steps", "4")
    assert changing.finish("--resume", "--steps", "6", warm=warm) == 0, changing.output()
    in_two_processes(changing, fast_path, warm, "--resume")
    assert comparable(changing) == comparable(unbroken)
    assert changing.state() == second_of(changing).state()


def test_processes_stop_together(fast_path: Path, warm: Warm) -> None:
    """A signal to one of them ends both after the same step, in training and in evaluation; they go on together."""
    scenario = Scenario("processes", {**ZO, "global_batch_size": 2, "eval_every": 1}, False, steps=2000)
    run = Run.make(scenario, fast_path / "run")
    run.config["data"]["eval_fraction"] = 0.1
    run = Run.of(run.config)
    for rank, steps, arguments in ((1, 3, ()), (0, 6, ("--resume",))):
        processes = start_two(run, fast_path, warm, *arguments)
        end = time.monotonic() + HANGS
        while last_row(run) < steps and time.monotonic() < end:
            time.sleep(0.002)
        processes[rank].send_signal(signal.SIGINT)
        ended_two(processes, fast_path, INTERRUPTED)
        assert steps <= last_row(run) < scenario.steps
        assert run.committed() == second_of(run).committed() == last_row(run) == last_row(second_of(run))


class Three(Processes):
    """Three processes of which the first is asked, and the others say what the test gives them."""

    def __init__(self, *others: Any) -> None:
        self.count, self.rank, self._others = 3, 0, others

    def gather(self, value: Any) -> list[Any]:
        return [value, *self._others]


def updates(count: int, first: float = 0.5) -> list[Update]:
    return [Update(step, 0.1, ((step, first if step == 0 else float("nan")),)) for step in range(count)]


def log(count: int, first: float = 0.5) -> list[str]:
    return [json.dumps(encode(update)) for update in updates(count, first)]


def test_all_processes_go_on_after_the_same_updates() -> None:
    def steps(own: int, committed: int, *others: tuple[int, bool, list[str]], replays: bool = True) -> int:
        return len(common_log(Three(*others), updates(own), committed, replays))

    assert steps(5, 4, (4, True, log(6)), (0, True, [])) == 5  # the first one's log, which is the run's
    assert steps(5, 4, (6, True, log(6)), (0, True, [])) == 6  # a store that is further cannot go back
    with pytest.raises(OffloadError, match="process 2 has the log of another run"):
        steps(5, 4, (5, True, log(5)), (3, True, log(3, first=0.25)))
    with pytest.raises(OffloadError, match=r"process 2 stands at step 3 and another at 5.*own buffers"):
        steps(5, 5, (5, False, log(5)), (3, False, log(3)), replays=False)


def test_processes_that_chose_other_settings_are_refused() -> None:
    cfg = offload.Config.load({"output": "run", "train": {"method": "zo", "steps": 1, "micro_batch_size": 2}})
    one, other = (
        {"train": {**cfg.dump()["train"], "micro_batch_size": rows}, "zo": cfg.dump().get("zo")} for rows in (2, 1)
    )
    check_settings(Three(one, one), cfg)
    with pytest.raises(ConfigError, match=r"train.micro_batch_size: got 2 in the first process and 1 in process 2"):
        check_settings(Three(one, other), cfg)
