"""Lifetimes of everything that one block's forward and backward allocate, traced on fake tensors: layout buffers.

Time counts operators. A block's own inputs, parameters and the gradient that enters its backward are not its buffers;
its output, what autograd saves, temporaries and fresh gradients are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from offload.planner.layout import Lifetime
from offload.planner.live import LiveBytes
from offload.planner.profile import default_batch, fake_copy, free_gradient
from offload.planner.tracer import backward
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode


class Recorder(LiveBytes):
    """`LiveBytes` that also notes when each storage was made and when it died. `clock` counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.lifetimes: list[Lifetime] = []
        self._born: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.clock += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known and storage.nbytes():
            self._born[storage._cdata] = (self.clock, storage.nbytes())
        super()._count(storage)

    def _gone(self, key: int, nbytes: int) -> None:
        super()._gone(key, nbytes)
        if key in self._born:  # it died after the operator that now is the last, which may have read it
            lower, size = self._born.pop(key)
            self.lifetimes.append(Lifetime(lower, self.clock + 1, size))

    def finish(self) -> list[Lifetime]:
        """All lifetimes, what still lives included, in order of birth."""
        self.lifetimes += [Lifetime(lower, self.clock + 1, size) for lower, size in self._born.values()]
        self._born.clear()
        return sorted(self.lifetimes)


@dataclass(frozen=True)
class BlockTrace:
    """Buffers of one block's forward and backward on [0, end), for one micro-batch; backward begins at `middle`."""

    buffers: tuple[Lifetime, ...]
    middle: int
    end: int


class _Reached(Exception):
    pass


def trace_block(
    model: nn.Module,
    block: str,
    *,
    micro_batch: int,
    sequence_length: int,
    dtype: torch.dtype,
    batch: Mapping[str, Tensor] | None = None,
) -> BlockTrace:
    """Trace the submodule called `block` of `model` (its parameters may be on meta) with the inputs it really gets.

    Raises ValueError if the model's forward does not come to the block. The model is not touched.
    """
    example = batch if batch is not None else default_batch(model, micro_batch, sequence_length)
    try:
        return _trace(model, block, example, dtype, None)
    except DynamicOutputShapeException:  # a loop over the experts that got tokens has no shapes to trace
        return _trace(model, block, example, dtype, "grouped_mm")


def _trace(
    model: nn.Module, block: str, example: Mapping[str, Tensor], dtype: torch.dtype, experts: str | None
) -> BlockTrace:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        clone = fake_copy(model, dtype, "cpu")
        if experts is not None:
            set_experts: Any = clone.set_experts_implementation  # a method of every model of the library
            set_experts(experts)
        module = clone.get_submodule(block)
        inputs = {k: torch.empty(v.shape, dtype=v.dtype, device="cpu") for k, v in example.items()}
        args, kwargs = _inputs_of(module, clone, inputs, block)
        for p in clone.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(free_gradient)
        flat, spec = pytree.tree_flatten((args, kwargs))
        recorder = Recorder()
        recorder.ignore([*clone.parameters(), *clone.buffers(), *(x for x in flat if isinstance(x, Tensor))])
        flat = [_own(x, next(iter(inputs.values())).shape[0]) for x in flat]
        with recorder:
            args, kwargs = pytree.tree_unflatten(flat, spec)
            outputs = [x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor)]
        del args, kwargs
        gradients: list[Any] = [torch.empty_like(x) for x in outputs]
        recorder.ignore(gradients)
        recorder.clock += 1
        middle = recorder.clock
        with recorder:
            backward(outputs, gradients)
        lifetimes = recorder.finish()
        del gradients, flat
    start = min((b.lower for b in lifetimes), default=0)
    end = max((b.upper for b in lifetimes), default=0)
    moved = tuple(Lifetime(b.lower - start, b.upper - start, b.size) for b in lifetimes)
    return BlockTrace(moved, middle - start, end - start)


def _inputs_of(module: nn.Module, model: nn.Module, batch: Mapping[str, Tensor], name: str) -> tuple[Any, Any]:
    seen: list[tuple[Any, Any]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), LiveBytes():  # reads values that fake tensors do not have as zero
            model(**batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    if not seen:
        raise ValueError(f"the model's forward does not come to its module {name!r}")
    return seen[0]


def _own(x: Any, rows: int) -> Any:
    """Inputs that carry a gradient: activations, that is floating point with the rows of the batch and a width."""
    if not isinstance(x, Tensor):
        return x
    activation = x.is_floating_point() and x.dim() >= 3 and x.shape[0] == rows
    return x.detach().requires_grad_(activation)


def stack(block: BlockTrace, layers: int) -> tuple[list[Lifetime], list[tuple[int, int]]]:
    """`layers` equal blocks, all forward and then all backward in reverse: buffers, and each layer pass's time."""
    forward, backward = block.middle, block.end - block.middle
    buffers: list[Lifetime] = []
    passes = [(i * forward, (i + 1) * forward) for i in range(layers)]
    turn = layers * forward
    passes += [(turn + i * backward, turn + (i + 1) * backward) for i in range(layers)]

    def moved(layer: int, t: int) -> int:
        if t <= block.middle:
            return layer * forward + t
        return turn + (layers - 1 - layer) * backward + t - block.middle

    for layer in range(layers):
        for b in block.buffers:
            if b.lower >= block.middle:
                shift = turn + (layers - 1 - layer) * backward - block.middle
                buffers.append(Lifetime(b.lower + shift, b.upper + shift, b.size))
            else:
                buffers.append(Lifetime(moved(layer, b.lower), moved(layer, b.upper), b.size))
    return buffers, passes


def repeated_blocks(model: nn.Module) -> Sequence[str]:
    """The names of the first block of each repeated stack of the model."""
    return [
        f"{name}.0"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(part.isdigit() for part in name.split("."))
    ]
