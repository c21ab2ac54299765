"""The run directory: refused when taken, held by one process, whole after a crash, gone when discarded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload import run_place, rundir
from offload.config import Config
from offload.errors import ConfigError, OffloadError
from offload.run_place import RunLocked
from offload.rundir import RunDirectory


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return Config.load({"model": {"architecture": {"model_type": "llama"}}, "output": str(tmp_path / "runs" / "a")})


def test_create_then_open(cfg: Config) -> None:
    with RunDirectory.create(cfg) as run:
        assert run.config() == cfg.resolved()
        assert json.loads((run.path / "run.json").read_text())["versions"]["torch"]
        name, identity = run.store_name, run.id
    with RunDirectory.open(cfg.output) as run:
        assert (run.store_name, run.id) == (name, identity)
        assert run.store_paths[0].path == str(Path(cfg.output) / "store")


def test_two_runs_have_stores_of_their_own(cfg: Config) -> None:
    with RunDirectory.create(cfg) as one, RunDirectory.create(Config.load(cfg, [f"output={cfg.output}-2"])) as two:
        assert one.store_name != two.store_name


def test_an_existing_run_is_refused_with_what_to_do(cfg: Config) -> None:
    RunDirectory.create(cfg).close()
    with pytest.raises(ConfigError, match=r"--resume.*--set output="):
        RunDirectory.create(cfg)


def test_foreign_files_are_refused_and_stay(cfg: Config) -> None:
    path = Path(cfg.output)
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"'thesis\.tex'"):
        RunDirectory.create(cfg)
    assert [p.name for p in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("output", ["file", "file/run"])
def test_a_file_in_the_way(cfg: Config, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output: "):
        RunDirectory.create(Config.load(cfg, [f"output={tmp_path / output}"]))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_setup_leaves_nothing(cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", fail)
    with pytest.raises(ConfigError, match="No space left"):
        RunDirectory.create(cfg)
    assert list(tmp_path.iterdir()) == []


def test_discard_removes_the_run_and_its_store_only(cfg: Config, tmp_path: Path) -> None:
    cfg = Config.load(cfg, [f"memory.nvme=[{{path: {tmp_path / 'ssd'}}}]"])
    run = RunDirectory.create(cfg)
    mine, other = tmp_path / "ssd" / run.store_name, tmp_path / "ssd" / "offload-of-another-run"
    for store in (mine, other):
        store.mkdir(parents=True)
        (store / "data").write_text("x")
    run.append_metrics({"step": 1})
    run.cache_path.mkdir()
    run.discard()
    assert not mine.exists() and (other / "data").exists() and not run.path.exists()
    RunDirectory.create(cfg).close()  # the place is free again


def test_discard_keeps_foreign_files(cfg: Config) -> None:
    run = RunDirectory.create(cfg)
    (run.path / "notes.md").write_text("mine")
    run.discard()
    assert [p.name for p in run.path.iterdir()] == ["notes.md"]


def test_no_second_process_and_a_killed_one_lets_go(cfg: Config) -> None:
    RunDirectory.create(cfg).close()
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from offload.rundir import RunDirectory; run = RunDirectory.open(sys.argv[1]);"
         "print('held', flush=True); time.sleep(60)", cfg.output],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"process {holder.pid}"):
            RunDirectory.open(cfg.output)
        with pytest.raises(ConfigError, match="--resume"):
            RunDirectory.create(cfg)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    RunDirectory.open(cfg.output).close()


def test_a_setup_that_was_killed_is_taken_over(cfg: Config) -> None:
    path = Path(cfg.output)
    path.mkdir(parents=True)
    (path / "lock").write_text("1\n")
    (path / "config.yaml").write_text("torn")
    (path / ".run.json.abc").write_text("{")
    with RunDirectory.create(cfg) as run:
        assert run.config() == cfg.resolved()


def test_a_moved_run_directory_takes_its_store_along(cfg: Config, tmp_path: Path) -> None:
    RunDirectory.create(cfg).close()
    moved = tmp_path / "moved"
    Path(cfg.output).rename(moved)
    with RunDirectory.open(moved) as run:
        assert run.store_paths[0].path == str(moved / "store")


def test_metrics_are_cut_after_the_committed_step(cfg: Config) -> None:
    with RunDirectory.create(cfg) as run:
        for step in range(1, 6):
            run.append_metrics({"step": step, "loss": 1 / step})
            run.append_eval({"step": step, "eval_loss": 1.0})
        with run.metrics_path.open("a") as file:
            file.write('{"step": 6, "lo')  # killed while writing
        run.truncate_metrics(3)
        run.append_metrics({"step": 4, "loss": 0.5})
        assert [row["step"] for row in rundir.read_jsonl(run.metrics_path)] == [1, 2, 3, 4]
        assert [row["step"] for row in rundir.read_jsonl(run.path / "eval.jsonl")] == [1, 2, 3]
        assert run.last_row == {"step": 4, "loss": 0.5}


def test_truncate_without_metrics(cfg: Config) -> None:
    with RunDirectory.create(cfg) as run:
        run.truncate_metrics(0)
        assert not run.metrics_path.exists()


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(OffloadError, match="line 2"):
        list(rundir.read_jsonl(tmp_path / "metrics.jsonl"))


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_cleans_up_unless_a_run_came_about(cfg: Config, tmp_path: Path) -> None:
    path = Path(cfg.output)
    with pytest.raises(RuntimeError), run_place.attempt(path):
        (path / "cache").mkdir(parents=True)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with run_place.attempt(path):
        (path / "cache").mkdir(parents=True)
        RunDirectory.create(cfg).close()
    assert (path / "run.json").exists() and (path / "cache").exists()
