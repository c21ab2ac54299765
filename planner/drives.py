"""How fast the drives are that a store lies on: a file is written and read back, with O_DIRECT where that works."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FILE_BYTES = 256 << 20
_BLOCK = 8 << 20
_DRIVE_SECONDS = 0.6  # per direction, after which no new block is started ...
_PASSES = 4  # ... nor when the file was passed so many times: writes wear the drive
_QUEUE = 4  # blocks in flight
# Read, write, both together: of a drive that cannot be measured.
SLOW_DRIVE = (2.0e9, 1.0e9, 1.0)


def file_systems(paths: Sequence[str | Path]) -> dict[int, Path]:
    """One existing directory per file system under the paths."""
    found: dict[int, Path] = {}
    for path in paths:
        directory = Path(path).expanduser().absolute()
        while not directory.is_dir():
            directory = directory.parent
        found.setdefault(os.stat(directory).st_dev, directory)
    return found


def bandwidths(paths: Sequence[str | Path]) -> list[float] | None:
    """For each path, the bytes per second at which its drive reads and writes equal amounts in turn, measured now.

    None when they need not be told apart: paths on one file system, a drive that could not be measured, or rates within
    a quarter of each other, which on a busy drive is chance.
    """
    devices = [next(iter(file_systems([path]).items())) for path in paths]
    drives = dict(devices)
    if len(drives) < 2:
        return None
    rates = {}
    for device, directory in drives.items():
        read, write, _, how = drive_rates(directory)
        if how.startswith("assumed"):
            return None
        # paths that share a drive share its rate
        rates[device] = 2 / (1 / read + 1 / write) / sum(other == device for other, _ in devices)
    found = [rates[device] for device, _ in devices]
    return None if min(found) > 0.75 * max(found) else found


def drive_rates(directory: Path) -> tuple[float, float, float, str]:
    """(read, write) bytes per second of the file system at `directory` alone, both together, and how it was found."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".offload-probe-", dir=directory)
    except OSError as error:
        return *SLOW_DRIVE, f"assumed: {directory} cannot be written ({error.strerror})"
    os.close(descriptor)
    try:
        direct = getattr(os, "O_DIRECT", 0)
        try:
            file = os.open(name, os.O_RDWR | direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            direct, file = 0, os.open(name, os.O_RDWR)
        try:
            blocks, write = _transfer(file, range(_FILE_BYTES // _BLOCK), _write)
            os.fsync(file)
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            _, read = _transfer(file, range(blocks), _read)
            duplex = _together(file, blocks, read, write)
        finally:
            os.close(file)
    except OSError as error:
        return *SLOW_DRIVE, f"assumed: measuring at {directory} failed ({error.strerror})"
    finally:
        os.unlink(name)
    how = "measured with O_DIRECT" if direct else "measured through the page cache: no O_DIRECT here"
    return read, write, duplex, how


def _write(file: int, buffer: mmap.mmap, offset: int) -> int:
    return os.pwrite(file, buffer, offset)


def _read(file: int, buffer: mmap.mmap, offset: int) -> int:
    return os.preadv(file, [buffer], offset)


def _together(file: int, blocks: int, read: float, write: float) -> float:
    """What reads of one half of the file and writes of the other reach at once, in units of either alone."""
    half = blocks // 2
    if not half:
        return 1.0
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_transfer, file, range(half), _read), pool.submit(_transfer, file, range(half, blocks), _write),
        ]  # fmt: skip
        (_, reading), (_, writing) = [job.result() for job in jobs]
    return min(2.0, max(1.0, reading / read + writing / write))


def _transfer(file: int, blocks: range, move: Callable[[int, mmap.mmap, int], int]) -> tuple[int, float]:
    """Move the blocks over and over, `_QUEUE` at a time, and sync; returns how many of them were moved, and bytes per
    second. A tenth of a second would not do: drives, and virtual ones above all, begin slowly."""
    begin, turn = time.perf_counter(), itertools.count()

    def work(_: int) -> int:
        with _buffer() as buffer:
            buffer.write(os.urandom(4096) * (_BLOCK // 4096))  # a drive that compresses must not look fast
            for moved in itertools.count():
                if time.perf_counter() - begin > _DRIVE_SECONDS or (i := next(turn)) >= _PASSES * len(blocks):
                    return moved
                if move(file, buffer, blocks[i % len(blocks)] * _BLOCK) != _BLOCK:
                    raise OSError(errno.EIO, "short transfer")
        raise AssertionError("counting ends nowhere")

    with ThreadPoolExecutor(_QUEUE) as pool:
        moved = sum(pool.map(work, range(_QUEUE)))
    os.fsync(file)
    return min(moved, len(blocks)), moved * _BLOCK / (time.perf_counter() - begin)


def _buffer() -> mmap.mmap:
    """Memory as the engine transfers from and to: in huge pages, with which a virtual drive was seen to read 3.7 GB/s
    instead of 1.2."""
    buffer = mmap.mmap(-1, _BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
