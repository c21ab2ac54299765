"""Boundaries around units: each micro-batch's forward is a coroutine that stops before every unit.

A boundary cuts the autograd graph: a unit runs without grad on detached inputs and its outputs become leaves, so that
nothing of the unit stays alive but what is recorded. Backward runs the unit again with grad (or uses the graph that was
kept, for the last unit or by plan), then pushes the input gradients through what the model computes between units, the
*glue*. The model's own `forward` runs everything else; nothing here knows any architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers.cache_utils import Cache

from offload import capture
from offload.activation_saving import SavedTensors
from offload.compiled import compiled
from offload.errors import OffloadError
from offload.head_loss import HeadLoss
from offload.mutable_buffers import Buffer, MutableBuffers, as_before
from offload.thread_state import ThreadState, no_autocast_cache, thread_state
from offload.units import Unit


@dataclass
class Record:
    """One pass of one micro-batch through one unit: what backward needs to run it again."""

    unit: Unit
    forward: Callable[..., Any]
    inputs: list[Any]  # flattened arguments as the model gave them: glue tensors or leaves of earlier units
    spec: pytree.TreeSpec
    state: ThreadState
    leaves: list[Any]  # flattened outputs; floating tensors are leaves whose .grad arrives from later units
    side: list[tuple[str, int, Tensor]]  # (collector key, position within this unit's own, leaf)
    collected: list[str] | None
    differentiable: bool
    versions: list[int]  # of the inputs: the glue must not change them before backward
    changed_buffers: list[Buffer] = field(default_factory=list)
    kept: tuple[list[Any], list[Any]] | None = None  # (detached inputs, outputs with their graph)
    saved: SavedTensors | None = None  # what the kept graph needs of the unit's inside, where the plan moves that
    nbytes: int = 0  # of the output leaves, each storage once


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
        gradients = _backward(record, self._device) if record.differentiable else []
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
                record, output = _stand_in(unit, *self._head, original, args, kwargs, self._device)
            else:
                run = trained if module.training else original
                record, output = _run(
                    unit, module, run, args, kwargs, self._device, micro_batch, mutable, run is not original
                )
            micro_batch.holds = record.nbytes
            if micro_batch.training:
                micro_batch.tape.append(record)
            return output

        module.forward = forward
        self._patched.append(module)


def _held_tensors(x: Any, depth: int = 2) -> list[Tensor]:
    """Tensors inside an object that the argument tree does not open: a mapping of another kind, say."""
    if torch.is_tensor(x):
        return [x]
    if depth == 0 or x is None or isinstance(x, (str, bytes, int, float, bool, type, nn.Module)):
        return []
    if isinstance(x, Mapping):
        inner = list(x.values())
    elif isinstance(x, (list, tuple, set)):
        inner = list(x)
    else:
        inner = list(getattr(x, "__dict__", {}).values())
    return [t for value in inner for t in _held_tensors(value, depth - 1)]


def _refuse_hidden_gradients(unit: Unit, values: list[Any], what: str) -> None:
    for x in values:
        if not torch.is_tensor(x) and any(t.requires_grad or t.grad_fn is not None for t in _held_tensors(x)):
            raise OffloadError(
                f"{unit.name}: {what} is a {type(x).__name__} that holds tensors with gradients, which cannot be "
                "followed through it; pass the tensors themselves, or a plain dict, list or tuple of them"
            )


def _run(
    unit: Unit,
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    device: str,
    micro_batch: MicroBatch,
    mutable: MutableBuffers,
    with_graph: bool,
) -> tuple[Record, Any]:
    """Run a unit on detached inputs and turn its outputs into leaves. `with_graph`: even where none is kept."""
    flat, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Cache))
    if any(isinstance(x, Cache) for x in flat):
        raise OffloadError(
            f"{unit.name} was given a key/value cache; training needs use_cache=False and none passed in"
        )
    state = ThreadState.now(device)
    differentiable = state.grad and (
        unit.trainable
        or any(torch.is_tensor(x) and x.requires_grad for x in flat)
        or any(p.requires_grad for p in module.parameters())
    )
    versions = [x._version if torch.is_tensor(x) else 0 for x in flat]
    opaque = [(x, [id(t) for t in _held_tensors(x)]) for x in flat if not torch.is_tensor(x)]
    if differentiable:
        _refuse_hidden_gradients(unit, flat, "an argument")
    before = mutable.copies()
    collector = capture.active()
    counts = capture.lengths(collector)

    saving = micro_batch.saving if differentiable else None
    keep = differentiable and (micro_batch.keep_graph or saving is not None)
    grad = differentiable and (keep or with_graph)
    inputs = [_detach(x, grad) for x in flat]
    hooks = saving.hooks(inputs, flat, list(module.buffers()), [b for _, b in before]) if saving else nullcontext()
    with torch.set_grad_enabled(grad), no_autocast_cache(), hooks:
        call_args, call_kwargs = pytree.tree_unflatten(inputs, spec)
        output = forward(*call_args, **call_kwargs)

    changed = [i for i, x in enumerate(flat) if torch.is_tensor(x) and x._version != versions[i]]
    filled = any([id(t) for t in _held_tensors(x)] != held for x, held in opaque)
    if changed or filled or pytree.tree_structure((call_args, call_kwargs)) != spec:
        what = f"argument {changed[0]}" if changed else "a container among its arguments"
        raise OffloadError(
            f"{unit.name} ({type(module).__name__}) changes {what} in place, so running it again in backward would see "
            "other values; make the block work on a copy"
        )
    out_flat, out_spec = pytree.tree_flatten(output)
    if differentiable:
        _refuse_hidden_gradients(unit, out_flat, "an output")
    leaves = [_leaf(x, differentiable) for x in out_flat]
    side: list[tuple[str, int, Tensor]] = []
    kept_side: list[Any] = []
    for key, start in counts.items():
        values = (collector or {})[key]
        for i in range(start, len(values)):
            if torch.is_tensor(values[i]):
                kept_side.append(values[i])
                values[i] = _leaf(values[i], differentiable)
                side.append((key, i - start, values[i]))
    record = Record(
        unit,
        forward,
        flat,
        spec,
        state,
        leaves,
        side,
        list(counts) if collector is not None else None,
        differentiable,
        versions,
    )
    record.changed_buffers = mutable.changed(before, state.grad)
    storages = {t.untyped_storage() for t in leaves if torch.is_tensor(t)}
    record.nbytes = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    if keep:
        record.kept, record.saved = (inputs, out_flat + kept_side), saving
    return record, pytree.tree_unflatten(leaves, out_spec)


def _stand_in(
    unit: Unit, head: nn.Linear, loss: HeadLoss, forward: Callable[..., Any], args: Any, kwargs: Any, device: str
) -> tuple[Record, Tensor]:
    """The head as the last unit, its logits left to the loss: backward of the loss is backward of this unit too.

    The record has no outputs, only the hidden states that get their gradient from the loss.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    (hidden,) = flat
    state = ThreadState.now(device)
    leaf = _detach(hidden, state.grad)
    trainable = unit.trainable or leaf.requires_grad
    record = Record(unit, forward, flat, spec, state, [], [], None, state.grad and trainable, [hidden._version])
    record.kept = ([leaf], [])
    return record, loss.logits(head, leaf)


