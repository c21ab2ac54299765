"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As the command line sets it, before torch is loaded: threads that spin at a barrier starve the lanes on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


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
