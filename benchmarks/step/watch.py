"""A worker process seen from outside: started, its memory sampled, its progress shown, ended if it takes too much."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from offload import memory

INTERVAL = 0.05  # seconds between samples, at least
SHARE = 0.02  # of one core's time that sampling may take: the kernel walks the page tables for each
ROOM = 1 << 30  # bytes of RAM that stay free; a worker that takes more is ended before the kernel ends something else
QUIET = 300.0  # seconds without an event after which a worker that measures is taken to hang


class Failed(Exception):
    """The worker did not come to its end; the message says why."""


def run(
    job: dict[str, Any],
    environment: dict[str, str],
    limit: float,
    show: Callable[[str], None],
    worker: str = "benchmarks.step.worker",
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Run one job to its end. Returns its events, and the peak PSS of its process tree by phase ("load", "steps").

    Samples can miss a short peak. While it takes its steps, the kernel's own record of the resident peak is exact; less
    what the process shares with others (resident minus proportional, as sampled) it is the peak that is returned.

    Args:
        limit: seconds after which it is ended.
        show: called with a line for each step.
        worker: the module that does the job.
    Raises Failed.
    """
    directory = Path(job["directory"])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    job = {**job, "events": str(directory / "events.jsonl")}
    (directory / "job.json").write_text(json.dumps(job, indent=1))
    log = directory / "log.txt"
    command = [sys.executable, "-m", worker, str(directory / "job.json")]
    root = Path(__file__).resolve().parent.parent.parent
    # The tools beside this Python (ninja, which DeepSpeed compiles with) are to be found.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("w") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=root, start_new_session=True,
            env={**os.environ, **environment, "PATH": path},
        )  # fmt: skip
        try:
            peaks, why = _watch(child, Path(job["events"]), limit, show)
        finally:
            _end(child)
    events = _events(Path(job["events"]))
    if why is None and (child.returncode or not events or events[-1]["event"] != "done"):
        why = f"ended with code {child.returncode}: {_last_error(log)}"
    if why is not None:
        raise Failed(f"{why} (log: {log})")
    for event in events:
        if event["event"] == "finished":
            peaks["steps"] = max(peaks["steps"], event["peak_rss"] - peaks["shared"])
    return events, peaks


def _watch(
    child: subprocess.Popen[bytes], events: Path, limit: float, show: Callable[[str], None]
) -> tuple[dict[str, int], str | None]:
    """Sample until the child ends. Returns the peaks, what it shares, and why it has to be ended (or None)."""
    begin = heard = time.monotonic()
    peaks = {"load": 0, "steps": 0, "shared": 0}
    phase, seen, shared = "load", 0, 0
    while child.poll() is None:
        sampled = time.perf_counter()
        total, resident, own = _sample(child.pid)
        if phase != "end" and own:
            peaks[phase] = max(peaks[phase], total)
            shared = resident - own if phase == "load" else min(shared, resident - own)
            peaks["shared"] = shared
        took = time.perf_counter() - sampled
        for event in _events(events)[seen:]:
            seen, heard = seen + 1, time.monotonic()
            if event["event"] == "ready":
                phase = "steps"
            elif event["event"] == "finished":
                phase = "end"
            elif event["event"] == "step":
                show(f"step {event['step']}  {event['seconds']:7.3f} s  loss {event['loss']:.5f}  "
                     f"peak {peaks['steps'] / 2**30:.2f} GiB")  # fmt: skip
        now = time.monotonic()
        if now - begin > limit:
            return peaks, f"took over {limit:.0f} s"
        if phase == "steps" and now - heard > QUIET:
            return peaks, f"no step ended for {QUIET:.0f} s"
        if psutil.virtual_memory().available < ROOM:
            return peaks, f"does not fit: less than {ROOM / 2**30:.0f} GiB of RAM was left, at {peaks} bytes PSS"
        time.sleep(max(INTERVAL, took / SHARE))
    return peaks, None


def _sample(pid: int) -> tuple[int, int, int]:
    """Bytes: the tree's PSS; of the process itself the resident and the proportional set size."""
    own = {"Rss": 0, "Pss": 0}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in own:
                own[name] = int(rest.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    children = sum(memory.resident_and_pss(child)[1] for child in memory.process_tree(pid)[1:])
    return own["Pss"] + children, own["Rss"], own["Pss"]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it has started; it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _events(path: Path) -> list[dict[str, Any]]:
    """The whole lines written so far."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _last_error(log: Path) -> str:
    """The line of a Python traceback that names the error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if line.partition(":")[0].split(".")[-1].endswith(("Error", "Exception", "Fit"))]
    return (named or lines or ["it wrote nothing"])[-1][:500]
