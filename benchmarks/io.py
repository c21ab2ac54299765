"""How fast the I/O backends and the store move unit-sized requests, beside fio and DeepSpeed's aio_handle.

    python -m benchmarks.io PATH [--json]

All contenders move the same bytes of files of the same size on the same file system with direct I/O. fio and DeepSpeed
run in the best configurations that a sweep finds. Disks drift, so every round runs each contender once, in a new order,
and what is compared is the ratio within a round; a bar is met when the upper end of the 95 % interval of the mean
ratio (bootstrap over rounds) reaches it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from offload.io import BLOCK
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import machine
from benchmarks.io_contenders import MIB, WINDOW, Run, contenders, timed

DIRECTIONS = ("read", "write", "mixed")
BARS = {"fio": 0.95, "deepspeed": 1.0}
FINALISTS = 2  # configurations of each peer that take part in the rounds
CHECKSUM_BAR = 0.05  # CPU seconds per GB


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
    runs, sweeps = dict(ours), dict[str, dict[str, Any]]()
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
