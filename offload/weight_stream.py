"""Weights on their way to the device: a fixed number of slots, filled ahead of compute in the order of visits.

    store ──read──► staging ring ──copy──► device slot ──bind──► parameter views        (or RAM home ──copy──► slot)

Slots are taken in the order of the visits to come and given back when a visit ends, by the main thread alone; the lane
that fills them waits only for store reads and for optimizer updates, which never wait for a slot. So there is no cycle.
A slot that is free keeps its unit until another needs the room: at the turn from forward to backward nothing is read
twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.device import Device, limit_lane_threads
from offload.errors import OffloadError
from offload.io import Priority, Request, Ring
from offload.state import UnitState
from offload.trace import Trace
from offload.units import Unit

# Reads in flight for one unit; the staging ring holds a few more for the gradient lane.
READS_AHEAD = 2


@dataclass
class _Slot:
    buffer: Tensor
    group: str
    unit: Unit | None = None
    filled: Future[None] | None = None
    bound: bool = False
    released: torch.cuda.Event | None = None


class WeightStream:
    """Brings units' weights into device slots ahead of compute and binds parameters to them as views.

    Args:
        ready: blocks until a unit's pending optimizer update is visible in its home; called on the lane.
        timeout: seconds compute waits for one unit before it gives up with an error.
        poison: fill a slot with NaN whenever it is released (tests: a stale use then shows in the numbers).
    """

    def __init__(
        self,
        states: Sequence[UnitState],
        slots: dict[str, list[Tensor]],
        resident: Tensor | None,
        dtype: torch.dtype,
        device: Device,
        staging: Ring,
        ready: Callable[[Unit], None],
        trace: Trace,
        timeout: float,
        poison: bool = False,
    ) -> None:
        self._states = states
        self._slots = [_Slot(buffer, group) for group, buffers in slots.items() for buffer in buffers]
        self._block_bytes = max((s.buffer.numel() for s in self._slots if s.group == "block"), default=0)
        self._resident = resident
        self._dtype = dtype
        self._device = device
        self._staging = staging
        self._ready = ready
        self._trace = trace
        self._timeout = timeout
        self._poison = poison
        self._where: dict[int, _Slot] = {}
        self._upcoming: deque[int] = deque()
        self._failed: BaseException | None = None
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="h2d", initializer=limit_lane_threads)
        self._placeholder = torch.full((1,), float("nan"), dtype=dtype, device=device.name)
        for state in states:
            self._unbind(state.unit)

    def expect(self, visits: Sequence[int]) -> None:
        """Announce the units to be visited, in order, and start to load the first of them."""
        self._upcoming = deque(visits)
        self._load_ahead()

    @contextmanager
    def bound(self, unit: Unit) -> Iterator[None]:
        """The unit's parameters are views of its slot inside the body; loads of the next units go on beside it."""
        if unit.index in self._upcoming:
            while self._upcoming.popleft() != unit.index:
                pass  # expected, but passed over this time
        slot = self._where.get(unit.index) or self._load(unit, self._choose(unit, position=-1))
        slot.bound = True
        self._load_ahead()
        self._await(slot, unit)
        self._bind(unit, slot.buffer)
        try:
            yield
        finally:
            self._unbind(unit)
            slot.bound = False
            slot.released = self._device.mark()
            if self._poison:
                slot.buffer.view(self._dtype).fill_(float("nan"))
                self._forget(slot)
            self._load_ahead()

    def load_resident(self) -> None:
        """Bring the resident unit up to date and bind it; it stays bound."""
        for state in self._states:
            if state.unit.resident and self._resident is not None:
                self._lane.submit(self._fill, state, self._resident, None).result(self._timeout)
                self._bind(state.unit, self._resident)

    def invalidate(self, unit: Unit) -> None:
        """The unit's weights are about to change: a copy in a slot is stale."""
        slot = self._where.get(unit.index)
        if slot is not None:
            self._forget(slot)

    def close(self) -> None:
        """Stop the lane; loads that have not begun are dropped."""
        self._upcoming.clear()
        self._lane.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()
        self._where.clear()
        self._resident = None

    # ---- slots: main thread only ----

    def _load_ahead(self) -> None:
        """Fill free slots with the next units, in order; stop at the first unit that finds no slot."""
        for position, index in enumerate(self._upcoming):
            if index in self._where:
                continue
            slot = self._choose(self._states[index].unit, position)
            if slot is None:
                break
            self._load(self._states[index].unit, slot)

    def _choose(self, unit: Unit, position: int) -> _Slot | None:
        """A slot of the unit's group that is empty, or whose unit is needed again latest, and after `position`."""
        need = self._states[unit.index].weight_bytes
        group = "block" if need <= self._block_bytes else "large"
        best, best_use = None, position
        for slot in self._slots:
            if slot.group != group or slot.bound:
                continue
            if slot.unit is None:
                return slot
            use = self._next_use(slot.unit)
            if use > best_use:
                best, best_use = slot, use
        return best

    def _next_use(self, unit: Unit) -> int:
        try:
            return self._upcoming.index(unit.index)
        except ValueError:
            return len(self._upcoming) + 1

    def _load(self, unit: Unit, slot: _Slot | None) -> _Slot:
        if slot is None:
            raise OffloadError(f"no weight slot is free for {unit.name}: two units are in use at once")
        self._forget(slot)
        slot.unit = unit
        slot.filled = self._lane.submit(self._fill, self._states[unit.index], slot.buffer, slot.released)
        self._where[unit.index] = slot
        return slot

    def _forget(self, slot: _Slot) -> None:
        if slot.unit is not None:
            del self._where[slot.unit.index]
            slot.unit = None

    def _await(self, slot: _Slot, unit: Unit) -> None:
        assert slot.filled is not None
        if not slot.filled.done():
            with self._trace.span("stall", f"weights of {unit.name}"):
                try:
                    slot.filled.result(self._timeout)
                except TimeoutError:
                    raise OffloadError(
                        f"the weights of {unit.name} did not arrive within {self._timeout:.0f} s; see the trace's "
                        "lanes for what holds them, and `offload doctor` for the store's speed"
                    ) from None
        slot.filled.result()

    def _bind(self, unit: Unit, buffer: Tensor) -> None:
        flat = buffer[: self._states[unit.index].weight_bytes].view(self._dtype)
        for parameter, slot in zip(unit.parameters, unit.layout.params, strict=True):
            start = slot.offset + (0 if slot.trainable else unit.layout.trainable_elements)
            parameter.data = flat[start : start + slot.numel].view(slot.shape)

    def _unbind(self, unit: Unit) -> None:
        for parameter, slot in zip(unit.parameters, unit.layout.params, strict=True):
            parameter.data = self._placeholder.expand(slot.shape)

    # ---- the lane's thread ----

    def _fill(self, state: UnitState, buffer: Tensor, released: torch.cuda.Event | None) -> None:
        try:
            if self._failed is not None:  # its buffers are lost to the ring, which the gradient lane needs too
                raise self._failed
            self._fill_now(state, buffer, released)
        except BaseException as error:
            self._failed = error
            raise

    def _fill_now(self, state: UnitState, buffer: Tensor, released: torch.cuda.Event | None) -> None:
        self._ready(state.unit)
        self._device.wait(released)
        start = 0
        for role in ("param", "frozen"):
            nbytes = state.sizes.get(role, 0)
            if not nbytes:
                continue
            target = buffer[start : start + nbytes]
            home = state.homes.get(role)
            if home is not None:
                with self._trace.span("h2d", state.unit.name, nbytes):
                    self._device.copy(target, home[:nbytes])
            else:
                self._stream_in(state, role, target)
            start += nbytes

    def _stream_in(self, state: UnitState, role: str, target: Tensor) -> None:
        """Store to device through the staging ring; `READS_AHEAD` reads are under way while one chunk is copied."""
        chunk = self._staging.nbytes
        total = state.store.padded(state.key(role))
        flying: deque[tuple[Request, Tensor, int]] = deque()

        def land() -> None:
            # After a failed read its buffer is not given back: the device may still write to it.
            request, buffer, at = flying.popleft()
            request.wait()
            part = target[at : at + chunk]
            with self._trace.span("h2d", state.unit.name, part.numel()):
                self._device.copy(part, buffer[: part.numel()])
            self._staging.release(buffer)

        for at in range(0, total, chunk):
            if len(flying) == READS_AHEAD:
                land()
            buffer = self._staging.acquire(self._timeout)
            part = buffer[: min(chunk, total - at)]
            flying.append((state.store.read(state.key(role), at, part, Priority.COMPUTE), buffer, at))
        while flying:
            land()