def _backward(record: Record, device: str) -> list[tuple[Tensor, Tensor]]:
    """Run a record again with grad and backward through it; returns (input as the model gave it, its gradient)."""
    for i, (x, version) in enumerate(zip(record.inputs, record.versions, strict=True)):
        if torch.is_tensor(x) and x._version != version:
            raise OffloadError(
                f"the model changes argument {i} of {record.unit.name} in place after the call, so running it again in "
                "backward would see other values; make the model work on a copy"
            )
    with as_before(record.changed_buffers):
        inputs, outputs = record.kept or _run_again(record, device)
        record.kept = None
        leaves = record.leaves + [leaf for _, _, leaf in record.side]
        pairs = [
            (out, leaf.grad)
            for out, leaf in zip(outputs, leaves, strict=True)
            if torch.is_tensor(out) and out.requires_grad and leaf.grad is not None
        ]
        record.leaves, record.side = [], []
        del outputs, leaves
        if pairs:
            roots, gradients = [o for o, _ in pairs], [g for _, g in pairs]
            del pairs
            torch.autograd.backward(roots, gradients)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for x, detached in zip(record.inputs, inputs, strict=True):
        if torch.is_tensor(x) and x.requires_grad and detached.grad is not None:
            gradient = detached.grad
            found[id(x)] = (x, found[id(x)][1] + gradient if id(x) in found else gradient)
    return list(found.values())


def _run_again(record: Record, device: str) -> tuple[list[Any], list[Any]]:
    """The unit's forward with grad, as it was the first time; returns detached inputs and outputs with their graph."""
    inputs = [_detach(x, True) for x in record.inputs]
    with (
        thread_state(record.state, device),
        torch.enable_grad(),
        no_autocast_cache(),
        capture.recapture(record.collected) as collected,
    ):
        args, kwargs = pytree.tree_unflatten(inputs, record.spec)
        outputs = pytree.tree_flatten(record.forward(*args, **kwargs))[0]
        return inputs, outputs + [collected[key][i] for key, i, _ in record.side]


def _detach(x: Any, grad: bool) -> Any:
    if not torch.is_tensor(x):
        return x
    return x.detach().requires_grad_(grad and x.requires_grad)


def _leaf(x: Any, differentiable: bool) -> Any:
    if not torch.is_tensor(x):
        return x
    return x.detach().requires_grad_(differentiable and x.is_floating_point())


def _distinct(inputs: list[Any]) -> list[Tensor]:
    """The tensors among a unit's inputs that need a gradient, each once."""
    return list({id(x): x for x in inputs if torch.is_tensor(x) and x.requires_grad}.values())
