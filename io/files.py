"""A store's directories: <path>/<name>/ on every path, each with a lock and a data file; the first has the manifest."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .directfile import DirectFile
from .errors import StoreError, StoreFull, StoreLocked, from_os_error
from .manifest import MANIFEST, TEMPORARY, StorePath, sync, write_durably

LOCK = "lock"
HOME = "home"  # a text file that names the directory with the manifest
RESERVE = "reserve"  # holds space for the next manifest, given up on a full disk


def normalized(paths: Sequence[StorePath], name: str) -> tuple[StorePath, ...]:
    """Absolute paths. Raises StoreError for an unusable name, no path, a path given twice or without a size."""
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise StoreError(f"'{name}' cannot be the name of a store: it must be a plain file name")
    result = tuple(replace(item, path=Path(os.path.abspath(os.path.expanduser(item.path)))) for item in paths)
    if not result or len({item.path.resolve() for item in result}) != len(result):
        raise StoreError(f"store '{name}': needs at least one path, and each path once")
    for item in result:
        if item.size <= 0:
            raise StoreError(f"store '{name}': the size of a path must be positive, not {item.size}", path=item.path)
    return result


class _Lock:
    """An exclusive lock on a directory, held until release() or the end of the process."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
                    raise StoreLocked(
                        f"the store is in use by {f'process {pid}' if pid else 'another process'}",
                        path=directory,
                        advice="Wait for it to end, or choose another name.",
                    ) from None
                # The holder before us may have deleted the file: then we locked what nobody else will find.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                        os.ftruncate(fd, 0)
                        os.pwrite(fd, str(os.getpid()).encode(), 0)
                        self._fd = fd
                        return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def release(self) -> None:
        os.close(self._fd)


class Directories:
    """The locked directories of one store."""

    def __init__(self, paths: Sequence[StorePath], name: str) -> None:
        self._directories = [item.path / name for item in paths]
        self.all = tuple(self._directories)
        self.first = self._directories[0]
        self._locks: list[_Lock] = []
        self._made: list[Path] = []
        self._data: list[DirectFile] = []

    @classmethod
    def create(cls, paths: Sequence[StorePath], name: str) -> Directories:
        """Make and lock the directories, and clear what an interrupted creation left in them.

        Raises StoreLocked, or StoreError when one of them belongs to a committed store.
        """
        self = cls(paths, name)
        try:
            for directory in self._directories:
                self._make(directory)
                self._locks.append(_Lock(directory))
                self._refuse_committed(directory)
            for directory in self._directories:
                self._clear(directory)
                write_durably(directory / HOME, str(self.first).encode())
        except BaseException as error:
            for made in self._made:
                (made / LOCK).unlink(missing_ok=True)
            self.release()
            for made in reversed(self._made):
                with contextlib.suppress(OSError):
                    made.rmdir()
            if isinstance(error, OSError):
                raise from_os_error(error, f"cannot create store '{name}'", error.filename or self.first) from error
            raise
        return self

    @classmethod
    def open(cls, paths: Sequence[StorePath], name: str) -> Directories:
        """Lock existing directories. Raises StoreLocked, or StoreError when one is missing."""
        self = cls(paths, name)
        try:
            for directory in self._directories:
                self._locks.append(_Lock(directory))
            (self.first / TEMPORARY).unlink(missing_ok=True)
        except OSError as error:
            self.release()
            raise from_os_error(error, f"cannot open store '{name}'", error.filename or self.first) from error
        except BaseException:
            self.release()
            raise
        return self

    def reserve(self, sizes: Sequence[int]) -> list[DirectFile]:
        """New data files with their space allocated, durably. Raises StoreFull."""
        for index, (directory, size) in enumerate(zip(self._directories, sizes, strict=True)):
            stat = os.statvfs(directory)
            available = stat.f_bavail * stat.f_frsize
            if size > available:
                raise StoreFull(
                    f"not enough space: needed {size} bytes, available {available} bytes",
                    path=directory,
                    advice="Free space there, lower this path's share, or give the store another path.",
                )
            file = DirectFile(self._data_path(index), create=True)
            self._data.append(file)
            if size:
                file.reserve(size)
            try:
                file.fsync()
                for changed in {directory, *(made.parent for made in self._made)}:
                    sync(changed)
            except OSError as error:
                raise from_os_error(error, "cannot sync", file.path) from error
        return self._data

    def open_data(self, sizes: Sequence[int], reserve: bool) -> list[DirectFile]:
        """The existing data files, with `reserve` allocated as a whole again: a copy of a store has holes where the
        original was never written. Raises StoreError when one is missing or shorter than `sizes` says, StoreFull."""
        for index, size in enumerate(sizes):
            file = DirectFile(self._data_path(index))
            self._data.append(file)
            status = os.fstat(file.fd)
            if status.st_size < size:
                raise StoreError(
                    f"the data file has {status.st_size} bytes, not {size}",
                    path=file.path,
                    advice="It was cut from outside, or belongs to another store: restore it from a copy.",
                )
            if reserve and status.st_blocks * 512 < size:
                file.reserve(size)
                file.fsync()
        return self._data

    def keep_room(self, nbytes: int) -> None:
        """Hold space for a manifest of `nbytes`. Raises StoreFull when there is none."""
        path = self.first / RESERVE
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(fd).st_size < nbytes:
                    os.posix_fallocate(fd, 0, nbytes)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os_error(error, f"cannot reserve {nbytes} bytes for the manifest", path) from error

    def give_room(self) -> bool:
        """Free that space; False if there was none."""
        path = self.first / RESERVE
        held = path.exists()
        path.unlink(missing_ok=True)
        return held

    def release(self) -> None:
        """Close the files and give the locks back. Idempotent."""
        for file in self._data:
            file.close()
        locks, self._locks = self._locks, []
        for lock in locks:
            lock.release()

    def remove(self) -> None:
        """Delete everything of the store, then release(). Directories above it stay, unless this object made them."""
        # The manifest first, durably: without it no half-deleted store can be opened.
        if (self.first / MANIFEST).exists():
            (self.first / MANIFEST).unlink()
            sync(self.first)
        for directory in self._directories:
            self._clear(directory)
            (directory / LOCK).unlink(missing_ok=True)
        self.release()
        for directory in [*self._directories, *reversed(self._made)]:
            with contextlib.suppress(OSError):  # not empty, or gone already
                directory.rmdir()

    def _data_path(self, index: int) -> Path:
        # Numbered, so that paths given in another order are noticed.
        return self._directories[index] / f"data-{index}.bin"

    def _make(self, directory: Path) -> None:
        missing = [directory]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for item in reversed(missing):
            with contextlib.suppress(FileExistsError):
                item.mkdir()
                self._made.append(item)

    @staticmethod
    def _refuse_committed(directory: Path) -> None:
        homes = {directory}
        with contextlib.suppress(FileNotFoundError):
            homes.add(directory / (directory / HOME).read_text(encoding="utf-8"))
        for home in homes:
            if (home / MANIFEST).exists():
                raise StoreError(
                    "the directory belongs to a committed store",
                    path=home / MANIFEST,
                    advice="Open that store, destroy it, or choose another name.",
                )

    @staticmethod
    def _clear(directory: Path) -> None:
        for file in (*directory.glob("data-*.bin"), directory / TEMPORARY, directory / HOME, directory / RESERVE):
            file.unlink(missing_ok=True)
