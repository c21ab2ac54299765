"""Boundaries around units: each micro-batch's forward is a coroutine that stops before every unit.

A boundary cuts the autograd graph: `unit_pass.py` runs a unit on its own. Backward runs the units again in reverse (or
uses the graph that was kept, for the last unit or by plan), then pushes their input gradients through what the model
computes between units, the *glue*. The model's own `forward` runs everything else; nothing here knows any architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from offload.activation_saving import SavedTensors
from offload.compiled import compiled
from offload.errors import OffloadError
from offload.head_loss import HeadLoss
from offload.mutable_buffers import MutableBuffers
from offload.thread_state import ThreadState, thread_state
from offload.unit_pass import Record, backward_of, run_unit, stand_in
from offload.units import Unit


class MicroBatch:
    """One micro-batch on its way through the model: a coroutine, its own thread state, and its tape of records."""

    def __init__(self, forward: Callable[[], Tensor], seed: int, device: str, training: bool) -> None:
        self._device = device
        self._coroutine = greenlet(forward)
        self._coroutine.micro_batch = self
        self.tape: list[Record] = []
        self.training = training
        self.loss: Tensor | None = None
        self.holds = 0  # bytes of the last unit's outputs
        # Set by the engine for the unit about to run: keep its graph as it is (the last unit's), or with these.
        self.keep_graph = False
        self.saving: SavedTensors | None = None
        self.after_head = False  # it has logits that were not computed: their weights may not leave before its loss
        self._pending: dict[int, Tensor] = {}  # gradients of glue tensors whose other consumers are still to come
        self._uses: dict[int, int] | None = None
        mine = ThreadState.now(device)
        torch.manual_seed(seed)
        torch.set_grad_enabled(training)
        self._state = ThreadState.now(device)
        mine.apply(device)

    def advance(self) -> Unit | None:
        """Run until the next unit's weights are needed (that unit is returned) or to the end (None; `loss` is set)."""
        with thread_state(self._state, self._device):
            wanted = self._coroutine.switch()
            self._state = ThreadState.now(self._device)
        if self._coroutine.dead:
            self.loss = wanted
            return None
        return wanted

    def abandon(self) -> None:
        """Unwind a coroutine that will not go on, so that context managers inside the model close."""
        if not self._coroutine.dead:
            with thread_state(self._state, self._device):
                self._coroutine.throw()

    def backward_loss(self) -> None:
        """Backward from the loss to the leaves of the units; its graph is freed unless other glue hangs on it."""
        loss, self.loss = self.loss, None
        assert loss is not None
        loss.backward(retain_graph=self._glue_is_shared(loss))

    def backward_unit(self) -> Record:
        """Backward of the last record on the tape: run it again, and push its input gradients through the glue."""
        if self._uses is None:
            self._uses = {}
            for record in self.tape:
                for x in _distinct(record.inputs):
                    self._uses[id(x)] = self._uses.get(id(x), 0) + 1
        record = self.tape.pop()
        gradients = backward_of(record, self._device) if record.differentiable else []
        ready: dict[int, Tensor] = {}
        for x, gradient in gradients:
            if x.is_leaf and not isinstance(x, nn.Parameter):
                x.grad = gradient if x.grad is None else x.grad + gradient
            else:
                before = self._pending.get(id(x))
                self._pending[id(x)] = gradient if before is None else before + gradient
        # A glue tensor read by several units (an encoder's output) flows back once, when its first reader is done:
        # the order in which autograd itself would have summed it.
        for x in _distinct(record.inputs):
            self._uses[id(x)] -= 1
            if self._uses[id(x)] == 0 and id(x) in self._pending:
                ready[id(x)] = x
        if ready:
            torch.autograd.backward(list(ready.values()), [self._pending.pop(key) for key in ready], retain_graph=True)
        return record

    def _glue_is_shared(self, loss: Tensor) -> bool:
        glue = [x.grad_fn for r in self.tape for x in r.inputs if torch.is_tensor(x) and x.grad_fn is not None]
        return bool(_graph(glue) & _graph([loss.grad_fn]))


