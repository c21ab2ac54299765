"""One chunk of a unit's optimizer state on its way through memory: read, AdamW, new weights to the device, written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from offload.adamw import Hyper, Kernel, within
from offload.device import Device
from offload.errors import OffloadError
from offload.io import BlockCheck, BlockSums, Priority, Request, moving
from offload.state import CHUNK_ELEMENTS, UnitState, role_dtype
from offload.units import Unit


@dataclass
class Lent:
    """A unit's trainable weights in a device slot, lent to its update, which leaves the new weights there.

    weights: uint8 on the device. current: they are the weights the update starts from; otherwise the slot only receives
    the new ones. released: the slot may be written once the compute stream has passed it. filled: settled by the
    update, when the new weights are in place.
    """

    weights: Tensor
    current: bool
    released: torch.cuda.Event | None
    filled: Future[None] = field(default_factory=Future)


@dataclass
class UnitUpdate:
    """One unit's update: `written` when none of its writes is under way, `ready` when its new weights can be read,
    `durable` when everything due is in the store. An update that was taken back is only ever `written`."""

    written: Future[None] = field(default_factory=Future)
    ready: Future[None] = field(default_factory=Future)
    durable: Future[None] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Pass an error to whoever waits for this update."""
        for future in (self.written, self.ready, self.durable):
            if not future.done():
                future.set_exception(error)


@dataclass
class Job:
    """One unit's update in one step.

    Args:
        present: parameters that have a gradient; the others are carried over unchanged.
        steps: the step count of each parameter, this update included.
        durable: write RAM homes to the store too, because this step is to be committed.
        gradient: the summed gradient on the host, 1-D; None to take it from its home or the store.
        done: called when `gradient` may be reused.
        lent: the weights' device slot, if the update has one.
        before: the commit it has to wait for. previous: this unit's update before this one.
        trial: the update is made before its clipping coefficient is known, as if that were 1; whether it was, settles
            this future. What was written stays in shadow extents until then. None: the update stands.
        retried: the trial that this update replaces; its writes have to end first.
    """

    state: UnitState
    present: set[str]
    steps: dict[str, int]
    hyper: Hyper
    durable: bool
    gradient: Tensor | None
    done: Callable[[], None] | None
    lent: Lent | None
    before: Future[None]
    previous: UnitUpdate | None
    trial: Future[bool] | None = None
    retried: UnitUpdate | None = None
    update: UnitUpdate = field(default_factory=UnitUpdate)

    @property
    def unit(self) -> Unit:
        return self.state.unit

    def fail(self, error: BaseException) -> None:
        """Pass an error to whoever waits for this update or for its slot."""
        self.update.fail(error)
        if self.lent is not None and not self.lent.filled.done():
            self.lent.filled.set_exception(error)


