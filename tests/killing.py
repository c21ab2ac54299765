"""Real `offload train` processes that are killed and go on: tiny runs, moments to kill at, and what has to survive.

Used by test_kill.py, and by `python -m benchmarks.kill` for many more kills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from offload.io import Ledger, Store, StorePath, allocate
from offload.planner import Plan
from offload.planner.memory import bare_ram
from warm import Warm, WarmProcess

import offload
from offload.prepare import prepare
from offload.rundir import read_info, read_jsonl, stored_paths

Process = subprocess.Popen[bytes] | WarmProcess

SAME_FIELDS = ("step", "loss", "grad_norm", "lr", "tokens")  # the others are times and bytes
ALL_FIELDS = {
    *SAME_FIELDS, "seconds", "tokens_per_second", "lane_seconds", "busiest_lane", "peak_bytes", "io_bytes",
}  # fmt: skip
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 264, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256,
}  # fmt: skip
HANGS = 100.0  # seconds after which a process of these tiny runs can only be hanging, on a busy machine too


# ---- runs ----


@dataclass(frozen=True)
class Scenario:
    """One kind of run: what of the configuration differs, and whether RAM is too small for any of its state."""

    name: str
    train: Mapping[str, Any]
    all_on_nvme: bool
    steps: int = 12


SCENARIOS = (
    Scenario("nvme, clipping", {"max_grad_norm": 1.0, "global_batch_size": 2}, True),
    Scenario("nvme, no clipping", {"max_grad_norm": None, "global_batch_size": 1}, True),
    Scenario("RAM, commit every 3", {"max_grad_norm": 1.0, "global_batch_size": 2, "commit_every": 3}, False),
    Scenario(
        "RAM, no clipping, commit every 2", {"max_grad_norm": None, "global_batch_size": 2, "commit_every": 2}, False
    ),
)


def write_text(path: Path) -> None:
    """A few kilobytes to train on."""
    lines = (f"Line {i}: the quick brown fox number {i * i} jumps over {i * 7 % 13} lazy dogs." for i in range(200))
    path.write_text("\n\n".join(lines))


def configuration(scenario: Scenario, directory: Path, name: str = "run", seed: int = 0) -> dict[str, Any]:
    """A run `name` below `directory`, with its store in `directory`/ssd; the text has to be there."""
    data = {"path": str(directory / "text.txt"), "tokenizer": "bytes", "sequence_length": 32}
    return _within_least_ram(scenario, {**_without_data(scenario, directory, name, seed), "data": data})


def engine_configuration(scenario: Scenario, directory: Path, name: str = "run", seed: int = 0) -> dict[str, Any]:
    """The same for `offload.wrap`: batches come from the caller, so there is no data section."""
    return _within_least_ram(scenario, _without_data(scenario, directory, name, seed))


def _without_data(scenario: Scenario, directory: Path, name: str, seed: int) -> dict[str, Any]:
    train = {
        "steps": scenario.steps, "micro_batch_size": 1, "seed": seed,
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 2}, **scenario.train,
    }  # fmt: skip
    return {
        "model": {"architecture": ARCHITECTURE, "dtype": "bfloat16"},
        "train": train,
        "memory": {
            "device": "cpu", "gpu": "64MiB", "cpu": "256MiB",
            "nvme": [{"path": str(directory / "ssd"), "size": "64MiB"}],
        },
        "output": str(directory / name),
    }  # fmt: skip


def _within_least_ram(scenario: Scenario, config: dict[str, Any]) -> dict[str, Any]:
    """With the smallest `memory.cpu` that fits, if RAM shall have no room for its state, nor for a gradient."""
    if scenario.all_on_nvme:
        prepared = prepare(offload.Config.load(config))
        config["memory"]["cpu"] = bare_ram(prepared.workload, prepared.plan)
    return config


def plan_of(config: dict[str, Any]) -> Plan:
    """The plan alone; `offload.plan` would make a dozen more, for its advice."""
    return prepare(offload.Config.load(config)).plan


@dataclass
class Run:
    """A configuration on disk, and processes that work on it."""

    config: dict[str, Any]
    file: Path

    @classmethod
    def make(cls, scenario: Scenario, directory: Path, name: str = "run", seed: int = 0) -> Run:
        """Write text and configuration below `directory`; nothing is run yet."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "text.txt")
        return cls.of(configuration(scenario, directory, name, seed))

    @classmethod
    def of(cls, config: dict[str, Any]) -> Run:
        file = Path(config["output"] + ".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config))
        return cls(config, file)

    @property
    def path(self) -> Path:
        return Path(self.config["output"])

    @property
    def log(self) -> Path:
        """stdout and stderr of the latest process."""
        return self.path.with_name(self.path.name + ".log")

    def start(
        self, *arguments: str, faults: str = "", command: str = "train", warm: Warm | None = None, log: str = ""
    ) -> Process:
        """`offload train CONFIG`, or another command, as a process of its own; its output goes to `self.log`, or to
        `log` beside it."""
        environment = {"OMP_NUM_THREADS": "1", "OFFLOAD_FAULTS": faults}
        arguments = (command, *([str(self.file)] if command == "train" else []), *arguments)
        if warm is not None:
            return warm.start(arguments, environment, self.path.parent, self.log.with_name(log or self.log.name))
        with self.log.with_name(log or self.log.name).open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "offload.cli", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment},
                cwd=self.path.parent,
            )  # fmt: skip

    def finish(self, *arguments: str, faults: str = "", command: str = "train", warm: Warm | None = None) -> int:
        """Run to the end; the exit code."""
        return wait(self.start(*arguments, faults=faults, command=command, warm=warm), self)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.path / "metrics.jsonl"))

    def result(self) -> dict[str, Any]:
        """Everything that has to be equal to the bit: numbers of every step, exported files, the optimizer's state."""
        rows = self.rows()
        assert all(set(row) - {"activation_fallbacks"} == ALL_FIELDS for row in rows)
        model = self.path / "model"
        return {
            "rows": [{name: row[name] for name in SAME_FIELDS} for row in rows],
            "model": {file.name: file.read_bytes() for file in sorted(model.iterdir())},
            "state": self.state(),
        }

    def state(self) -> dict[str, bytes]:
        """The committed bytes of every extent of the store."""
        with self.open_store() as store:
            return {key: read(store, key, extent.nbytes) for key, extent in store.extents.items() if extent.durable}

    def open_store(self) -> Store:
        return Store.open(self._places(), read_info(self.path)["store"]["name"])

    def committed(self) -> int | None:
        """The last committed step, after checking that it is whole; None when nothing was committed."""
        if not (self.path / "run.json").exists():
            return None
        if not Store.exists(self._places(), read_info(self.path)["store"]["name"]):
            return None
        with self.open_store() as store:
            assert store.verify() == []
            return int(store.meta["step"])

    def _places(self) -> list[StorePath]:
        return [StorePath(Path(entry.path), 1) for entry in stored_paths(self.path, read_info(self.path))]


