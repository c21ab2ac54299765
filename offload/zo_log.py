"""The log of a zeroth-order run: one line per step, from which its weights can be made again.

A line holds the step, its learning rate, and (seed, projected gradient) of each direction: some 80 bytes, whatever the
size of the model. It is written as soon as the step is computed, so that a run goes on after its last line even where
the weights in the store are older: the updates in between are taken again, from their seeds.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from offload.errors import OffloadError
from offload.rundir import read_jsonl, write_atomically
from offload.zo_variants import Update

NAME = "zo.jsonl"


def read_log(path: str | Path) -> list[Update]:
    """All whole lines of a log (or of the one in a run directory), in order; a torn last line is left out.

    Raises OffloadError where a step is missing or stands twice.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    updates = [decode(row) for row in read_jsonl(path)]
    for expected, update in enumerate(updates):
        if update.step != expected:
            raise OffloadError(f"{path}: step {update.step} stands where step {expected} should; the log is damaged")
    return updates


def encode(update: Update) -> dict[str, Any]:
    """An update as JSON; floats are written so that they are read back to the bit."""
    return {"step": update.step, "lr": update.lr, "draws": [list(draw) for draw in update.draws]}


def decode(row: dict[str, Any]) -> Update:
    return Update(row["step"], row["lr"], tuple((int(seed), float(g)) for seed, g in row["draws"]))


class UpdateLog:
    """Appends to the log of a run; opened with the updates that are to stay, which replace what was there."""

    def __init__(self, directory: Path, keep: Iterable[Update]) -> None:
        self._path = directory / NAME
        write_atomically(self._path, "".join(json.dumps(encode(update)) + "\n" for update in keep))
        self._file = FileIO(self._path, "a")

    def append(self, update: Update) -> None:
        """Add one line; it is with the operating system when this returns. Raises OSError naming the file."""
        line = (json.dumps(encode(update)) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written != len(line):  # a disk takes a part only when it has no room for the rest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def sync(self) -> None:
        """Bring the lines written so far to the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
