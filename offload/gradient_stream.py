"""Gradients on their way out: summed per unit on the device, leaving it once per step.

    autograd ──hook──► device slot (sum over micro-batches) ──copy──► landing (host) ─┬─► optimizer update
                                                                                      ├─► gradient home (RAM, CXL)
                                                                                      └─► spilled to the store

On a CPU the slot is host memory itself and nothing lands elsewhere. Each parameter has its own place in the slot; one
that got no gradient is left out of everything, as PyTorch skips it.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offload.device import Device, limit_lane_threads
from offload.errors import OffloadError
from offload.io import Priority, Ring, copy, first_non_finite
from offload.norms import Norms
from offload.state import UnitState
from offload.trace import Trace
from offload.units import Unit
from offload.update_chunk import Countdown

# Bytes of one write request of a spilled gradient.
_SPILL_BYTES = 8 << 20
# Seconds between two looks at whether the lane has failed, while compute waits for it.
_LOOK_SECONDS = 0.5
# Elements added at a time where the dtypes differ: the widened copy stays in a core's cache.
_PART = 256 * 1024


@dataclass
class UnitGradient:
    """One unit's summed gradient of the current step: which parameters have one, and their norms (fp32 scalars)."""

    unit: Unit
    present: set[str] = field(default_factory=set)
    norms: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Open:
    gradient: UnitGradient
    buffer: Tensor
    group: str
    stays: bool = False  # on the device until it is asked to go
    released: bool = False


def _accumulate(target: Tensor, gradient: Tensor) -> None:
    """target += gradient. On a CPU float32 += bfloat16 widens its operand whole, so it is done a part at a time; CUDA
    widens value by value, and would spend its time on launches."""
    if target.dtype == gradient.dtype or target.is_cuda or not gradient.is_contiguous():
        target.add_(gradient)
        return
    for part, addend in zip(target.view(-1).split(_PART), gradient.view(-1).split(_PART), strict=True):
        part.add_(addend)


def _refuse_non_finite(name: str, gradient: Tensor) -> None:
    """Raise OffloadError if a value is infinite or NaN."""
    bad = first_non_finite(f"the gradient of {name}", gradient)
    if bad is not None:
        raise OffloadError(f"{bad}; nothing of this step is committed: lower the learning rate, or look at its batch")