class Chunk:
    """One chunk of one unit's state: views into its homes where it has them, else parts of a ring buffer being read.

    Args:
        buffer: uint8, room for CHUNK_ELEMENTS elements of the roles that have no home, and of a gradient that waits in
            the store.
    """

    def __init__(self, state: UnitState, start: int, buffer: Tensor, gradient_dtype: torch.dtype) -> None:
        self.state = state
        self.start = start
        self.buffer = buffer
        self._count = min(CHUNK_ELEMENTS, state.unit.layout.trainable_elements - start)
        self._gradient_dtype = gradient_dtype
        self._reads: list[Request] = []
        self._asked: set[str] = set()
        self._checks: dict[str, BlockCheck] = {}
        self._sums: dict[str, BlockSums] = {}
        self._raw: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._in_place: dict[str, int] = {}  # bytes that the update moves in and out of each home
        end = 0
        for role in [*state.updated_roles, *(["grad"] if state.gradient_waits else [])]:
            dtype = gradient_dtype if role == "grad" else role_dtype(role, state.dtype)
            home = state.gradient_home if role == "grad" else state.homes.get(role)
            if home is not None:
                self._parts[role] = home.view(dtype)[start : start + self._count]
                self._asked.add(role)
                # state is read and written, a gradient read
                self._in_place[role] = (1 if role == "grad" else 2) * self._count * dtype.itemsize
                continue
            nbytes = -(-self._count * dtype.itemsize // 4096) * 4096
            self._raw[role] = buffer[end : end + nbytes]
            self._parts[role] = self._raw[role][: self._count * dtype.itemsize].view(dtype)
            end += nbytes
        if end > buffer.numel():
            raise OffloadError(
                f"a chunk of {state.unit.name} needs {end} bytes for {', '.join(self._raw)}, its buffer has "
                f"{buffer.numel()}: the plan's placement and its buffers do not belong together; plan the run again"
            )

    def read(self, roles: list[str]) -> None:
        """Start to read these roles from the store, those that live in RAM or are on their way already excepted.
        `step` or `check` compares what was read with its checksums."""
        for role in roles:
            if role not in self._asked:
                self._asked.add(role)
                offset = self.start * self._parts[role].element_size()
                key, raw = self.state.key(role), self._raw[role]
                request, self._checks[role] = self.state.store.read_unchecked(key, offset, raw, Priority.STATE)
                self._reads.append(request)

    def wait(self) -> None:
        """Return when everything this chunk reads has arrived; also to be called before its buffer is given away."""
        reads, self._reads = self._reads, []
        for request in reads:
            request.wait()

    def take(self, job: Job, device: Device) -> None:
        """Bring in what the job itself has: its gradient, and the weights from their device slot. Returns when all
        roles are here."""
        if job.gradient is not None:
            self._parts["grad"] = job.gradient.view(self._gradient_dtype)[self.start : self.start + self._count]
            self._asked.add("grad")
            self._in_place.pop("grad", None)
        if job.lent is not None and job.lent.current and "param" not in self._asked:
            self._asked.add("param")
            device.copy(_bytes(self._parts["param"]), self._slot_part(job.lent))
        self.read([*self.state.updated_roles, "grad"])
        self.wait()

    def step(self, job: Job, kernel: Kernel) -> None:
        """AdamW over the pieces of parameters in this chunk that have a gradient.

        What was read is checked, and what will be written summed, window by window around the update: while the bytes
        are in cache. Raises ChecksumError; nothing of the chunk may go anywhere then.
        """
        pieces = [
            (at, at + count, job.steps[p.name])
            for p, _, count, at in self.state.unit.layout.pieces(True, self.start, self.start + self._count)
            if p.name in job.present
        ]
        part = self._parts
        self._sums = {role: BlockSums() for role in self.state.updated_roles if role in self._raw}
        window = kernel.window if self._checks or self._sums else self._count
        with ExitStack() as stack:
            for role, nbytes in self._in_place.items() if pieces else ():
                stack.enter_context(moving(nbytes, self.state.tiers[role]))
            for start in range(0, self._count, window):
                stop = min(start + window, self._count)
                self._pass(self._checks, start, stop, kernel)
                kernel.step(
                    part["param"], part.get("master"), part["grad"], part["exp_avg"], part["exp_avg_sq"],
                    within(pieces, start, stop), job.hyper,
                )  # fmt: skip
                self._pass(self._sums, start, stop, kernel)
        self._finish_checks()

    def check(self, kernel: Kernel) -> None:
        """Compare what was read with its checksums, for a chunk that is not updated. Raises ChecksumError."""
        self._pass(self._checks, 0, self._count, kernel)
        self._finish_checks()

    def _pass(self, sums: Mapping[str, BlockSums], start: int, stop: int, kernel: Kernel) -> None:
        """Bring elements [start, stop) of each role, with the last the rest of its page, to its checksums."""
        tasks = []
        for role, each in sums.items():
            itemsize, raw = self._parts[role].element_size(), self._raw[role]
            end = stop * itemsize if stop < self._count else raw.numel()
            tasks.append(partial(each.update, raw[start * itemsize : end].numpy().data))
        kernel.share(tasks)

    def _finish_checks(self) -> None:
        checks, self._checks = self._checks, {}
        for check in checks.values():
            check.finish()

    @property
    def weight_bytes(self) -> int:
        """Of this chunk's weights in the compute dtype."""
        return self._parts["param"].nbytes

    def place(self, lent: Lent, device: Device) -> None:
        """Copy the new weights to their device slot."""
        device.copy(self._slot_part(lent), _bytes(self._parts["param"]))

    def store(self, writes: Writes, durable: bool, release: Callable[[Tensor], None]) -> None:
        """Start the writes of this chunk; `release(buffer)` is called when those that leave from it are done."""
        leaving: list[tuple[str, Request]] = []
        for role in self.state.updated_roles:
            itemsize = role_dtype(role, self.state.dtype).itemsize
            home = self.state.homes.get(role)
            if home is None:
                write = self.state.write(role, self.start * itemsize, self._raw[role], self._sums[role])
                leaving.append((role, write))
            elif durable:
                first = self.start * itemsize
                stop = min(first + CHUNK_ELEMENTS * itemsize, self.state.store.padded(self.state.key(role)))
                writes.add(role, self.state.write(role, first, home[first:stop]))
        buffer = self.buffer
        left = Countdown(1 + len(leaving), lambda: release(buffer))
        for role, request in leaving:
            writes.add(role, request)
            request.add_done_callback(lambda _: left.down())
        left.down()

    def _slot_part(self, lent: Lent) -> Tensor:
        itemsize = self._parts["param"].element_size()
        return lent.weights[self.start * itemsize : (self.start + self._count) * itemsize]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


class Writes:
    """All writes of one unit's update; publishes each role when it is complete and settles the update's futures."""

    def __init__(self, job: Job) -> None:
        self._state = job.state
        self._update = job.update
        self._trial = job.trial
        self._roles: set[str] = set()
        self._error: BaseException | None = None
        self._left = Countdown(1, self._settle)  # one more than the writes: `finish` takes it away

    def add(self, role: str, request: Request) -> None:
        self._roles.add(role)
        self._left.up()
        request.add_done_callback(self._one_done)

    def finish(self) -> None:
        """All writes were added."""
        self._left.down()

    def _one_done(self, request: Request) -> None:
        if request.error is not None:
            self._error = request.error
        self._left.down()

    def _settle(self) -> None:
        if self._error is not None:  # this may run in an I/O thread: whoever waits for the update has to see it
            self._update.fail(self._error)
            return
        self._update.written.set_result(None)
        if self._trial is None:
            self._publish()
        else:
            self._trial.add_done_callback(lambda trial: self._publish() if trial.result() else None)

    def _publish(self) -> None:
        try:
            for role in self._roles:
                self._state.store.publish(self._state.key(role))
        except BaseException as error:
            self._update.fail(error)
            return
        for future in (self._update.ready, self._update.durable):
            if not future.done():
                future.set_result(None)


class Countdown:
    """Calls a function once, when as many `down`s as `up`s have come."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._then = then

    def up(self) -> None:
        with self._lock:
            self._count += 1

    def down(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._then()


def settled() -> Future[None]:
    """A future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
