"""Units that live on the device: all their roles in one buffer there, from the store and back to it when it commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from offload.device import Device
from offload.errors import OffloadError
from offload.io import BLOCK, Request, Ring
from offload.planner import Plan
from offload.planner.pages import round_up
from offload.state import UPDATED_ROLES, UnitState, Writer, role_dtype
from offload.trace import Trace

if TYPE_CHECKING:  # it uses this module
    from offload.update_chunk import Writes


class DeviceHome:
    """All roles of a unit that lives on the device.

    Args:
        buffer: uint8 on the device. The weights lie in it as in a slot, trainable and then frozen ones; every other
            role begins on a page.
    """

    def __init__(self, buffer: Tensor, sizes: Mapping[str, int]) -> None:
        self.buffer = buffer
        self.starts: dict[str, int] = {}
        self._sizes = sizes
        end = 0
        for role in ("param", "frozen", *UPDATED_ROLES[1:]):
            if role in sizes:
                self.starts[role] = end if role == "frozen" else round_up(end)
                end = self.starts[role] + sizes[role]
        if end > buffer.numel():
            raise OffloadError(
                f"a unit that lives on the device needs {end} bytes there, the plan gives it {buffer.numel()}; plan "
                "the run again"
            )

    def part(self, role: str, first: int = 0, size: int | None = None) -> Tensor:
        """Bytes [first, first + size) of a role, by default all of it."""
        start = self.starts[role]
        stop = self._sizes[role] if size is None else first + size
        return self.buffer[start + first : start + stop]


def place(states: Sequence[UnitState], plan: Plan, slots: Callable[[str], list[Tensor]]) -> None:
    """Give the units that the plan has on the device their buffers there (`state.<unit>`); `load` fills them."""
    for state in states:
        if plan.unit(state.unit.name).placement.get("exp_avg") == "gpu":
            state.on_device = DeviceHome(slots(f"state.{state.unit.name}")[0], state.sizes)


def load(states: Sequence[UnitState], bring: Callable[[UnitState, str, Tensor, int], None]) -> None:
    """Fill what lives on the device from the store: `bring(state, role, buffer, start)`."""
    for state in states:
        if state.on_device is not None:
            for role, start in state.on_device.starts.items():  # a direct read may go on to the end of its page ...
                bring(state, role, state.on_device.buffer, start)  # ... which the next role then overwrites


def send(
    state: UnitState,
    role: str,
    take: Callable[[], Tensor],
    release: Callable[[Tensor], None],
    device: Device,
    trace: Trace,
    writes: Writes,
) -> None:
    """Start to write a role to the store, through host buffers of `take` that `release` gets back when they are
    written. Returns when all of it has been copied from the device."""
    assert state.on_device is not None
    source, first = state.on_device.part(role), 0
    while first < source.numel():
        buffer = take()
        size = buffer.numel() // BLOCK * BLOCK or buffer.numel()  # whole blocks of the store, or all of it at once
        part = source[first : first + size]
        with trace.span("d2h", f"state of {state.unit.name}", part.numel()):
            device.copy(buffer[: part.numel()], part)
        request = state.write(role, first, buffer[: round_up(part.numel())])
        writes.add(role, request)
        request.add_done_callback(partial(_written, release, buffer))
        first += size


def _written(release: Callable[[Tensor], None], buffer: Tensor, _: Request) -> None:
    release(buffer)


def write(states: Sequence[UnitState], staging: Ring, device: Device, timeout: float) -> None:
    """Write all that lives on the device to the store and publish it, between two commits that are due."""
    writer = Writer(staging, timeout)
    device.wait(device.mark())  # for updates that were launched
    for state in states:
        if state.on_device is None:
            continue
        for role in state.updated_roles:
            dtype = role_dtype(role, state.dtype)
            step, whole = staging.nbytes // dtype.itemsize, state.on_device.part(role).view(dtype)
            for start in range(0, whole.numel(), step):
                stop = min(start + step, whole.numel())
                with writer.buffer(state) as parts:
                    device.copy(parts.take(role, start, stop), whole[start:stop])
                    parts.send(role)
        writer.drain()
        for role in state.updated_roles:
            state.store.publish(state.key(role))
