"""The engine: a run from its first step to its end. What happens within a step is in `full_step`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from offload import left_open, models, oom, resources
from offload.config import Config
from offload.errors import DoesNotFit, OffloadError, described
from offload.full_step import FullStep
from offload.io import drives
from offload.loss import micro_seed, split
from offload.ownership import take_ownership
from offload.prepare import Prepared, prepare
from offload.resources import TIMEOUT, Resources
from offload.rundir import RunDirectory
from offload.samples import count_tokens, has_whole_rows
from offload.tokenization import load_tokenizer
from offload.weights import save_pretrained
from offload.zo_step import ZerothOrderStep

__all__ = ["Engine", "Prepared", "StepResult", "micro_seed", "prepare"]


@dataclass(frozen=True)
class StepResult:
    """What one step did. `step` counts completed steps from 1; `tokens` are not padding; `seconds` is wall time."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


class Engine:
    """Trains a model whose weights, gradients and optimizer state are streamed through fixed buffers.

    Made by `offload.wrap` or `offload.resume`. Not thread-safe: one thread calls it. A context manager.
    """

    def __init__(self, prepared: Prepared, run: RunDirectory, held: Resources) -> None:
        cfg = prepared.config
        self.config = cfg
        self.model = prepared.model
        self.plan = prepared.plan
        self._prepared = prepared
        self.run = run
        self.store = held.store
        self.ledger = held.ledger
        self._held = held
        self._trace = held.trace
        self._units = prepared.units
        self._failed = False
        self._failure = ""
        self._closed = False
        meta = held.store.meta
        self.committed_step: int = meta["step"]
        with ExitStack() as stack:  # undone in reverse: streams, what they hold, the model, the run
            stack.callback(run.close)
            take_ownership(self.model, self._units, prepared.device, stack)
            stack.callback(held.close)
            self._method: FullStep | ZerothOrderStep
            if cfg.train.method == "zo":
                self._method = ZerothOrderStep(prepared, held, run, stack)
            else:
                self._method = FullStep(prepared, held, meta, stack)
            self.completed_steps = self._method.completed_steps
            run.truncate_metrics(self.completed_steps)
            self._stack = stack.pop_all()
        left_open.opened(self)

    @classmethod
    def create(cls, cfg: Config, model: nn.Module | None = None, prepared: Prepared | None = None) -> Engine:
        """Start a run: reserve everything, bring the weights into the store, commit them as step 0.

        Raises ConfigError and DoesNotFit before anything is written; after any other error nothing is left behind.
        """
        prepared = prepared or prepare(cfg, model)
        _refuse_unfit(prepared)
        with ExitStack() as stack:
            run = RunDirectory.create(prepared.config)
            stack.callback(run.discard)
            run.write_plan(prepared.plan.to_json())
            with resources.create(prepared, run) as held:
                stack.pop_all()
                return cls(prepared, run, held)

    @classmethod
    def resume(
        cls, run_dir: str | Path, model: nn.Module | None = None, prepared: Prepared | None = None
    ) -> Engine:
        """Go on with an existing run at its last committed step.

        Args:
            model: needed only where the run began with a model that its configuration does not describe (peft).
            prepared: a plan made already for the run's configuration.
        """
        with ExitStack() as stack:
            run = RunDirectory.open(run_dir)
            stack.callback(run.close)
            if prepared is None:
                prepared = prepare(run.config(), model if model is not None else resources.rebuild_model(run))
            _refuse_unfit(prepared)
            run.write_plan(prepared.plan.to_json())
            with resources.reopen(prepared, run) as held:
                stack.pop_all()
                return cls(prepared, run, held)

    # ---- one step ----

    def step(self, batch: Mapping[str, Any]) -> StepResult:
        """One optimizer step on one global batch: a dict of tensors whose dimension 0 is `train.global_batch_size`.

        Returns when the gradients are complete; the update runs on beside the next step's forward. Raises OffloadError
        for a batch that does not fit the plan; after any other error the engine takes no more steps, and the run goes
        on from its last committed step with `offload.resume`.
        """
        micro = self._split(batch)
        begin = time.perf_counter()
        with self._all_or_nothing():
            due = (self.completed_steps + 1) % self.plan.commit_every == 0
            with self._held.record.during(self.completed_steps + 1):
                outcome = self._method.step(micro, self.completed_steps, due)
            self.completed_steps += 1
            seconds = time.perf_counter() - begin
            tokens = count_tokens(dict(batch))
            result = StepResult(self.completed_steps, outcome.loss, outcome.grad_norm, outcome.lr, tokens, seconds)
            # Before its commit: killed in between, a run has a row too many, which resume drops, never one too few.
            self._log(result, outcome.activation_fallbacks)
            self._method.logged()
            if due:
                self._submit_commit()
        return result

    def evaluate(self, batch: Mapping[str, Any]) -> float:
        """The loss of one global batch in evaluation mode, without an update; pending updates are seen."""
        micro = self._split(batch)
        with self._all_or_nothing():
            loss = self._method.evaluate(micro, self.completed_steps)
        self._trace.forget()
        return loss

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """`asked`, to be read between steps and evaluations: where several processes share them, all are told the same,
        which is that one of them was asked in the latest one."""
        return self._method.agreed(asked) if isinstance(self._method, ZerothOrderStep) else asked

    def _submit_commit(self) -> None:
        step = self.completed_steps

        def committed() -> None:
            self.committed_step = step

        # The rows of a committed step have to survive a power cut too.
        self._method.commit(self._meta(), self.run.sync_metrics, committed)

    def _meta(self) -> dict[str, Any]:
        """What a commit holds beside the extents."""
        train = self.config.train
        return {
            "step": self.completed_steps,
            # The next step's random numbers and rows follow from these and the configuration.
            "rng": {"seed": train.seed, "next_step": self.completed_steps},
            "data": {"next_row": self.completed_steps * train.global_batch_size},
            "buffers": resources.encode_buffers(self.model),
            **self._method.meta(self.completed_steps),
        }

    # ---- around the steps ----

    def flush(self) -> None:
        """Wait until every pending update is applied and every commit that is due is on disk."""
        with self._all_or_nothing():
            self._method.flush()

    def commit(self) -> int:
        """Make the current step durable, whether it is due or not; returns its number."""
        self.flush()
        if self.committed_step != self.completed_steps:
            with self._all_or_nothing():
                self._held.write_homes()
                self._submit_commit()
                self._method.flush()
        return self.committed_step

    def save_pretrained(self, out: str | Path, tokenizer: Any = None) -> None:
        """Write the current weights as a Hugging Face directory, streamed; pending updates are part of it.

        Args:
            out: a directory that does not exist or is empty; it appears whole or not at all.
            tokenizer: saved beside the model; by default the one the configuration names or the model brings.
        """
        self.flush()
        reader = self._held.states.reader(self._held.staging, TIMEOUT)
        save_pretrained(self.model, out, reader, tokenizer=tokenizer or self._own_tokenizer(), dtype=self._held.dtype)

    def _own_tokenizer(self) -> Any:
        cfg = self.config
        described = cfg.model is not None and cfg.model.path is not None
        directory = models.locate(cfg.model, weights=False) if cfg.model is not None and described else None
        return load_tokenizer(cfg.data.tokenizer if cfg.data else None, directory)

    def close(self) -> None:
        """Commit, stop all lanes and give memory, locks and the model's own forward back. Safe to call twice; called
        at the end of the program for an engine that was left open.

        The model's parameters are on meta afterwards: their values are in the store (`offload export`).
        """
        if self._closed:
            return
        try:
            if not self._failed:
                self.commit()
                self.write_memory(closed=True)
            with suppress(OSError, MemoryError):  # a disk that is full has ended the run already, and said so
                if self._failed:
                    self.write_memory()
                self.write_trace()
        finally:
            left_open.closed(self)
            self._closed = True
            if self._failed:
                self._held.abort()
            self._stack.close()

    def write_memory(self, failure: str = "", closed: bool = False) -> None:
        """memory.json: per tier the ledger's figures beside plan and budget, what process and device took beside them,
        one step's timeline, the rates that were planned with, what compute waited for, and what ended the run, or that
        it was `closed`; bytes and seconds."""
        self._failure = failure or self._failure
        ledger = self.ledger.snapshot()
        tiers = {
            tier: {
                "budget": budget,
                "predicted": self.plan.peak_bytes.get(tier, 0),
                "peak": self.ledger.peak(tier),
                "categories": ledger.get(tier, {}),
            }
            for tier, budget in self.plan.budget_bytes.items()
        }
        hardware = self._prepared.hardware
        rates = {lane: getattr(hardware, lane) for lane in ("h2d", "d2h", "nvme_read", "nvme_write")}
        worn = drives(self.store.paths, self.store.written)
        told = {
            "device_in_ram": self._prepared.device == "cpu",
            "host_tiers": {name: tier.describe() for name, tier in self._prepared.tiers.items()},
            "rates": rates,
            "failure": self._failure,
            "closed": closed,
        }
        stalls = {reason: _digits(seconds, 3) for reason, seconds in self._trace.stall_means().items()}
        memory = {"tiers": tiers, **self._held.record.to_json(), **told, "drives": worn}
        self.run.write_memory({**memory, "stall_seconds": stalls})

    def write_trace(self) -> None:
        """trace.json: the operations of the first step and of the latest one."""
        self.run.write_trace(self._trace.events())

    @property
    def stalls(self) -> dict[str, float]:
        """Seconds that compute waited in the latest step, by reason."""
        return self._trace.stalls

    @property
    def ram_peak(self) -> int:
        """Bytes of RAM that the process tree took at its peak beyond what it had before the run, measured."""
        return self._held.record.grown

    @property
    def doing(self) -> str:
        """What is computed, or waited for, at this moment: `forward of model.layers.3`; empty between steps."""
        return self._trace.doing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """After an error inside, this engine goes no further: the store still holds the last committed step whole."""
        if self._closed or self._failed:
            why = "is closed" if self._closed else "failed before"
            raise OffloadError(
                f"this engine {why}; go on from the last commit with offload.resume({str(self.run.path)!r})"
            )
        try:
            with oom.explained(self._prepared, self.ledger, self._trace, self.completed_steps + 1):
                yield
        except BaseException as error:
            self._failed = True
            self._failure = described(error)
            self._method.abandon()
            raise

    def _split(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        data = self.config.data
        if data is not None and data.whole_rows and not has_whole_rows(batch):
            raise OffloadError(
                "the batch has padding, or rows of several sequences; the plan has no memory for an attention mask, "
                "because data.padding and data.packing are false"
            )
        micro = split(batch, self._prepared.workload.micro_batch)
        if len(micro) > self.plan_micro_batches:
            raise OffloadError(
                f"the batch makes {len(micro)} micro-batches; the plan has memory for {self.plan_micro_batches} "
                f"(train.global_batch_size {self.config.train.global_batch_size})"
            )
        return micro

    @property
    def plan_micro_batches(self) -> int:
        """M, the number of micro-batches that memory was planned for."""
        return self._prepared.workload.micro_batches

    def _log(self, result: StepResult, activation_fallbacks: int) -> None:
        totals = self._trace.end_step(result.step)
        lanes = {lane: _digits(seconds, 3) for lane, seconds in totals.lanes.items()}
        self.run.append_metrics(
            {
                "step": result.step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "seconds": _digits(result.seconds, 5),
                "tokens": result.tokens,
                "tokens_per_second": _digits(result.tokens / result.seconds, 5),
                "lane_seconds": lanes,
                "busiest_lane": max(lanes, key=lanes.__getitem__),
                "peak_bytes": {tier: self.ledger.peak(tier) for tier in ("gpu", "cpu", "cxl", "nvme")},
                "io_bytes": totals.nbytes,
                **({"activation_fallbacks": activation_fallbacks} if activation_fallbacks else {}),
            }
        )


def _digits(value: float, digits: int) -> float:
    """What a clock is worth, and no more: ten thousand rows of metrics.jsonl, with the report, stay under 5 MB."""
    return float(f"{value:.{digits}g}")


def _refuse_unfit(prepared: Prepared) -> None:
    plan = prepared.plan
    if not plan.fits:
        short = "; ".join(
            f"{tier} needs {plan.peak_bytes[tier]:,} bytes, the budget is {plan.budget_bytes[tier]:,}"
            for tier in plan.shortfall_bytes
        )
        raise DoesNotFit(f"the run does not fit: {short}. " + " ".join(plan.suggestions))
