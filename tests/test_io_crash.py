"""After a kill or a power cut at any point the store opens at the last version or the one under way, whole."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import crashing
import pytest
from offload.io import StoreError


@pytest.fixture(scope="module")
def recorder() -> Iterator[crashing.Recorder]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of directories are made and read again
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield crashing.record_store(Path(folder).resolve() / "root", commits=3, seed=3)


def test_killed_at_random_operations_it_reopens_at_a_committed_version(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, crashing.__file__, str(tmp_path / "one"), str(tmp_path / "two"), "1500", "7"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    operations, kills, commits = (int(word) for word in re.findall(r"\d+", done.stdout)[:3])
    assert operations >= 1500 and kills >= 25 and commits > 100


def test_every_call_is_recorded(recorder: crashing.Recorder) -> None:
    """record_store has compared the recording with the disk; here, that it holds what a commit is made of."""
    kinds = [operation.kind for operation in recorder.operations]
    starts = [at for at, operation in enumerate(recorder.operations) if operation.value == ("start", 2)]
    commit = recorder.operations[starts[0] + 1 : kinds.index("mark", starts[0] + 1)]
    names = [(operation.kind, Path(operation.target or operation.path).name) for operation in commit]
    assert sorted(names[:2]) == [("sync", "data-0.bin"), ("sync", "data-1.bin")]
    assert names[2:] == [
        ("create", "manifest.tmp"), ("write", ""), ("sync", "manifest.tmp"), ("rename", "manifest.json"),
        ("syncdir", "run"),
    ]  # fmt: skip


def test_a_power_cut_leaves_a_whole_version(recorder: crashing.Recorder) -> None:
    """Every prefix of the recorded operations, and sampled reorderings of what lies between two syncs."""
    states = 0
    for end, tree in crashing.crash_states(recorder, samples=4, rng=random.Random(11)):
        crashing.check_crash(recorder, end, tree)
        states += 1
    assert states > 200


@pytest.mark.parametrize(
    "ignored",
    [
        lambda sync: sync.kind == "sync" and "data-" in sync.path,
        lambda sync: sync.kind == "sync" and "manifest" in sync.path,
        lambda sync: sync.kind == "syncdir" and sync.path.endswith("one/run"),
    ],
    ids=["data", "manifest", "directory"],
)
def test_the_replay_finds_a_missing_sync(
    recorder: crashing.Recorder, ignored: Callable[[crashing.Operation], bool]
) -> None:
    """Each sync of the protocol is needed: without it some crash loses or mixes versions, and the replay says so."""
    first = next(at for at, operation in enumerate(recorder.operations) if operation.value == ("start", 2))
    with pytest.raises((AssertionError, StoreError)):
        for end, tree in crashing.crash_states(recorder, 4, random.Random(2), ignored, first):
            crashing.check_crash(recorder, end, tree)
