"""The run directory: one run's config, plan, metrics and reports, held by one process at a time."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from offload.config import Config
from offload.config_sections import NvmePath
from offload.config_values import absolute
from offload.errors import ConfigError, OffloadError
from offload.run_place import make_directories, not_there, refuse_existing, remove_files, rmdir, take_lock

_LIBRARIES = ("offload", "torch", "transformers", "numpy", "safetensors", "tokenizers", "accelerate", "peft", "pyarrow")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` as a whole: a reader, or a crash, sees the old text or the new. Raises OSError naming it."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log that may end in a torn line (the process died while writing it); a missing file has none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise OffloadError(f"{path}, line {number}: not a JSON object: {error}; remove the line") from None


def _compact(value: Any) -> str:
    """JSON without spaces: logs of ten thousand steps stay small."""
    return json.dumps(value, separators=(",", ":"))


class RunDirectory:
    """Files of one run under `path`; get one from `create` (new run) or `open` (existing run), then `close` it."""

    def __init__(self, path: Path, lock: TextIO, info: dict[str, Any], made: Sequence[Path] = ()) -> None:
        self.path = path
        self.info = info
        self.last_row: dict[str, Any] | None = None
        self._lock: TextIO | None = lock
        self._metrics: FileIO | None = None
        self._made = made

    @classmethod
    def create(cls, cfg: Config) -> RunDirectory:
        """A new run directory at `cfg.output`: made, locked, with `config.yaml` and `run.json` written.

        Raises ConfigError when a run or foreign files are there, or it cannot be written; RunLocked when another
        process has it. Nothing is left behind on failure; after success, `discard` undoes it.
        """
        path = Path(absolute(cfg.output))
        refuse_existing(path)
        not_there_yet = [directory for entry in cfg.store_paths() for directory in not_there(Path(entry.path))]
        made = make_directories(path)
        lock = None
        try:
            lock = take_lock(path)
            refuse_existing(path)  # another process may have finished its set-up before we had the lock
            run_id = uuid.uuid4().hex
            info = {
                "id": run_id,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "store": {"name": f"offload-{run_id[:16]}", "paths": _portable(cfg.store_paths(), path)},
                "versions": _versions(),
            }
            cfg.resolved().write(path / "config.yaml")
            write_atomically(path / "run.json", json.dumps(info, indent=2) + "\n")
            return cls(path, lock, info, [*not_there_yet, *made])
        except BaseException as error:
            if lock:
                remove_files(path)
                lock.close()
            for directory in made:
                rmdir(directory)
            if isinstance(error, OSError):
                raise ConfigError(f"output: got {cfg.output}, which cannot be written: {error}") from error
            raise

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run, locked. Raises ConfigError when there is no run, RunLocked when another process has it."""
        path = Path(absolute(str(path)))
        read_info(path)
        lock = take_lock(path)
        try:
            return cls(path, lock, read_info(path))
        except BaseException:
            lock.close()
            raise

    @property
    def id(self) -> str:
        return str(self.info["id"])

    @property
    def store_name(self) -> str:
        """Unique to this run: its directory under each store path."""
        return str(self.info["store"]["name"])

    @property
    def store_paths(self) -> list[NvmePath]:
        """Where the store lies, in order, with absolute paths; sizes in bytes or "auto"."""
        return stored_paths(self.path, self.info)

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def cache_path(self) -> Path:
        """Tokenised data of this run."""
        return self.path / "cache"

    def config(self) -> Config:
        """The config the run was last started with."""
        return read_config(self.path)

    def write_config(self, cfg: Config) -> None:
        """Replace the config, on a resume that changes it. The place of the store stays as it was created."""
        cfg.resolved().write(self.path / "config.yaml")

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_atomically(self.path / "plan.json", json.dumps(plan, indent=1) + "\n")

    def write_memory(self, memory: Mapping[str, Any]) -> None:
        write_atomically(self.path / "memory.json", _compact(memory) + "\n")

    def write_trace(self, events: list[dict[str, Any]]) -> None:
        """Chrome trace events (chrome://tracing, Perfetto): `ts` and `dur` in microseconds.

        With nothing but names of rows (no step was taken) an earlier trace stays.
        """
        if all(event["ph"] == "M" for event in events):
            return
        write_atomically(self.path / "trace.json", _compact(events) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one step's row to `metrics.jsonl`; it is with the operating system when this returns.

        Raises OSError naming the file; a torn last line is then dropped on resume.
        """
        line = (_compact(row) + "\n").encode()
        try:
            if self._metrics is None:
                self._metrics = FileIO(self.metrics_path, "a")
            written = self._metrics.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics_path)) from error
        if written != len(line):  # a disk takes a part only when it has no room for the rest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics_path))
        self.last_row = dict(row)

    def sync_metrics(self) -> None:
        """Bring the rows written so far to the disk itself."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def append_eval(self, row: Mapping[str, Any]) -> None:
        """Add one evaluation's row to `eval.jsonl`."""
        with (self.path / "eval.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_metrics(self, after_step: int) -> None:
        """Drop rows of steps later than `after_step` and a torn last line, atomically: each step will stand once."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        for path in (self.metrics_path, self.path / "eval.jsonl"):
            if path.exists():
                rows = [row for row in read_jsonl(path) if row["step"] <= after_step]
                write_atomically(path, "".join(_compact(row) + "\n" for row in rows))

    def discard(self) -> None:
        """Remove this run, store included, and close: for a set-up that failed, or was killed, before any commit.

        Only what a run writes is removed; foreign files, and then the directory, stay.
        """
        for entry in self.store_paths:
            shutil.rmtree(Path(entry.path) / self.store_name, ignore_errors=True)
        remove_files(self.path)
        self.close()
        for directory in self._made or [self.path]:
            rmdir(directory)

    def close(self) -> None:
        """Let go of the lock. Safe to call twice."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_info(path: Path) -> dict[str, Any]:
    """`run.json` of the run at `path`, without taking its lock. Raises ConfigError when there is no run."""
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is not a run directory: it has no run.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / 'run.json'} cannot be read: {error}") from None
    if not isinstance(info, dict):
        raise ConfigError(f"{path / 'run.json'} is not a JSON object")
    return info


def read_config(path: Path) -> Config:
    """The config of the run at `path`, without taking its lock."""
    return Config.load(path / "config.yaml")


def stored_paths(path: Path, info: Mapping[str, Any]) -> list[NvmePath]:
    """The store paths of `run.json`; those inside the run directory move with it."""
    return [
        NvmePath(path=str(path / entry["path"]), size=entry["size"], tbw=entry.get("tbw"))
        for entry in info["store"]["paths"]
    ]


def _portable(paths: list[NvmePath], run: Path) -> list[dict[str, Any]]:
    """Store paths for `run.json`: relative where inside the run directory."""
    entries = []
    for entry in paths:
        path = Path(entry.path)
        text = str(path.relative_to(run)) if path.is_relative_to(run) else str(path)
        entries.append({**entry.model_dump(), "path": text})
    return entries


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
