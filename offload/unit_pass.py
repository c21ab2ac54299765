"""One pass of one micro-batch through one unit: cut off from the graph, recorded, and run again for its backward.

A unit runs without grad on detached inputs and its outputs become leaves, so that nothing of it stays alive but what is
recorded. Backward runs it again with grad, or uses the graph that was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers.cache_utils import Cache

from offload import capture
from offload.activation_saving import SavedTensors
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


def run_unit(
    unit: Unit,
    module: nn.Module,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    device: str,
    mutable: MutableBuffers,
    keep_graph: bool,
    saving: SavedTensors | None,
    with_graph: bool,
) -> tuple[Record, Any]:
    """Run a unit on detached inputs and turn its outputs into leaves.

    The graph is kept as it is with `keep_graph`, or with what it saved in `saving`; `with_graph`: it is made even where
    none is kept.
    """
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

    saving = saving if differentiable else None
    keep = differentiable and (keep_graph or saving is not None)
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


def stand_in(
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


def backward_of(record: Record, device: str) -> list[tuple[Tensor, Tensor]]:
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


def _detach(x: Any, grad: bool) -> Any:
    if not torch.is_tensor(x):
        return x
    return x.detach().requires_grad_(grad and x.requires_grad)


def _leaf(x: Any, differentiable: bool) -> Any:
    if not torch.is_tensor(x):
        return x
    return x.detach().requires_grad_(differentiable and x.is_floating_point())
