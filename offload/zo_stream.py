"""Units on their way through the device for forward passes only: clean weights in, perturbed weights beside them.

    home or store ──► slot ──update──► slot ──► home or store (`zo_writeback`)
                                        └─ perturb ──► another slot ──► forward passes

Two slots are enough. While the first passes of a unit run on perturbed weights in the other slot, its clean weights go
home; then the last perturbation is made where the clean weights were, and the other slot takes the next unit. With a
third slot the next unit comes during all passes. Slots are handed out by the main thread alone; the lane that fills
them waits for write-backs only, which wait for no slot. So there is no cycle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from offload.zo_pieces import Pieces
from offload.zo_writeback import WriteBack


@dataclass
class Slot:
    """A buffer on the device, and the unit whose clean weights it holds or is being filled with."""

    buffer: Tensor
    unit: Unit | None = None
    filled: Future[None] | None = None
    taken: bool = False  # in use by the visit under way
    leaving: Future[None] | None = None  # a write-back that reads it
    released: torch.cuda.Event | None = None


class UnitStream:
    """Brings units' stored roles into slots in the order of visits, and lends free slots for perturbed weights.

    Args:
        timeout: seconds compute waits for one unit before it gives up with an error.
        poison: fill a slot with NaN whenever it is released (tests: a stale use then shows in the numbers).
    """

    def __init__(
        self,
        states: Sequence[UnitState],
        slots: Sequence[Tensor],
        pieces: Pieces,
        device: Device,
        staging: Ring,
        home: WriteBack,
        trace: Trace,
        timeout: float,
        poison: bool = False,
    ) -> None:
        self._states = states
        self._slots = [Slot(buffer) for buffer in slots]
        self._pieces = pieces
        self._device = device
        self._loads = SlotLoads(device, staging, trace, timeout)
        self._home = home
        self._timeout = timeout
        self._poison = poison
        self._upcoming: deque[int] = deque()
        self._visiting = False
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="h2d", initializer=limit_lane_threads)

    def expect(self, visits: Sequence[int]) -> None:
        """Announce the units to be visited, in order, and start to load the first of them."""
        self._upcoming = deque(visits)
        self._load_ahead()

    @contextmanager
    def visit(self, unit: Unit) -> Iterator[Slot]:
        """The slot with the unit's clean weights; what is done to it inside the body is lost unless it is sent home."""
        if unit.index in self._upcoming:
            while self._upcoming.popleft() != unit.index:
                pass  # expected, but passed over this time
        slot = self._find(unit) or self._load(unit, self._choose())
        slot.taken = self._visiting = True
        assert slot.filled is not None
        self._loads.wait(slot.filled, unit)
        try:
            yield slot
        finally:
            self._visiting = False
            self.give_back(slot)

    def take(self) -> Slot:
        """A free slot for perturbed weights, empty; blocks while a write-back still reads it."""
        slot = self._choose()
        slot.taken = True
        slot.unit = None
        if slot.leaving is not None:
            slot.leaving.result(self._timeout)
        self._load_ahead()
        return slot

    def give_back(self, slot: Slot) -> None:
        """A slot is not needed any more: the next units may take it."""
        slot.taken = False
        slot.unit = None
        if self._poison and (slot.leaving is None or slot.leaving.done()):
            slot.buffer.fill_(255)  # NaN in every floating dtype
        slot.released = self._device.mark()
        self._load_ahead()

    def close(self) -> None:
        """Stop the lane; loads that have not begun are dropped."""
        self._upcoming.clear()
        self._lane.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()

    # ---- slots: main thread only ----

    def _load_ahead(self) -> None:
        """Fill free slots with the next units, in order; between visits one slot stays free for perturbed weights."""
        room = len(self._slots) - (0 if self._visiting else 1)
        for index in self._upcoming:
            if sum(slot.taken or slot.unit is not None for slot in self._slots) >= room:
                return
            unit = self._states[index].unit
            if self._find(unit) is None:
                self._load(unit, self._choose())

    def _find(self, unit: Unit) -> Slot | None:
        return next((slot for slot in self._slots if slot.unit is unit), None)

    def _choose(self) -> Slot:
        """A slot that is not taken: empty rather than filled, and one that nothing reads any more if there is one."""
        free = [slot for slot in self._slots if not slot.taken]
        if not free:
            raise OffloadError("no weight slot is free: more units are in use at once than the plan has slots for")
        return min(free, key=lambda s: (self._next_use(s), s.leaving is not None and not s.leaving.done()))

    def _next_use(self, slot: Slot) -> int:
        """0 for an empty slot; the later a filled one is needed, the smaller."""
        if slot.unit is None:
            return -len(self._upcoming) - 2
        index = slot.unit.index
        return -self._upcoming.index(index) if index in self._upcoming else -len(self._upcoming) - 1

    def _load(self, unit: Unit, slot: Slot) -> Slot:
        slot.unit = unit
        state = self._states[unit.index]
        slot.filled = self._lane.submit(self._fill, state, slot.buffer, slot.released, slot.leaving)
        slot.leaving = None
        return slot

    # ---- the lane's thread ----

    def _fill(
        self, state: UnitState, slot: Tensor, released: torch.cuda.Event | None, leaving: Future[None] | None
    ) -> None:
        self._home.wait_ready(state.unit)
        if leaving is not None:
            leaving.result(self._timeout)
        self._device.wait(released)
        for role in state.sizes:
            target = self._pieces.part(state.unit.layout, slot, role)
            self._loads.load(state, role, slot, int(target.storage_offset() - slot.storage_offset()))
