"""One zeroth-order step, readable from top to bottom.

walk       for each unit in order: apply the last step's update to its weights and send them home; form the perturbed
           weights of each branch and pass every micro-batch of that branch through the unit
measure    the projected gradient of each direction, from the losses of its two branches
log        (seed, projected gradient): the update, which the next walk applies

A branch is a set of perturbed weights; its micro-batches are coroutines that stop before every unit (`boundary`). No
gradient is made and no activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from offload.boundary import Boundaries, MicroBatch
from offload.config_sections import ZoConfig
from offload.errors import OffloadError
from offload.full_step import Outcome
from offload.loss import LossItems, Scale, micro_seed
from offload.prepare import Prepared
from offload.resources import TIMEOUT, Resources
from offload.rundir import RunDirectory, read_jsonl
from offload.schedule import learning_rates
from offload.units import Unit
from offload.zo import direction_seed
from offload.zo_log import NAME, UpdateLog, encode, read_log
from offload.zo_processes import Processes, check_settings, common_log
from offload.zo_stream import Slot, UnitStream
from offload.zo_variants import Branch, Update, make_variant
from offload.zo_writeback import WriteBack


class ZerothOrderStep:
    """Forward passes and updates of one global batch through the streams of a run.

    Args:
        run: its log of updates is read and continued.
        stack: closes the streams, last opened first.
    """

    def __init__(self, prepared: Prepared, held: Resources, run: RunDirectory, stack: ExitStack) -> None:
        cfg = prepared.config
        self._config = cfg.train
        self._zo = cfg.zo or ZoConfig()
        self._model = prepared.model
        self._units = prepared.units
        self._device = prepared.device
        self._ledger = held.ledger
        self._trace = held.trace
        self._states = held.states
        self._variant = make_variant(cfg)
        self._lr = learning_rates(
            cfg.train.schedule.name, cfg.train.optimizer.lr, cfg.train.schedule.warmup_steps, cfg.train.steps or 1
        )
        self._processes = Processes()
        stack.callback(self._processes.close)
        check_settings(self._processes, cfg)
        self._together = prepared.workload.zo.together if prepared.workload.zo else 2
        self._runs: list[MicroBatch] = []
        forward = [u.index for u in self._units if not u.resident]
        self._visits = self._order(forward)
        self._resident_buffer = held.resident
        self._open_streams(held, stack)
        self._restore(held, run, stack)

    def _restore(self, held: Resources, run: RunDirectory, stack: ExitStack) -> None:
        """How far every unit of the last commit had come, and the updates that it waits for: the log's."""
        meta = held.store.meta.get("zo", {})
        applied = meta.get("applied", {})
        self._applied = {u.index: int(applied.get(str(u.index), 0)) for u in self._units}
        self._pieces.thresholds.update(meta.get("thresholds", {}))
        committed, replays = int(held.store.meta["step"]), not held.store.meta["buffers"]
        updates = common_log(self._processes, _logged(run, held.store.meta), committed, replays)
        self.completed_steps = len(updates)
        self._pending = [u for u in updates if u.step >= min(self._applied.values())]
        self._log = UpdateLog(run.path, updates)
        stack.callback(self._log.close)

    def _open_streams(self, held: Resources, stack: ExitStack) -> None:
        assert held.pieces is not None
        self._pieces = held.pieces
        self._home = WriteBack(held.states, self._pieces, held.device, held.update, self._trace, TIMEOUT)
        stack.callback(self._home.close)
        self._stream = UnitStream(
            held.states.units, held.weight_slots["block"], self._pieces, held.device, held.staging, self._home,
            self._trace, TIMEOUT,
        )  # fmt: skip
        stack.callback(self._stream.close)
        self._placeholder = torch.full((1,), float("nan"), dtype=held.dtype, device=self._device)
        for unit in self._units:
            self._unbind(unit)
        self._boundaries = Boundaries(self._units, self._device, compiles=self._config.compile)
        stack.callback(self._boundaries.close)
        self._loss_items = LossItems(self._model)
        stack.callback(self._loss_items.close)

    # ---- what the engine calls ----

    def step(self, micro: list[dict[str, Any]], step: int, durable: bool) -> Outcome:
        """All forward passes of one global batch; returns when its update is known, which the next walk applies."""
        self._home.check()
        lr, eps = self._lr(step), self._zo.eps
        seeds = [direction_seed(self._config.seed, step, i) for i in range(self._zo.samples)]
        pairs = self._walk(micro, [Branch(seed, sign * eps) for seed in seeds for sign in (1, -1)], step)
        measured = [self._clipped((pairs[2 * i] - pairs[2 * i + 1]) / (2 * eps)) for i in range(len(seeds))]
        update = Update(step, lr, tuple(zip(seeds, measured, strict=True)))
        if self._variant.tries_both_ways:
            update = self._best_of(micro, update)
        self.completed_steps, self._last = step + 1, update
        self._pending.append(update)
        self._stream.expect(self._visits)
        return Outcome(sum(pairs) / len(pairs), sum(abs(g) for g in measured) / len(measured), lr)

    def evaluate(self, micro: list[dict[str, Any]], step: int) -> float:
        """The loss of one global batch in evaluation mode, without an update; the pending one is applied before."""
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            loss = self._walk(micro, [Branch()], step)[0]
        finally:
            for module, mode in modes.items():
                module.training = mode
        self._stream.expect(self._visits)
        return loss

    def logged(self) -> None:
        """The step's row is written: write its update to the log, from which the run can go on.

        Nobody goes on, or commits, before every process has done so.
        """
        self._log.append(self._last)
        self._processes.wait()

    def commit(self, meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]) -> None:
        """Once all that was sent home has arrived: call `first`, make the store's next version, call `then`."""

        def before() -> None:
            first()
            self._log.sync()

        self._home.commit(meta, before, then)

    def flush(self) -> None:
        """Apply the pending update to every unit that has not seen it, and wait until all is home."""
        for unit in self._units:
            if self._waits_for(unit):
                with self._stream.visit(unit) as slot:
                    self._advance(unit, slot)
        self._home.flush()

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Whether any process was asked to stop, the same in all of them between two steps."""
        return self._processes.agreed(asked)

    def abandon(self) -> None:
        """After an error: unwind the model's forward passes that will not go on."""
        for run in self._runs:
            run.abandon()

    def meta(self, completed: int) -> dict[str, Any]:
        """What a commit has to hold of this method: how far each unit is, and the updates that are still to come."""
        first = min(self._applied.values())
        return {
            "zo": {
                "applied": {str(index): step for index, step in self._applied.items()},
                "pending": [encode(update) for update in self._pending if update.step >= first],
                "thresholds": self._pieces.thresholds,
            },
            "schedule": {"name": self._config.schedule.name, "next_lr": self._lr(completed)},
        }

    # ---- one step ----

    def _clipped(self, projected: float) -> float:
        limit = self._zo.clip
        return projected if limit is None else max(-limit, min(limit, projected))

    def _best_of(self, micro: list[dict[str, Any]], update: Update) -> Update:
        """The update, its opposite, or none of it: after which this batch's loss is lowest (a tie keeps the first)."""
        tried = [
            Update(update.step, update.lr, tuple((seed, factor * g) for seed, g in update.draws))
            for factor in (0.0, 1.0, -1.0)
        ]
        losses = self._walk(micro, [Branch(), *(Branch(update=u) for u in tried[1:])], update.step)
        return tried[losses.index(min(losses))]

    def _walk(self, micro: list[dict[str, Any]], branches: list[Branch], step: int) -> list[float]:
        """Pass every micro-batch of every branch through all units, once; returns the loss of each branch.

        A process runs its share of the (branch, micro-batch) pairs; the losses are exchanged.
        """
        if len(branches) > self._together:
            raise OffloadError(f"{len(branches)} branches at once; the plan has memory for {self._together}")
        self._stream.expect(self._visits)
        mine = self._processes.share(len(branches) * len(micro))
        found: dict[int, Tensor] = {}  # read when all is launched: until then nobody waits for the device
        scales = self._loss_items.scales(micro)
        self._visit_resident(branches, step)
        self._visited: list[int] = []
        runs: dict[int, MicroBatch] = {}
        for item in mine:
            i = item % len(micro)
            seed = micro_seed(self._config.seed, step, i)
            runs[item] = MicroBatch(self._forward_of(micro[i], scales[i]), seed, self._device, training=False)
        self._runs = list(runs.values())
        waiting = {item: self._pass(run, branches, item // len(micro), None) for item, run in runs.items()}
        if any(unit is None for unit in waiting.values()):
            raise OffloadError(f"{type(self._model).__name__} came to its loss without passing through any unit")
        while unit := next((u for u in waiting.values() if u is not None), None):
            self._visited.append(unit.index)
            here = sorted({item // len(micro) for item, wanted in waiting.items() if wanted is unit})

            def run_branch(b: int, unit: Unit = unit) -> None:
                for item in [k for k, wanted in waiting.items() if wanted is unit and k // len(micro) == b]:
                    waiting[item] = self._pass(runs[item], branches, b, unit)
                    if waiting[item] is None:
                        found[item] = self._loss_of(runs[item])

            self._visit(unit, branches, here, step, run_branch)
        self._runs = []
        self._visits = self._order(self._visited or self._visits[1:])
        losses = [found[item].item() if item in found else 0.0 for item in range(len(branches) * len(micro))]
        losses = self._processes.exchange(losses, mine)
        return [sum(losses[b * len(micro) : (b + 1) * len(micro)]) for b in range(len(branches))]

    def _visit(
        self, unit: Unit, branches: list[Branch], here: list[int], step: int, run: Callable[[int], None]
    ) -> None:
        """Bring one unit's weights in, and run the branches that wait for it, each on its own weights."""
        with self._stream.visit(unit) as slot:
            active = unit.trainable and self._variant.active(unit.index, step)
            wanted = [branches[b] if active else Branch() for b in here]
            clean = not unit.trainable or (self._pieces.in_place and all(branch == Branch() for branch in wanted))
            if clean:  # what is in the slot can be computed with
                self._advance(unit, slot)
                self._bind(unit, slot.buffer, slot)
                for b in here:
                    run(b)
            else:
                self._visit_perturbed(unit, slot, wanted, here, run)
            self._unbind(unit)

    def _visit_perturbed(
        self, unit: Unit, slot: Slot, wanted: list[Branch], here: list[int], run: Callable[[int], None]
    ) -> None:
        other: Slot | None = self._stream.take()
        try:
            for n, (b, branch) in enumerate(zip(here, wanted, strict=True)):
                assert other is not None
                if n == 0:
                    self._advance(unit, slot, branch, other)
                elif n == len(here) - 1 and self._pieces.in_place and (slot.leaving is None or slot.leaving.done()):
                    # The clean weights are at home: the last perturbation takes their place, and the other slot a unit.
                    if slot.leaving is not None:
                        slot.leaving.result()
                    self._form(unit, slot, branch, slot)
                    self._unbind(unit)
                    self._stream.give_back(other)
                    other = None
                elif branch != wanted[n - 1]:
                    self._form(unit, slot, branch, other)
                self._bind(unit, (other or slot).buffer, slot)
                run(b)
        finally:
            if other is not None:
                self._stream.give_back(other)

    def _visit_resident(self, branches: list[Branch], step: int) -> None:
        """The leftovers stay on the device through a walk, one copy for each branch."""
        self._resident: tuple[Unit, list[Tensor]] | None = None
        for unit in self._units:
            if not unit.resident:
                continue
            assert self._resident_buffer is not None
            size = self._resident_buffer.numel() // self._together
            copies = [self._resident_buffer[i * size : (i + 1) * size] for i in range(len(branches))]
            with self._stream.visit(unit) as slot:
                self._advance(unit, slot)
                frozen = self._pieces.part(unit.layout, slot.buffer, "frozen")
                for copy, branch in zip(copies, branches, strict=True):
                    self._pieces.part(unit.layout, copy, "frozen").copy_(frozen)
                    if unit.trainable:
                        active = self._variant.active(unit.index, step)
                        self._pieces.advance(unit.layout, slot.buffer, (), branch if active else Branch(), copy)
            self._resident = (unit, copies)

    def _pass(self, run: MicroBatch, branches: list[Branch], branch: int, unit: Unit | None) -> Unit | None:
        """One micro-batch through a unit, up to the next; the leftovers are those of its branch."""
        if self._resident is not None:
            resident, copies = self._resident
            self._bind(resident, copies[branch], None)
        before = run.holds
        with self._trace.span("compute", f"forward of {unit.name if unit else 'the start'}"):
            wanted = run.advance()
        self._ledger.add("gpu", "activations", run.holds)  # what came in is there until what goes out is
        self._ledger.remove("gpu", "activations", before if wanted is not None else before + run.holds)
        return wanted

    def _loss_of(self, run: MicroBatch) -> Tensor:
        assert run.loss is not None
        loss, run.loss = run.loss.detach(), None
        return loss

    def _forward_of(self, inputs: dict[str, Any], scale: Scale) -> Callable[[], Tensor]:
        moved = {k: v.to(self._device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return lambda: self._loss_items.forward(self._model, moved, scale)

    def _order(self, forward: list[int]) -> list[int]:
        """The leftovers first, then the units as they were visited last time."""
        return [u.index for u in self._units if u.resident] + forward

    # ---- weights ----

    def _waits_for(self, unit: Unit) -> list[Update]:
        """The updates that the unit has not seen and that change it."""
        if not unit.trainable:
            return []
        done = self._applied[unit.index]
        return [u for u in self._pending if u.step >= done and self._variant.active(unit.index, u.step)]

    def _advance(self, unit: Unit, slot: Slot, branch: Branch | None = None, target: Slot | None = None) -> None:
        """Bring the unit's weights up to date and send them home; form the weights of a branch in the same pass."""
        updates = self._waits_for(unit)
        if unit.trainable and (updates or branch is not None):
            with self._trace.span("optimizer", unit.name, launches=True):
                into = target.buffer if target is not None else None
                self._pieces.advance(unit.layout, slot.buffer, updates, branch, into)
        self._applied[unit.index] = self.completed_steps
        if updates:
            slot.leaving = self._home.send(unit, slot.buffer)
        done = min(self._applied.values())
        self._pending = [u for u in self._pending if u.step >= done]

    def _form(self, unit: Unit, slot: Slot, branch: Branch, target: Slot) -> None:
        with self._trace.span("optimizer", unit.name, launches=True):
            self._pieces.advance(unit.layout, slot.buffer, (), branch, target.buffer)

    def _bind(self, unit: Unit, buffer: Tensor, slot: Slot | None) -> None:
        """Parameters become views: trainable ones of weights in `buffer`, frozen ones of the slot they came in."""
        weights = self._pieces.weights(unit.layout, buffer)
        frozen = self._pieces.part(unit.layout, buffer if slot is None else slot.buffer, "frozen").view(weights.dtype)
        for parameter, place in zip(unit.parameters, unit.layout.params, strict=True):
            source = weights if place.trainable else frozen
            parameter.data = source[place.offset : place.offset + place.numel].view(place.shape)

    def _unbind(self, unit: Unit) -> None:
        for parameter, place in zip(unit.parameters, unit.layout.params, strict=True):
            parameter.data = self._placeholder.expand(place.shape)


def _logged(run: RunDirectory, meta: dict[str, Any]) -> list[Update]:
    """The updates of a run that can be gone on after: the log's, as far as every line has its row in the metrics.

    A model that changes its own buffers (running statistics) goes on at its last commit: they cannot be made again.
    """
    committed = int(meta["step"])
    updates = read_log(run.path / NAME)
    rows = sum(1 for _ in read_jsonl(run.metrics_path))
    return updates[: committed if meta["buffers"] else max(committed, min(len(updates), rows))]
