"""Gradients on their way out: summed per unit on the device, leaving it once per step.

    autograd ──hook──► device slot (sum over micro-batches) ──copy──► landing (fp32, host) ─┬─► optimizer update
                                                                                            ├─► gradient home (RAM)
                                                                                            └─► spilled to the store

Each parameter has its own place in the slot; one that got no gradient is left out of everything, as PyTorch skips it.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.device import Device, limit_lane_threads
from offload.errors import OffloadError
from offload.io import Priority, Request, Ring
from offload.state import UnitState
from offload.trace import Trace
from offload.units import Unit

# Writes in flight for one spilled unit; the staging ring keeps the rest for the weight lane.
WRITES_BEHIND = 2
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
    released: bool = False


def _accumulate(target: Tensor, gradient: Tensor) -> None:
    """target += gradient. float32 += bfloat16 widens its operand whole, so it is done a part at a time."""
    if target.dtype == gradient.dtype or not gradient.is_contiguous():
        target.add_(gradient)
        return
    for part, addend in zip(target.view(-1).split(_PART), gradient.view(-1).split(_PART), strict=True):
        part.add_(addend)


class GradientStream:
    """Sums gradients in device slots and drains each unit's once, on a lane of its own.

    Args:
        slots: free device buffers by group ("block", "large", "held/<unit>", "resident").
        keep: gradients wait in their home (RAM or store) for the global norm; otherwise `update` takes each at once.
        update: called on the lane with (gradient, landing, done) when `keep` is false; it must call `done()` when the
            landing buffer may be reused.
    """

    def __init__(
        self,
        states: Sequence[UnitState],
        slots: dict[str, list[Tensor]],
        landing: Ring,
        staging: Ring,
        dtype: torch.dtype,
        device: Device,
        keep: bool,
        update: Callable[[UnitGradient, Tensor, Callable[[], None]], None],
        trace: Trace,
        timeout: float,
    ) -> None:
        self._states = states
        self._landing = landing
        self._staging = staging
        self._dtype = dtype
        self._device = device
        self._keep = keep
        self._update = update
        self._trace = trace
        self._timeout = timeout
        self._free: dict[str, queue.Queue[Tensor]] = {group: queue.Queue() for group in slots}
        for group, buffers in slots.items():
            for buffer in buffers:
                self._free[group].put(buffer)
        self._block_bytes = max((b.numel() for b in slots.get("block", [])), default=0)
        self._open: dict[int, _Open] = {}
        self._draining: list[Future[None]] = []
        self._drained: set[int] = set()
        self._finished: dict[int, UnitGradient] = {}
        self._failed: BaseException | None = None
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="d2h", initializer=limit_lane_threads)
        self._hooks = []
        for state in states:
            for parameter, slot in zip(state.unit.parameters, state.unit.layout.params, strict=True):
                if slot.trainable:
                    self._hooks.append(
                        parameter.register_post_accumulate_grad_hook(self._sink(state.unit, slot.name, slot.offset))
                    )

    def open(self, unit: Unit) -> None:
        """Give the unit a slot for its gradient, if it has none yet; waits for a slot that is being drained."""
        if not unit.trainable or unit.index in self._open:
            return
        group = self._group(unit)
        with self._trace.span("stall", f"gradient slot for {unit.name}"):
            buffer = self._take(group, unit)
        self._open[unit.index] = _Open(UnitGradient(unit), buffer, group)

    def close_unit(self, unit: Unit) -> None:
        """No more gradients will come for this unit in this step: drain its slot."""
        entry = self._open.pop(unit.index, None)
        if entry is not None:
            if unit.index in self._drained:
                raise OffloadError(f"{unit.name} was visited again in backward after its gradient had left")
            self._drained.add(unit.index)
            self._draining.append(self._lane.submit(self._drain, entry, self._device.mark()))

    def finish(self) -> dict[int, UnitGradient]:
        """Drain what is still open and wait for all drains; returns the step's gradients by unit index."""
        for index in list(self._open):
            self.close_unit(self._states[index].unit)
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
        self._free.clear()
        self._open.clear()

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

    def _sink(self, unit: Unit, name: str, offset: int) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            if gradient.is_sparse:
                raise OffloadError(f"{name} has a sparse gradient; make its embedding dense (sparse=False)")
            entry = self._open.get(unit.index)
            if entry is None:
                raise OffloadError(f"{name} got a gradient outside the backward of its unit {unit.name}")
            target = entry.buffer.view(self._dtype)[offset : offset + gradient.numel()].view(gradient.shape)
            if name in entry.gradient.present:
                _accumulate(target, gradient)
            else:
                target.copy_(gradient)
                entry.gradient.present.add(name)
            parameter.grad = None

        return add

    # ---- the lane's thread ----

    def _drain(self, entry: _Open, mark: torch.cuda.Event | None) -> None:
        try:
            if self._failed is not None:  # its buffers are lost to the rings: nobody may wait for them
                raise self._failed
            self._drain_now(entry, mark)
        except BaseException as error:
            self._failed = error
            self._release(entry)  # the main thread may wait for a slot; it sees the error in `finish`
            raise

    def _release(self, entry: _Open) -> None:
        if not entry.released:
            entry.released = True
            self._free[entry.group].put(entry.buffer)

    def _drain_now(self, entry: _Open, mark: torch.cuda.Event | None) -> None:
        unit, gradient = entry.gradient.unit, entry.gradient
        state = self._states[unit.index]
        self._device.wait(mark)
        landing = self._landing.acquire(self._timeout)
        flat = landing.view(torch.float32)
        with self._trace.span("d2h", unit.name, unit.layout.trainable_elements * self._dtype.itemsize):
            summed = entry.buffer.view(self._dtype)
            for slot in unit.layout.params:
                if slot.name in gradient.present:
                    part = slice(slot.offset, slot.offset + slot.numel)
                    self._land(flat[part], summed[part])
                    # The norm of the whole parameter, as clip_grad_norm_ takes it: its rounding depends on the length.
                    gradient.norms[slot.name] = torch.linalg.vector_norm(flat[part])
        self._release(entry)
        self._finished[unit.index] = gradient
        if not self._keep:
            self._update(gradient, landing, lambda: self._landing.release(landing))
            return
        try:
            if state.gradient_home is not None:
                home = state.gradient_home.view(self._dtype)
                home[: unit.layout.trainable_elements].copy_(flat[: unit.layout.trainable_elements])
            else:
                self._spill(state, flat)
        finally:  # writes leave from staging, so nothing needs the landing buffer any more
            self._landing.release(landing)

    def _land(self, target: Tensor, source: Tensor) -> None:
        """Device slot to landing, widened to float32."""
        if self._device.name == "cpu":
            target.copy_(source)
            return
        stage = self._staging.acquire(self._timeout)
        pinned = stage.view(self._dtype)
        for at in range(0, source.numel(), pinned.numel()):
            part = source[at : at + pinned.numel()]
            self._device.copy(pinned[: part.numel()], part)
            target[at : at + part.numel()].copy_(pinned[: part.numel()])
        self._staging.release(stage)

    def _spill(self, state: UnitState, flat: Tensor) -> None:
        """Landing to the store, in the dtype the gradients were summed in: nothing is lost."""
        key = state.key("grad")
        chunk = self._staging.nbytes
        total = state.store.padded(key)
        elements = state.unit.layout.trainable_elements
        flying: list[tuple[Request, Tensor]] = []
        for at in range(0, total, chunk):
            if len(flying) == WRITES_BEHIND:
                self._written(flying.pop(0))
            buffer = self._staging.acquire(self._timeout)
            part = buffer[: min(chunk, total - at)]
            first = at // self._dtype.itemsize
            count = min(elements - first, part.numel() // self._dtype.itemsize)
            part.view(self._dtype)[:count].copy_(flat[first : first + count])
            flying.append((state.store.write(key, at, part, Priority.WRITE), buffer))
        for entry in flying:
            self._written(entry)
        state.store.publish(key)

    def _written(self, entry: tuple[Request, Tensor]) -> None:
        request, buffer = entry
        request.wait()
        self._staging.release(buffer)
