"""Flat binary files of tokenised data: written once, keyed by content, read back in slices.

Slices are read with `pread` into buffers of their own. A memory map would do the same with fewer lines, but its pages
count as the process's memory for as long as the kernel keeps them, and would grow by the whole data set in an epoch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from offload.errors import DataError
from offload.io import sync

_FLUSH = 1 << 16  # elements buffered by a writer


class FlatArray:
    """A read-only one-dimensional array in a file."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._file = path.open("rb", buffering=0)
        self._path = path
        self._length = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) as a new array; `DataError` when the file has become shorter."""
        out = np.empty(count, self.dtype)
        view, at = out.view(np.uint8).data, start * self.dtype.itemsize
        while view:
            got = os.preadv(self._file.fileno(), [view], at)
            if got == 0:
                raise DataError(f"{self._path}: ends at byte {at}; delete its directory to have it made again")
            view, at = view[got:], at + got
        return out

    def close(self) -> None:
        self._file.close()


class FlatWriter:
    """Appends to a flat file through a small buffer."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._parts: list[np.ndarray] = []
        self._buffered = 0
        self.length = 0

    def append(self, values: Any) -> None:
        part = np.asarray(values, self.dtype)
        self._parts.append(part)
        self._buffered += len(part)
        self.length += len(part)
        if self._buffered >= _FLUSH or len(self._parts) >= 4096:
            self._flush()

    def _flush(self) -> None:
        if self._parts:
            self._file.write(np.concatenate(self._parts).tobytes())
        self._parts, self._buffered = [], 0

    def finish(self) -> None:
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Entry:
    """A directory of flat files and what was noted when they were made."""

    def __init__(self, directory: Path, dtypes: dict[str, str], meta: dict[str, Any]) -> None:
        self.directory = directory
        self.meta = meta
        self.arrays = {name: FlatArray(directory / f"{name}.bin", dtype) for name, dtype in dtypes.items()}

    def close(self) -> None:
        for array in self.arrays.values():
            array.close()


def cached(
    cache_dir: Path,
    key: str,
    dtypes: dict[str, str],
    build: Callable[[dict[str, FlatWriter]], dict[str, Any]],
) -> Entry:
    """The entry `key` of the cache, made by `build` if it is not there or not whole.

    `build` gets a writer per array and returns the entry's metadata. It works in a directory of its own, which is
    renamed when all its files are on disk: a killed process leaves no entry or a whole one.
    """
    final = cache_dir / key
    meta = _whole(final, dtypes)
    if meta is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _remove_orphans(cache_dir)
            meta = _make(cache_dir, final, dtypes, build)
        except OSError as error:
            raise DataError(
                f"{cache_dir}: cannot write the tokenised data: {error.strerror or error}; "
                "free space there or choose another output directory"
            ) from error
    return Entry(final, dtypes, meta["meta"])


def _make(
    cache_dir: Path, final: Path, dtypes: dict[str, str], build: Callable[[dict[str, FlatWriter]], dict[str, Any]]
) -> dict[str, Any]:
    temporary = cache_dir / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        writers = {name: FlatWriter(temporary / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
        noted = build(writers)
        for writer in writers.values():
            writer.finish()
        meta = {"lengths": {name: writer.length for name, writer in writers.items()}, "meta": noted}
        with (temporary / "meta.json").open("w") as stream:
            json.dump(meta, stream)
            stream.flush()
            os.fsync(stream.fileno())
        sync(temporary)
        if _whole(final, dtypes) is None:  # another run may have made the same entry meanwhile
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        shutil.rmtree(temporary, ignore_errors=True)
        sync(cache_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return meta


def _whole(directory: Path, dtypes: dict[str, str]) -> dict[str, Any] | None:
    try:
        meta = json.loads((directory / "meta.json").read_text())
        for name, dtype in dtypes.items():
            size = (directory / f"{name}.bin").stat().st_size
            if size != meta["lengths"][name] * np.dtype(dtype).itemsize:
                return None
        return dict(meta)
    except (OSError, ValueError, KeyError):
        return None


def _remove_orphans(cache_dir: Path) -> None:
    for directory in cache_dir.glob("*.tmp-*"):
        owner = directory.name.rpartition("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(directory, ignore_errors=True)


class TokenWriter:
    """The sink of an encoder: flat arrays `tokens`, `documents` (start, length for each) and, where kept, `labels`."""

    def __init__(self, writers: dict[str, FlatWriter]) -> None:
        self._writers = writers
        self._start = 0
        self.has_labels = False
        self.largest_id = -1

    def append(self, ids: Any, labels: Any | None) -> None:
        if len(ids) == 0:
            return
        self.largest_id = max(self.largest_id, int(np.max(ids)))
        self.has_labels = self.has_labels or labels is not None
        self._writers["tokens"].append(ids)
        if "labels" in self._writers:
            self._writers["labels"].append(ids if labels is None else labels)

    def end_document(self) -> None:
        length = self._writers["tokens"].length - self._start
        if length >= 2:
            self._writers["documents"].append([self._start, length])
        self._start = self._writers["tokens"].length
