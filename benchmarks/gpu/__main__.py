"""What only a GPU can show, one part at a time, each within ten minutes.

    python -m benchmarks.gpu [PART ...] [--out DIR] [--store DIR] [--cap 24GiB] [--json]

Parts: exact, overlap, memory, full, peers, zo, long; all of them by default. Nothing is fetched: models are made from
transformers configs with random weights, rows are the bytes of a text. Every case runs in a process of its own, whose
device memory is capped twice: the engine's own budget, and PyTorch's allocator (set_per_process_memory_fraction), so
that a large card stands in for a small one. Per case there are a log, the plan, the engine's trace.json and report, and
the profiler's trace where one was asked for; per part DIR/PART.json, written after every case. A case that has no time
left, does not fit or whose system is not installed is named with its reason. `--device cpu --small` tries the script
out with toy models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gpu.case import Case
from benchmarks.gpu.parts import PARTS, Sizes, follow
from benchmarks.step import watch
from benchmarks.step.__main__ import say
from offload import footprint
from offload.config import Config
from offload.environment import DEFAULTS
from offload.errors import OffloadError

TEXT = Path(__file__).resolve().parent.parent.parent / "examples" / "quickstart.txt"
SHORTEST = 5.0  # seconds left of a part, below which no further case is begun


def run_part(name: str, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of a part, as far as the time goes; the report is written after each."""
    cases, verdict = PARTS[name]
    begin = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"part": name, "machine": machine.describe(), "cases": found, "skipped": {}}
    chosen = (case for case in cases(sizes) if options.only in case.name or case.task in ("rates", "longest"))
    for number, planned in enumerate(chosen):
        left = options.minutes * 60 - (time.monotonic() - begin)
        case = follow(name, planned, found)
        if case is None or left < SHORTEST:
            report["skipped"][planned.name] = "an earlier case it needs is missing" if case is None else "no time left"
            continue
        say(f"{name}: {case.name} ({left:.0f} s left)")
        directory = options.out / name / f"{number:02}-{''.join(c if c.isalnum() else '-' for c in case.name)}"
        try:
            found[case.name] = measure(case, directory, left, options)
        except watch.Failed as error:
            report["skipped"][case.name] = str(error)
            say(f"{name}: {case.name}: {error}")
        if found:
            report["verdict"] = verdict(sizes, found)
        report["seconds"] = time.monotonic() - begin
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def measure(case: Case, directory: Path, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """One case in its own process: what it found, its steps, and its peak RAM."""
    large = Path(tempfile.mkdtemp(dir=options.store, prefix="offload-gpu-"))
    try:
        job = {"case": case.to_json(), "directory": str(large / "case")}
        environment = {**DEFAULTS, "TOKENIZERS_PARALLELISM": "false"}
        try:
            events, peaks = watch.run(job, environment, limit, lambda line: say(f"    {line}"), "benchmarks.gpu.worker")
        finally:
            _keep(large / "case", directory)
        result: dict[str, Any] = next(e["result"] for e in events if e["event"] == "found")
        steps = [e for e in events if e["event"] == "step"]
        timed = steps[case.warm :]
        return {
            "case": asdict(case),
            "cap": {k: v for k, v in events[0].items() if k != "event"},
            "losses": [e["loss"] for e in steps],
            "step_seconds": [e["seconds"] for e in timed],
            "warm_seconds": [e["seconds"] for e in steps[: case.warm]],
            "tokens": timed[-1]["tokens"],
            "peak_pss_bytes": peaks["steps"],
            "footprint_bytes": _footprint(case),
            **result,
        } if timed else {"case": asdict(case), "cap": events[0], **result}  # fmt: skip
    finally:
        shutil.rmtree(large, ignore_errors=True)


def _keep(work: Path, directory: Path) -> None:
    """Logs, plans, metrics, traces and the report, without the store; reports are made here, where it costs no case."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for path in [*work.glob("*.json*"), *work.glob("log.txt"), *work.glob("run/*.*")]:
        if path.is_file():
            shutil.copy(path, directory / path.name)
    if (directory / "metrics.jsonl").exists():
        from offload import report

        try:
            report.build(directory)
        except (OffloadError, OSError, KeyError, ValueError) as error:
            say(f"    no report of {directory.name}: {error}")


_footprints: dict[str, int] = {}


def _footprint(case: Case) -> int:
    kind = case.architecture()["model_type"]
    if kind not in _footprints:
        _footprints[kind] = footprint.measure(kind)
    return _footprints[kind]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where results go")
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()), help="a directory on the SSD")
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file whose bytes are the tokens")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cap", default="24GiB", help="device memory that any process may take")
    parser.add_argument("--ram", default="auto", help="memory.cpu of the engine")
    parser.add_argument("--disk-ram", default="32GiB", help="memory.cpu of the run whose state has to go to disk")
    parser.add_argument("--minutes", type=float, default=10.0, help="that a part may take")
    parser.add_argument("--small", action="store_true", help="toy models and few steps: the script itself is tried")
    parser.add_argument("--sparse", action="store_true",
                        help="do not reserve disk space for durable copies of what lives in RAM (24 bytes a parameter)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    for name in ("out", "store", "text"):
        setattr(options, name, getattr(options, name).absolute())
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.store.mkdir(parents=True, exist_ok=True)
    budgets = Config.load({"memory": {"gpu": options.cap, "cpu": options.disk_ram}}).memory
    base = Case(
        "", "toy" if options.small else "1b", 1024, options.device, int(budgets.gpu), str(options.text),
        cpu=options.ram, sparse=options.sparse,
    )  # fmt: skip
    sizes = Sizes(base, options.small, options.ram if options.small else int(budgets.cpu))
    if options.device == "cuda":
        say(f"device memory is capped to {options.cap} in every process, by budget and by the allocator")
    reports = {name: run_part(name, sizes, options) for name in options.parts}
    if options.json:
        print(json.dumps(reports, indent=1))
    else:
        for name, report in reports.items():
            print(f"{name}: {json.dumps(report.get('verdict'), indent=1)}")
            for case, why in report["skipped"].items():
                print(f"  {case}: {why}")
    return 0 if all(report["cases"] for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
