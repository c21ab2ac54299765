"""This engine beside plain PyTorch and DeepSpeed: one model, data, seed and dtype, each system in its own process.

    python -m benchmarks.step [--size 271m] [--rounds 3] [--json [OUT]]

(a) plain PyTorch in memory, (a-ckpt) the same with gradient checkpointing, (b) DeepSpeed ZeRO-3 in RAM, (c) DeepSpeed
ZeRO-Infinity on the SSD, (d) this engine in RAM, (e) this engine with everything on the SSD and the smallest RAM
budget that it accepts, (e-clip) the same with the gradient norm clipped to 1.0. Rounds are interleaved: every round
runs each system once, in an order that turns by one. Loading is not timed. Peaks are proportional set sizes (PSS) of
the process tree while it takes its steps. Bytes are the kernel's count for the process. DeepSpeed needs a C++
compiler, and libaio's headers for (c); where it cannot be used the reason is printed and the others run.
Exit code 1 if a bar is missed or this engine's losses differ from plain PyTorch's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.step import compare, watch
from benchmarks.step.setting import ARCHITECTURES, Setting
from offload import footprint
from offload.environment import DEFAULTS

ROOT = Path(__file__).resolve().parent.parent.parent
DEEPSPEED, OURS = ("b", "c"), ("d", "e", "e-clip")
BUILD_LIMIT, MODEL_LIMIT, BUDGET_LIMIT = 900.0, 600.0, 600.0  # seconds


class Comparison:
    """All rounds of one setting; what is finished is kept under `work`."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting = setting
        self.options = options
        self.work: Path = options.work
        self.model = self.work / "models" / f"llama-{setting.size}-seed{setting.seed}"
        self.kept = self.work / "rounds" / setting.key
        self.code = _fingerprint_of_code()
        self.deepspeed: dict[str, Any] = json.loads(options.deepspeed.read_text()) if options.deepspeed else {}
        self.failures: dict[str, str] = {}
        self.budgets: dict[str, Any] = {}
        self.rounds: compare.Rounds = {}

    def run(self) -> dict[str, Any]:
        """Run every round and return the report."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.options.resume_rounds:
            shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir(parents=True, exist_ok=True)
        systems = self._usable()
        if not self.model.exists():
            say(f"making {self.model.name}")
            self.model.parent.mkdir(parents=True, exist_ok=True)
            self._job("model", "a", "model", MODEL_LIMIT)
        base = footprint.measure("llama")
        for number in range(self.options.rounds):
            turn = number % len(systems) if systems else 0
            for name in systems[turn:] + systems[:turn]:
                result = self._finished(number, name) or self._measure(number, name)
                if result is not None:
                    self.rounds.setdefault(number, {})[name] = result
        return self._report(base)

    def _usable(self) -> list[str]:
        """The systems to run, DeepSpeed only if its native parts can be had."""
        systems = list(self.options.systems)
        if any(name in DEEPSPEED for name in systems):
            say("building DeepSpeed's native parts, if they are not there yet")
            try:
                version("deepspeed")
                self._job("build deepspeed", "c", "build", BUILD_LIMIT)
            except (PackageNotFoundError, watch.Failed) as error:
                for name in DEEPSPEED:
                    self.failures[name] = f"DeepSpeed cannot be used here: {error}"
                    say(f"({name}) {self.failures[name]}")
                systems = [name for name in systems if name not in DEEPSPEED]
        return systems

    def _measure(self, number: int, name: str) -> dict[str, Any] | None:
        """One process of one system; None if it failed, and then it is not tried again."""
        if name in self.failures:
            return None
        began = datetime.now(UTC).isoformat(timespec="seconds")
        where = f"round{number + 1}-{name}"
        say(f"round {number + 1}/{self.options.rounds}  ({name}) {compare.NAMES[name]}")
        try:
            if name in OURS and name not in self.budgets:
                self.budgets[name] = self._budget(name)
            events, peaks = self._job("measure", name, where, self.options.timeout)
        except watch.Failed as error:
            self.failures[name] = str(error)
            say(f"({name}) did not run: {error}")
            return None
        finally:
            for large in ("store", "nvme"):
                shutil.rmtree(self.work / "runs" / where / large, ignore_errors=True)
        steps = [event for event in events if event["event"] == "step"]
        timed = steps[self.setting.warm :]
        last = next(event for event in events if event["event"] == "finished")
        result: dict[str, Any] = {
            "began": began,
            "code": self.code if name in OURS else None,
            "deepspeed": self.deepspeed if name in DEEPSPEED else None,
            "losses": [event["loss"] for event in steps],
            "seconds": [event["seconds"] for event in timed],
            "warm_seconds": [event["seconds"] for event in steps[: self.setting.warm]],
            "cpu_seconds": [event["cpu_seconds"] for event in timed],
            "read": [event["read"] for event in timed],
            "written": [event["written"] for event in timed],
            "finish_seconds": last["seconds"],
            "peak_pss_bytes": peaks,
            "peak_rss_bytes": last["peak_rss"],
        }
        for event in events:
            if event["event"] == "found":
                result["found"] = {k: v for k, v in event.items() if k != "event"}
            elif event["event"] == "threads":
                result["threads"] = event["per_step"]
        (self.kept / f"{where}.json").write_text(json.dumps(result, indent=1))
        if not self.options.keep:
            shutil.rmtree(self.work / "runs" / where)
        return result

    def _finished(self, number: int, name: str) -> dict[str, Any] | None:
        """The result of an earlier run of this command, if it was of the same code and settings."""
        path = self.kept / f"round{number + 1}-{name}.json"
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        same = (self.code if name in OURS else None, self.deepspeed if name in DEEPSPEED else None)
        if (result["code"], result["deepspeed"]) != same:
            return None
        say(f"round {number + 1}/{self.options.rounds}  ({name}) was measured at {result['began']}")
        return result

    def _budget(self, name: str) -> int | str:
        """`memory.cpu` of one of this engine's systems."""
        if name == "d":
            return self.options.ram_budget
        if self.options.ssd_budget:
            return self.options.ssd_budget
        events, _ = self._job("budget", name, f"budget-{name}", BUDGET_LIMIT)
        found: int = next(event["bytes"] for event in events if event["event"] == "budget")
        say(f"({name}) the smallest RAM budget is {found / 2**20:.0f} MiB")
        return found

    def _job(self, task: str, system: str, where: str, limit: float) -> tuple[list[dict[str, Any]], dict[str, int]]:
        job = {
            "task": task,
            "system": system,
            "setting": asdict(self.setting),
            "model": str(self.model),
            "directory": str(self.work / "runs" / where),
            "cpu": self.budgets.get(system, "auto"),
            "deepspeed": self.deepspeed,
        }
        environment = {"TOKENIZERS_PARALLELISM": "false"}
        if system in OURS:
            environment |= DEFAULTS  # as its command line sets
        result = watch.run(job, environment, limit, lambda line: say(f"    {line}"))
        if task != "measure":
            shutil.rmtree(job["directory"])
        return result

    def _report(self, base: int) -> dict[str, Any]:
        parameters = _parameters(self.model)
        systems = {}
        for name, results in compare.by_system(self.rounds, lambda name: name not in self.failures).items():
            systems[name] = compare.summarize(results, parameters, base)
            if "found" in results[0]:
                last = results[-1]["found"]
                systems[name] |= {"budget_bytes": last["budget_bytes"], "recomputes": last["recomputed"]}
                systems[name] |= {"placements": last["placements"], "planned_peak_bytes": last["planned_peak_bytes"]}
        return {
            "machine": machine.describe(),
            "deepspeed": _version("deepspeed"),
            "setting": asdict(self.setting),
            "parameters": parameters,
            "footprint_bytes": base,
            "systems": systems,
            "losses": compare.losses(systems),
            "bars": compare.bars(self.setting, self.rounds, systems),
            "failures": self.failures,
            "rounds": {str(number + 1): results for number, results in sorted(self.rounds.items())},
        }


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _fingerprint_of_code() -> str:
    """A hash of this project's code: results of another version are not mixed in."""
    digest = hashlib.sha256()
    for folder in ("offload", "io", "planner"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _parameters(model: Path) -> int:
    """Elements in a directory of safetensors, from the headers."""
    count = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                elements = 1
                for n in tensor["shape"]:
                    elements *= n
                count += elements
    return count


def _systems(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in compare.NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: accepted are {', '.join(compare.NAMES)}")
    return names


def _norm(text: str) -> float | None:
    return None if text == "null" else float(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=ARCHITECTURES, default="271m")
    parser.add_argument("--systems", type=_systems, default=list(compare.NAMES), help="comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each process")
    parser.add_argument("--warm", type=int, default=2, help="steps before them that are not timed")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per row")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows per micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--max-grad-norm", type=_norm, default=None, help="null (no clipping, the default) or a number")
    parser.add_argument("--ram-budget", default="auto", help="memory.cpu of (d)")
    parser.add_argument("--ssd-budget", default=None, help="memory.cpu of (e); default: the smallest that works")
    parser.add_argument("--deepspeed", type=Path, help="a JSON file merged over DeepSpeed's configuration")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds one process may take")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "offload-step",
                        help="where models, stores, logs and finished rounds go: a directory on the SSD")  # fmt: skip
    parser.add_argument("--resume-rounds", action="store_true", help="reuse finished rounds of the same code")
    parser.add_argument("--keep", action="store_true", help="keep logs, plans, metrics and traces, in WORK/runs")
    parser.add_argument("--json", nargs="?", const="-", metavar="OUT", help="print JSON, or write it to a file")
    options = parser.parse_args(arguments)
    options.work = options.work.absolute()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    setting = Setting(
        options.size, options.sequence, options.micro_batch, options.micro_batches, options.max_grad_norm,
        options.warm, options.steps,
    )  # fmt: skip
    report = Comparison(setting, options).run()
    if options.json == "-":
        print(json.dumps(report, indent=1))
    else:
        print(compare.table(report))
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if compare.all_met(report) and not report["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
