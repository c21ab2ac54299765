"""Which backend to take: what works on a path, which of it is fastest there, and making it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from .aiofiles_backend import AiofilesBackend
from .backend import PIECE, Backend
from .buffers import PAGE, allocate
from .directfile import DirectFile
from .errors import StoreError
from .ledger import Ledger
from .libaio import LibaioBackend
from .threads import ThreadsBackend
from .uring import UringBackend

logger = logging.getLogger(__name__)

BACKENDS = ("threads", "io_uring", "libaio", "aiofiles")
WORTH_MEASURING = 256 << 20
"""Bytes below which a store gets the threads backend without a measurement."""
SAMPLE = 8 * PIECE
SECONDS = 1.0
"""After this time no further round of the measurement begins."""
SIMILAR = 1.1
"""Backends whose time is within this factor of the best count as equally fast: the least CPU time decides."""


@dataclass
class Choice:
    """A backend's name, why it was taken, and per measured backend wall and CPU seconds per GB (10^9 bytes), half of it
    written and half read, in the slowest of the file systems `measured_in`, and what those that do not work said."""

    backend: str
    why: str
    paths: list[str]
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    measured_in: list[str] = field(default_factory=list)


def check(name: str) -> None:
    """Raise StoreError unless `name` is "auto" or the name of a backend."""
    if name != "auto" and name not in BACKENDS:
        raise StoreError(f"unknown I/O backend '{name}'", advice=f"Use auto, {', '.join(BACKENDS)}.")


def make_backend(name: str, *, paths: int = 1, timeout: float = 120.0, compile: bool = False) -> Backend:
    """The backend `name` for a store on `paths` devices. Raises StoreError when it is not to be had."""
    if name == "threads":
        return ThreadsBackend(4 * paths, timeout=timeout)
    if name == "io_uring":
        return UringBackend(8 * paths, syncs=paths, timeout=timeout)  # a commit syncs every path at once
    if name == "libaio":
        return LibaioBackend(4 * paths, timeout=timeout, compile=compile)
    return AiofilesBackend(4 * paths, timeout=timeout)


def why_not(name: str, directory: Path, *, compile: bool = False) -> str:
    """Try a backend with a write, a sync and a read of one page in `directory`: "" when it works, else the reason.

    With `compile`, libaio's operator is compiled if need be, which takes minutes.
    """
    try:
        with _trial(directory, PAGE) as file, allocate(2 * PAGE, Ledger()) as buffer:
            backend = make_backend(name, timeout=5.0, compile=compile)
            try:
                out, into = buffer.tensor[:PAGE], buffer.tensor[PAGE:]
                out.fill_(37)
                backend.write(file, 0, out).wait()
                backend.sync(file).wait()
                backend.read(file, 0, into).wait()
                return "" if into.equal(out) else "it read other bytes than it wrote"
            finally:
                backend.close()
    except (OSError, StoreError) as error:
        return str(error)


def choose_backend(directories: Sequence[Path], nbytes: int, record: Path | None = None) -> Choice:
    """The backend for a store of `nbytes` bytes in `directories`, by a measurement on each of their file systems.

    One backend serves all paths, and a striped store is as fast as its slowest: so the slowest decides. A file system
    takes one to two seconds and a temporary file of 64 MiB. The choice is kept in the file `record` and taken from
    there next time, as long as the directories are the same; delete the file to have it measured again. Small stores
    are not worth a measurement and get "threads".
    """
    paths = [str(directory) for directory in directories]
    if nbytes < WORTH_MEASURING:
        return Choice("threads", f"the store is smaller than {WORTH_MEASURING >> 20} MiB: nothing was measured", paths)
    choice = _recorded(record, paths)
    if choice is None:
        choice = _measure(_one_per_file_system(directories), paths)
        if record is not None:
            try:
                partial = record.with_name(f".{record.name}.{os.getpid()}")
                partial.write_text(json.dumps(asdict(choice), indent=1) + "\n", encoding="utf-8")
                partial.replace(record)
            except OSError as error:
                logger.warning("the choice of the I/O backend cannot be kept: %s", error)
    return choice


def open_backend(
    wanted: str, directories: Sequence[Path], nbytes: int, *, record: Path | None = None, timeout: float = 120.0
) -> Backend:
    """The backend that `wanted` names, or for "auto" the one that `choose_backend` finds.

    When it does not work in a directory, the reason is logged and the threads backend taken, which always works.
    """
    check(wanted)
    name = choose_backend(directories, nbytes, record).backend if wanted == "auto" else wanted
    if name != "threads":
        for directory in directories:
            if reason := why_not(name, directory, compile=wanted == "libaio"):
                logger.warning("I/O backend %s does not work in %s, using threads: %s", name, directory, reason)
                name = "threads"
                break
    return make_backend(name, paths=len(directories), timeout=timeout)


def _recorded(record: Path | None, paths: list[str]) -> Choice | None:
    if record is None:
        return None
    try:
        choice = Choice(**json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return choice if choice.paths == paths and choice.backend in BACKENDS else None


@contextlib.contextmanager
def _trial(directory: Path, nbytes: int) -> Iterator[DirectFile]:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".offload-io-") as folder:
        file = DirectFile(Path(folder) / "data", create=True)
        try:
            file.reserve(nbytes)
            yield file
        finally:
            file.close()


def _one_per_file_system(directories: Sequence[Path]) -> list[Path]:
    found: dict[int, Path] = {}
    for directory in directories:
        found.setdefault(os.stat(directory).st_dev, directory)
    return list(found.values())


def _measure(directories: Sequence[Path], paths: list[str]) -> Choice:
    """The fastest candidate, judged by the file system on which each is slowest."""
    # libaio is no candidate: see there. Loading its operator takes longer than all of this, and 30 MB.
    reason = next((why for directory in directories if (why := why_not("io_uring", directory))), "")
    refused = {"io_uring": reason} if reason else {}
    names = ["threads"] if reason else ["threads", "io_uring"]
    measured: dict[str, dict[str, float]] = {}
    try:
        for directory in directories:
            here = _rates(directory, names)
            if here is None:
                return Choice("aiofiles", f"the file system of {directory} has no O_DIRECT", paths, refused=refused)
            for name, item in here.items():
                if name not in measured or item["seconds_per_gb"] > measured[name]["seconds_per_gb"]:
                    measured[name] = item
    except StoreError as error:
        return Choice("threads", f"nothing could be measured: {error}", paths, refused=refused)
    limit = SIMILAR * min(item["seconds_per_gb"] for item in measured.values())
    fast = [name for name in names if measured[name]["seconds_per_gb"] <= limit]
    best = min(fast, key=lambda name: measured[name]["cpu_seconds_per_gb"])
    why = "the least CPU time of those that were fastest here"
    return Choice(best, why, paths, measured, refused, [str(directory) for directory in directories])


def _rates(directory: Path, names: list[str]) -> dict[str, dict[str, float]] | None:
    """Write and read the sample with each candidate in turn, until the time is over; None without O_DIRECT."""
    backends: dict[str, Backend] = {}
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, float] = dict.fromkeys(names, 0.0)
    try:
        with _trial(directory, SAMPLE) as file, allocate(PIECE, Ledger()) as buffer:
            if not file.direct:
                return None
            buffer.tensor.random_(0, 256)  # compressing drives must not look faster than they are
            backends = {name: make_backend(name, timeout=30.0) for name in names}
            _move(backends["threads"], file, buffer.tensor)  # the first write of a new file is slower than all others
            began = time.perf_counter()
            while time.perf_counter() - began < SECONDS:
                for name, backend in backends.items():
                    start, used = time.perf_counter(), time.process_time()
                    _move(backend, file, buffer.tensor)
                    wall[name].append(time.perf_counter() - start)
                    cpu[name] += time.process_time() - used
    finally:
        for backend in backends.values():
            backend.close()
    scale = 1e9 / (2 * SAMPLE)
    return {
        name: {
            "seconds_per_gb": sorted(times)[len(times) // 2] * scale,
            "cpu_seconds_per_gb": cpu[name] / len(times) * scale,
        }
        for name, times in wall.items()
    }


def _move(backend: Backend, file: DirectFile, buffer: Tensor) -> None:
    for submit in (backend.write, backend.read):
        for request in [submit(file, offset, buffer) for offset in range(0, SAMPLE, PIECE)]:
            request.wait()
