"""A role of a unit, from where it rests to a slot of the device tier, and the wait of compute for a filled slot."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from torch import Tensor

from offload.device import Device
from offload.errors import OffloadError
from offload.io import Priority, Request, Ring, Store, moving
from offload.planner.memory import PAGE
from offload.state import UnitState
from offload.trace import Trace
from offload.units import Unit

# Chunks of one unit whose reads are under way while another is copied.
READS_AHEAD = 2
# Bytes of one read that goes straight to a slot.
READ_BYTES = 8 << 20


class SlotLoads:
    """Brings whole roles into slots, and compute to them once they are there.

    Args:
        staging: the ring of host buffers that reads pass through where the device is not host memory.
        timeout: seconds to wait for a buffer of the ring, and of compute for a slot.
    """

    def __init__(self, device: Device, staging: Ring, trace: Trace, timeout: float) -> None:
        self._device = device
        self._staging = staging
        self._trace = trace
        self._timeout = timeout

    def load(self, state: UnitState, role: str, slot: Tensor, start: int) -> None:
        """Fill the bytes of `slot` (uint8, on the device) from `start` on with a unit's `role`, from its home or store.

        The store reads whole pages: a direct read may fill the slot up to the next page.
        """
        nbytes, unit, home = state.sizes[role], state.unit.name, state.homes.get(role)
        target = slot[start : start + nbytes]
        if home is not None:
            with self._trace.span("h2d", unit, nbytes), moving(nbytes, state.tiers[role]):
                self._device.copy(target, home[:nbytes])
        elif self._device.in_host_memory and start % PAGE == 0:
            self._directly(state.store, state.key(role), slot[start:])
        else:
            self._staged(state.store, state.key(role), unit, target)

    def wait(self, filled: Future[None], unit: Unit) -> None:
        """Block compute until a slot is filled; a stall of the trace. Raises what the load raised, or OffloadError."""
        if not filled.done():
            with self._trace.stall("weights", unit.name):
                try:
                    filled.result(self._timeout)
                except TimeoutError:
                    raise OffloadError(
                        f"the weights of {unit.name} did not arrive within {self._timeout:.0f} s; see the trace's "
                        "lanes for what holds them, and `offload doctor` for the store's speed"
                    ) from None
        filled.result()

    def _directly(self, store: Store, key: str, target: Tensor) -> None:
        chunk, total = READ_BYTES, store.padded(key)
        requests = [
            store.read(key, at, target[at : min(at + chunk, total)], Priority.COMPUTE) for at in range(0, total, chunk)
        ]
        for request in requests:
            request.wait()

    def _staged(self, store: Store, key: str, unit: str, target: Tensor) -> None:
        chunk, total = self._staging.nbytes, store.padded(key)
        flying: deque[tuple[Request, Tensor, int]] = deque()

        def land() -> None:
            # After a failed read its buffer is not given back: the device may still write to it.
            request, buffer, at = flying.popleft()
            request.wait()
            part = target[at : at + chunk]
            with self._trace.span("h2d", unit, part.numel()):
                self._device.copy(part, buffer[: part.numel()])
            self._staging.release(buffer)

        for at in range(0, total, chunk):
            if len(flying) == READS_AHEAD:
                land()
            buffer = self._staging.acquire(self._timeout)
            flying.append((store.read(key, at, buffer[: min(chunk, total - at)], Priority.COMPUTE), buffer, at))
        while flying:
            land()
