"""Recipes of tensors without memory: the operations that lead to their values, and how large draws are cut up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Elements that are drawn at a time. A multiple of 16: torch's normal_ draws in groups of 16.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class View:
    """A tensor without memory: the deferred storage it lies in, and how (in elements)."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    contiguous: bool

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        empty: Any = torch.empty(0, dtype=self.dtype)
        result: Tensor = empty.set_(storage, self.offset, self.size, self.stride)
        return result


@dataclass(eq=False)
class Operation:
    """One deferred operation; `args` and `kwargs` hold a `View` wherever it had a tensor without memory."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int  # in the order of all deferred operations
    reads: frozenset[int] = frozenset()  # storages
    creates: tuple[int, ...] = ()  # storages, in the order of the results
    random: bool = False
    needed: bool = True  # False once something has overwritten all it did
    state: Tensor | None = None  # of the generator just before it


@dataclass
class History:
    """The operations that made and changed one storage, in order."""

    operations: list[Operation] = field(default_factory=list)
    read_by_others: bool = False


def draw(operation: Operation, target: View) -> None:
    """Draw what an in-place uniform_ or normal_ of a contiguous tensor draws, in little memory."""
    scratch = torch.empty(min(target.numel, _BLOCK + 15), dtype=target.dtype)
    for count in block_sizes(target.numel):
        operation.function(scratch[:count], *operation.args[1:], **operation.kwargs)


def block_sizes(numel: int) -> Iterator[int]:
    """Cut a contiguous uniform_ or normal_ so that the blocks draw, and give, what the whole does."""
    while numel >= _BLOCK + 16:
        yield _BLOCK
        numel -= _BLOCK
    yield numel  # 16 elements or more, unless that is all: normal_ draws fewer in another way


def in_blocks(view: View, operations: list[Operation]) -> bool:
    """Whether a recipe is: memory, then at most one draw of the whole, then constants in contiguous ranges."""
    if len(operations) < 2 or operations[0].function is not aten.empty.memory_format:
        return False
    for index, operation in enumerate(operations[1:]):
        target = operation.args[0]
        if not (isinstance(target, View) and target.contiguous and target.dtype == view.dtype):
            return False
        is_draw = operation.function in (aten.uniform_.default, aten.normal_.default)
        if is_draw and (index > 0 or target != view):
            return False
        if not is_draw and operation.function not in (aten.zero_.default, aten.fill_.Scalar):
            return False
    return view.contiguous and view.offset == 0


def key_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def view_of(tensor: Tensor) -> View:
    size, stride, offset = tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset())
    return View(key_of(tensor), size, stride, offset, tensor.dtype, tensor.is_contiguous())
