"""Full disks and failing drives: a clear message, nothing left of a failed set-up, the committed step whole.

The command runs in this process (its own `main`, with arguments), where that shows the same as a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import ARCHITECTURE, SCENARIOS, Run, Scenario, check_survivor, engine_configuration, last_row, same, wait
from offload.io import ChecksumError, StoreError, StoreFull
from warm import Warm

import offload
from offload import cli
from offload.errors import OffloadError

NVME, IN_BACKWARD, RAM = SCENARIOS[0], SCENARIOS[1], SCENARIOS[2]
BATCH = {"input_ids": torch.arange(32).view(1, 32), "labels": torch.arange(32).view(1, 32)}


class Command:
    """`offload ARGUMENTS` in this process; keeps what it printed to stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.errors = ""

    def __call__(self, *arguments: str, faults: str = "") -> int:
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["offload", *arguments])
            patch.setenv("OFFLOAD_FAULTS", faults)
            self._capfd.readouterr()
            begin = time.monotonic()
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert time.monotonic() - begin < 60  # a lane that waits for a dead one would take minutes
            self.errors = self._capfd.readouterr().err
        assert "Traceback" not in self.errors
        return int(end.value.code or 0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capfd)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def set_nvme(run: Run, **values: Any) -> Run:
    run.config["memory"]["nvme"] = [{**run.config["memory"]["nvme"][0], **values}]
    return Run.of(run.config)


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# ---- in the middle of a run ----


@pytest.mark.parametrize("scenario", [NVME, IN_BACKWARD, RAM], ids=lambda scenario: scenario.name)
def test_faults_in_the_middle_of_a_run(scenario: Scenario, fast_path: Path, command: Command) -> None:
    """One fault after the other; each ends the command with a message, and the run goes on where it was committed."""
    unbroken = Run.make(scenario, fast_path / "unbroken")
    assert command("train", str(unbroken.file)) == 0
    run = Run.make(scenario, fast_path / "run")
    data = re.escape(str(fast_path / "run" / "ssd")) + r"/offload-\w+/data-0\.bin, offset \d+"
    manifest = re.escape(str(fast_path / "run" / "ssd")) + r"/offload-\w+/manifest.tmp"
    reads = 40 if scenario.all_on_nvme else 5
    faults = [
        ("write:ENOSPC:after=40", rf"write of '\d+/\w+' failed: file {data}.*ENOSPC.*Free space on this file system"),
        (f"read:EIO:after={reads}", rf"read of '\d+/\w+' failed: file {data}.*EIO.*check the kernel log"),
        ("sync:ENOSPC:after=1", rf"file {manifest}.*ENOSPC.*Free space"),
        (f"read:flip:after={reads}:times=1", rf"extent '\d+/\w+', block \d+: .*not those written: file {data}"),
        ("write:EIO:after=5:times=1", rf"write of '\d+/\w+' failed: file {data}.*EIO"),
    ]
    committed = 0
    for rule, message in faults:
        assert command("train", str(run.file), "--resume", faults=rule) == 1, rule
        assert re.search(message, command.errors), f"{rule}: {command.errors}"
        assert command.errors.startswith("offload: ") and len(command.errors.strip().splitlines()) == 1
        left = check_survivor(run, committed)
        assert left is not None and left < scenario.steps, rule
        committed = left
    assert command("train", str(run.file), "--resume") == 0
    assert same(unbroken.result(), run.result()) == []


def test_a_disk_that_really_fills_up(small_disk: Path, warm: Warm) -> None:
    """Run directory and store on it, and another program that takes the rest; the store's own space is reserved."""
    # So many steps that what they log cannot all go into the last page of the metrics, which is there already.
    for scenario in (replace(NVME, steps=24), replace(RAM, steps=24)):
        directory = small_disk / "files"
        run = Run.make(scenario, directory)
        unbroken = Run.make(scenario, small_disk.parent / scenario.name)
        run.config["data"] = unbroken.config["data"]
        run = set_nvme(Run.of(run.config), size="1600KiB")
        beside = unbroken.start(warm=warm)
        # The log of the process must not be what hits the limit.
        log = small_disk.parent / "log"
        run.log.symlink_to(log)
        process = run.start(faults="read:delay=0.01;write:delay=0.01", warm=warm)
        while last_row(run) < 2:
            assert process.poll() is None, run.output()
            time.sleep(0.005)
        with (small_disk / "ballast").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        assert wait(process, run) == 1, run.output()
        told = run.output()
        assert "Traceback" not in told, told
        assert re.search(r"offload: .*" + re.escape(str(small_disk)), told), told
        assert re.search(r"No space left on device", told) and re.search(r"[Ff]ree space", told), told
        (small_disk / "ballast").unlink()
        assert (check_survivor(run, 0) or 0) < scenario.steps
        assert run.finish("--resume", warm=warm) == 0, run.output()
        assert wait(beside, unbroken) == 0, unbroken.output()
        assert same(unbroken.result(), run.result()) == []
        subprocess.run(["rm", "-r", str(directory)], check=True)


