"""Where zeroth-order state lives: the roles of a format and a variant in homes and extents, and weights read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.io import Extent, Ring, copy
from offload.state import States, UnitState, WeightReader, Writer, gather
from offload.units import Unit
from offload.zo_formats import GROUP
from offload.zo_pieces import Pieces

# Elements encoded at a time on loading; the bytes of each role divide a buffer of the ring.
_LOAD_ELEMENTS = 512 * 1024


def extents(units: Sequence[Unit], pieces: Pieces) -> list[Extent]:
    """Everything the store has to hold: two sides of what steps write, one of the rest."""
    written = {role.name for role in pieces.roles if role.written}
    return [
        Extent(f"{unit.index}/{role}", nbytes, sides=2 if role in written else 1, durable=True)
        for unit in units
        for role, nbytes in pieces.sizes(unit.layout).items()
    ]


class ZoStates(States):
    """All units' weights at rest, with the moments of the variant."""

    def __init__(self, pieces: Pieces, *args: Any) -> None:
        self._pieces = pieces
        super().__init__(*args)

    def reader(self, ring: Ring, timeout: float) -> WeightReader:
        return _Reader(self._pieces, self, ring, timeout)

    def _unit_state(self, unit: Unit) -> UnitState:
        written = tuple(role.name for role in self._pieces.roles if role.written)
        return UnitState(unit, self.store, self.dtype, self._pieces.sizes(unit.layout), written=written)

    def _first_chunk(
        self, state: UnitState, read: Callable[[str, int, int], Tensor], start: int, stop: int, writer: Writer
    ) -> None:
        if start:  # the whole unit went with its first chunk: its roles fill the store's blocks at different rates
            return
        roles = self._pieces.format.roles  # moments: fresh extents and fresh memory read as zeros already
        filling = {role.name: _Filling(state, role.name, writer.ring, writer.timeout) for role in roles}
        elements = state.unit.layout.trainable_elements
        for first in range(0, elements, _LOAD_ELEMENTS):
            n = min(_LOAD_ELEMENTS, elements - first)
            values = torch.empty(n, dtype=torch.float32)
            gather(state.unit, True, first, first + n, read, values)
            parts = {role.name: filling[role.name].next(role.size(n)).view(role.dtype) for role in roles}
            self._pieces.encode(parts, slice(0, n), values)
        for part in filling.values():
            part.finish()


class _Filling:
    """A role on its way to the store: one ring buffer, written whenever it is full."""

    def __init__(self, state: UnitState, role: str, ring: Ring, timeout: float) -> None:
        self._state, self._role, self._ring = state, role, ring
        self._buffer = ring.acquire(timeout)
        self._written = self._filled = 0

    def next(self, nbytes: int) -> Tensor:
        """The place of the next bytes; those before are in their place."""
        if self._filled + nbytes > self._buffer.numel():
            self._write()
        self._filled += nbytes
        return self._buffer[self._filled - nbytes : self._filled]

    def finish(self) -> None:
        """Write the rest, and give the buffer back."""
        self._write()
        self._ring.release(self._buffer)

    def _write(self) -> None:
        home = self._state.homes.get(self._role)
        if home is not None:
            place = home[self._written : self._written + self._filled]
            copy(place, self._buffer[: self._filled], self._state.tiers[self._role])
        total = self._state.store.padded(self._state.key(self._role))
        part = self._buffer[: min(self._buffer.numel(), total - self._written)]
        self._state.write(self._role, self._written, part).wait()
        self._written, self._filled = self._written + self._filled, 0


class _Reader(WeightReader):
    """Decodes trainable weights from the format they rest in."""

    def __init__(self, pieces: Pieces, states: States, ring: Ring, timeout: float) -> None:
        super().__init__(states, ring, timeout)
        self._pieces = pieces

    def read(self, name: str, start: int, count: int) -> Tensor:
        state, place = self._where[name]
        if not place.trainable:
            return super().read(name, start, count)
        first = (place.offset + start) // GROUP * GROUP
        stop = -(-(place.offset + start + count) // GROUP) * GROUP
        held = {}
        for role in self._pieces.format.roles:
            begin, end = role.size(first), role.size(stop)
            held[role.name] = self._bytes(state, role.name, begin, end - begin).view(role.dtype)
        skip = place.offset + start - first
        return self._pieces.decode(held, slice(0, stop - first))[skip : skip + count]
