"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import Warm

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As the command line sets it, before torch is loaded: threads that spin at a barrier starve the lanes on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# Files of half a minute and more, the longest first: a worker that comes to one last keeps the other waiting.
LONG = (
    "test_kill.py",
    "test_disk_full.py",
    "test_docs.py",
    "test_exactness.py",
    "test_zo.py",
    "test_benchmarks.py",
    "test_benchmark_gpu.py",
    "test_bf16.py",
    "test_two_runs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def _measured_once() -> Iterator[None]:
    from probing import measure_by_file_system  # loads torch

    with pytest.MonkeyPatch.context() as patch:
        measure_by_file_system(patch.setattr)
        yield


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Starts `offload` commands as forks of a process that has made the imports: one for all files of a worker."""
    with Warm() as server:
        yield server


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for tests of numbers, which would wait for the disk's syncs only."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir=memory, prefix="offload-test-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
