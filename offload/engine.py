"""The engine: one training step, readable from top to bottom.

forward    for each unit in order: bind its weights, pass every micro-batch through it;
           a micro-batch that reaches its loss runs backward through the last unit at once
backward   for each unit in reverse: bind, run every micro-batch again with grad, drain the summed gradient
update     AdamW where the state lives, in backward or ahead of the next forward; then commit
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from offload import models, resources
from offload.adamw import Hyper
from offload.boundary import Boundaries, MicroBatch
from offload.config import Config
from offload.errors import DoesNotFit, OffloadError
from offload.gradient_stream import GradientStream, UnitGradient
from offload.loss import LossItems, Scale, micro_seed, split
from offload.memory import Sampler
from offload.prepare import Prepared, prepare
from offload.resources import TIMEOUT, Resources
from offload.rundir import RunDirectory
from offload.samples import count_tokens
from offload.schedule import learning_rates
from offload.state import WeightReader
from offload.tokenization import load_tokenizer
from offload.units import Unit
from offload.update_stream import UpdateStream
from offload.weight_stream import WeightStream
from offload.weights import save_pretrained

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
        self.run = run
        self.store = held.store
        self.ledger = held.ledger
        self._held = held
        self._trace = held.trace
        self._units = prepared.units
        self._device = prepared.device
        self._clips = cfg.train.max_grad_norm is not None
        self._failed = False
        self._closed = False
        self._runs: list[MicroBatch] = []
        self._restore(held.store.meta)
        with ExitStack() as stack:  # undone in reverse: streams, what they hold, the model, the run
            stack.callback(run.close)
            resources.take_ownership(self.model, self._units, stack)
            stack.callback(held.close)
            self._open_streams(stack)
            self._boundaries = Boundaries(self._units, self._device)
            stack.callback(self._boundaries.close)
            self._loss_items = LossItems(self.model)
            stack.callback(self._loss_items.close)
            self._sampler = stack.enter_context(Sampler())
            self._stack = stack.pop_all()

    def _restore(self, meta: dict[str, Any]) -> None:
        """Everything that is not in the store's extents, from the last commit's `meta`."""
        cfg = self.config.train
        self.completed_steps: int = meta["step"]
        self.committed_step: int = meta["step"]
        default, exceptions = meta["parameter_steps"]
        names = [slot.name for unit in self._units for slot in unit.layout.params if slot.trainable]
        self._parameter_steps = {name: exceptions.get(name, default) for name in names}
        self._parameter_order = {name: i for i, (name, _) in enumerate(self.model.named_parameters())}
        self._lr = learning_rates(cfg.schedule.name, cfg.optimizer.lr, cfg.schedule.warmup_steps, cfg.steps or 1)
        # What is known of the next step's visits: the order of the units at first, then what the last step did.
        forward = [u.index for u in self._units if not u.resident]
        self._visits = {True: forward + forward[::-1], False: forward}
        kept = {unit.name for unit in self.plan.units if unit.activations["keep"] == 1.0}
        self._last_unit = next((u.index for u in reversed(self._units) if u.name in kept), -1)

    def _open_streams(self, stack: ExitStack) -> None:
        held = self._held
        self._updates = UpdateStream(held.states, held.update, held.gradient_dtype, self._trace, TIMEOUT)
        stack.callback(self._updates.close)
        self._gradients = GradientStream(
            held.states.units, held.gradient_slots, held.landing, held.staging, held.gradient_dtype, held.device,
            self._clips, self._update_landed, self._trace, TIMEOUT,
        )  # fmt: skip
        stack.callback(self._gradients.close)
        self._weights = WeightStream(
            held.states.units, held.weight_slots, held.resident, held.dtype, held.device, held.staging,
            self._updates.wait_ready, self._trace, TIMEOUT,
        )  # fmt: skip
        stack.callback(self._weights.close)

    @classmethod
    def create(cls, cfg: Config, model: nn.Module | None = None, prepared: Prepared | None = None) -> Engine:
        """Start a run: reserve everything, bring the weights into the store, commit them as step 0.

        Raises ConfigError and DoesNotFit before anything is written; after any other error nothing is left behind.
        """
        prepared = prepared or prepare(cfg, model)
        _refuse_unfit(prepared)
        with ExitStack() as stack:
            run = RunDirectory.create(cfg)
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
                run.truncate_metrics(held.store.meta["step"])
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
            self._updates.check()
            lr = self._lr(self.completed_steps)
            runs = self._start(micro, training=True)
            losses = self._forward(runs)
            self._backward(runs)
            gradients = self._gradients.finish()
            norm, coefficient = self._clip(gradients)
            self.completed_steps += 1
            if self._clips:
                self._update(gradients, self._hyper(lr, coefficient))
            seconds = time.perf_counter() - begin
            result = StepResult(self.completed_steps, sum(losses), norm, lr, count_tokens(dict(batch)), seconds)
            # Before its commit: killed in between, a run has a row too many, which resume drops, never one too few.
            self._log(result)
            if self._is_due(self.completed_steps):
                self._commit(gradients)
            for index in gradients:
                self._weights.invalidate(self._units[index])
            self._weights.expect(self._visits[True])
        return result

    def evaluate(self, batch: Mapping[str, Any]) -> float:
        """The loss of one global batch in evaluation mode, without an update; pending updates are seen."""
        micro = self._split(batch)
        with self._all_or_nothing():
            modes = {module: module.training for module in self.model.modules()}
            self.model.eval()
            losses = self._forward(self._start(micro, training=False))
            for module, mode in modes.items():
                module.training = mode
            self._weights.expect(self._visits[True])
        self._trace.forget()
        return sum(losses)

    def _start(self, micro: list[dict[str, Any]], training: bool) -> list[MicroBatch]:
        """One coroutine per micro-batch, each at the start of its forward."""
        self._weights.expect(self._visits[training])
        self._weights.load_resident()
        if training:
            for unit in self._units:
                if unit.resident:
                    self._gradients.open(unit)
        self._visited: list[int] = []
        self._runs = runs = []
        for i, (inputs, scale) in enumerate(zip(micro, self._loss_items.scales(micro), strict=True)):
            seed = micro_seed(self.config.train.seed, self.completed_steps, i)
            runs.append(MicroBatch(self._forward_of(inputs, scale), seed, self._device, training))
        return runs

    def _forward_of(self, inputs: dict[str, Any], scale: Scale) -> Callable[[], Tensor]:
        moved = {k: v.to(self._device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return lambda: self._loss_items.forward(self.model, moved, scale)

    def _forward(self, runs: list[MicroBatch]) -> list[float]:
        """All micro-batches through one unit before the next begins. Returns the scaled losses in order."""
        waiting = [self._advance(run, "the start") for run in runs]
        if any(unit is None for unit in waiting):
            raise OffloadError(f"{type(self.model).__name__} came to its loss without passing through any unit")
        losses = [0.0] * len(runs)
        while unit := next((u for u in waiting if u is not None), None):
            self._visited.append(unit.index)
            with self._weights.bound(unit):
                for i, run in enumerate(runs):
                    if waiting[i] is not unit:
                        continue
                    run.keep_graph = run.training and unit.index == self._last_unit
                    waiting[i] = self._advance(run, unit.name)
                    if waiting[i] is None:
                        losses[i] = self._finish(run, unit)
                    elif run.tape:
                        run.tape[-1].kept = None  # not the last unit after all: its slot will be refilled
            if all(unit is None for unit in waiting):
                self._drain_if_done(unit, runs)
        if runs[0].training:
            self._last_unit = self._visited[-1]
        else:
            self._visits[False] = self._visited
        return losses

    def _finish(self, run: MicroBatch, unit: Unit) -> float:
        """A micro-batch has its loss: backward to the leaves and through the last unit, while its weights are bound."""
        assert run.loss is not None
        value = run.loss.item()
        if run.training:
            with self._trace.span("compute", "backward of the loss"):
                run.backward_loss()
            if run.tape and run.tape[-1].unit is unit:
                self._gradients.open(unit)
                self._backward_unit(run, unit)
        return value

    def _backward(self, runs: list[MicroBatch]) -> None:
        """Units in reverse; within a unit the micro-batches in order: gradients are summed as in a plain loop."""
        while any(run.tape for run in runs):
            unit = max(runs, key=lambda run: len(run.tape)).tape[-1].unit
            here = [run for run in runs if run.tape and run.tape[-1].unit is unit]
            if any(run.tape[-1].differentiable for run in here):
                self._visited.append(unit.index)
                self._gradients.open(unit)
                with self._weights.bound(unit):
                    for run in here:
                        self._backward_unit(run, unit)
            else:
                for run in here:
                    self._backward_unit(run, unit)
            self._drain_if_done(unit, runs)
        self._visits[True] = self._visited

    def _drain_if_done(self, unit: Unit, runs: list[MicroBatch]) -> None:
        """Drain the unit's gradient once no micro-batch will come back to it."""
        if not any(record.unit is unit for run in runs for record in run.tape):
            self._gradients.close_unit(unit)

    def _advance(self, run: MicroBatch, name: str) -> Unit | None:
        passed = len(run.tape)
        with self._trace.span("compute", f"forward of {name}"):
            wanted = run.advance()
        if len(run.tape) > passed:
            self.ledger.add("gpu", "activations", run.tape[-1].nbytes)
        return wanted

    def _backward_unit(self, run: MicroBatch, unit: Unit) -> None:
        with self._trace.span("compute", f"backward of {unit.name}"):
            record = run.backward_unit()
        self.ledger.remove("gpu", "activations", record.nbytes)

    # ---- norm, update, commit ----

    def _clip(self, gradients: dict[int, UnitGradient]) -> tuple[float, Tensor | None]:
        """The global norm and clipping coefficient, to the bit those of `torch.nn.utils.clip_grad_norm_`."""
        norms = {name: norm for gradient in gradients.values() for name, norm in gradient.norms.items()}
        if not norms:
            raise OffloadError("no parameter got a gradient; check requires_grad and the batch's labels")
        ordered = [norms[name] for name in sorted(norms, key=self._parameter_order.__getitem__)]
        total = torch.linalg.vector_norm(torch.stack(ordered))
        limit = self.config.train.max_grad_norm
        if limit is None:
            return total.item(), None
        coefficient = torch.clamp(limit / (total + 1e-6), max=1.0)
        return total.item(), None if coefficient.item() == 1.0 else coefficient

    def _hyper(self, lr: float, coefficient: Tensor | None) -> Hyper:
        o = self.config.train.optimizer
        return Hyper(lr, o.betas[0], o.betas[1], o.eps, o.weight_decay, coefficient)

    def _update(self, gradients: dict[int, UnitGradient], hyper: Hyper) -> None:
        """Queue the updates in the order in which the next forward needs the weights, the resident unit first."""
        first_use = {index: i for i, index in reversed(list(enumerate(self._visits[True])))}
        for index in sorted(gradients, key=lambda i: first_use.get(i, -1)):
            self._queue_update(gradients[index], hyper, self._is_due(self.completed_steps))

    def _update_landed(self, gradient: UnitGradient, landing: Tensor, done: Callable[[], None]) -> None:
        """Without clipping: the gradient lane calls this as soon as a unit's gradient is on the host."""
        step = self.completed_steps
        self._queue_update(gradient, self._hyper(self._lr(step), None), self._is_due(step + 1), landing, done)

    def _queue_update(
        self,
        gradient: UnitGradient,
        hyper: Hyper,
        durable: bool,
        landing: Tensor | None = None,
        done: Callable[[], None] | None = None,
    ) -> None:
        for name in gradient.present:
            self._parameter_steps[name] += 1
        steps = {name: self._parameter_steps[name] for name in gradient.present}
        self._updates.submit(gradient.unit, gradient.present, steps, hyper, durable, landing, done)

    def _is_due(self, step: int) -> bool:
        return step % self.plan.commit_every == 0

    def _commit(self, gradients: dict[int, UnitGradient]) -> None:
        """Commit this step once its updates are on disk, while training goes on."""
        # A unit without gradient keeps its state, but what of it lives in RAM belongs to this commit too.
        for unit in self._units:
            if unit.trainable and unit.index not in gradients:
                self._updates.submit(unit, set(), {}, self._hyper(0.0, None), durable=True)
        self._submit_commit()

    def _submit_commit(self) -> None:
        step = self.completed_steps

        def committed() -> None:
            self.committed_step = step

        # The rows of a committed step have to survive a power cut too.
        self._updates.commit(self._meta(), self.run.sync_metrics, committed)

    def _meta(self) -> dict[str, Any]:
        """What a commit holds beside the extents."""
        counts = list(self._parameter_steps.values())
        default = max(set(counts), key=counts.count)
        train = self.config.train
        return {
            "step": self.completed_steps,
            "parameter_steps": [default, {name: n for name, n in self._parameter_steps.items() if n != default}],
            # The next step's random numbers, learning rate and rows all follow from these and the configuration.
            "rng": {"seed": train.seed, "next_step": self.completed_steps},
            "schedule": {"name": train.schedule.name, "next_lr": self._lr(self.completed_steps)},
            "data": {"next_row": self.completed_steps * train.global_batch_size},
            "buffers": resources.encode_buffers(self.model),
        }

    # ---- around the steps ----

    def flush(self) -> None:
        """Wait until every pending update is applied and every commit that is due is on disk."""
        with self._all_or_nothing():
            self._updates.flush()

    def commit(self) -> int:
        """Make the current step durable, whether it is due or not; returns its number."""
        self.flush()
        if self.committed_step != self.completed_steps:
            with self._all_or_nothing():
                self._held.states.write_homes()
                self._submit_commit()
                self._updates.flush()
        return self.committed_step

    def save_pretrained(self, out: str | Path, tokenizer: Any = None) -> None:
        """Write the current weights as a Hugging Face directory, streamed; pending updates are part of it.

        Args:
            out: a directory that does not exist or is empty; it appears whole or not at all.
            tokenizer: saved beside the model; by default the one the configuration names or the model brings.
        """
        self.flush()
        reader = WeightReader(self._held.states, self._held.staging, TIMEOUT)
        save_pretrained(self.model, out, reader, tokenizer=tokenizer or self._own_tokenizer(), dtype=self._held.dtype)

    def _own_tokenizer(self) -> Any:
        cfg = self.config
        described = cfg.model is not None and cfg.model.path is not None
        directory = models.locate(cfg.model, weights=False) if cfg.model is not None and described else None
        return load_tokenizer(cfg.data.tokenizer if cfg.data else None, directory)

    def close(self) -> None:
        """Commit, stop all lanes and give memory, locks and the model's own forward back. Safe to call twice.

        The model's parameters are on meta afterwards: their values are in the store (`offload export`).
        """
        if self._closed:
            return
        try:
            if not self._failed:
                self.commit()
                self.run.write_trace(self._trace.events())
                self.write_memory()
        finally:
            self._closed = True
            if self._failed:
                self._held.abort()
            self._stack.close()

    def write_memory(self) -> None:
        """memory.json: per tier the ledger's figures beside plan and budget, and the process tree's RAM; all bytes."""
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
        self.run.write_memory({"tiers": tiers, "process": {"pss_peak": self._sampler.peak}})

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
            yield
        except BaseException:
            self._failed = True
            for run in self._runs:
                run.abandon()
            raise

    def _split(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        micro = split(batch, self.config.train.micro_batch_size)
        if len(micro) > self.plan_micro_batches:
            raise OffloadError(
                f"the batch makes {len(micro)} micro-batches; the plan has memory for {self.plan_micro_batches} "
                f"(train.global_batch_size {self.config.train.global_batch_size})"
            )
        return micro

    @property
    def plan_micro_batches(self) -> int:
        """M, the number of micro-batches that memory was planned for."""
        train = self.config.train
        return -(-train.global_batch_size // train.micro_batch_size)

    def _log(self, result: StepResult) -> None:
        lanes, moved = self._trace.end_step(result.step)
        self.run.append_metrics(
            {
                "step": result.step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "seconds": result.seconds,
                "tokens": result.tokens,
                "tokens_per_second": result.tokens / result.seconds,
                "lane_seconds": lanes,
                "busiest_lane": max(lanes, key=lanes.__getitem__),
                "peak_bytes": {tier: self.ledger.peak(tier) for tier in ("gpu", "cpu", "cxl", "nvme")},
                "io_bytes": moved,
            }
        )


def _refuse_unfit(prepared: Prepared) -> None:
    plan = prepared.plan
    if not plan.fits:
        short = "; ".join(
            f"{tier} needs {plan.peak_bytes[tier]:,} bytes, the budget is {plan.budget_bytes[tier]:,}"
            for tier in plan.shortfall_bytes
        )
        raise DoesNotFit(f"the run does not fit: {short}. " + " ".join(plan.suggestions))
