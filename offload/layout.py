"""How a unit's parameters lie in flat memory: one description for device slots, store extents and the optimizer.

Each unit has two flat element spaces, one for trainable and one for frozen parameters. A parameter starts at a multiple
of 64 elements, so that an optimizer pass over any chunk that starts at a multiple of 64 rounds like a pass over the
whole tensor (the vector kernels then see the same lanes and the same tails).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ALIGN = 64


@dataclass(frozen=True)
class ParamSlot:
    """One parameter inside a unit's flat space; `offset` and `numel` count elements."""

    name: str
    shape: tuple[int, ...]
    numel: int
    offset: int
    trainable: bool


@dataclass(frozen=True)
class UnitLayout:
    """The parameters of one unit; `trainable_elements` and `frozen_elements` include the padding between parameters."""

    index: int
    name: str
    params: tuple[ParamSlot, ...]
    trainable_elements: int
    frozen_elements: int

    @property
    def parameters(self) -> int:
        """Number of parameters, padding not counted."""
        return sum(p.numel for p in self.params)

    def pieces(self, trainable: bool, start: int, stop: int) -> Iterator[tuple[ParamSlot, int, int, int]]:
        """The parts of parameters that lie in elements [start, stop) of one flat space.

        Yields (parameter, first element within the parameter, element count, offset within [start, stop)).
        """
        for p in self.params:
            if p.trainable is trainable and p.offset < stop and p.offset + p.numel > start:
                first = max(start, p.offset)
                yield p, first - p.offset, min(stop, p.offset + p.numel) - first, first - start


def pack(index: int, name: str, params: list[tuple[str, tuple[int, ...], bool]]) -> UnitLayout:
    """Lay (name, shape, trainable) out in order, each space on its own."""
    ends = {True: 0, False: 0}
    slots = []
    for param_name, shape, trainable in params:
        numel = 1
        for extent in shape:
            numel *= extent
        slots.append(ParamSlot(param_name, tuple(shape), numel, ends[trainable], trainable))
        ends[trainable] += -(-numel // ALIGN) * ALIGN
    return UnitLayout(index, name, tuple(slots), ends[True], ends[False])