def read(store: Store, key: str, nbytes: int) -> bytes:
    with allocate(store.padded(key), Ledger()) as buffer:
        store.read(key, 0, buffer.tensor).wait()
        return bytes(buffer.tensor[:nbytes].numpy().tobytes())


def wait(process: Process, run: Run) -> int:
    """The exit code; a process that hangs is ended, and the test fails with what it printed."""
    try:
        return process.wait(HANGS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"the process hangs; it printed:\n{run.output()}") from None


# ---- kills ----


@dataclass(frozen=True)
class Kill:
    """One moment to kill at: at a request of the store (`rule`), or from outside, `delay` seconds after `when`."""

    name: str
    rule: str = ""
    when: Callable[[Run], bool] | None = None
    delay: float = 0.0
    slow: float = 0.0  # seconds by which each request is made longer, so that moments between requests are hit


def at(rule: str) -> Kill:
    """Kill itself at a request: `at("write:3")` at the fourth write of the process."""
    kind, _, number = rule.partition(":")
    return Kill(rule, rule=f"{kind}:kill:after={number}")


def after_step(step: int, delay: float, slow: float = 0.004) -> Kill:
    """`delay` seconds after the row of `step` was written; at once if it was there already."""
    return Kill(f"step {step} + {delay:.3f} s", when=lambda run: last_row(run) >= step, delay=delay, slow=slow)


