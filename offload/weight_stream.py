"""Weights on their way to the device: a fixed number of slots, filled ahead of compute in the order of visits.

    store ──read──► staging ring ──copy──► device slot ──bind──► parameter views   (or home ──copy──► slot)
    optimizer update ──new weights──────────────┘

Slots are taken in the order of the visits to come and given back when a visit ends, or when the optimizer update that
they were lent to is done with them. The lane that fills slots waits only for store reads and for updates that have
started; an update starts when it has its slot and never waits for another. So there is no cycle. A slot that is free
keeps its unit until another needs the room: at the turn from forward to backward, and from an update to the next
forward, nothing is read twice. (On a CPU the store reads into the slot itself; nothing is staged.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.device import Device, limit_lane_threads
from offload.errors import OffloadError
from offload.io import Ring
from offload.slot_loads import SlotLoads
from offload.state import UnitState
from offload.trace import Trace
from offload.units import Unit
from offload.update_chunk import Lent, settled
from offload.update_stream import UpdateStream

_OWN = "own"


@dataclass
class _Slot:
    buffer: Tensor
    group: str
    unit: Unit | None = None
    filled: Future[None] | None = None
    bound: bool = False
    lent: bool = False  # to an optimizer update, which reads the unit's weights here or leaves new ones
    outdated: bool = False  # holds, or will, the weights that the unit's deferred update starts from
    released: torch.cuda.Event | None = None

    @property
    def filling(self) -> bool:
        """Whether somebody writes to it, maybe for a unit that is not wanted any more."""
        return self.filled is not None and not self.filled.done()


class WeightStream:
    """Brings units' weights into device slots ahead of compute and binds parameters to them as views.

    Args:
        updates: starts a unit's deferred update when there is a slot for its new weights; says when others are done.
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
        updates: UpdateStream,
        trace: Trace,
        timeout: float,
        poison: bool = False,
    ) -> None:
        self._states = states
        self._slots = [_Slot(buffer, group) for group, buffers in slots.items() for buffer in buffers]
        self._block_bytes = max((s.buffer.numel() for s in self._slots if s.group == "block"), default=0)
        self._resident = resident
        self._resident_filled: Future[None] | None = None
        self._dtype = dtype
        self._device = device
        self._loads = SlotLoads(device, staging, trace, timeout)
        self._updates = updates
        self._trace = trace
        self._timeout = timeout
        self._poison = poison
        # What lives on the device has a slot of its own, which nobody else is given.
        self._where: dict[int, _Slot] = {
            s.unit.index: _Slot(s.on_device.buffer, _OWN, s.unit, settled()) for s in states if s.on_device is not None
        }
        self._generations = [0] * len(states)
        self._upcoming: deque[int] = deque()
        self._failed: BaseException | None = None
        self._changed = threading.Condition(threading.RLock())  # guards slots and visits
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="h2d", initializer=limit_lane_threads)
        self._placeholder = torch.full((1,), float("nan"), dtype=dtype, device=device.name)
        for state in states:
            self._unbind(state.unit)

    def expect(self, visits: Sequence[int]) -> None:
        """Announce the units to be visited, in order, and start to load the resident unit and the first of them.

        To be called between two steps, when nothing computes with the resident unit's weights.
        """
        self._renew_resident()
        with self._changed:
            self._upcoming = deque(visits)
            self._load_ahead()

    @contextmanager
    def bound(self, unit: Unit) -> Iterator[None]:
        """The unit's parameters are views of its slot inside the body; loads of the next units go on beside it."""
        with self._changed:
            while unit.index in self._upcoming and self._upcoming[0] != unit.index:
                self._upcoming.popleft()  # expected, but passed over this time
            slot = self._slot_of(unit)
            if self._upcoming and self._upcoming[0] == unit.index:
                self._upcoming.popleft()
            self._load_ahead()
        assert slot.filled is not None
        self._loads.wait(slot.filled, unit)
        self._bind(unit, slot.buffer)
        try:
            yield
        finally:
            self._unbind(unit)
            with self._changed:
                slot.bound = False
                if self._poison and not slot.lent and slot.group != _OWN:
                    slot.buffer.view(self._dtype).fill_(float("nan"))
                    self._forget(slot)
                slot.released = self._device.mark()
                self._load_ahead()

    def lend(self, unit: Unit) -> Lent:
        """Lend the slot of a unit that is bound now to its optimizer update, which starts from the weights in it and
        leaves the new ones there."""
        if unit.resident:
            assert self._resident is not None
            lent = Lent(self._resident[: self._states[unit.index].sizes["param"]], True, self._device.mark())
            self._resident_filled = lent.filled
            return lent
        with self._changed:
            self._generations[unit.index] += 1
            slot = self._where[unit.index]
            lent = Lent(slot.buffer[: self._states[unit.index].sizes["param"]], True, self._device.mark())
            self._hold(slot, lent)
            slot.filled = lent.filled
            return lent

    def bind_resident(self) -> None:
        """Bind the resident unit once its weights are up to date; it stays bound."""
        for state in self._states:
            if state.unit.resident and self._resident is not None:
                assert self._resident_filled is not None
                with self._trace.stall("weights", state.unit.name):
                    self._resident_filled.result(self._timeout)
                self._bind(state.unit, self._resident)

    def _renew_resident(self) -> None:
        for state in self._states:
            if state.unit.resident and self._resident is not None:
                lent = Lent(self._resident[: state.sizes.get("param", 0)], False, self._device.mark())
                started = self._updates.start(state.unit, lent)
                if started or self._resident_filled is None:
                    self._resident_filled = self._submit(state, self._resident, None, lent if started else None)

    def outdate(self, unit: Unit) -> None:
        """The unit's update was deferred: a copy in a slot is what it starts from, and nothing else."""
        with self._changed:
            self._generations[unit.index] += 1
            slot = self._where.get(unit.index)
            if slot is not None:
                slot.outdated = True

    def changed(self, unit: Unit) -> None:
        """The weights of a unit that lives on the device were updated where they are."""
        with self._changed:
            self._generations[unit.index] += 1

    def finish_outdated(self) -> None:
        """Wait for loads under way of weights that deferred updates are going to replace: an update that starts
        without a slot may write to the very blocks, or the home, that such a load reads. What a load raises is for
        compute, if that needs it."""
        with self._changed:
            loads = [slot.filled for slot in self._slots if slot.outdated and slot.filled and slot.filling]
        if loads:
            with self._trace.stall("weights", "which updates replace"):
                _, late = wait(loads, self._timeout)
            if late:
                raise OffloadError(
                    f"weights that updates replace were still being loaded after {self._timeout:.0f} s; see the "
                    "trace's lanes for what holds them, and `offload doctor` for the store's speed"
                )

    def invalidate(self, unit: Unit) -> None:
        """What a slot holds of the unit are not its weights."""
        with self._changed:
            self._generations[unit.index] += 1
            slot = self._where.get(unit.index)
            if slot is not None:
                self._forget(slot)

    def holds(self, unit: Unit) -> bool:
        """Whether the unit's weights, or those that its deferred update starts from, are in a slot."""
        with self._changed:
            slot = self._where.get(unit.index)
            return slot is not None and not slot.filling

    def generation(self, unit: Unit) -> int | None:
        """How often the unit's weights have changed so far, while it is bound; else None."""
        with self._changed:
            slot = self._where.get(unit.index)
            return self._generations[unit.index] if slot is not None and slot.bound else None

    def close(self) -> None:
        """Stop the lane; loads that have not begun are dropped."""
        with self._changed:
            self._upcoming.clear()
        self._lane.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()
        self._where.clear()
        self._resident = None

    # ---- slots: under the lock ----

    def _load_ahead(self) -> None:
        """Fill free slots with the next units, in order; stop at the first unit that finds no slot, or whose weights
        are not decided: what backward needs would wait behind it in the lane, and the decision for backward."""
        for position, index in enumerate(self._upcoming):
            unit = self._states[index].unit
            if index in self._where:
                self._renew(unit, self._where[index])
                continue
            slot = None if self._updates.undecided(unit) else self._choose(unit, position)
            if slot is None:
                break
            self._load(unit, slot)

    def _slot_of(self, unit: Unit) -> _Slot:
        """The slot of a unit that compute needs now, loading it if need be; updates may still hold those that fit.

        It counts as bound before its load or update begins: either may be over at once, and others are then loaded
        ahead, into it too if the unit is not among the visits to come.
        """
        deadline = time.monotonic() + self._timeout
        begin = time.perf_counter()
        waited = False
        while (slot := self._where.get(unit.index)) is None or (slot.outdated and slot.filling):
            free = self._choose(unit, position=-1) if slot is None else None
            if free is not None:
                free.bound = True
                slot = self._load(unit, free)
                break
            if not any(s.lent or s.filling for s in self._slots):
                raise OffloadError(f"no weight slot is free for {unit.name}: two units are in use at once")
            waited = True
            if not self._changed.wait(deadline - time.monotonic()):
                raise OffloadError(
                    f"no weight slot came free for {unit.name} within {self._timeout:.0f} s; see the trace's optimizer "
                    "lane for the update that holds it"
                )
        if waited:
            self._trace.add("stall", f"weight slot: {unit.name}", begin, time.perf_counter())
        slot.bound = True
        self._renew(unit, slot)
        return slot

    def _choose(self, unit: Unit, position: int) -> _Slot | None:
        """A slot of the unit's group that is empty, or whose unit is needed again latest, and after `position`."""
        need = self._states[unit.index].weight_bytes
        group = "block" if need <= self._block_bytes else "large"
        best, best_use = None, position
        for slot in self._slots:
            if slot.group != group or slot.bound or slot.lent or slot.filling:
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

    def _load(self, unit: Unit, slot: _Slot) -> _Slot:
        self._forget(slot)
        slot.unit = unit
        self._where[unit.index] = slot
        state = self._states[unit.index]
        lent = Lent(slot.buffer[: state.sizes.get("param", 0)], False, slot.released)
        if started := self._updates.start(unit, lent):
            self._hold(slot, lent)
        slot.filled = self._submit(state, slot.buffer, slot.released, lent if started else None)
        slot.filled.add_done_callback(lambda _: self._came_free())
        return slot

    def _submit(
        self, state: UnitState, buffer: Tensor, released: torch.cuda.Event | None, lent: Lent | None
    ) -> Future[None]:
        """Have the lane fill `buffer`, with what the unit's update leaves where it is lent to that. The update to wait
        for is the latest one as of now: a later one may be deferred until this lane has come further."""
        update = self._updates.ready(state.unit) if lent is None else lent.filled
        return self._lane.submit(self._fill, state, buffer, released, update, lent is not None)

    def _renew(self, unit: Unit, slot: _Slot) -> None:
        """Start the unit's deferred update on the weights in its slot; load new ones if it did not wait for that.

        A slot that is still being filled, for a visit that did not come, is looked at again when that is over.
        """
        if not slot.outdated or slot.filling:
            return
        slot.outdated = False
        lent = Lent(slot.buffer[: self._states[unit.index].sizes["param"]], True, slot.released)
        if slot.filled is not None and _succeeded(slot.filled) and self._updates.start(unit, lent):
            self._hold(slot, lent)
            slot.filled = lent.filled
        else:
            self._load(unit, slot)

    def _hold(self, slot: _Slot, lent: Lent) -> None:
        slot.lent = True
        lent.filled.add_done_callback(lambda _: self._came_free(slot))

    def _came_free(self, lent: _Slot | None = None) -> None:
        with self._changed:
            if lent is not None:
                lent.lent = False
            self._changed.notify_all()
            self._load_ahead()

    def _forget(self, slot: _Slot) -> None:
        if slot.unit is not None:
            del self._where[slot.unit.index]
            slot.unit, slot.outdated = None, False

    def _bind(self, unit: Unit, buffer: Tensor) -> None:
        flat = buffer[: self._states[unit.index].weight_bytes].view(self._dtype)
        for parameter, slot in zip(unit.parameters, unit.layout.params, strict=True):
            start = slot.offset + (0 if slot.trainable else unit.layout.trainable_elements)
            parameter.data = flat[start : start + slot.numel].view(slot.shape)

    def _unbind(self, unit: Unit) -> None:
        for parameter, slot in zip(unit.parameters, unit.layout.params, strict=True):
            parameter.data = self._placeholder.expand(slot.shape)

    # ---- the lane's thread ----

    def _fill(
        self, state: UnitState, buffer: Tensor, released: torch.cuda.Event | None, update: Future[None], leaves: bool
    ) -> None:
        try:
            if self._failed is not None:  # its buffers are lost to the ring, which the gradient lane needs too
                raise self._failed
            self._fill_now(state, buffer, released, update, leaves)
        except BaseException as error:
            self._failed = error
            raise

    def _fill_now(
        self, state: UnitState, buffer: Tensor, released: torch.cuda.Event | None, update: Future[None], leaves: bool
    ) -> None:
        """`update`: settled when the unit's update `leaves` its new weights here; otherwise when they can be read."""
        if not leaves:
            update.result(self._timeout)
        self._device.wait(released)
        start = 0
        for role in ("param", "frozen"):
            nbytes = state.sizes.get(role, 0)
            if not nbytes:
                continue
            if role == "param" and leaves:
                update.result(self._timeout)
            else:
                self._loads.load(state, role, buffer, start)
            start += nbytes


def _succeeded(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
