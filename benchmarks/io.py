"""How fast the I/O backends and the store move unit-sized requests, beside fio and DeepSpeed's aio_handle.

    python -m benchmarks.io PATH [--json]

All contenders move the same bytes of files of the same size on the same file system with direct I/O. fio and DeepSpeed
run in the best configurations that a sweep finds. Disks drift, so every round runs each contender once, in a new order,
and what is compared is the ratio within a round; a bar is met when the upper end of the 95 % interval of the mean
ratio (bootstrap over rounds) reaches it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
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
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import machine

MIB = 1 << 20
DIRECTIONS = ("read", "write", "mixed")
WINDOW = 2  # unit requests under way at a time, as the engine prefetches
BARS = {"fio": 0.95, "deepspeed": 1.0}
FINALISTS = 2  # configurations of each peer that take part in the rounds
CHECKSUM_BAR = 0.05  # CPU seconds per GB
FIO_SWEEP = tuple(itertools.product(("libaio", "io_uring"), (1, 4, 8), (1, 4, 16)))  # engine, MiB per block, depth
DEEPSPEED_SWEEP = tuple(itertools.product((1, 8), (8, 32), (1, 4)))  # MiB per block, queue depth, threads

Run = Callable[[str], tuple[float, float]]
"""Moves the sample in a direction; seconds and CPU seconds it took."""


@dataclass
class Series:
    """The rounds of one contender in one direction."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def summary(self, nbytes: int) -> dict[str, Any]:
        rates = sorted(nbytes / seconds / 1e9 for seconds in self.seconds)
        return {
            "gb_per_second": statistics.median(rates),
            "gb_per_second_quartiles": [rates[len(rates) // 4], rates[(3 * len(rates)) // 4]],
            "cpu_seconds_per_gb": sum(self.cpu_seconds) / (len(rates) * nbytes / 1e9),
            "seconds": self.seconds,
        }


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
            lambda kind=kind, at=at: submit[kind](file, at, buffer[at : at + size])  # type: ignore[misc]
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
            lambda kind=kind, at=at: submit[kind](  # type: ignore[misc]
                str(at // unit), at % unit, buffer[at : at + size]
            )
            for kind, at in zip(kinds(direction, len(buffer) // size), range(0, len(buffer), size), strict=True)
        ]
        return timed(lambda: windowed(starts))

    return run


def raw(file: DirectFile, buffer: Tensor, block: int) -> Run:
    """One thread, one preadv or pwritev after the other: the yardstick where there is no fio."""
    import os

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


def ratios(ours: Sequence[float], theirs: Sequence[float], bar: float) -> dict[str, Any]:
    """How many times as fast as theirs, from the seconds of paired rounds: geometric mean and 95 % interval."""
    logs = np.log(np.array(theirs) / np.array(ours))
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(axis=1)
    low, high = np.exp(np.percentile(draws, [2.5, 97.5]))
    return {"ratio": float(np.exp(logs.mean())), "low": float(low), "high": float(high), "bar": bar,
            "met": bool(high >= bar)}  # fmt: skip


def fastest(candidates: dict[str, Run], direction: str, count: int) -> tuple[list[str], dict[str, float]]:
    """The `count` fastest configurations by the least time of two interleaved runs each, and all these times."""
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(2):
        for name, run in candidates.items():
            times[name] = min(times[name], run(direction)[0])
    return sorted(times, key=lambda name: times[name])[:count], times


def checksum_cost(buffer: Tensor) -> dict[str, Any]:
    """CPU seconds per GB: of bytes that lie in RAM, of bytes in the cache, and of any one pass over the RAM (a sum)."""
    view, hot, words = buffer.numpy().data, buffer.numpy().data[:MIB], buffer.numpy().view(np.uint64)

    def cold() -> None:
        for at in range(0, len(view), BLOCK):
            xxhash.xxh3_64_intdigest(view[at : at + BLOCK])

    def again() -> None:
        for _ in range(0, len(view), len(hot)):
            xxhash.xxh3_64_intdigest(hot)

    cost, cached, floor = (
        min(timed(work)[1] for _ in range(5)) * 1e9 / len(view) for work in (cold, again, lambda: words.sum() and None)
    )
    return {
        "algorithm": "xxh3_64",
        "cpu_seconds_per_gb": cost,
        "in_cache_cpu_seconds_per_gb": cached,
        "sum_cpu_seconds_per_gb": floor,
        "bar": CHECKSUM_BAR,
        "met": cost <= CHECKSUM_BAR,
    }


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


def measure(
    path: Path, nbytes: int, units: Sequence[int], pairs: int, directions: Sequence[str], peers: bool
) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(dir=path, prefix=".offload-benchmark-") as folder,
        contenders(Path(folder), nbytes, units, peers) as (ours, fios, deepspeeds, missing, buffer, direct),
    ):
        found: dict[str, Any] = {
            "machine": machine.describe(),
            "direct": direct,
            "sample_bytes": nbytes,
            "pairs": pairs,
            "requests_under_way": WINDOW,
            "missing": missing,
            "checksum": checksum_cost(buffer),
            "directions": {},
        }
        for direction in directions:
            found["directions"][direction] = compare(direction, nbytes, ours, fios, deepspeeds, pairs)
    return found


def compare(
    direction: str, nbytes: int, ours: dict[str, Run], fios: dict[str, Run], deepspeeds: dict[str, Run], pairs: int
) -> dict[str, Any]:
    """One direction: sweep the peers, then the rounds. Of each peer the best of the sweep take part in all rounds, and
    ours are compared with the one that was fastest there: a single sweep of a drifting disk picks a lucky one."""
    runs, sweeps = dict(ours), {}
    for peer, configurations in (("fio", fios), ("deepspeed", deepspeeds)):
        if configurations:
            chosen, times = fastest(configurations, direction, FINALISTS)
            sweeps[peer] = {"finalists": chosen, "gb_per_second": {k: nbytes / v / 1e9 for k, v in times.items()}}
            runs |= {f"{peer} {name}": configurations[name] for name in chosen}
    series = {name: Series() for name in runs}
    order, shuffle = list(runs), random.Random(0)
    for number in range(pairs):
        shuffle.shuffle(order)
        for name in order:
            seconds, cpu = runs[name](direction)
            series[name].seconds.append(seconds)
            series[name].cpu_seconds.append(cpu)
        print(f"\r{direction}: round {number + 1}/{pairs}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = {name: item.summary(nbytes) for name, item in series.items()}
    for peer, sweep in sweeps.items():
        names = [f"{peer} {name}" for name in sweep["finalists"]]
        rival = sweep["best"] = min(names, key=lambda name: float(np.log(series[name].seconds).mean()))
        for name in ours:
            results[name][f"to_{peer}"] = ratios(series[name].seconds, series[rival].seconds, BARS[peer])
    return {"sweeps": sweeps, "results": results}


def show(found: dict[str, Any]) -> None:
    console = Console()
    about = found["machine"]
    console.print(
        f"{about['processor']}, {about['cores']} cores, {about['system']}, {about['date']}; "
        f"{found['sample_bytes'] // MIB} MiB per sample, {found['pairs']} rounds, O_DIRECT "
        f"{'yes' if found['direct'] else 'no'}"
    )
    for direction, part in found["directions"].items():
        table = Table(title=direction, title_justify="left")
        for title in ("contender", "GB/s (quartiles)", "CPU s/GB", "to fio [95 %] >= 0.95", "to DeepSpeed [95 %] >= 1"):
            table.add_column(title)
        for name, item in part["results"].items():
            low, high = item["gb_per_second_quartiles"]
            cells = []
            for peer in BARS:
                ratio = item.get(f"to_{peer}")
                verdict = "met" if ratio and ratio["met"] else "MISSED"
                cells.append(
                    f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] {verdict}" if ratio else ""
                )
            rival = any(sweep["best"] == name for sweep in part["sweeps"].values())
            label = f"{name} (the best of its peer)" if rival else name
            table.add_row(
                label,
                f"{item['gb_per_second']:.2f} ({low:.2f} to {high:.2f})",
                f"{item['cpu_seconds_per_gb']:.3f}",
                *cells,
            )
        console.print(table)
    checksum = found["checksum"]
    console.print(
        f"checksum {checksum['algorithm']}: {checksum['cpu_seconds_per_gb']:.3f} CPU s/GB, at most {checksum['bar']}: "
        f"{'met' if checksum['met'] else 'MISSED'} (of cached bytes {checksum['in_cache_cpu_seconds_per_gb']:.3f}; "
        f"summing words from RAM takes {checksum['sum_cpu_seconds_per_gb']:.3f})"
    )
    for name, reason in found["missing"].items():
        console.print(f"without {name}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.io", description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a directory on the file system to measure")
    parser.add_argument("--json", action="store_true", help="all figures as JSON on standard output")
    parser.add_argument("--pairs", type=int, default=20, help="rounds per direction (default 20)")
    parser.add_argument("--size", type=int, default=512, help="MiB per sample (default 512)")
    parser.add_argument("--units", default="32,512", help="request sizes in MiB, each a divisor of --size")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--no-peers", action="store_true", help="leave fio and DeepSpeed out")
    options = parser.parse_args()
    units = [int(unit) * MIB for unit in options.units.split(",")]
    directions = options.directions.split(",")
    if any(options.size * MIB % unit or unit % BLOCK for unit in units) or not set(directions) <= set(DIRECTIONS):
        parser.error("--units must be divisors of --size and multiples of 4, --directions some of read,write,mixed")
    if not options.path.is_dir():
        parser.error(f"{options.path} is not a directory")
    found = measure(options.path, options.size * MIB, units, options.pairs, directions, not options.no_peers)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