def test_an_engine_that_failed_says_so_and_can_be_resumed(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_configuration(IN_BACKWARD, fast_path)
    with monkeypatch.context() as environment:
        environment.setenv("OFFLOAD_FAULTS", "write:ENOSPC:after=45")
        engine = offload.wrap(None, config)
        losses, begin = [], time.monotonic()
        with pytest.raises(StoreFull, match=r"data-0\.bin, offset \d+, length \d+: ENOSPC"):
            for _ in range(12):
                losses.append(engine.step(BATCH).loss)
        with pytest.raises(OffloadError, match=r"failed before.*offload\.resume"):
            engine.step(BATCH)
        engine.close()
        assert time.monotonic() - begin < 60
    with offload.resume(fast_path / "run") as engine:
        begun = engine.completed_steps
        assert 0 < begun <= len(losses)
        again = [engine.step(BATCH).loss for _ in range(begun, 4)]
    assert losses[begun:4] == again[: len(losses[begun:4])]


@pytest.mark.parametrize("scenario", [NVME, IN_BACKWARD], ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("rule", ["read:EIO", "read:flip", "write:ENOSPC"])
def test_no_lane_waits_for_one_that_failed(
    rule: str, scenario: Scenario, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whatever request on the drive fails: the error comes at once, though buffers are lost with it."""
    config = engine_configuration(scenario, fast_path)
    rows = config["train"]["global_batch_size"]
    batch = {name: ids.expand(rows, -1) for name, ids in BATCH.items()}
    for after in range(13, 67, 6):
        with monkeypatch.context() as environment:
            environment.setenv("OFFLOAD_FAULTS", f"{rule}:after={after}")
            engine, begin = offload.wrap(None, config), time.monotonic()
            with pytest.raises(StoreError, match=r"EIO|ENOSPC|not those written"):
                for _ in range(12):
                    engine.step(batch)
            engine.close()
        assert time.monotonic() - begin < 30, f"{rule}, from request {after} on"
        shutil.rmtree(fast_path / "run")


# ---- before the first commit ----


@pytest.mark.parametrize("rule", ["write:ENOSPC:after=4", "sync:ENOSPC", "sync:ENOSPC:after=1", "sync:EIO:after=2"])
def test_a_full_disk_while_loading_leaves_nothing(rule: str, fast_path: Path, command: Command) -> None:
    run = Run.make(RAM, fast_path / "a", "runs/run")
    before = tree(fast_path)
    assert command("train", str(run.file), faults=rule) == 1
    code = "EIO" if "EIO" in rule else "ENOSPC"
    assert re.search(rf"^offload: .*{re.escape(str(fast_path / 'a' / 'ssd'))}\S*.*{code}.*\.", command.errors)
    assert tree(fast_path) == before


def test_no_room_for_the_reservation(small_disk: Path, tmp_path: Path, command: Command) -> None:
    """The budget says there is room; the file system does not have it."""
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    run = Run.make(RAM, tmp_path / "a", "runs/run")
    run = set_nvme(run, path=str(small_disk / "ssd"))
    before = tree(tmp_path)
    assert command("train", str(run.file)) == 1
    needed, available = (int(n) for n in re.findall(r"needed (\d+) bytes, available (\d+) bytes", command.errors)[0])
    assert needed > available > 0
    assert str(small_disk / "ssd") in command.errors and "Free space there" in command.errors
    assert tree(tmp_path) == before


def test_free_space_too_small_is_known_before_the_start(small_disk: Path, tmp_path: Path, command: Command) -> None:
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    run = set_nvme(Run.make(RAM, tmp_path / "a", "runs/run"), path=str(small_disk / "ssd"), size="auto")
    before = tree(tmp_path)
    assert command("train", str(run.file)) == 3
    assert "nvme" in command.errors
    assert tree(tmp_path) == before


def test_a_budget_too_small_is_known_before_the_start(fast_path: Path, command: Command) -> None:
    run = set_nvme(Run.make(RAM, fast_path / "a", "runs/run"), size="1MiB")
    before = tree(fast_path)
    assert command("train", str(run.file)) == 3
    assert "nvme" in command.errors and "1 MiB" in command.errors
    assert tree(fast_path) == before


def test_a_model_in_memory_is_set_up_or_not_at_all(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `offload.wrap` keeps of a given model goes too when the set-up fails, and the directory is free again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = engine_configuration(RAM, fast_path)
    del config["model"]
    before = tree(fast_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE), dtype=torch.bfloat16)
    with monkeypatch.context() as environment:
        environment.setenv("OFFLOAD_FAULTS", "write:ENOSPC:after=3")
        with pytest.raises(StoreFull):
            offload.wrap(model, config)
    assert tree(fast_path) == before
    with offload.wrap(model, config) as engine:
        assert engine.step(BATCH).step == 1


# ---- reading back ----


def test_export_names_what_cannot_be_read(fast_path: Path, command: Command) -> None:
    run = Run.make(NVME, fast_path)
    assert command("train", str(run.file), "--steps", "1") == 0
    for rule, message in (("read:EIO:after=2", "EIO"), ("read:flip:after=2", "not those written")):
        assert command("export", str(run.path), str(fast_path / "out"), faults=rule) == 1
        assert re.search(rf"data-0\.bin, offset \d+.*{message}|{message}.*data-0\.bin, offset \d+", command.errors)
        assert not list(fast_path.glob("out*"))
    assert command("export", str(run.path), str(fast_path / "out")) == 0


def test_bytes_that_rot_on_the_disk_are_found_on_resume(fast_path: Path) -> None:
    """Changed behind the program's back, while nothing runs."""
    offload.wrap(None, engine_configuration(RAM, fast_path)).close()
    data = next((fast_path / "ssd").glob("*/data-0.bin"))
    content = bytearray(data.read_bytes())
    at = next(i for i in range(0, len(content), 4096) if any(content[i : i + 64]))
    content[at] ^= 1
    data.write_bytes(content)
    with pytest.raises(ChecksumError, match=rf"file {re.escape(str(data))}, offset \d+") as found:
        offload.resume(fast_path / "run")
    assert isinstance(found.value, StoreError)
    content[at] ^= 1
    data.write_bytes(content)
    offload.resume(fast_path / "run").close()  # the failed resume let go of everything
