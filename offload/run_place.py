"""The place of a run: which directories a run may be made in, its lock, and the removal of what was only an attempt.

`lock` is held with flock for the life of the process that works on the run, so it goes with the process however that
ends. `run.json` is the last file of the set-up: a directory with a lock and no `run.json` was never more than an
attempt.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from offload.config_values import absolute
from offload.errors import ConfigError, OffloadError

IO_CHOICE = "io.json"
FILES = (
    "config.yaml", "run.json", "plan.json", "metrics.jsonl", "eval.jsonl", "zo.jsonl", "memory.json", "trace.json",
    "report.html", "compare.html", IO_CHOICE,
)  # fmt: skip
DIRECTORIES = ("store", "cache", "architecture")


class RunLocked(OffloadError):
    """Another process holds the run directory."""


def is_run(path: str | Path) -> bool:
    """Whether a run was set up at `path`."""
    return (Path(path).expanduser() / "run.json").is_file()


def refuse_existing(path: Path) -> None:
    """Raise ConfigError unless a new run can be made at `path`: absent, empty, or what a failed attempt left."""
    if is_run(path):
        raise ConfigError(
            f"output: {path} already holds a run; add --resume to go on with it, "
            "or choose another directory with --set output=..."
        )
    if path.exists():
        if not path.is_dir():
            raise ConfigError(f"output: {path} is a file; give a directory that does not exist yet")
        foreign = sorted(entry.name for entry in path.iterdir() if not _ours(entry.name))
        if foreign:
            raise ConfigError(
                f"output: {path} is not empty (it has {foreign[0]!r}) and holds no run; "
                "choose another directory with --set output=..."
            )


@contextmanager
def attempt(path: str | Path) -> Iterator[None]:
    """Remove what the body made at `path` on the way to a run (cached data, say) if no run came about."""
    path = Path(absolute(str(path)))
    to_make = not_there(path)
    try:
        yield
    finally:
        if not is_run(path) and (not path.is_dir() or _remove_unlocked(path)):
            for directory in to_make:
                rmdir(directory)


def _remove_unlocked(path: Path) -> bool:
    """Remove our files unless another process is setting up a run here; whether that was done."""
    try:
        lock = take_lock(path)
    except (RunLocked, ConfigError):
        return False
    with lock:
        remove_files(path)
    return True


def _ours(name: str) -> bool:
    return name in (*FILES, *DIRECTORIES, "lock") or name.startswith(tuple(f".{file}." for file in FILES))


def make_directories(path: Path) -> list[Path]:
    """Make `path`; returns the directories that had to be made, deepest first."""
    to_make = not_there(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for directory in to_make:
            rmdir(directory)
        raise ConfigError(f"output: {path} cannot be made: {error}; choose another with --set output=...") from error
    return to_make


def not_there(path: Path) -> list[Path]:
    """`path` and its parents that do not exist, deepest first."""
    return [p for p in (path, *path.parents) if not p.exists()]


def holder(path: Path) -> str:
    """The id of the process that holds the run at `path`, empty if none does. Does not touch the lock itself."""
    try:
        inode = str((path / "lock").stat().st_ino)
        held = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        if any("FLOCK" in words and inode in words[-3].split(":") for words in held):
            return (path / "lock").read_text(encoding="ascii").strip() or "unknown"
    except OSError:
        pass  # no lock, or a system that does not tell
    return ""


def take_lock(path: Path) -> TextIO:
    """Open the lock file and hold it. Raises RunLocked when another process does, ConfigError when it fails."""
    while True:
        try:
            file = os.fdopen(os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644), "r+")
        except OSError as error:
            raise ConfigError(f"output: {path} cannot be written: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "unknown"
            file.close()
            raise RunLocked(
                f"{path} is in use by process {holder}; wait for it or stop it, or choose another run directory"
            ) from None
        try:
            current = (path / "lock").stat().st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            current = False
        if current:  # not a lock file that a discarding process has just removed
            break
        file.close()
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def remove_files(path: Path) -> None:
    """Remove what a run writes under `path`, but nothing else, and the lock last."""
    for entry in list(path.iterdir()):
        if entry.name in DIRECTORIES:
            _remove_directory(entry)
        elif _ours(entry.name) and entry.name != "lock":
            entry.unlink(missing_ok=True)
    (path / "lock").unlink(missing_ok=True)


def _remove_directory(entry: Path) -> None:
    if entry.name != "store":
        shutil.rmtree(entry, ignore_errors=True)
    else:  # the store of this run was removed by name; another run may have been told to keep its own here
        rmdir(entry)


def rmdir(path: Path) -> None:
    """Remove a directory unless something is in it."""
    try:
        path.rmdir()
    except OSError:
        return  # not empty, or gone: not ours to remove
