"""One system in a process of its own: loads, takes steps, and writes what it measured as JSON lines to a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.step.setting import Setting, make_model

# RAM systems of the engine commit to the SSD now and then; the others never do. Not within a benchmark.
NEVER = 1_000_000
CLIP = 1.0  # of the system "e-clip"


def main(job_file: str) -> None:
    """Do one job: {task, system, setting, model, directory, events, cpu, deepspeed}."""
    job = json.loads(Path(job_file).read_text())
    setting = Setting(**job["setting"])
    with open(job["events"], "a", buffering=1, encoding="utf-8") as events:

        def tell(event: str, **values: Any) -> None:
            events.write(json.dumps({"event": event, **values}) + "\n")

        if job["task"] == "model":
            make_model(setting, Path(job["model"]))
        elif job["task"] == "build deepspeed":
            from benchmarks.step import zero

            zero.build()
        elif job["task"] == "budget":
            from benchmarks.step import ours

            tell("budget", bytes=ours.smallest_budget(_config(job, setting)))
        else:
            measure(job, setting, tell)
        tell("done")


def measure(job: dict[str, Any], setting: Setting, tell: Callable[..., None]) -> None:
    """Load the system and take its steps; each is timed from the end of the one before."""
    system, directory = job["system"], Path(job["directory"])
    with ExitStack() as stack:
        finish: Callable[[], None] = _nothing
        step: Callable[[Any], float]
        if system in ("a", "a-ckpt"):
            from benchmarks.step import plain

            step = stack.enter_context(plain.opened(setting, job["model"], system == "a-ckpt"))
        elif system in ("b", "c"):
            from benchmarks.step import zero

            nvme = directory / "nvme" if system == "c" else None
            step = stack.enter_context(zero.opened(setting, job["model"], nvme, job["deepspeed"]))
        else:
            from benchmarks.step import ours

            engine, step = stack.enter_context(ours.opened(_config(job, setting)))
            finish = engine.flush
        batches = [setting.batch(i) for i in range(setting.warm + setting.steps)]
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak counts from here
        tell("ready")
        before = _counters()
        for i, batch in enumerate(batches):
            if i == setting.warm:
                threads = _threads()
            loss = step(batch)
            now = _counters()
            tell("step", step=i, loss=loss, **{name: now[name] - before[name] for name in now})
            before = now
        tell("threads", per_step=_per_step(threads, _threads(), setting.steps))
        finish()
        tell("finished", peak_rss=_peak_rss(), **{name: n - before[name] for name, n in _counters().items()})
    if system not in ("a", "a-ckpt", "b", "c"):
        from benchmarks.step import ours

        tell("found", **ours.found(directory, setting))


def _config(job: dict[str, Any], setting: Setting) -> dict[str, Any]:
    from benchmarks.step import ours

    clip = CLIP if job["system"] == "e-clip" else setting.max_grad_norm
    commit = NEVER if job["system"] == "d" else "auto"
    return ours.config(setting, job["model"], Path(job["directory"]), job["cpu"], clip, commit)


def _counters() -> dict[str, float]:
    """Wall and processor seconds, and bytes this process and its threads had read from and written to drives."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "seconds": time.perf_counter(),
        "cpu_seconds": time.process_time(),
        "read": int(io["read_bytes"]),
        "written": int(io["write_bytes"]),
    }


def _threads() -> dict[int, tuple[str, float, float, int]]:
    """Per thread its kind, user and system seconds so far, and page faults that needed no reading."""
    names = {t.native_id: t.name.rsplit("_", 1)[0] for t in threading.enumerate()}
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            user, system = (int(fields[i]) / os.sysconf("SC_CLK_TCK") for i in (11, 12))
            found[int(task.name)] = (names.get(int(task.name), "native"), user, system, int(fields[7]))
    return found


def _per_step(before: Any, after: Any, steps: int) -> dict[str, dict[str, float]]:
    """What the threads of each kind used per step: {kind: {user_seconds, system_seconds, page_faults}}."""
    kinds: dict[str, dict[str, float]] = {}
    for task, (kind, *now) in after.items():
        entry = kinds.setdefault(kind, {"user_seconds": 0.0, "system_seconds": 0.0, "page_faults": 0.0})
        then = before[task][1:] if task in before else (0.0, 0.0, 0)
        for name, a, b in zip(entry, now, then, strict=True):
            entry[name] += (a - b) / steps
    return kinds


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _nothing() -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1])
