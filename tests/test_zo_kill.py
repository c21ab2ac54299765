"""Zeroth-order runs killed at any moment end as if nothing had happened; two processes give the numbers of one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from killing import Run, Scenario, after_step, at, check_survivor, kill
from warm import Warm

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


def test_two_processes_give_the_numbers_of_one(fast_path: Path, warm: Warm) -> None:
    """One has the plus and one the minus branches; they exchange losses, and both end with the weights of one."""
    scenario = Scenario("processes", {**ZO, "global_batch_size": 2}, False, steps=6)
    alone = Run.make(scenario, fast_path / "one")
    together = Run.make(scenario, fast_path / "two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):  # as torchrun starts them
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = fast_path / f"rank{rank}.log"
        processes.append(warm.start(["train", str(together.file), "--yes"], environment, fast_path, log))
    assert alone.finish(warm=warm) == 0, alone.output()
    codes = [process.wait(100) for process in processes]
    assert codes == [0, 0], [(fast_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert comparable(together) == comparable(alone)
    second = Path(f"{together.path}-rank1")
    assert (second / "zo.jsonl").read_text() == (together.path / "zo.jsonl").read_text()
    assert not (second / "model").exists()
    assert together.state() == Run({**together.config, "output": str(second)}, together.file).state()