class GradientStream:
    """Sums gradients in device slots and drains each unit's once, on a lane of its own.

    Args:
        slots: free device buffers by group ("block", "large", "held/<unit>", "resident").
        keep: gradients wait in their home (RAM or store) for the global norm.
        landing: host buffers of the largest unit's gradient; None where the device is host memory.
        update: called on the lane with (gradient, host, done) for units that are closed with `update`: `host` is the
            summed gradient as 1-D bytes, read only; `done()` must be called when it may be reused.
    """

    def __init__(
        self,
        states: Sequence[UnitState],
        slots: dict[str, list[Tensor]],
        landing: Ring | None,
        dtype: torch.dtype,
        device: Device,
        keep: bool,
        update: Callable[[UnitGradient, Tensor, Callable[[], None]], None],
        trace: Trace,
        timeout: float,
    ) -> None:
        self._states = states
        self._landing = landing
        self._dtype = dtype
        self._device = device
        self._keep = keep
        self._update = update
        self._trace = trace
        self._timeout = timeout
        self._count = {group: len(buffers) for group, buffers in slots.items()}
        self._free: dict[str, queue.Queue[Tensor]] = {group: queue.Queue() for group in slots}
        for group, buffers in slots.items():
            for buffer in buffers:
                self._free[group].put(buffer)
        self._block_bytes = max((b.numel() for b in slots.get("block", [])), default=0)
        self._open: dict[int, _Open] = {}
        self._draining: list[Future[None]] = []
        self._drained: set[int] = set()
        self._staying: dict[int, _Open] = {}
        self._finished: dict[int, UnitGradient] = {}
        self._failed: BaseException | None = None
        self._norm = Norms()
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="d2h", initializer=limit_lane_threads)
        self._hooks = []
        self._places: dict[int, tuple[Unit, str, int]] = {}  # by id of the parameter
        for state in states:
            for parameter, slot in zip(state.unit.parameters, state.unit.layout.params, strict=True):
                if slot.trainable:
                    self._places[id(parameter)] = state.unit, slot.name, slot.offset
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._add))

    def open(self, unit: Unit) -> None:
        """Give the unit a slot for its gradient, if it has none yet; waits for a slot that is being drained.

        Raises OffloadError when none can come free: all belong to units that backward has not done with.
        """
        if not unit.trainable or unit.index in self._open:
            return
        group = self._group(unit)
        holders = [entry.gradient.unit.name for entry in self._open.values() if entry.group == group]
        if len(holders) == self._count[group]:
            raise OffloadError(
                f"no gradient slot is left for {unit.name}: backward has yet to come back to {' and '.join(holders)}, "
                "because this forward passed through units more often than the one that was planned for, which got "
                "nothing but tokens. Let the model pass through them as often then too (by its configuration's number "
                "of loops, say) and start a new run, or let it pass through them less often here"
            )
        with self._trace.stall("gradient slot", unit.name):
            buffer = self._take(group, unit)
        self._open[unit.index] = _Open(UnitGradient(unit), buffer, group)

    def is_open(self, unit: Unit) -> bool:
        """Whether the unit has a slot in which gradients are being summed."""
        return unit.index in self._open

    def close_unit(self, unit: Unit, update: bool = False, stay: bool = False) -> None:
        """No more gradients will come for this unit in this step: drain its slot, and update the unit at once; or let
        the gradient stay in its slot, where `summed` finds it, until `release`."""
        entry = self._open.pop(unit.index, None)
        if entry is not None:
            if stay:
                entry.stays = True
                self._staying[unit.index] = entry
            if unit.index in self._drained:
                raise OffloadError(f"{unit.name} was visited again in backward after its gradient had left")
            self._drained.add(unit.index)
            self._draining.append(self._lane.submit(self._drain, entry, self._device.mark(), update))

    def summed(self, unit: Unit) -> tuple[UnitGradient, Tensor]:
        """The gradient of a unit that is open or stays, and its slot (1-D bytes on the device)."""
        entry = self._open.get(unit.index) or self._staying[unit.index]
        return entry.gradient, entry.buffer

    def release(self, unit: Unit) -> None:
        """Give back the slot of a gradient that stayed; what was launched on it goes before what comes next."""
        self._release(self._staying.pop(unit.index))

    def finish(self) -> dict[int, UnitGradient]:
        """Drain what is still open and wait for all drains; returns the step's gradients by unit index."""
        for index in list(self._open):
            state = self._states[index]
            self.close_unit(state.unit, stay=self._keep and state.on_device is not None)
        with self._trace.stall("gradients", "the last units"):
            for future in self._draining:
                future.result(self._timeout)
        self._draining.clear()
        self._drained.clear()
        found, self._finished = self._finished, {}
        return found

    def close(self) -> None:
        """Take the hooks off the parameters and stop the lane."""
        for hook in self._hooks:
            hook.remove()
        self._lane.shutdown(wait=True, cancel_futures=True)
        self._norm.wait()
        self._free.clear()
        self._open.clear()
        self._staying.clear()

    def _group(self, unit: Unit) -> str:
        for group in (f"held/{unit.name}", "resident" if unit.resident else ""):
            if group in self._free:
                return group
        nbytes = unit.layout.trainable_elements * self._dtype.itemsize
        return "block" if nbytes <= self._block_bytes else "large"

    def _take(self, group: str, unit: Unit) -> Tensor:
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            self._raise_drain_errors()
            with contextlib.suppress(queue.Empty):
                return self._free[group].get(timeout=_LOOK_SECONDS)
        raise OffloadError(
            f"no gradient slot came free for {unit.name} within {self._timeout:.0f} s; see the trace's d2h and "
            "nvme_write lanes for what holds them"
        )

    def _raise_drain_errors(self) -> None:
        for future in self._draining:
            if future.done():
                future.result()

    def slot(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        """Where the parameter's gradient is summed (its shape, the gradient dtype), and whether there is a sum already.

        For a backward that writes its gradient there itself, at once. Raises OffloadError outside the backward of the
        parameter's unit.
        """
        unit, name, offset = self._places[id(parameter)]
        entry = self._open.get(unit.index)
        if entry is None:
            raise OffloadError(f"{name} got a gradient outside the backward of its unit {unit.name}")
        present = name in entry.gradient.present
        entry.gradient.present.add(name)
        return entry.buffer.view(self._dtype)[offset : offset + parameter.numel()].view(parameter.shape), present

    def _add(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:  # its backward has written to the slot itself
            return
        assert isinstance(parameter, nn.Parameter)
        if gradient.is_sparse:
            _, name, _ = self._places[id(parameter)]
            raise OffloadError(f"{name} has a sparse gradient; make its embedding dense (sparse=False)")
        target, present = self.slot(parameter)
        if present:
            _accumulate(target, gradient)
        else:
            target.copy_(gradient)
        parameter.grad = None

    # ---- the lane's thread ----

    def _drain(self, entry: _Open, mark: torch.cuda.Event | None, update: bool) -> None:
        try:
            if self._failed is not None:  # its buffers are lost to the rings: nobody may wait for them
                raise self._failed
            self._drain_now(entry, mark, update)
        except BaseException as error:
            self._failed = error
            self._release(entry)  # the main thread may wait for a slot; it sees the error in `finish`
            raise

    def _left(self, entry: _Open) -> None:
        if not entry.stays:
            self._release(entry)

    def _release(self, entry: _Open) -> None:
        if not entry.released:
            entry.released = True
            free = self._free.get(entry.group)
            if free is not None:  # else closed: an update that a failed step left behind ends now
                free.put(entry.buffer)

    def _drain_now(self, entry: _Open, mark: torch.cuda.Event | None, update: bool) -> None:
        unit, gradient = entry.gradient.unit, entry.gradient
        state = self._states[unit.index]
        self._device.wait(mark)
        nbytes = unit.layout.trainable_elements * self._dtype.itemsize
        host, done = self._landed(entry, update)
        summed = host.view(self._dtype)
        with self._trace.span("d2h", f"norms of {unit.name}"):
            for slot in unit.layout.params:
                if slot.name in gradient.present:
                    part = summed[slot.offset : slot.offset + slot.numel]
                    # The norm of the whole parameter, as clip_grad_norm_ takes it: its rounding depends on the length.
                    norm = gradient.norms[slot.name] = self._norm(part)
                    if not torch.isfinite(norm):  # or finite values whose squares overflow, as plain PyTorch has it
                        _refuse_non_finite(slot.name, part)
        self._finished[unit.index] = gradient
        waits = self._keep and state.on_device is None
        users = Countdown(1 + waits + update, done)
        if update:
            self._update(gradient, host, users.down)
        if waits:
            try:
                home = state.gradient_home
                if home is None:
                    self._spill(state, host)
                elif home is not host:
                    copy(home[:nbytes], host[:nbytes], state.tiers["grad"])
            finally:
                users.down()
        users.down()

    def _landed(self, entry: _Open, update: bool) -> tuple[Tensor, Callable[[], None]]:
        """The summed gradient on the host, and what gives its buffer back.

        One that only waits for the norm lands in its home; an update needs the landing buffer, which nothing refills
        under it.
        """
        if self._landing is None:
            return entry.buffer, lambda: self._left(entry)
        unit, ring = entry.gradient.unit, self._landing
        home = self._states[unit.index].gradient_home if self._keep and not update else None
        landing = ring.acquire(self._timeout) if home is None else home
        nbytes = unit.layout.trainable_elements * self._dtype.itemsize
        with self._trace.span("d2h", unit.name, nbytes):
            self._device.copy(landing[:nbytes], entry.buffer[:nbytes])
        self._left(entry)
        return landing, (lambda: ring.release(landing)) if home is None else (lambda: None)

    def _spill(self, state: UnitState, host: Tensor) -> None:
        """The gradient to the store, in the dtype it was summed in: nothing is lost."""
        key = state.key("grad")
        total = state.store.padded(key)
        requests = [
            state.store.write(key, at, host[at : min(at + _SPILL_BYTES, total)], Priority.WRITE)
            for at in range(0, total, _SPILL_BYTES)
        ]
        for request in requests:
            request.wait()
        state.store.publish(key)
