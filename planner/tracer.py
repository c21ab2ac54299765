"""One pass through one unit at the boundaries of a model's forward: what it costs, and its outputs again unrun.

The passes follow the engine's: a unit is cut off at its boundary and runs without grad, then again with grad and
backward; the last visit keeps its graph through the loss. Units that cannot differ (class, attributes, parameter and
input shapes) are traced once. The profile runs them on fake tensors; `timed.py` puts a clock in the same places.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from offload.planner.bounds import UnitModules
from offload.planner.live import LiveBytes
from offload.planner.plan import UnitCost
from torch import Tensor, nn

# The head's module, and what stands in for its logits: called with the head (of a copy of the model) and hidden states.
Head = tuple[nn.Module, Callable[[Any, Tensor], Tensor]]


@dataclass
class _Traced:
    """One unit pass: costs, and the shape of every output (or which input it is).

    `collects`: the model takes tensors from inside the unit (router logits), so that its code must run at every visit.
    """

    cost: UnitCost
    outputs: list[Any]
    spec: pytree.TreeSpec
    collects: bool


@dataclass(frozen=True)
class _Like:
    """A tensor output: what to make in its place."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Input:
    """An output that is the unit's input number `index`, passed through."""

    index: int


@dataclass
class Tracer:
    """Stands at the boundaries of the fake model while its forward runs."""

    live: LiveBytes
    device: str
    owners: dict[int, str]
    traced: dict[Any, _Traced] = field(default_factory=dict)
    visits: list[tuple[str, _Traced]] = field(default_factory=list)
    tape: list[list[Any]] = field(default_factory=list)  # keeps every unit's inputs alive, as the engine does
    last: int = -1  # the visit that keeps its graph; unknown in the first pass
    kept: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))
    entry: int = 0  # live bytes when the last visit begins
    head: Head | None = None  # of the copy
    logits_bytes: int = 0  # of logits that something stood in for

    def visit(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        differentiable = torch.is_grad_enabled() and (
            any(p.requires_grad for p in module.parameters())
            or any(isinstance(x, Tensor) and x.requires_grad for x in flat)
        )
        key = signature(module, flat, spec)
        if key not in self.traced:
            self.traced[key] = self._measure(module, forward, flat, spec, differentiable)
        found = self.traced[key]
        number = len(self.visits)
        self.visits.append((name, found))
        if number == self.last and self.head is not None and self.head[0] is module:
            self.entry = self.live.mark()
            logits = self.head[1](module, detach(flat[0], torch.is_grad_enabled()))
            self.logits_bytes = logits.numel() * logits.element_size()
            return logits
        if number == self.last:
            self.entry = self.live.mark()
            outputs = self._run(forward, flat, spec, differentiable)
        elif found.collects:
            self.tape.append(flat)
            outputs = self._run(forward, flat, spec, False)
        else:
            self.tape.append(flat)
            outputs = [self._make(x, flat) for x in found.outputs]
        leaves = [_leaf(x, differentiable) for x in outputs]
        if number == self.last:
            self.kept = (outputs, leaves)
        return pytree.tree_unflatten(leaves, found.spec)

    def _run(self, forward: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec, grad: bool) -> list[Any]:
        with torch.set_grad_enabled(grad):
            args, kwargs = pytree.tree_unflatten([detach(x, grad) for x in flat], spec)
            return pytree.tree_leaves(forward(*args, **kwargs), is_leaf=lambda x: x is None)

    def _make(self, output: Any, flat: list[Any]) -> Any:
        if isinstance(output, _Input):
            return flat[output.index].detach()
        if isinstance(output, _Like):
            return torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device=self.device)
        return output

    def _measure(
        self, module: nn.Module, forward: Callable[..., Any], flat: list[Any], spec: pytree.TreeSpec, grad: bool
    ) -> _Traced:
        live, cost = self.live, UnitCost()
        start, flops = live.mark(), live.flops
        with torch.no_grad():
            args, kwargs = pytree.tree_unflatten([detach(x, False) for x in flat], spec)
            result = forward(*args, **kwargs)
        del args, kwargs
        outputs, out_spec = pytree.tree_flatten(result)
        del result
        cost.forward_flops = live.flops - flops
        cost.workspace_forward = live.peak - start
        cost.boundary_bytes = live.live - start  # what it returned, and what a collector took from inside it
        if grad:
            self._measure_backward(module, forward, flat, spec, outputs, cost)
        storages = {x.untyped_storage()._cdata: i for i, x in enumerate(flat) if isinstance(x, Tensor)}
        returned = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in outputs if isinstance(x, Tensor)}
        own = sum(n for key, n in returned.items() if key not in storages)
        return _Traced(cost, [template(x, storages) for x in outputs], out_spec, cost.boundary_bytes > own)

    def _measure_backward(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        flat: list[Any],
        spec: pytree.TreeSpec,
        outputs: list[Any],
        cost: UnitCost,
    ) -> None:
        """Peak bytes of a recomputation with its backward, of its forward with grad, of the backward beside what
        autograd saved; and the bytes of each tensor that it saved."""
        gradients = [torch.empty_like(x) if isinstance(x, Tensor) else None for x in outputs]
        inputs = [detach(x, True) for x in flat]
        start = self.live.mark()

        references = _storages([*inputs, *module.parameters(), *module.buffers()])
        saved: dict[int, int] = {}
        packed = 0

        def look() -> None:
            """At the highest point since the last time."""
            highest = self.live.peak - start
            cost.workspace_graph = max(cost.workspace_graph, highest)
            cost.workspace_unsaved = max(cost.workspace_unsaved, highest - packed)
            self.live.mark()

        def pack(x: Tensor) -> Tensor:
            nonlocal packed
            look()
            storage = x.untyped_storage()
            if storage._cdata not in references:
                packed += storage.nbytes() if storage._cdata not in saved else 0
                saved.setdefault(storage._cdata, storage.nbytes())
            return x

        def run() -> None:
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
            with torch.enable_grad(), hooks:
                args, kwargs = pytree.tree_unflatten(inputs, spec)
                again = pytree.tree_leaves(forward(*args, **kwargs), is_leaf=lambda x: x is None)
            look()
            cost.workspace_backward = cost.workspace_graph
            before = self.live.mark()
            backward(again, gradients)
            cost.workspace_kept = self.live.peak - before

        contextvars.Context().run(run)  # an empty context: the model's output collector must not see the second run
        cost.workspace_backward = max(cost.workspace_backward, self.live.peak - start)
        cost.saved = tuple(saved.values())


