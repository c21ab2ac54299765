"""Updates of units that live on the device: AdamW on the compute lane, where weights, state and gradient lie.

Nothing of such a unit is streamed. Only its gradient's norm, which is taken on the CPU, and what a commit writes go to
the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from offload import device_adamw
from offload.adamw import Chunk, Hyper
from offload.device import Device
from offload.errors import OffloadError
from offload.state import UnitState, role_dtype
from offload.trace import Trace
from offload.units import Unit
from offload.update_chunk import Lent
from offload.update_stream import UpdateStream


class DeviceUpdates:
    """Updates units on the device, and has the optimizer lane write them where a step is to be committed.

    Args:
        scratch: memory of the kernel; None where no unit lives on the device.
        timeout: seconds that an update waits for an earlier state to be copied away.
    """

    def __init__(
        self,
        states: Sequence[UnitState],
        gradient_dtype: torch.dtype,
        scratch: Tensor | None,
        device: Device,
        updates: UpdateStream,
        trace: Trace,
        timeout: float,
    ) -> None:
        self._states = {state.unit.index: state for state in states if state.on_device is not None}
        self._gradient_dtype = gradient_dtype
        self._device = device
        self._updates = updates
        self._trace = trace
        self._timeout = timeout
        self._leaving: dict[int, Future[None]] = {}  # state that is copied away for a commit
        self._kernel = None if scratch is None else _kernel(scratch)

    def has(self, unit: Unit) -> bool:
        """Whether the unit lives on the device."""
        return unit.index in self._states

    def step(self, unit: Unit, gradient: Tensor, present: set[str], steps: dict[str, int], hyper: Hyper) -> None:
        """One AdamW step of the parameters that are `present`; launches and returns.

        Args:
            gradient: the unit's summed gradient on the device, 1-D bytes.
            steps: the step count of each parameter, this update included.
        """
        leaving = self._leaving.pop(unit.index, None)
        if leaving is not None and not leaving.done():
            with self._trace.stall("state", unit.name):
                try:
                    leaving.result(self._timeout)
                except TimeoutError:
                    raise OffloadError(
                        f"the state of {unit.name} was not copied from the device within {self._timeout:.0f} s for the "
                        "commit before; see the trace's d2h and nvme_write lanes for what holds it"
                    ) from None
        state = self._states[unit.index]
        pieces = [
            (slot.offset, slot.offset + slot.numel, steps[slot.name])
            for slot in unit.layout.params
            if slot.trainable and slot.name in present
        ]
        assert self._kernel is not None
        with self._trace.span("compute", f"update of {unit.name}"):
            self._kernel.part(self._chunk(state, gradient), pieces, hyper)

    def write(self, unit: Unit, hyper: Hyper, waited: bool = False) -> None:
        """Write the unit's state to the store for this step's commit, as it is when what was launched is done; a lane
        that calls this has `waited` for that."""
        home = self._states[unit.index].on_device
        assert home is not None
        lent = Lent(home.part("param"), True, None if waited else self._device.mark())
        self._leaving[unit.index] = lent.filled
        self._updates.submit(unit, set(), {}, hyper, durable=True, lent=lent)

    def _chunk(self, state: UnitState, gradient: Tensor) -> Chunk:
        """All of a unit as one chunk."""
        home = state.on_device
        assert home is not None
        view = {role: home.part(role).view(role_dtype(role, state.dtype)) for role in state.updated_roles}
        summed = gradient.view(self._gradient_dtype)[: state.unit.layout.trainable_elements]
        return Chunk(view["param"], view.get("master"), summed, view["exp_avg"], view["exp_avg_sq"])


def _kernel(scratch: Tensor) -> device_adamw.DeviceAdamW:
    form = device_adamw.find(scratch.device)
    if form is None:
        raise OffloadError(
            "the plan updates units on the device, where AdamW does not give the bits of the CPU's (checked just now); "
            "plan the run again on this machine"
        )
    return device_adamw.DeviceAdamW(form, scratch)
