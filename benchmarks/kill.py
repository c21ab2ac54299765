"""Kill real training processes at random moments and compare what comes out with unbroken runs, to the bit.

    python -m benchmarks.kill --kills 200 --json --out benchmarks/results/kill.json

Each run is killed a few times and then finishes; runs are started until there were enough kills. The moments are drawn
from the seed: requests of the store (reads, writes, the syncs of a commit) at which the process kills itself, and times
after the plan, after a step or within the export at which it is killed from outside. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import killing

KILLS_PER_RUN = 8


class Benchmark:
    """Runs of every scenario in turn, until `kills` were counted."""

    def __init__(self, directory: Path, kills: int, seed: int) -> None:
        self.directory = directory
        self.kills = kills
        self.seed = seed
        self.moments: Counter[str] = Counter()
        self.failures: list[str] = []
        self.runs = 0
        self._lock = threading.Lock()
        self._expected: dict[str, dict[str, Any]] = {}

    @property
    def counted(self) -> int:
        return sum(self.moments.values())

    def expect(self, scenario: killing.Scenario) -> None:
        """Let an unbroken run of the scenario say what has to come out."""
        run = killing.Run.make(scenario, self.directory / scenario.name)
        if run.finish() != 0:
            raise SystemExit(f"the unbroken run failed:\n{run.output()}")
        self._expected[scenario.name] = run.result()

    def work(self, worker: int, workers: int) -> None:
        """Kill runs until there were enough kills."""
        for number in itertools.count(worker, workers):
            with self._lock:
                left = self.kills - self.counted
            if left <= 0 or self.failures:
                return
            self._run(number, min(KILLS_PER_RUN, left))

    def _run(self, number: int, kills: int) -> None:
        scenario = killing.SCENARIOS[number % len(killing.SCENARIOS)]
        run = killing.Run.make(scenario, self.directory / str(number))
        moments = killing.random_moments(random.Random(f"{self.seed}/{number}"), scenario.steps)
        try:
            outcome = killing.torment(run, itertools.islice(moments, kills))
            wrong = killing.same(self._expected[scenario.name], run.result())
        except Exception:
            with self._lock:
                self.failures.append(f"run {number} ({scenario.name}): {traceback.format_exc()}")
            return  # its files stay, to be looked at
        with self._lock:
            self.runs += 1
            self.moments.update(name.partition(":")[0].split(" ")[0] for name, _ in outcome.kills)
            self.failures += [f"run {number} ({scenario.name}): {text}" for text in wrong]
            print(f"{self.counted} kills, {self.runs} runs, {len(self.failures)} failures", file=sys.stderr, flush=True)
        if not wrong:
            shutil.rmtree(self.directory / str(number))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--path", type=Path, help="where runs and stores go, for a drive of your choice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    begin = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="offload-kill-", dir=arguments.path))
    benchmark = Benchmark(directory, arguments.kills, arguments.seed)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(benchmark.expect, killing.SCENARIOS))
        list(pool.map(benchmark.work, range(arguments.jobs), [arguments.jobs] * arguments.jobs))
    if not benchmark.failures:
        shutil.rmtree(directory)
    result = {
        "kills": benchmark.counted, "at": dict(benchmark.moments.most_common()), "runs": benchmark.runs,
        "steps_per_run": {scenario.name: scenario.steps for scenario in killing.SCENARIOS},
        "failures": benchmark.failures, "identical": not benchmark.failures, "seed": arguments.seed,
        "seconds": round(time.monotonic() - begin, 1), "machine": machine.describe(),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        for name, value in result.items():
            print(f"{name:14} {value}")
    return 1 if benchmark.failures else 0


if __name__ == "__main__":
    sys.exit(main())
