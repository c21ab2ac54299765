"""The optimizer lane: AdamW over each unit's state, chunk by chunk, wherever the state lives.

    store ──read──► chunk buffer ─┐                        ┌─► shadow extents in the store (write-behind)
    homes ────────(in place)──────┴─► merge, AdamW, split ─┼─► homes in RAM or CXL memory
    device slot ──(weights)───────┘                        └─► device slot

One job per unit and step. Without clipping a unit's job is submitted when its gradient is complete: it takes the
weights from the slot in which backward used them. With clipping the jobs wait, in the order in which the next forward
will visit the units, and each starts when that forward has a slot for its unit: the update leaves the new weights
there, so they cross to the device without being read again. Either way the state of the units to come is read ahead as
far as chunk buffers are free. A step's jobs are followed by its commit; the next step's jobs wait for that, so that
what a commit names never changes under it.

The lane waits only for store reads, for chunk buffers (freed by store writes) and for commits (which wait for updates
before them); none of these waits for the lane's next job, so there is no cycle.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from offload import device_home
from offload.adamw import Hyper, Kernel
from offload.device import Device, limit_lane_threads, optimizer_threads
from offload.errors import OffloadError
from offload.io import Ring
from offload.state import CHUNK_ELEMENTS, States, UnitState
from offload.trace import Trace
from offload.units import Unit
from offload.update_chunk import Chunk, Job, Lent, UnitUpdate, Writes, settled

_STOP, _LOOK = object(), object()


class UpdateStream:
    """Runs optimizer updates and commits in order, on lanes of their own.

    Args:
        states: where every unit's state lives.
        ring: chunk buffers; each holds of one chunk the roles that any unit has on NVMe.
        gradient_dtype: what gradients are summed in, and kept in while they wait.
        timeout: seconds one chunk may wait for a buffer.
    """

    def __init__(
        self,
        states: States,
        ring: Ring,
        gradient_dtype: torch.dtype,
        device: Device,
        trace: Trace,
        timeout: float,
    ) -> None:
        self._states = states
        self._ring = ring
        self._gradient_dtype = gradient_dtype
        self._device = device
        self._trace = trace
        self._timeout = timeout
        self._kernel = Kernel(optimizer_threads(device.name))
        self._latest: dict[int, UnitUpdate] = {}
        self._waiting: dict[int, Job] = {}  # deferred, in the order of the visits to come
        self._trials: dict[int, Job] = {}  # of this step, not decided
        self._started: deque[Job] = deque()
        self._commit: Future[None] = settled()
        self._failed: BaseException | None = None
        self._closed = False
        self._lock = threading.Lock()
        # Read ahead: units whose update comes next, which of their roles, and the chunks on their way.
        self._coming: deque[int] = deque()
        self._coming_roles: dict[int, list[str]] = {}
        self._ahead: deque[Chunk] = deque()
        self._announced = self._read_for = 0  # announcements made, and the one that `_ahead` was read for
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lane = threading.Thread(target=self._serve, name="optimizer", daemon=True)
        self._lane.start()
        # Not an executor: the interpreter would wait at its exit for commits whose updates nobody starts any more.
        self._commits: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._commit_lane = threading.Thread(target=self._serve_commits, name="commit", daemon=True)
        self._commit_lane.start()

    def submit(
        self,
        unit: Unit,
        present: set[str],
        steps: dict[str, int],
        hyper: Hyper,
        durable: bool,
        gradient: Tensor | None = None,
        done: Callable[[], None] | None = None,
        lent: Lent | None = None,
        trial: Future[bool] | None = None,
    ) -> None:
        """Queue one unit's update; see `Job` for the arguments."""
        job = self._job(unit, present, steps, hyper, durable, gradient, done, lent)
        if trial is not None:
            job.trial = trial
            with self._lock:
                self._trials[unit.index] = job
        self._start(job)

    def can_try(self, unit: Unit) -> bool:
        """Whether an update of this unit can be taken back: nothing of its state is updated in place."""
        state = self._states.units[unit.index]
        return not state.homes and state.on_device is None

    def undecided(self, unit: Unit) -> bool:
        """Whether the unit's latest update is a trial of this step: its weights are not known before the step's end."""
        with self._lock:
            return unit.index in self._trials

    def defer(self, unit: Unit, present: set[str], steps: dict[str, int], hyper: Hyper, durable: bool) -> None:
        """Hold one unit's update back until `start`, or `start_all`: its gradient waits in its home or the store."""
        with self._lock:
            trial = self._trials.pop(unit.index, None)
        job = self._job(unit, present, steps, hyper, durable, None, None, None)
        if trial is not None:  # it was taken back
            job.previous, job.retried = trial.previous, trial.update
        with self._lock:
            self._waiting[unit.index] = job

    def forget_trials(self) -> None:
        """All trials stand: the next updates are ordinary ones again."""
        with self._lock:
            self._trials.clear()

    def expect(self, units: Sequence[Unit], roles: Sequence[str], held: Sequence[Unit] = ()) -> None:
        """Announce the updates to come, in order, and which roles may be read ahead of them (`grad` where it waits;
        not `param` of units whose weights are `held` in slots)."""
        here = {unit.index for unit in held}
        with self._lock:
            self._coming = deque(u.index for u in units if u.trainable)
            self._coming_roles = {
                u.index: [
                    role
                    for role in (*self._states.units[u.index].updated_roles, "grad")
                    if role in roles and not (role == "param" and u.index in here)
                ]
                for u in units
            }
            self._announced += 1
        self._inbox.put(_LOOK)

    def start(self, unit: Unit, lent: Lent | None) -> bool:
        """Start the unit's deferred update, if it has one; it leaves the new weights in the slot that is lent to it."""
        with self._lock:
            job = self._waiting.pop(unit.index, None)
        if job is None:
            return False
        job.lent = lent
        self._start(job)
        return True

    def start_all(self) -> None:
        """Start the deferred updates that nobody asked for, in order."""
        while True:
            with self._lock:  # slots that come free take jobs away meanwhile
                index = next(iter(self._waiting), None)
            if index is None:
                return
            self.start(self._states.units[index].unit, None)

    def commit(self, meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]) -> None:
        """After all updates queued so far are durable, call `first`, make the store's next version, call `then`."""
        updates = list(self._latest.values())
        self._commit = Future()
        self._commits.put((self._commit, updates, meta, first, then))

    def ready(self, unit: Unit) -> Future[None]:
        """Settled when the weights of the unit's latest update can be read, or with its error."""
        update = self._latest.get(unit.index)
        return settled() if update is None else update.ready

    def check(self) -> None:
        """Raise the error of an update or commit that has failed; does not wait."""
        for future in (*(update.ready for update in self._latest.values()), self._commit):
            if future.done():
                future.result()

    def flush(self) -> None:
        """Wait for every update and commit, deferred ones too; raises the first error."""
        self.start_all()
        for update in list(self._latest.values()):
            update.ready.result()
            update.durable.result()
        self._commit.result()

    def close(self) -> None:
        """Stop the lanes; updates that have not begun are dropped."""
        with self._lock:
            self._closed = True
            dropped = list(self._waiting.values())
            self._waiting.clear()
        for job in dropped:
            _drop(job)
        self._inbox.put(_STOP)
        self._lane.join()
        self._kernel.close()
        self._commits.put(_STOP)
        self._commit_lane.join()

    def _job(
        self,
        unit: Unit,
        present: set[str],
        steps: dict[str, int],
        hyper: Hyper,
        durable: bool,
        gradient: Tensor | None,
        done: Callable[[], None] | None,
        lent: Lent | None,
    ) -> Job:
        state, previous = self._states.units[unit.index], self._latest.get(unit.index)
        job = Job(state, present, dict(steps), hyper, durable, gradient, done, lent, self._commit, previous)
        self._latest[unit.index] = job.update
        return job

    def _start(self, job: Job) -> None:
        with self._lock:
            closed = self._closed
            if not closed:
                self._started.append(job)
        if closed:
            _drop(job)
            raise OffloadError("the optimizer lane is closed")
        self._inbox.put(_LOOK)

    # ---- the lanes' threads ----

    def _serve_commits(self) -> None:
        limit_lane_threads()
        while (commit := self._commits.get()) is not _STOP:
            future, *arguments = commit
            try:
                self._commit_now(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _commit_now(
        self, updates: list[UnitUpdate], meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]
    ) -> None:
        for update in updates:
            update.durable.result()
        first()
        with self._trace.span("nvme_write", "commit"):
            self._states.store.commit(meta)
        then()

    def _serve(self) -> None:
        limit_lane_threads()
        while self._inbox.get() is not _STOP:
            while self._started and not self._closed:
                self._run(self._started.popleft())
            try:
                self._read_ahead(None, 0)
            except BaseException as error:  # the next job has to hear of it
                self._failed = error
        for job in self._started:
            _drop(job)

    def _run(self, job: Job) -> None:
        try:
            if self._failed is not None:  # its buffers are lost to the ring: nobody may wait for them
                raise self._failed
            self._update(job)
        except BaseException as error:
            self._failed = error
            job.fail(error)
        finally:
            if job.done is not None:
                job.done()

    def _update(self, job: Job) -> None:
        job.before.result()
        if job.previous is not None:  # its weights may be ready long before its moments are in the store
            job.previous.durable.result(self._timeout)
        if job.retried is not None:
            job.retried.written.result(self._timeout)
        with self._lock:
            while job.unit.index in self._coming and self._coming.popleft() != job.unit.index:
                pass  # expected, but passed over this time
        writes = Writes(job)
        if job.lent is not None:
            self._device.wait(job.lent.released)
        if job.present:
            self._update_chunks(job, writes)
        else:  # no gradient: its state is as it was, and what of it lives in RAM may be due
            self._carry_over(job, writes)
        if "param" in job.state.homes:
            job.update.ready.set_result(None)
        if job.lent is not None:
            job.lent.filled.set_result(None)
        writes.finish()

    def _update_chunks(self, job: Job, writes: Writes) -> None:
        for start in range(0, job.unit.layout.trainable_elements, CHUNK_ELEMENTS):
            chunk = self._take_chunk(job.state, start)
            self._read_ahead(job, start + CHUNK_ELEMENTS)
            chunk.take(job, self._device)
            with self._trace.span("optimizer", job.unit.name):
                chunk.step(job, self._kernel)
            if job.lent is not None:
                with self._trace.span("h2d", job.unit.name, chunk.weight_bytes):
                    chunk.place(job.lent, self._device)
            chunk.store(writes, job.durable, self._release)

    def _carry_over(self, job: Job, writes: Writes) -> None:
        for role in job.state.updated_roles:
            home = job.state.homes.get(role)
            if job.durable and home is not None:
                writes.add(role, job.state.write(role, 0, home[: job.state.store.padded(job.state.key(role))]))
            elif job.durable and job.state.on_device is not None:
                device_home.send(
                    job.state, role, self._spare, self._release, self._device, self._trace, writes
                )  # fmt: skip
        if job.lent is not None and not job.lent.current:
            self._fill(job.state, job.lent.weights)

    def _spare(self) -> Tensor:
        """A chunk buffer for what is not read; what was read ahead may hold all of them."""
        buffer = self._ring.try_acquire()
        if buffer is None:
            if self._ahead:
                self._drop_chunk(self._ahead.pop())
            buffer = self._ring.acquire(self._timeout)
        return buffer

    def _fill(self, state: UnitState, slot: Tensor) -> None:
        """A slot that was lent for new weights, when there are none: the unit's weights as they are."""
        for start in range(0, state.unit.layout.trainable_elements, CHUNK_ELEMENTS):
            chunk = self._take_chunk(state, start)
            chunk.read(["param"])
            chunk.wait()
            chunk.check(self._kernel)
            chunk.place(Lent(slot, False, None), self._device)
            self._release(chunk.buffer)

    # ---- read-ahead ----

    def _take_chunk(self, state: UnitState, start: int) -> Chunk:
        """The chunk, if it was read ahead; otherwise a fresh one, for which what was read ahead in vain makes room."""
        self._drop_stale()
        while self._ahead:
            chunk = self._ahead.popleft()
            if chunk.state is state and chunk.start == start:
                return chunk
            self._drop_chunk(chunk)
        return Chunk(state, start, self._ring.acquire(self._timeout), self._gradient_dtype)

    def _read_ahead(self, job: Job | None, start: int) -> None:
        """Start to read the chunks to come while buffers are free: the job's own from `start` on, then other units'."""
        if self._failed is not None or self._closed:
            return
        self._drop_stale()
        for state, first, roles in islice(self._to_come(job, start), len(self._ahead), None):
            buffer = self._ring.try_acquire()
            if buffer is None:
                return
            chunk = Chunk(state, first, buffer, self._gradient_dtype)
            self._ahead.append(chunk)
            chunk.read(roles)

    def _to_come(self, job: Job | None, start: int) -> Iterator[tuple[UnitState, int, list[str]]]:
        with self._lock:  # another announcement may come while this one is followed
            coming, roles = list(self._coming), self._coming_roles
            queued = {job.unit.index: job for job in (*self._waiting.values(), *self._started)}
        if job is not None:
            for first in range(start, job.unit.layout.trainable_elements, CHUNK_ELEMENTS):
                yield job.state, first, roles.get(job.unit.index, [])
        for index in coming:
            state = self._states.units[index]
            before = queued[index].previous if index in queued else self._latest.get(index)
            if before is not None and not (before.durable.done() and before.durable.exception() is None):
                return  # its last update is not in the store yet
            for first in range(0, state.unit.layout.trainable_elements, CHUNK_ELEMENTS):
                yield state, first, roles[index]

    def _drop_stale(self) -> None:
        """What was read for an earlier announcement and not used may not be what the store holds now."""
        with self._lock:
            stale, self._read_for = self._read_for != self._announced, self._announced
        while stale and self._ahead:
            self._drop_chunk(self._ahead.popleft())

    def _drop_chunk(self, chunk: Chunk) -> None:
        chunk.wait()
        self._release(chunk.buffer)

    def _release(self, buffer: Tensor) -> None:
        self._ring.release(buffer)
        self._inbox.put(_LOOK)


def _drop(job: Job) -> None:
    """`close` dropped the job before it began; whoever waits for it has to hear of it."""
    job.fail(OffloadError(f"the update of {job.unit.name} was dropped: the engine was closed"))
