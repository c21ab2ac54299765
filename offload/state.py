"""Where each unit's state lives: homes in RAM or CXL memory by plan, and extents in the store for everything durable.

Roles: `param` (trainable weights in the compute dtype), `frozen`, `master` (low half of the float32 master, bfloat16
runs), `exp_avg`, `exp_avg_sq`, `grad` (gradients that wait for the global norm).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload import adamw
from offload.errors import OffloadError
from offload.io import (
    BLOCK,
    BlockSums,
    Extent,
    HostBuffer,
    HostTier,
    Ledger,
    Priority,
    Request,
    Ring,
    Store,
    moving,
)
from offload.planner import Plan
from offload.units import Unit

if TYPE_CHECKING:  # it imports this module
    from offload.device_home import DeviceHome

# Elements of one optimizer chunk, and of one piece of loading: whole store blocks in every role.
CHUNK_ELEMENTS = 2 * 1024 * 1024
UPDATED_ROLES = ("param", "master", "exp_avg", "exp_avg_sq")


@dataclass
class UnitState:
    """One unit's roles: their sizes in bytes, their homes (uint8, page-aligned) with the memory each lies in (`tiers`,
    `grad` too), and the store behind them. `on_device`: all of them live there, and are updated there."""

    unit: Unit
    store: Store
    dtype: torch.dtype
    sizes: dict[str, int]
    homes: dict[str, Tensor] = field(default_factory=dict)
    gradient_home: Tensor | None = None
    gradient_waits: bool = False  # for the global norm, in its home or in the store
    tiers: dict[str, HostTier] = field(default_factory=dict)
    written: tuple[str, ...] = UPDATED_ROLES
    on_device: DeviceHome | None = None

    def key(self, role: str) -> str:
        """The store's name for this unit's role."""
        return f"{self.unit.index}/{role}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the unit in a device slot: trainable, then frozen."""
        return self.sizes.get("param", 0) + self.sizes.get("frozen", 0)

    @property
    def updated_roles(self) -> list[str]:
        """The roles an optimizer step rewrites, in store order."""
        return [role for role in self.written if role in self.sizes]

    def write(self, role: str, offset: int, buffer: Tensor, sums: BlockSums | None = None) -> Request:
        """Write part of a role to its shadow extent; the buffer must stay untouched until the request is done."""
        return self.store.write(self.key(role), offset, buffer, Priority.WRITE, sums)


def role_dtype(role: str, compute: torch.dtype) -> torch.dtype:
    """The dtype a role is stored in."""
    return {"master": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}.get(role, compute)