def backward_order(runs: Sequence[MicroBatch]) -> list[tuple[Unit, list[tuple[MicroBatch, Record]]]]:
    """The passes in the order of their backward: units in reverse, within a unit the micro-batches in order."""
    order = []
    left = [len(run.tape) for run in runs]
    while any(left):
        longest = max(range(len(runs)), key=left.__getitem__)
        unit = runs[longest].tape[left[longest] - 1].unit
        here = [i for i, run in enumerate(runs) if left[i] and run.tape[left[i] - 1].unit is unit]
        order.append((unit, [(runs[i], runs[i].tape[left[i] - 1]) for i in here]))
        for i in here:
            left[i] -= 1
    return order


def _graph(heads: list[Any]) -> set[Any]:
    """All nodes of the autograd graph below `heads` that hold something (leaves do not)."""
    stack, seen = [node for node in heads if node is not None], set()
    while stack:
        node = stack.pop()
        if node not in seen and not hasattr(node, "variable"):
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return seen


def _distinct(inputs: list[Any]) -> list[Tensor]:
    """The tensors among a unit's inputs that need a gradient, each once."""
    return list({id(x): x for x in inputs if torch.is_tensor(x) and x.requires_grad}.values())


class Boundaries:
    """Patches the boundary modules of all units in place, and takes the patches back on `close`.

    Args:
        head: the module whose logits are computed together with the loss, and how; None for none.
        compiles: blocks run compiled while they train. Their first pass too is then made with a graph, which is
            dropped: without one it would be compiled apart, and might round or draw random numbers otherwise.
    """

    def __init__(
        self,
        units: list[Unit],
        device: str,
        head: tuple[nn.Linear, HeadLoss] | None = None,
        compiles: bool = False,
    ) -> None:
        self._device = device
        self._head = head
        self._compiles = compiles
        self._patched: list[nn.Module] = []
        for unit in units:
            for module in unit.modules:
                self._patch(unit, module)

    def close(self) -> None:
        """Restore every module's own `forward`."""
        for module in self._patched:
            del module.forward
        self._patched.clear()

    def _patch(self, unit: Unit, module: nn.Module) -> None:
        if "forward" in vars(module):
            raise OffloadError(
                f"{unit.name}: its forward is already replaced on the instance; wrap the model before other tools do"
            )
        original = module.forward
        trained = compiled(original) if self._compiles and unit.kind == "block" else original
        mutable = MutableBuffers(module)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            micro_batch = getattr(getcurrent(), "micro_batch", None)
            if micro_batch is None:
                raise OffloadError(
                    f"{unit.name} belongs to an offload engine, which holds its weights: use engine.step or "
                    "engine.evaluate instead of calling the model"
                )
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                raise OffloadError(
                    f"{unit.name} is called under open saved_tensors_hooks, which a coroutine switch would leak; close "
                    "them around the model's units"
                )
            if micro_batch.after_head:
                raise OffloadError(
                    f"{unit.name} runs after the head, whose logits were to be computed together with the loss; set "
                    "train.head_chunks to 0"
                )
            getcurrent().parent.switch(unit)
            last = micro_batch.keep_graph or not micro_batch.training
            autocast = torch.is_autocast_enabled(self._device)
            if self._head is not None and module is self._head[0] and last and not autocast:
                micro_batch.after_head = True
                record, output = stand_in(unit, *self._head, original, args, kwargs, self._device)
            else:
                run = trained if module.training else original
                record, output = run_unit(
                    unit, module, run, args, kwargs, self._device, mutable,
                    micro_batch.keep_graph, micro_batch.saving, with_graph=run is not original,
                )  # fmt: skip
            micro_batch.holds = record.nbytes
            if micro_batch.training:
                micro_batch.tape.append(record)
            return output

        module.forward = forward
        self._patched.append(module)
