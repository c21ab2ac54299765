"""`offload train`: plan, say so, run step by step, commit, report; and stopping, resuming and exporting on the way."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from offload import models, preflight, report, run_place, rundir, tables
from offload.advice import ADVISED_AFTER, advised, advised_if_long
from offload.config import Config
from offload.data import Dataset, open_dataset
from offload.engine import Engine, Prepared, prepare
from offload.errors import ConfigError, DoesNotFit, described
from offload.io import Store, StorePath
from offload.progress import clock, open_progress
from offload.resumable import check_resumable
from offload.rundir import RunDirectory
from offload.trackers import open_trackers, train_values
from offload.zo_processes import own_config, world

INTERRUPTED = 130
MEMORY_JSON_SECONDS = 30.0  # how old memory.json and trace.json of a killed run can be


class Stop:
    """SIGINT and SIGTERM, kept for the end of the step while `deferred`; a second one ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self.announce: Callable[[], None] = lambda: None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.announce()

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(
    cfg: Config,
    *,
    resume: bool = False,
    last_step: int | None = None,
    confirm: Callable[[], bool] | None = None,
) -> int:
    """Train as `cfg` says; returns the exit code: 0 done, 130 interrupted (the step committed or dropped whole).

    `resume` goes on after the last committed step of the run at `cfg.output`, or starts it if nothing was committed.
    `last_step` ends the run after that step; the schedule keeps the length that `train.steps` gives it, so that a run
    in parts is the same run (a larger `last_step` replaces `train.steps`). `confirm` is asked after the plan was shown;
    a no ends with nothing written and code 0. Raises OffloadError and StoreError; ConfigError and DoesNotFit are raised
    before anything is written.
    """
    cfg = own_config(cfg)
    console = tables.open_console() if world()[1] == 0 else Console(quiet=True)
    preflight.check(cfg)
    path = Path(cfg.output).expanduser()
    going_on = resume and _committed(path)
    if going_on:
        saved = rundir.read_config(path)
        cfg = cfg.with_micro_batch_size(saved.train.micro_batch_size)  # auto: what was chosen when the run began
        check_resumable(saved, cfg)
    elif not (resume and run_place.is_run(path)):
        run_place.refuse_existing(path.absolute())
    with Stop().installed() as stop, run_place.attempt(path):
        dataset = None
        try:
            if cfg.train.steps is None:  # the length of an epoch is known from the data only
                dataset = _open_dataset(cfg, path)
                cfg = _with_steps(cfg, dataset)
            if last_step is not None and last_step > (cfg.train.steps or 0):
                cfg = Config.load(cfg, [f"train.steps={last_step}"])
            prepared = advised_if_long(prepare(cfg))
            cfg = prepared.config
            plan = prepared.plan.to_json()
            console.print(tables.plan_tables(plan))
            refuse_unfit(plan)
            if confirm and not confirm():
                return 0
            dataset = dataset or _open_dataset(cfg, path)
            for note in dataset.notes:
                console.print(f"data: {note}", highlight=False, markup=False)
            with _open_engine(cfg, prepared, path, going_on) as engine:
                last = cfg.train.steps or 0 if last_step is None else last_step
                return _train(prepared, last, engine, dataset, stop, console)
        except Exception:
            if _committed(path):
                with contextlib.suppress(Exception):  # the error under way matters more
                    report.build(path)
            raise
        except KeyboardInterrupt:
            if _committed(path):
                message = "interrupted; the last committed step stays: go on with --resume"
                tables.open_console(stderr=True).print(message)
            raise
        finally:
            if dataset:
                dataset.close()


def refuse_unfit(plan: dict[str, Any]) -> None:
    """Raise for a plan that does not fit: ConfigError where a budget cannot hold even one unit, else DoesNotFit."""
    if plan["fits"]:
        return
    least = plan["layout"]["one_unit_bytes"]
    arena_in_ram = "device" in plan["categories"].get("cpu", {})
    for key in ("cpu", "gpu") if arena_in_ram else ("gpu",):
        budget = plan["budget_bytes"][key]
        if budget >= least or key not in plan["shortfall_bytes"]:
            continue
        raise ConfigError(
            f"memory.{key}: got {tables.size(budget)}, smaller than one unit of the model: its weights and "
            f"gradient take {tables.size(least)}; the whole plan needs {tables.size(plan['peak_bytes'][key])}\n"
            + tables.shortfall(plan)
        )
    raise DoesNotFit(tables.shortfall(plan))