def role_sizes(unit: Unit, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each durable role of a unit; roles without elements are left out."""
    trainable, frozen = unit.layout.trainable_elements, unit.layout.frozen_elements
    sizes = {"param": trainable * dtype.itemsize, "frozen": frozen * dtype.itemsize}
    if dtype == torch.bfloat16:
        sizes["master"] = trainable * 2
    sizes["exp_avg"] = sizes["exp_avg_sq"] = trainable * 4
    return {role: n for role, n in sizes.items() if n}


def extents(units: Sequence[Unit], dtype: torch.dtype, gradient_dtype: torch.dtype, clipping: bool) -> list[Extent]:
    """Everything the store has to hold. With clipping it has room for all gradients, wherever this plan lets them wait:
    a run can go on with another RAM budget."""
    found = []
    for unit in units:
        for role, nbytes in role_sizes(unit, dtype).items():
            found.append(Extent(f"{unit.index}/{role}", nbytes, sides=1 if role == "frozen" else 2, durable=True))
        if clipping and unit.trainable:
            nbytes = unit.layout.trainable_elements * gradient_dtype.itemsize
            found.append(Extent(f"{unit.index}/grad", nbytes, sides=1, durable=False))
    return found


class States:
    """All units' states and the memory they take.

    Args:
        tiers: memories that the plan may place homes in, by name ("cpu", "cxl").
    """

    def __init__(
        self,
        units: Sequence[Unit],
        plan: Plan,
        store: Store,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        clipping: bool,
        ledger: Ledger,
        pin: Callable[[Tensor], None],
        tiers: Mapping[str, HostTier],
    ) -> None:
        self._buffers: list[HostBuffer] = []
        self.store = store
        self.dtype = dtype

        def reserve(state: UnitState, role: str, tier: str, nbytes: int) -> Tensor:
            state.tiers[role] = tiers[tier]
            buffer = tiers[tier].allocate(nbytes, ledger, role)
            self._buffers.append(buffer)
            pin(buffer.tensor)
            return buffer.tensor

        self.units = [self._unit_state(unit) for unit in units]
        for state in self.units:
            placement = plan.unit(state.unit.name).placement
            for role, nbytes in state.sizes.items():
                tier = placement.get(role, placement["param"])
                if tier in tiers:
                    state.homes[role] = reserve(state, role, tier, nbytes)
            state.gradient_waits = clipping and state.unit.trainable and placement.get("grad") != "gpu"
            if state.gradient_waits and placement.get("grad") in tiers:
                nbytes = state.unit.layout.trainable_elements * gradient_dtype.itemsize
                state.gradient_home = reserve(state, "grad", placement["grad"], nbytes)

    def _unit_state(self, unit: Unit) -> UnitState:
        return UnitState(unit, self.store, self.dtype, role_sizes(unit, self.dtype))

    def reader(self, ring: Ring, timeout: float) -> WeightReader:
        """The current weights by parameter name, read through `ring`."""
        return WeightReader(self, ring, timeout)

    def close(self) -> None:
        """Give the homes back."""
        for state in self.units:
            state.homes.clear()
            state.gradient_home = state.on_device = None
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()

    def populate(
        self,
        read: Callable[[str, int, int], Tensor],
        order: Sequence[Unit],
        update: Ring,
        staging: Ring,
        timeout: float,
    ) -> None:
        """Bring weights in for the first time, chunk by chunk, with zero moments; publishes, does not commit.

        Args:
            read: `read(name, start, count)` gives elements of a parameter, 1-D, in the source's dtype.
            order: units in the order in which the source likes to be read.
            update, staging: the optimizer's chunk buffers for trainable state, the transfer ring for frozen weights.
        """
        trained, frozen = Writer(update, timeout), Writer(staging, timeout)
        step = staging.nbytes // self.dtype.itemsize
        for unit in order:
            state = self.units[unit.index]
            for start in range(0, unit.layout.trainable_elements, CHUNK_ELEMENTS):
                stop = min(start + CHUNK_ELEMENTS, unit.layout.trainable_elements)
                self._first_chunk(state, read, start, stop, trained)
            for start in range(0, unit.layout.frozen_elements, step):
                stop = min(start + step, unit.layout.frozen_elements)
                with frozen.buffer(state) as parts:
                    gather(unit, False, start, stop, read, parts.take("frozen", start, stop))
                    parts.send("frozen")
        trained.drain()
        frozen.drain()
        for state in self.units:
            for role in state.sizes:
                self.store.publish(state.key(role))

    def _first_chunk(
        self, state: UnitState, read: Callable[[str, int, int], Tensor], start: int, stop: int, writer: Writer
    ) -> None:
        with writer.buffer(state) as parts:
            param, exp_avg, exp_avg_sq = (parts.take(role, start, stop) for role in ("param", "exp_avg", "exp_avg_sq"))
            exp_avg_sq.zero_()
            if self.dtype == torch.bfloat16:
                master, low = exp_avg, parts.take("master", start, stop)  # the moment's place, before it has a value
                gather(state.unit, True, start, stop, read, master)
                for at in range(0, stop - start, adamw.CACHE_ELEMENTS):
                    part = slice(at, min(at + adamw.CACHE_ELEMENTS, stop - start))
                    bits = torch.empty(part.stop - at, dtype=torch.int32)
                    adamw.split_master(master[part], param[part], low[part], exp_avg_sq[part], bits)
            else:
                gather(state.unit, True, start, stop, read, param)
            exp_avg.zero_()
            for role in state.updated_roles:
                if role not in ("exp_avg", "exp_avg_sq") or exp_avg_sq.view(torch.int32).any():
                    parts.send(role)
                # else: fresh extents read as zeros already

    def load_homes(self) -> None:
        """Fill the homes from the store's committed extents (resume)."""
        for state in self.units:
            for role, home in state.homes.items():
                total = self.store.padded(state.key(role))
                state.store.read(state.key(role), 0, home[:total], Priority.COMPUTE).wait()

    def write_homes(self) -> None:
        """Write every home to its shadow extent and publish it (an extra commit between two due ones)."""
        for state in self.units:
            roles = [role for role in state.updated_roles if role in state.homes]
            requests = [state.write(role, 0, state.homes[role][: self.store.padded(state.key(role))]) for role in roles]
            for request in requests:
                request.wait()
            for role in roles:
                self.store.publish(state.key(role))


class WeightReader:
    """The current weights by parameter name, for export: slices of the homes or of the store."""

    def __init__(self, states: States, ring: Ring, timeout: float) -> None:
        self._where = {p.name: (state, p) for state in states.units for p in state.unit.layout.params}
        self._dtype = states.dtype
        self._ring = ring
        self._timeout = timeout

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter: 1-D, in the compute dtype, a copy."""
        state, slot = self._where[name]
        role = "param" if slot.trainable else "frozen"
        first, size = (slot.offset + start) * self._dtype.itemsize, count * self._dtype.itemsize
        return self._bytes(state, role, first, size).view(self._dtype)

    def _bytes(self, state: UnitState, role: str, first: int, size: int) -> Tensor:
        """Bytes [first, first + size) of a role, a copy."""
        home = state.homes.get(role)
        if home is not None:
            with moving(size, state.tiers[role]):
                return home[first : first + size].clone()
        if state.on_device is not None:
            return state.on_device.part(role, first, size).to("cpu", copy=True)
        out = torch.empty(size, dtype=torch.uint8)
        total = state.store.padded(state.key(role))
        buffer = self._ring.acquire(self._timeout)
        for block in range(first // BLOCK * BLOCK, first + size, self._ring.nbytes):
            part = buffer[: min(self._ring.nbytes, total - block)]
            state.store.read(state.key(role), block, part, Priority.COMPUTE).wait()
            low, high = max(first, block), min(first + size, block + part.numel())
            out[low - first : high - first].copy_(part[low - block : high - block])
        self._ring.release(buffer)
        return out


def gather(
    unit: Unit, trainable: bool, start: int, stop: int, read: Callable[[str, int, int], Tensor], out: Tensor
) -> None:
    """Fill `out` with elements [start, stop) of a unit's flat space from `read`; padding becomes zero."""
    out.zero_()
    for param, first, count, at in unit.layout.pieces(trainable, start, stop):
        out[at : at + count].copy_(read(param.name, first, count))


class _Parts:
    """One chunk of a unit's roles: in their homes, or in parts of one ring buffer; and the writes that leave from them.

    Where a home is in slow memory, `close` returns when that memory would have been done.
    """

    def __init__(self, state: UnitState, buffer: Tensor) -> None:
        self._state = state
        self._buffer = buffer
        self._end = 0
        self._parts: dict[str, tuple[int, Tensor]] = {}
        self._moving = ExitStack()
        self.requests: list[Request] = []

    def take(self, role: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a role, to be written to; on a page of their own."""
        dtype = role_dtype(role, self._state.dtype)
        offset, size = start * dtype.itemsize, (stop - start) * dtype.itemsize
        nbytes = -(-size // 4096) * 4096
        home = self._state.homes.get(role)
        if home is not None:
            part = home[offset : offset + nbytes]
            self._moving.enter_context(moving(size, self._state.tiers[role]))
        else:
            part = self._buffer[self._end : self._end + nbytes]
            self._end += nbytes
            if self._end > self._buffer.numel():
                raise OffloadError(
                    f"{role} of {self._state.unit.name} does not fit into its buffer of {self._buffer.numel()} bytes: "
                    "the plan's placement and its buffers do not belong together; plan the run again"
                )
        self._parts[role] = offset, part
        return part[:size].view(dtype)

    def send(self, role: str) -> None:
        """Write a part to the store."""
        offset, part = self._parts[role]
        self.requests.append(self._state.write(role, offset, part))

    def close(self) -> None:
        """Nothing is written to the parts any more."""
        self._moving.close()


class Writer:
    """Hands out ring buffers and takes each back when its writes are done; one chunk is written behind the next."""

    def __init__(self, ring: Ring, timeout: float) -> None:
        self.ring = ring
        self.timeout = timeout
        self._flying: deque[tuple[Tensor, list[Request]]] = deque()

    @contextmanager
    def buffer(self, state: UnitState) -> Iterator[_Parts]:
        """A chunk of the unit to be filled and sent."""
        self.drain(leave=1)
        raw = self.ring.acquire(self.timeout)
        parts = _Parts(state, raw)
        try:
            yield parts
        finally:
            parts.close()
            self._flying.append((raw, parts.requests))

    def drain(self, leave: int = 0) -> None:
        """Wait until at most `leave` chunks are still being written."""
        while len(self._flying) > leave:
            buffer, requests = self._flying.popleft()
            for request in requests:
                request.wait()
            self.ring.release(buffer)
