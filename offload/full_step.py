"""One step of full fine-tuning, readable from top to bottom.

forward    for each unit in order: bind its weights, pass every micro-batch through it;
           a micro-batch that reaches its loss runs backward through the last unit at once
backward   for each unit in reverse: bind, run every micro-batch again with grad, drain the summed gradient
update     AdamW where the state lives, in backward or ahead of the next forward; of a unit that lives on the device
           in backward, or once the norm is known
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.activation_stream import ActivationStream
from offload.adamw import Hyper
from offload.boundary import Boundaries, MicroBatch, backward_order
from offload.device_update import DeviceUpdates
from offload.errors import OffloadError
from offload.gradient_stream import GradientStream, UnitGradient
from offload.head_loss import HeadLoss, find_head
from offload.loss import LossItems, Scale, micro_seed
from offload.norms import clipping
from offload.prepare import Prepared
from offload.resources import TIMEOUT, Resources
from offload.schedule import learning_rates
from offload.step_counts import StepCounts
from offload.units import Unit
from offload.update_chunk import Lent
from offload.update_stream import UpdateStream
from offload.weight_stream import WeightStream

# Roles of the optimizer state beside the weights themselves.
_STATE = ("master", "exp_avg", "exp_avg_sq")
# Steps in a row that were not clipped, after which updates are tried in backward. At the start of most fine-tunings
# the norm is far above the limit, and each trial that is taken back costs the traffic of its state.
TRIAL_AFTER = 3


@dataclass(frozen=True)
class Outcome:
    """What a step computed: the global batch's loss, the gradient's norm before clipping, and the learning rate.

    `activation_fallbacks` counts passes of micro-batches through units whose activations took more room than planned.
    """

    loss: float
    grad_norm: float
    lr: float
    activation_fallbacks: int = 0


class FullStep:
    """Forward, backward and AdamW update of one global batch through the streams of a run.

    Args:
        stack: closes the streams, last opened first.
        meta: of the last commit; `parameter_steps` holds the step count of every parameter.
    """

    def __init__(self, prepared: Prepared, held: Resources, meta: dict[str, Any], stack: ExitStack) -> None:
        cfg = prepared.config.train
        self._config = cfg
        self._model = prepared.model
        self._plan = prepared.plan
        self._units = prepared.units
        self._device = prepared.device
        self._heap = held.device.heap
        self._framework = {unit.name: unit.framework for unit in self._plan.units}
        device = self._plan.categories["gpu"]
        self._comes_and_goes = device.get("activations", 0) + device.get("framework", 0)
        self._ledger = held.ledger
        self._trace = held.trace
        self._clips = cfg.max_grad_norm is not None
        self._lr = learning_rates(cfg.schedule.name, cfg.optimizer.lr, cfg.schedule.warmup_steps, cfg.steps or 1)
        self._runs: list[MicroBatch] = []
        self._unclipped_steps = 0  # the last ones in a row
        self._step = 0  # of the step under way: completed steps before it
        self.completed_steps = int(meta["step"])
        trained = [slot.name for unit in self._units for slot in unit.layout.params if slot.trainable]
        self._counts = StepCounts(trained, meta["parameter_steps"])
        self._parameter_order = {name: i for i, (name, _) in enumerate(self._model.named_parameters())}
        # What is known of the next step's visits: the order of the units at first, then what the last step did.
        forward = [u.index for u in self._units if not u.resident]
        self._visits = {True: forward + forward[::-1], False: forward}
        kept = {unit.name for unit in self._plan.units if unit.activations["keep"] == 1.0}
        self._last_unit = next((u.index for u in reversed(self._units) if u.name in kept), -1)
        self._open_streams(held, prepared.workload.micro_batches, stack)

    def _open_streams(self, held: Resources, micro_batches: int, stack: ExitStack) -> None:
        self._updates = UpdateStream(
            held.states, held.update, held.gradient_dtype, held.device, self._trace, TIMEOUT
        )
        stack.callback(self._updates.close)
        self._on_device = DeviceUpdates(
            held.states.units, held.gradient_dtype, held.device_scratch, held.device, self._updates, self._trace,
            TIMEOUT,
        )  # fmt: skip
        self._gradients = GradientStream(
            held.states.units, held.gradient_slots, held.landing, held.gradient_dtype, held.device,
            self._clips, self._update_landed, self._trace, TIMEOUT,
        )  # fmt: skip
        stack.callback(self._gradients.close)
        self._weights = WeightStream(
            held.states.units, held.weight_slots, held.resident, held.dtype, held.device, held.staging,
            self._updates, self._trace, TIMEOUT,
        )  # fmt: skip
        stack.callback(self._weights.close)
        self.activations = ActivationStream(
            self._plan, held.activation_tiers, held.activation_staging, held.kept_room, held.kept_memory, micro_batches,
            self._weights.generation, [b for b in (held.resident,) if b is not None], held.device, self._ledger,
            self._trace, TIMEOUT,
        )  # fmt: skip
        stack.callback(self.activations.close)
        head = find_head(self._model, self._units) if self._plan.head_chunks else None
        loss = HeadLoss(self._plan.head_chunks, self._gradients.slot)
        chunked = None if head is None else (head, loss)
        self._boundaries = Boundaries(self._units, self._device, chunked, self._config.compile)
        stack.callback(self._boundaries.close)
        self._loss_items = LossItems(self._model)
        stack.callback(self._loss_items.close)

    def step(self, micro: list[dict[str, Any]], step: int, durable: bool) -> Outcome:
        """Forward and backward of one global batch; returns when its gradients are complete and updates are queued.

        Args:
            micro: the micro-batches, in order.
            step: completed steps before this one.
            durable: this step will be committed, so RAM homes are written to the store too.
        """
        self._step, self._durable = step, durable
        self._heap.begin_step()
        self._counts.begin_step()
        self._trial: Future[bool] | None = Future() if self._tries() else None
        self._updates.check()
        runs = self._start(micro, training=True)
        self.activations.begin()
        losses = self._forward(runs)
        self._backward(runs)
        self.activations.end()
        gradients = self._gradients.finish()
        loss = _summed(losses)
        norms = {name: norm for gradient in gradients.values() for name, norm in gradient.norms.items()}
        norm, coefficient = clipping(norms, self._parameter_order, self._config.max_grad_norm)
        if self._clips:
            self._update_clipped(gradients, coefficient)
        if durable:
            self._carry_over(gradients)
        for index in gradients:
            unit = self._units[index]
            if index not in self._lent and not self._on_device.has(unit):  # these hold the new weights
                self._weights.outdate(unit)
        self._weights.expect(self._visits[True])
        return Outcome(loss, norm, self._lr(step), self.activations.fallbacks)

    def evaluate(self, micro: list[dict[str, Any]], step: int) -> float:
        """The loss of one global batch in evaluation mode, without an update; pending updates are seen."""
        self._step = step
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        loss = _summed(self._forward(self._start(micro, training=False)))
        for module, mode in modes.items():
            module.training = mode
        self._weights.expect(self._visits[True])
        return loss

    def logged(self) -> None:
        """The step's row is written; nothing else has to be."""

    def commit(self, meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]) -> None:
        """Once all queued updates are durable: call `first`, make the store's next version, call `then`."""
        self._updates.commit(meta, first, then)

    def flush(self) -> None:
        """Wait until every queued update is applied and every queued commit is on disk."""
        self._weights.finish_outdated()
        self._updates.flush()

    def abandon(self) -> None:
        """After an error: unwind the model's forward passes that will not go on."""
        for run in self._runs:
            run.abandon()

    def meta(self, completed: int) -> dict[str, Any]:
        """What a commit after `completed` steps has to hold of this method."""
        return {
            "parameter_steps": self._counts.to_meta(),
            # The next step's learning rate follows from this and the configuration.
            "schedule": {"name": self._config.schedule.name, "next_lr": self._lr(completed)},
        }

    # ---- one step ----

    def _start(self, micro: list[dict[str, Any]], training: bool) -> list[MicroBatch]:
        """One coroutine per micro-batch, each at the start of its forward."""
        self._weights.expect(self._visits[training])
        self._weights.bind_resident()
        if training:
            for unit in self._units:
                if unit.resident:
                    self._gradients.open(unit)
        self._visited: list[int] = []
        self._lent: dict[int, Lent] = {}
        self._runs = runs = []
        for i, (inputs, scale) in enumerate(zip(micro, self._loss_items.scales(micro), strict=True)):
            seed = micro_seed(self._config.seed, self._step, i)
            runs.append(MicroBatch(self._forward_of(inputs, scale), seed, self._device, training))
        return runs

    def _forward_of(self, inputs: dict[str, Any], scale: Scale) -> Callable[[], Tensor]:
        moved = {k: v.to(self._device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return lambda: self._loss_items.forward(self._model, moved, scale)

    def _forward(self, runs: list[MicroBatch]) -> list[Tensor]:
        """All micro-batches through one unit before the next begins. Returns the scaled losses in order, on the device:
        to read one would keep this thread from launching what follows."""
        waiting = [self._advance(run, "the start") for run in runs]
        if any(unit is None for unit in waiting):
            raise OffloadError(f"{type(self._model).__name__} came to its loss without passing through any unit")
        losses = [torch.zeros(())] * len(runs)
        while unit := next((u for u in waiting if u is not None), None):
            self._visited.append(unit.index)
            with self._weights.bound(unit):
                for i, run in enumerate(runs):
                    if waiting[i] is not unit:
                        continue
                    self._enter(unit, backward=False)
                    run.keep_graph = run.training and unit.index == self._last_unit
                    run.saving = self.activations.saving(unit, i) if run.training and not run.keep_graph else None
                    waiting[i] = self._advance(run, unit.name)
                    if waiting[i] is None:
                        losses[i] = self._finish(run, unit)
                    elif run.keep_graph:
                        run.tape[-1].kept = None  # not the last unit after all: its slot will be refilled
                if all(unit is None for unit in waiting):
                    if runs[0].training:
                        self._weights.finish_outdated()
                        self._updates.start_all()  # of units that this forward passed over
                        self._expect_updates()
                    self._drain_if_done(unit, runs)
        if runs[0].training:
            self._last_unit = self._visited[-1]
        else:
            self._visits[False] = self._visited
        return losses

    def _enter(self, unit: Unit, backward: bool) -> None:
        """A micro-batch passes `unit` next."""
        held = self._ledger.snapshot().get("gpu", {}).get("activations", {"bytes": 0})["bytes"]
        planned = self._framework[unit.name]
        coming = planned.get("backward" if backward else "forward")
        if unit.index == self._last_unit:  # its backward follows at once
            coming = max(planned.values(), default=coming)
        self.activations.make_room(unit, self._comes_and_goes - held - (coming or 0), backward)
        self._heap.enter(f"{unit.kind} {backward}", held, coming)

    def _finish(self, run: MicroBatch, unit: Unit) -> Tensor:
        """A micro-batch has its loss: backward to the leaves and through the last unit, while its weights are bound."""
        assert run.loss is not None
        value = run.loss.detach()
        if run.training:
            last = bool(run.tape) and run.tape[-1].unit is unit
            if last:
                self._gradients.open(unit)
            with self._trace.span("compute", "backward of the loss"):
                run.backward_loss()
            if last:
                self._backward_unit(run, unit)
        return value

    def _backward(self, runs: list[MicroBatch]) -> None:
        """Units in reverse; within a unit the micro-batches in order: gradients are summed as in a plain loop."""
        order = deque(backward_order(runs))
        self.activations.expect([record for _, here in order for _, record in here])
        while order:
            unit, here = order.popleft()  # a record that is done must not be held: its inputs' gradients hang on it
            if any(record.differentiable for _, record in here):
                self._visited.append(unit.index)
                self._gradients.open(unit)
                with self._weights.bound(unit):
                    for run, _ in here:
                        self._backward_unit(run, unit)
                    self._drain_if_done(unit, runs)
            else:
                for run, _ in here:
                    self._backward_unit(run, unit)
                self._drain_if_done(unit, runs, bound=False)
        self._visits[True] = self._visited
        for unit in self._units:
            if unit.resident:
                self._drain_if_done(unit, runs)

    def _drain_if_done(self, unit: Unit, runs: list[MicroBatch], bound: bool = True) -> None:
        """Drain the unit's gradient once no micro-batch will come back to it; without clipping its update follows, and
        takes the weights from the slot they are bound in."""
        if any(record.unit is unit for run in runs for record in run.tape) or not self._gradients.is_open(unit):
            return
        if self._on_device.has(unit):
            if not self._clips:
                self._update_on_device(unit, None)
            self._gradients.close_unit(unit, update=not self._clips and self._durable, stay=self._clips)
            return
        now = not self._clips or (self._trial is not None and self._updates.can_try(unit))
        if bound and now:
            self._lent[unit.index] = self._weights.lend(unit)
        self._gradients.close_unit(unit, update=now)

    def _advance(self, run: MicroBatch, name: str) -> Unit | None:
        passed = len(run.tape)
        with self._trace.span("compute", f"forward of {name}"):
            wanted = run.advance()
        if len(run.tape) > passed:
            self._ledger.add("gpu", "activations", run.tape[-1].nbytes)
            self.activations.passed(run)
        return wanted

    def _backward_unit(self, run: MicroBatch, unit: Unit) -> None:
        self._enter(unit, backward=True)
        with self.activations.present(run.tape[-1]), self._trace.span("compute", f"backward of {unit.name}"):
            record = run.backward_unit()
        self._ledger.remove("gpu", "activations", record.nbytes)

    # ---- norm, update, commit ----

    def _hyper(self, coefficient: Tensor | None) -> Hyper:
        o = self._config.optimizer
        return Hyper(self._lr(self._step), o.betas[0], o.betas[1], o.eps, o.weight_decay, coefficient)

    def _update_clipped(self, gradients: dict[int, UnitGradient], coefficient: Tensor | None) -> None:
        """Decide the trials, and hold the other updates for the next forward, which starts each when its unit has a
        slot. Units without a trial, and all if the trials are taken back, are among the others; but those that live on
        the device are updated at once."""
        unclipped = coefficient is None
        self._unclipped_steps = self._unclipped_steps + 1 if unclipped else 0
        tried: set[int] = set()
        if self._trial is not None:
            if unclipped:
                tried = {index for index in gradients if self._updates.can_try(self._units[index])}
                self._updates.forget_trials()
            else:
                for index in self._lent:
                    self._weights.invalidate(self._units[index])
                self._lent.clear()
            self._trial.set_result(unclipped)
        first_use = {index: i for i, index in reversed(list(enumerate(self._visits[True])))}
        in_order = [self._units[i] for i in sorted(gradients, key=lambda i: first_use.get(i, -1))]
        order = [unit for unit in in_order if unit.index not in tried and not self._on_device.has(unit)]
        for unit in order:
            gradient = gradients[unit.index]
            self._updates.defer(
                unit, gradient.present, self._counts.count(gradient), self._hyper(coefficient), self._durable
            )
        held = [unit for unit in order if self._weights.holds(unit)]
        self._updates.expect([u for u in order if gradients[u.index].present], ("param", *_STATE, "grad"), held)
        for unit in in_order:
            if self._on_device.has(unit):
                self._update_on_device(unit, coefficient)
                self._gradients.release(unit)
                if self._durable:
                    self._on_device.write(unit, self._hyper(coefficient))

    def _update_on_device(self, unit: Unit, coefficient: Tensor | None) -> None:
        """The unit lives on the device: update it there, from its gradient's slot."""
        gradient, summed = self._gradients.summed(unit)
        hyper = self._hyper(coefficient)
        self._on_device.step(unit, summed, gradient.present, self._counts.count(gradient), hyper)
        self._weights.changed(unit)

    def _update_landed(self, gradient: UnitGradient, host: Tensor, done: Callable[[], None]) -> None:
        """Without clipping, or for a trial: the gradient lane calls this when a unit's gradient is on the host."""
        unit = gradient.unit
        if self._on_device.has(unit):  # updated before the gradient left; what is due is written
            self._on_device.write(unit, self._hyper(None), waited=True)
            done()
            return
        steps = self._counts.count(gradient)
        lent = self._lent.get(unit.index)
        self._updates.submit(
            unit, gradient.present, steps, self._hyper(None), self._durable, host, done, lent, self._trial
        )

    def _expect_updates(self) -> None:
        """Updates made in backward come in its order; their state may be read ahead."""
        if not self._clips or self._trial is not None:
            backward = [self._units[i] for i in dict.fromkeys(reversed(self._visited))]
            backward += [u for u in self._units if u.resident]
            here = [u for u in backward if not self._on_device.has(u)]
            self._updates.expect([u for u in here if not self._clips or self._updates.can_try(u)], _STATE)

    def _tries(self) -> bool:
        """Whether to update in backward as if nothing were clipped: after a few steps in which nothing was."""
        return self._clips and self._plan.commit_every == 1 and self._unclipped_steps >= TRIAL_AFTER

    def _carry_over(self, gradients: dict[int, UnitGradient]) -> None:
        """A unit without gradient keeps its state, but what of it lives in RAM belongs to this step's commit too."""
        for unit in self._units:
            if not unit.trainable or unit.index in gradients:
                continue
            if self._on_device.has(unit):
                self._on_device.write(unit, self._hyper(None))
            else:
                self._updates.submit(unit, set(), {}, self._hyper(None), durable=True)


def _summed(losses: list[Tensor]) -> float:
    """The global batch's loss: waits for the device."""
    return sum(loss.item() for loss in losses)
