"""Deferred initialisation, as in torchdistX: tensors without memory, whose values can be worked out later one by one.

Every operation on such a tensor (the constructors' own initialisation, then transformers' `_init_weights`) is noted
instead of executed; random operations also keep their place in the sequence of random numbers. A tensor's value is then
the replay of the few operations that lead to it, each from the generator state it has in that sequence. Which module
initialises which parameter, and in what order, does not matter.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import initialization  # not as an attribute of transformers, which may lack it

from offload.deferred_recipe import History, Operation, View, block_sizes, draw, in_blocks, key_of, view_of

aten = torch.ops.aten

# Creations of at least this many elements are deferred at once, so that constructing takes no memory even in passing.
_LARGE = 1 << 16
_FACTORIES = {
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.randn.default,
    aten.rand.default,
}
# In-place operations whose result does not depend on what was there before.
_OVERWRITES = {
    aten.uniform_.default,
    aten.normal_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.copy_.default,
}


class DeferredInit(TorchDispatchMode):
    """While active, tensors on meta are recipes; `value` gives what such a tensor would hold.

    `seed` starts the sequence of random numbers, as `torch.manual_seed` does. The global CPU generator is left alone.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._count = 0
        self._alive: list[Tensor] = []  # keeps storage keys unique
        self._histories: dict[int, History] = {}
        self._pending: deque[Operation] = deque()  # random operations the generator has not passed yet, in order
        self._generator_state = torch.Generator().manual_seed(seed).get_state()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        deferred = [t for t in tensors if self.is_deferred(t)]
        random = torch.Tag.nondeterministic_seeded in func.tags
        to_device = kwargs.get("device")
        if not deferred:
            if (func in _FACTORIES and _makes_large(args, kwargs)) or _is_meta(to_device):
                return self._create(func, args, kwargs, random)
            return self._run(func, args, kwargs) if random else func(*args, **kwargs)
        mutated = _mutated(func, args, kwargs)
        if any(not self.is_deferred(t) for t in mutated) or (to_device is not None and not _is_meta(to_device)):
            return self._run(func, args, kwargs)  # a real tensor is to receive the value
        if func.is_view:
            return func(*args, **kwargs)
        if mutated:
            whole = mutated[0].untyped_storage().nbytes() == mutated[0].nbytes
            storages = [key_of(t) for t in mutated]
            self._note(func, args, kwargs, random, deferred, storages, whole and func in _OVERWRITES)
            return mutated[0] if len(func._schema.returns) == 1 else None
        try:
            metas, meta_kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
            result = func(*metas, **meta_kwargs)
        except (NotImplementedError, RuntimeError):  # its result depends on values, `item()` for one
            return self._run(func, args, kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self._alive += made
        self._note(func, args, kwargs, random, deferred, [key_of(t) for t in made], creates=True)
        return result

    def is_deferred(self, tensor: Tensor) -> bool:
        return tensor.device.type == "meta" and key_of(tensor) in self._histories

    def adopt(self, tensor: Tensor) -> Tensor:
        """A deferred stand-in for a real tensor, which is kept as its first value until something overwrites it."""
        literal = tensor.detach().contiguous()
        stand_in = torch.empty(literal.shape, dtype=literal.dtype, device="meta")
        self._alive.append(stand_in)
        self._note(aten.clone.default, (literal,), {}, False, [], [key_of(stand_in)], creates=True)
        return stand_in

    def defer_in_place(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note a Python function that fills `tensor`, perhaps from random numbers, as if it were one operation."""
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        self._note(func, (tensor, *args), kwargs, True, [tensor], [key_of(tensor)], overwrites=whole)
        return tensor

    def place(self, tensor: Tensor) -> int:
        """Position of the last operation on a deferred tensor among all deferred operations."""
        return self._histories[key_of(tensor)].operations[-1].place

    def value(self, tensor: Tensor) -> Tensor:
        """The real tensor that a deferred one stands for, freshly computed."""
        return self._values([view_of(tensor)], self._count)[0]

    def blocks(self, tensor: Tensor) -> Iterator[Tensor]:
        """The elements of a deferred tensor in order, 1-D: in small blocks if its recipe allows, else all at once."""
        view, operations = view_of(tensor), self._histories[key_of(tensor)].operations
        if not in_blocks(view, operations):
            yield self.value(tensor).reshape(-1)
            return
        drawn = operations[1] if operations[1].random else None
        state = None
        if drawn is not None:
            self._advance(drawn)
            state = drawn.state = self._generator_state if self._is_next(drawn) else drawn.state
        start = 0
        for count in block_sizes(view.numel):
            block = torch.empty(count, dtype=view.dtype)
            for operation in operations[1:]:
                target = operation.args[0]
                part = block[max(0, target.offset - start) : max(0, target.offset + target.numel - start)]
                if operation is not drawn:
                    operation.function(part, *operation.args[1:], **operation.kwargs)
                    continue
                assert state is not None
                with _generator_at(state):
                    operation.function(part, *operation.args[1:], **operation.kwargs)
                    after = torch.get_rng_state()
                state = after
            start += count
            yield block
        if drawn is not None and state is not None and self._is_next(drawn):
            self._pending.popleft()
            self._generator_state = state

    def _is_next(self, operation: Operation) -> bool:
        return bool(self._pending) and self._pending[0] is operation

    def _values(self, views: list[View], before: int) -> list[Tensor]:
        """What tensors held before the operation at a place."""
        wanted: dict[int, Operation] = {}
        for view in views:
            self._collect(view.storage, before, wanted)
        memory: dict[int, torch.UntypedStorage] = {}
        for place in sorted(wanted):
            self._replay(wanted[place], memory)
        return [view.on(memory[view.storage]) for view in views]

    def _collect(self, storage: int, before: int, wanted: dict[int, Operation]) -> None:
        for operation in self._histories[storage].operations:
            if operation.place < before and operation.place not in wanted:
                wanted[operation.place] = operation
                for read in operation.reads:
                    self._collect(read, operation.place, wanted)

    def _replay(self, operation: Operation, memory: dict[int, torch.UntypedStorage]) -> None:
        args, kwargs = tree_map_only(View, lambda v: v.on(memory[v.storage]), (operation.args, operation.kwargs))
        if not operation.random:
            result = operation.function(*args, **kwargs)
        else:
            self._advance(operation)
            # Normally the operation is the next of the sequence and moves it on; a second replay must not.
            is_next = self._is_next(operation)
            state = self._generator_state if is_next else operation.state
            assert state is not None
            with _generator_at(state):
                result = operation.function(*args, **kwargs)
                if is_next:
                    operation.state, self._generator_state = state, torch.get_rng_state()
                    self._pending.popleft()
        for storage, tensor in zip(operation.creates, _tensors(result), strict=False):
            memory[storage] = tensor.untyped_storage()

    def _advance(self, until: Operation | None) -> None:
        """Pass pending random operations up to `until` (None: all) without keeping what they draw."""
        while self._pending and (until is None or self._pending[0].place < until.place):
            operation = self._pending[0]
            target = operation.args[0] if operation.args else None
            drawn_in_blocks = operation.function in (aten.uniform_.default, aten.normal_.default)
            if drawn_in_blocks and isinstance(target, View) and target.contiguous:
                state = self._generator_state
                with _generator_at(state):
                    draw(operation, target)
                    self._generator_state = torch.get_rng_state()
                self._pending.popleft()
                operation.state = state if operation.needed else None
            else:
                views = [v for v in tree_leaves((operation.args, operation.kwargs)) if isinstance(v, View)]
                tensors = self._values(views, operation.place)
                memory = {v.storage: t.untyped_storage() for v, t in zip(views, tensors, strict=True)}
                if self._is_next(operation):
                    self._replay(operation, memory)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute now, on real values, at this point of the sequence of random numbers."""
        args, kwargs = tree_map_only(Tensor, lambda t: self.value(t) if self.is_deferred(t) else t, (args, kwargs))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self._advance(None)
        with _generator_at(self._generator_state):
            result = func(*args, **kwargs)
            self._generator_state = torch.get_rng_state()
        return result

    def _create(self, func: Any, args: Any, kwargs: Any, random: bool) -> Tensor:
        result: Tensor = func(*args, **{**kwargs, "device": torch.device("meta")})
        self._alive.append(result)
        self._note(func, args, kwargs, random, [], [key_of(result)], creates=True)
        return result

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        random: bool,
        deferred: list[Tensor],
        storages: list[int],
        overwrites: bool = False,
        creates: bool = False,
    ) -> None:
        def freeze(tensor: Tensor) -> Any:
            return view_of(tensor) if self.is_deferred(tensor) else tensor.detach()

        if _is_meta(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        frozen_args, frozen_kwargs = tree_map_only(Tensor, freeze, (args, kwargs))
        reads = frozenset(key_of(t) for t in deferred) - frozenset(storages)
        for storage in reads:
            self._histories[storage].read_by_others = True
        made = tuple(storages) if creates else ()
        operation = Operation(func, frozen_args, frozen_kwargs, self._count, reads, made, random)
        self._count += 1
        if random:
            self._pending.append(operation)
        for storage in storages:
            history = self._histories.setdefault(storage, History())
            if overwrites and not history.read_by_others:
                view = frozen_args[0]
                for old in history.operations:
                    old.needed, old.state = False, None
                empty, place = aten.empty.memory_format, history.operations[0].place
                memory = Operation(empty, ([view.numel],), {"dtype": view.dtype}, place, creates=(storage,))
                history.operations = [memory]
            history.operations.append(operation)


@contextmanager
def whole_functions_deferred(mode: DeferredInit) -> Iterator[None]:
    """Defer as a whole those initialisers of torch that look at values and therefore do nothing on meta."""
    # transformers keeps its own references to torch's functions, which its guarded versions call.
    kept = initialization.TORCH_INIT_FUNCTIONS
    originals = {name: getattr(nn.init, name) for name in ("trunc_normal_", "orthogonal_", "sparse_", "dirac_")}

    def deferring(original: Any) -> Any:
        @functools.wraps(original)
        def initialise(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if mode.is_deferred(tensor):
                return mode.defer_in_place(original, tensor, *args, **kwargs)
            filled: Tensor = original(tensor, *args, **kwargs)
            return filled

        return initialise

    for name, original in originals.items():
        kept[name] = deferring(original)
        setattr(nn.init, name, kept[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            kept[name] = original
            setattr(nn.init, name, original)


@contextmanager
def _generator_at(state: Tensor) -> Iterator[None]:
    """The global CPU generator in a given state, and as it was afterwards."""
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]


def _makes_large(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    numel = 1
    for extent in args[0]:
        numel *= extent
    return numel >= _LARGE and (device is None or device.type == "cpu")


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    written: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return _tensors(written)
