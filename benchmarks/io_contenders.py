"""Who moves the sample in `benchmarks.io`: our backends and store, fio or a preadv loop, DeepSpeed's aio_handle.

All move the same bytes of files of the same size on the same file system with direct I/O.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from offload.io import (
    BLOCK,
    Backend,
    DirectFile,
    Extent,
    HostBuffer,
    Ledger,
    Request,
    Store,
    StoreError,
    StorePath,
    allocate,
    libaio,
    make_backend,
    round_up,
    why_not,
)
from torch import Tensor

MIB = 1 << 20
WINDOW = 2  # unit requests under way at a time, as the engine prefetches
FIO_SWEEP = tuple(itertools.product(("libaio", "io_uring"), (1, 4, 8), (1, 4, 16)))  # engine, MiB per block, depth
DEEPSPEED_SWEEP = tuple(itertools.product((1, 8), (8, 32), (1, 4)))  # MiB per block, queue depth, threads

Run = Callable[[str], tuple[float, float]]
"""Moves the sample in a direction; seconds and CPU seconds it took."""


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds (this process with all its threads) of a call."""
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return seconds, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime


def windowed(starts: Sequence[Callable[[], Request]]) -> None:
    """Run requests in order, WINDOW of them under way."""
    under_way: deque[Request] = deque()
    for start in starts:
        if len(under_way) == WINDOW:
            under_way.popleft().wait()
        under_way.append(start())
    while under_way:
        under_way.popleft().wait()


def kinds(direction: str, count: int) -> list[str]:
    return [("read", "write")[index % 2] if direction == "mixed" else direction for index in range(count)]