def in_set_up(delay: float, slow: float = 0.01) -> Kill:
    """`delay` seconds after the plan was printed: tokenising, run directory, store, loading."""
    return Kill(f"set-up + {delay:.3f} s", when=lambda run: "planned by" in run.output(), delay=delay, slow=slow)


def in_export(delay: float, slow: float = 0.02) -> Kill:
    """`delay` seconds after the export has begun."""
    return Kill(f"export + {delay:.3f} s", when=_exporting, delay=delay, slow=slow)


def last_row(run: Run) -> int:
    try:
        lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _exporting(run: Run) -> bool:
    return any(run.path.glob(".model.new*"))


def kill(run: Run, moment: Kill, warm: Warm | None = None) -> bool:
    """Start or go on with the run and kill it; False when it ended, well, before its moment came."""
    rules = moment.rule or f"read:delay={moment.slow};write:delay={moment.slow};sync:delay={moment.slow}"
    begin = time.monotonic()
    process = run.start("--resume", faults=rules, warm=warm)
    if moment.when is not None:
        while process.poll() is None and not moment.when(run):
            if time.monotonic() - begin > HANGS:
                break
            time.sleep(0.002)
        time.sleep(moment.delay)
        process.send_signal(signal.SIGKILL)
    code = wait(process, run)
    assert code in (0, -signal.SIGKILL), f"{moment.name}: exit {code}; it printed:\n{run.output()}"
    return code == -signal.SIGKILL


def check_survivor(run: Run, committed_before: int | None) -> int | None:
    """What a killed process left: a whole commit, no older than the one before, with a row for each of its steps."""
    committed = run.committed()
    if committed is None:
        assert committed_before is None
        return None
    assert committed_before is None or committed >= committed_before
    steps = [row["step"] for row in run.rows()]
    assert steps == list(range(1, len(steps) + 1)), f"rows of steps {steps}"
    assert len(steps) >= committed, f"step {committed} is committed, but there are rows up to {len(steps)} only"
    return committed


@dataclass
class Outcome:
    """What happened to one run: the kills that hit it, with the step that was committed after each."""

    kills: list[tuple[str, int | None]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def torment(run: Run, moments: Iterable[Kill], warm: Warm | None = None) -> Outcome:
    """Kill the run at each moment, check what is left, go on; then let it finish.

    With `warm`, all processes but every third are forked from it, the one that finishes too.
    """
    outcome, committed, begin = Outcome(), None, time.monotonic()
    for number, moment in enumerate(moments):
        if kill(run, moment, warm if number % 3 else None):
            committed = check_survivor(run, committed)
            outcome.kills.append((moment.name, committed))
        else:
            outcome.missed.append(moment.name)
    assert run.finish("--resume", warm=warm) == 0, run.output()
    outcome.seconds = time.monotonic() - begin
    return outcome


def random_moments(generator: random.Random, steps: int) -> Iterator[Kill]:
    """Moments over the whole life of a run without end: loading, reads, writes, commits, steps and export."""
    while True:
        kind = generator.choices(("write", "read", "sync", "set-up", "step", "export"), (4, 4, 4, 1, 5, 1))[0]
        if kind in ("write", "read"):
            yield at(f"{kind}:{generator.randrange(150)}")
        elif kind == "sync":
            yield at(f"sync:{generator.randrange(12)}")
        elif kind == "set-up":
            yield in_set_up(generator.uniform(0, 0.5))
        elif kind == "step":
            yield after_step(generator.randrange(1, steps), generator.uniform(0, 0.3))
        else:
            yield in_export(generator.uniform(0, 0.3))


def same(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two results, in words; empty when they are equal to the bit."""
    found = []
    if one["rows"] != other["rows"]:
        found.append(f"rows: {one['rows']} and {other['rows']}")
    for part in ("model", "state"):
        if one[part].keys() != other[part].keys():
            found.append(f"{part}: {sorted(one[part])} and {sorted(other[part])}")
        both = one[part].keys() & other[part].keys()
        found += [f"{part}: {key}" for key in both if one[part][key] != other[part][key]]
    return found


def remove(run: Run) -> None:
    """Delete a run and its store."""
    for entry in stored_paths(run.path, read_info(run.path)):
        shutil.rmtree(Path(entry.path) / read_info(run.path)["store"]["name"], ignore_errors=True)
    shutil.rmtree(run.path)
