"""The machine is measured once for all tests, not for each of their directories: two seconds for each would be most of
the time that the suite takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offload.planner import Hardware, probe

import offload.prepare

SHARED = (Path("/dev/shm"), Path(tempfile.gettempdir()))


def measure_by_file_system(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on this process, and those forked from it, plan with the rates measured at `SHARED`.

    For store paths on the same file system, that is: others are measured themselves. The rates are really measured, and
    cached as a user's are, for these two directories.
    """

    def shared(device: str, paths: Sequence[Path], **optimizers: Callable[..., float] | None) -> Hardware:
        return probe(device, [_stand_in(path) for path in paths], **optimizers)

    patch(offload.prepare, "probe", shared)


def _stand_in(path: Path) -> Path:
    there = path.absolute()
    while not there.is_dir():
        there = there.parent
    device = os.stat(there).st_dev
    return next((d for d in SHARED if os.access(d, os.W_OK) and os.stat(d).st_dev == device), path)