def bare(backend: Backend, file: DirectFile, buffer: Tensor, unit: int) -> Run:
    """The backend alone, in requests of `unit` bytes."""

    def run(direction: str) -> tuple[float, float]:
        size = min(unit, len(buffer) // 2) if direction == "mixed" else unit
        submit = {"read": backend.read, "write": backend.write}
        starts = [
            lambda kind=kind, at=at: submit[kind](file, at, buffer[at : at + size])
            for kind, at in zip(kinds(direction, len(buffer) // size), range(0, len(buffer), size), strict=True)
        ]
        return timed(lambda: windowed(starts))

    return run


def stored(store: Store, buffer: Tensor, unit: int) -> Run:
    """The engine's path: extents of `unit` bytes in a store, with checksums."""

    def run(direction: str) -> tuple[float, float]:
        size = min(unit, len(buffer) // 2) if direction == "mixed" else unit
        submit = {"read": store.read, "write": store.write}
        starts = [
            lambda kind=kind, at=at: submit[kind](str(at // unit), at % unit, buffer[at : at + size])
            for kind, at in zip(kinds(direction, len(buffer) // size), range(0, len(buffer), size), strict=True)
        ]
        return timed(lambda: windowed(starts))

    return run


def raw(file: DirectFile, buffer: Tensor, block: int) -> Run:
    """One thread, one preadv or pwritev after the other: the yardstick where there is no fio."""
    view = buffer.numpy().data

    def work(direction: str) -> None:
        calls = {"read": os.preadv, "write": os.pwritev}
        for kind, at in zip(kinds(direction, len(view) // block), range(0, len(view), block), strict=True):
            if calls[kind](file.fd, [view[at : at + block]], at) != block:
                raise StoreError("short transfer", path=file.path, offset=at)

    return lambda direction: timed(lambda: work(direction))


def fio(path: Path, nbytes: int, engine: str, block: int, depth: int) -> Run:
    """fio's own figures of one job: run time, and CPU time as a share of it."""

    def run(direction: str) -> tuple[float, float]:
        command = [
            "fio", "--name=sample", f"--filename={path}", f"--size={nbytes}", f"--bs={block * MIB}", "--direct=1",
            f"--rw={'rw' if direction == 'mixed' else direction}", f"--ioengine={engine}", f"--iodepth={depth}",
            "--thread", "--allow_file_create=0", "--fallocate=none", "--output-format=json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
        moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
        if moved != nbytes or job["error"]:
            raise RuntimeError(f"fio moved {moved} of {nbytes} bytes, error {job['error']}")
        return seconds, seconds * (job["usr_cpu"] + job["sys_cpu"]) / 100

    return run


class DeepSpeed:
    """DeepSpeed's aio_handle, the sample as one request (mixed: a read and a write of half of it each)."""

    def __init__(self, path: Path, nbytes: int, filled: Tensor) -> None:
        self._module = libaio.load(compile=False)
        self._owner = self._module.aio_handle(MIB, 8, False, True, 1)
        self._path, self._half = str(path), nbytes // 2
        self._buffer = self._owner.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))
        self._buffer.copy_(filled)

    def configuration(self, block: int, depth: int, threads: int) -> Run:
        handle, other = (self._module.aio_handle(block * MIB, depth, False, True, threads) for _ in range(2))

        def work(direction: str) -> None:
            if direction == "read":
                handle.sync_pread(self._buffer, self._path, 0)
            elif direction == "write":
                handle.sync_pwrite(self._buffer, self._path, 0)
            else:
                handle.async_pread(self._buffer[: self._half], self._path, 0)
                other.async_pwrite(self._buffer[self._half :], self._path, self._half)
                handle.wait()
                other.wait()

        return lambda direction: timed(lambda: work(direction))

    def close(self) -> None:
        self._owner.free_cpu_locked_tensor(self._buffer)


@contextlib.contextmanager
def contenders(folder: Path, nbytes: int, units: Sequence[int], peers: bool) -> Iterator[tuple[Any, ...]]:
    """Ours by name, fio's and DeepSpeed's configurations by name, why something is missing, and the filled buffer."""
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        buffer: HostBuffer = stack.enter_context(allocate(nbytes, Ledger()))
        buffer.tensor.random_(0, 256)
        file = DirectFile(folder / "data", create=True)
        stack.callback(file.close)
        file.reserve(nbytes)
        ours: dict[str, Run] = {}
        for name in ("threads", "io_uring", *(["libaio"] if peers else [])):
            if name == "libaio" and not libaio.built():
                missing[name] = "DeepSpeed's async_io operator is not built"
            elif reason := why_not(name, folder):
                missing[name] = reason
            if name in missing:
                continue
            backend = make_backend(name)
            stack.callback(backend.close)
            # libaio is here for its CPU time: one size says it.
            for unit in units if name != "libaio" else units[:1]:
                ours[f"{name} {unit // MIB} MiB"] = bare(backend, file, buffer.tensor, unit)
        for unit in units:
            extents = [Extent(str(index), unit, 1, False) for index in range(nbytes // unit)]
            paths = [StorePath(folder, round_up(nbytes, 4 * BLOCK) + 4 * BLOCK)]
            store = Store.create(paths, f"store-{unit}", extents, backend="auto")
            stack.callback(store.destroy)
            ours[f"store {unit // MIB} MiB"] = stored(store, buffer.tensor, unit)
            ours[f"store {unit // MIB} MiB"]("write")
        fios: dict[str, Run] = {}
        if peers and shutil.which("fio"):
            fios = {f"{e} {b} MiB x {d}": fio(file.path, nbytes, e, b, d) for e, b, d in FIO_SWEEP}
        else:
            missing["fio"] = "not installed (apt install fio): a raw preadv loop stands in for it"
            fios = {f"raw {b} MiB": raw(file, buffer.tensor, b * MIB) for b in (1, 4, 8)}
        deepspeeds: dict[str, Run] = {}
        if peers and libaio.built():
            deepspeed = DeepSpeed(file.path, nbytes, buffer.tensor)
            stack.callback(deepspeed.close)
            deepspeeds = {
                f"{b} MiB x {d}, {t} threads": deepspeed.configuration(b, d, t) for b, d, t in DEEPSPEED_SWEEP
            }
        else:
            missing["deepspeed"] = "its async_io operator is not built"
        next(iter(ours.values()))("write")  # the first write of a new file is slower than all others
        yield ours, fios, deepspeeds, missing, buffer.tensor, file.direct
