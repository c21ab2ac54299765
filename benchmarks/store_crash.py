"""Kill processes at random store operations, and replay recorded operations as power cuts may leave them.

    python -m benchmarks.store_crash --operations 10000 --json --out benchmarks/results/store_crash.json

After every kill, and in every replayed directory, the store must open at the last committed version or at the one whose
commit was under way, with every block as it was written. Exit code 1 at the first that does not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from offload.io import StoreError, StorePath

from benchmarks import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import crashing


def kills(folder: Path, operations: int, seed: int) -> dict[str, Any]:
    """Random operations with random kills on a store under `folder`."""
    began = time.monotonic()
    paths = [StorePath(folder / name, 1 << 28) for name in ("one", "two")]
    return asdict(crashing.kill_at_random(paths, operations, seed)) | {"seconds": round(time.monotonic() - began, 1)}


def replays(folder: Path, recordings: int, samples: int, seed: int) -> dict[str, Any]:
    """Every prefix and `samples` reorderings at each point of several recordings."""
    began, states, calls = time.monotonic(), 0, 0
    for number in range(recordings):
        recorder = crashing.record_store((folder / str(number)).resolve(), commits=4, seed=seed + number)
        calls += len(recorder.operations)
        for end, tree in crashing.crash_states(recorder, samples, random.Random(f"{seed}/{number}")):
            crashing.check_crash(recorder, end, tree)
            states += 1
    seconds = round(time.monotonic() - began, 1)
    return {"recordings": recordings, "calls": calls, "states": states, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--recordings", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8, help="reorderings at each recorded call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path, help="where the killed store goes, for a drive of your choice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the killed processes are forks of this one
    result: dict[str, Any] = {"failure": None, "seed": arguments.seed}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        with tempfile.TemporaryDirectory(dir=arguments.path) as folder:
            result["kills"] = kills(Path(folder), arguments.operations, arguments.seed)
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            result["replays"] = replays(Path(folder), arguments.recordings, arguments.samples, arguments.seed)
    except (AssertionError, StoreError) as error:
        result["failure"] = repr(error)
    result["machine"] = machine.describe()
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        for name, value in result.items():
            print(f"{name:10} {value}")
    return 1 if result["failure"] else 0


if __name__ == "__main__":
    sys.exit(main())
