"""Kill a run with SIGKILL in the middle of a step, go on with --resume, and compare with a run that nobody killed.

Run it with `python examples/resume_after_kill.py [CONFIG] [STEPS]` from the directory that holds `examples/`. Both runs
are made in a temporary directory; the losses have to be equal, step by step, to the bit.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(config: str, run: Path, steps: int, *more: str) -> list[str]:
    """`offload train` on `config`, with its run and store under `run`."""
    sets = [f"output={run}", "memory.nvme=[{path: " + f"{run}-store" + ", size: 2GiB}]", f"train.steps={steps}"]
    options = [part for s in sets for part in ("--set", s)]
    return [sys.executable, "-m", "offload.cli", "train", config, "--yes", *options, *more]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a line that the kill tore is left out."""
    log = run / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def main(config: str, steps: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        whole, killed = Path(directory) / "whole", Path(directory) / "killed"
        subprocess.run(command(config, whole, steps), check=True, stdout=subprocess.DEVNULL)

        process = subprocess.Popen(command(config, killed, steps), stdout=subprocess.DEVNULL)
        while len(losses(killed)) < steps // 2 and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed after {len(losses(killed))} of {steps} steps")

        subprocess.run(command(config, killed, steps, "--resume"), check=True, stdout=subprocess.DEVNULL)
        first, second = losses(whole), losses(killed)
        for step, loss in first.items():
            print(f"step {step}  never killed {loss:.6f}  killed and resumed {second.get(step, math.nan):.6f}")
        if first != second:
            raise SystemExit("the losses differ")
        print("equal to the bit")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "examples/quickstart.yaml", int(sys.argv[2]) if len(sys.argv) > 2 else 6)