def export_run(run_dir: Path, out: Path) -> None:
    """The last committed step of a run as a Hugging Face directory. Raises ConfigError when `out` is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists and is not empty; give another directory")
    if not _committed(run_dir.expanduser()):
        rundir.read_info(run_dir.expanduser().absolute())
        raise ConfigError(f"{run_dir} has no committed step to export; run it first, with --resume")
    with Engine.resume(run_dir) as engine:
        engine.save_pretrained(out)


def _save_model(engine: Engine, tokenizer: Any) -> None:
    """Write `<run>/model`, in place of an earlier one once the new one is whole."""
    out = engine.run.model_path
    partial = out.with_name(f".{out.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        engine.save_pretrained(partial, tokenizer=tokenizer)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _committed(path: Path) -> bool:
    """Whether a run at `path` has a committed step to go on from."""
    if not run_place.is_run(path):
        return False
    info = rundir.read_info(path)
    places = [StorePath(Path(entry.path), 1) for entry in rundir.stored_paths(path.absolute(), info)]
    return Store.exists(places, info["store"]["name"])


def _open_engine(cfg: Config, prepared: Prepared, path: Path, going_on: bool) -> Engine:
    if going_on:
        with RunDirectory.open(path) as directory:
            before = directory.config()
            directory.write_config(cfg)
        try:
            return Engine.resume(path, prepared=prepared)
        except BaseException:
            with RunDirectory.open(path) as directory:
                directory.write_config(before)
            raise
    if run_place.is_run(path):  # set up and then killed before its first commit
        RunDirectory.open(path).discard()
    return Engine.create(cfg, prepared=prepared)


def _open_dataset(cfg: Config, path: Path) -> Dataset:
    assert cfg.data is not None and cfg.model is not None  # preflight
    model = models.build(cfg.model)
    return open_dataset(
        cfg.data,
        models.locate(cfg.model, weights=False),
        vocab_size=model.config.get_text_config().vocab_size,
        micro_batch_size=1 if cfg.train.micro_batch_size == "auto" else cfg.train.micro_batch_size,  # any divides it
        global_batch_size=cfg.train.global_batch_size,
        seed=cfg.train.seed,
        cache_dir=path / "cache",
    )


def _with_steps(cfg: Config, dataset: Dataset) -> Config:
    assert cfg.train.epochs is not None
    steps = max(1, math.ceil(cfg.train.epochs * len(dataset.train) / cfg.train.global_batch_size))
    return Config.load(cfg, ["train.epochs=null", f"train.steps={steps}"])


def _train(prepared: Prepared, steps: int, engine: Engine, dataset: Dataset, stop: Stop, console: Console) -> int:
    cfg, run = prepared.config, engine.run
    began, first = time.perf_counter(), engine.completed_steps
    progress = open_progress(console, first, steps, engine.plan.budget_bytes, lambda: engine.doing)
    trackers = open_trackers(cfg, run, first)
    stop.announce = lambda: progress.note("stopping after this step; once more to drop it and stop now")
    stop.deferred = True
    ends = engine.agreed(lambda: stop.requested)
    logged = -math.inf  # the first step is in the logs at once
    try:
        if first:
            progress.note(f"going on after step {first}")
        for index in range(first, steps):
            if ends():
                break
            result = engine.step(dataset.train.batch(index))
            row = run.last_row
            assert row is not None  # engine.step wrote it
            progress.step(row, engine.stalls, engine.ram_peak)
            for tracker in trackers:
                tracker.log(train_values(row), result.step)
            if cfg.train.eval_every and result.step % cfg.train.eval_every == 0:
                loss = evaluate(engine, dataset, ends)
                if loss is None:
                    break
                run.append_eval({"step": result.step, "eval_loss": loss})
                progress.note(f"step {result.step}: eval loss {loss:.4f}")
                for tracker in trackers:
                    tracker.log({"eval/loss": loss}, result.step)
            if time.perf_counter() - logged > MEMORY_JSON_SECONDS:
                logged = time.perf_counter()
                engine.write_memory()
                engine.write_trace()
        engine.commit()
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk, say: the error under way tells more
            engine.write_memory(failure=described(error))
        raise
    finally:
        stop.deferred = False
        progress.close()
        for tracker in trackers:
            tracker.close()
    if ends() and engine.completed_steps < steps:
        engine.close()
        report.build(run.path)
        console.print(f"stopped after step {engine.committed_step}, committed; go on with --resume", highlight=False)
        return INTERRUPTED
    if steps == 0:
        console.print(f"loaded and committed; {run.path}", highlight=False)
        return 0
    if world()[1] == 0:
        _save_model(engine, dataset.tokenizer)
    engine.close()
    if not prepared.plan.advised and time.perf_counter() - began > ADVISED_AFTER:
        run.write_plan(advised(prepared).plan.to_json())
    console.print(tables.run_table(report.summary(report.build(run.path))))
    console.print(f"took {clock(time.perf_counter() - began)}; model in {run.model_path}", highlight=False)
    return 0


def evaluate(engine: Engine, dataset: Dataset, ends: Callable[[], bool]) -> float | None:
    """Loss over the evaluation data, each counted token weighing the same; None when the run `ends` meanwhile."""
    assert dataset.eval is not None
    total, counted = 0.0, 0
    for batch in dataset.eval.eval_batches():
        if ends():
            return None
        n = int((batch["labels"][:, 1:] != -100).sum())  # the first token of a row is no target
        total += engine.evaluate(batch) * n
        counted += n
    return total / counted if counted else math.nan