def _storages(values: list[Any]) -> set[int]:
    return {x.untyped_storage()._cdata for x in values if isinstance(x, Tensor)}


def owners_of(model: nn.Module, clone: nn.Module, units: Sequence[UnitModules]) -> dict[int, str]:
    """The unit name of each boundary module of the copy, by id."""
    names = {id(m): name for name, m in model.named_modules()}
    return {id(clone.get_submodule(names[id(m)])): unit for unit, _, modules in units for m in modules}


@contextmanager
def boundaries(clone: nn.Module, tracer: Tracer) -> Iterator[None]:
    patched = [m for m in clone.modules() if id(m) in tracer.owners]

    def patch(module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return tracer.visit(tracer.owners[id(module)], module, original, args, kwargs)

        module.forward = forward

    for module in patched:
        patch(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise RuntimeError("the forward returns no loss")
    return loss


def detach(x: Any, grad: bool) -> Any:
    return x.detach().requires_grad_(grad and x.requires_grad) if isinstance(x, Tensor) else x


def _leaf(x: Any, grad: bool) -> Any:
    return x.detach().requires_grad_(grad and x.is_floating_point()) if isinstance(x, Tensor) else x


def template(x: Any, inputs: Mapping[int, int]) -> Any:
    if not isinstance(x, Tensor):
        return x
    index = inputs.get(x.untyped_storage()._cdata)
    return _Input(index) if index is not None else _Like(tuple(x.shape), x.stride(), x.dtype)


def backward(outputs: list[Any], gradients: list[Any]) -> None:
    pairs = [
        (out, gradient)
        for out, gradient in zip(outputs, gradients, strict=True)
        if isinstance(out, Tensor) and out.requires_grad and gradient is not None
    ]
    outputs.clear()
    if pairs:
        roots, seeds = [out for out, _ in pairs], [gradient for _, gradient in pairs]
        del pairs
        torch.autograd.backward(roots, seeds)


_SIMPLE = (bool, int, float, str, type(None))


def signature(module: nn.Module, flat: list[Any], spec: pytree.TreeSpec) -> Any:
    """Equal exactly for unit passes that cannot differ in shapes or operators."""
    parts: list[Any] = [str(spec)]
    for m in module.modules():
        simple = tuple((k, v) for k, v in sorted(vars(m).items()) if isinstance(v, _SIMPLE) and not k.endswith("_idx"))
        tensors = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in m.parameters(recurse=False))
        parts.append((type(m), simple, tensors))
    for x in flat:
        if isinstance(x, Tensor):
            parts.append((tuple(x.shape), x.stride(), x.dtype, x.requires_grad))
        else:
            parts.append(repr(x) if isinstance(x, _SIMPLE) else type(x))
    return tuple(parts)
