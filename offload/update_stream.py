"""The optimizer lane: AdamW over each unit's state, chunk by chunk, wherever the state lives.

    store ──read──► chunk buffer ─┐                        ┌─► shadow extents in the store (write-behind)
    RAM homes ────(in place)──────┴─► merge, AdamW, split ─┴─► RAM homes

One job per unit and step. With clipping the jobs are queued at the end of backward, in the order in which the next
forward will visit the units, and run ahead of it; without, a unit's job is queued as soon as its gradient landed.
A step's jobs are followed by its commit; the next step's jobs wait for that, so that what a commit names never changes
under it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offload import adamw
from offload.adamw import Hyper
from offload.device import limit_lane_threads
from offload.errors import OffloadError
from offload.io import Priority, Request, Ring
from offload.state import CHUNK_ELEMENTS, States, UnitState, role_dtype
from offload.trace import Trace
from offload.units import Unit


@dataclass
class UnitUpdate:
    """One unit's update: `ready` when its new weights can be read, `durable` when everything due is in the store."""

    ready: Future[None] = field(default_factory=Future)
    durable: Future[None] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Pass an error to whoever waits for this update."""
        for future in (self.ready, self.durable):
            if not future.done():
                future.set_exception(error)


class UpdateStream:
    """Runs optimizer updates and commits in order, on lanes of their own.

    Args:
        states: where every unit's state lives.
        ring: chunk buffers; each holds all roles of one chunk and float32 scratch.
        gradient_dtype: what gradients that wait in a home or in the store are kept in.
        timeout: seconds one chunk may wait for a buffer.
    """

    def __init__(self, states: States, ring: Ring, gradient_dtype: torch.dtype, trace: Trace, timeout: float) -> None:
        self._states = states
        self._ring = ring
        self._gradient_dtype = gradient_dtype
        self._trace = trace
        self._timeout = timeout
        self._scratch = _Scratch()
        self._latest: dict[int, UnitUpdate] = {}
        self._commit: Future[None] = _done()
        self._failed: BaseException | None = None
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="optimizer", initializer=limit_lane_threads)
        self._commit_lane = ThreadPoolExecutor(1, thread_name_prefix="commit", initializer=limit_lane_threads)

    def submit(
        self,
        unit: Unit,
        present: set[str],
        steps: dict[str, int],
        hyper: Hyper,
        durable: bool,
        landing: Tensor | None = None,
        done: Callable[[], None] | None = None,
    ) -> None:
        """Queue one unit's update.

        Args:
            present: parameters that have a gradient; the others are carried over unchanged.
            steps: the step count of each parameter, this update included.
            durable: write RAM homes to the store too, because this step is to be committed.
            landing: the summed gradient, float32 [trainable elements]; None to take it from its home or the store.
            done: called when `landing` may be reused.
        """
        job = _Job(self._states.units[unit.index], present, dict(steps), hyper, durable, landing, done, self._commit)
        self._latest[unit.index] = job.update
        queued = self._lane.submit(self._run, job)
        queued.add_done_callback(lambda future: _dropped(job) if future.cancelled() else None)

    def commit(self, meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]) -> None:
        """After all updates queued so far are durable, call `first`, make the store's next version, call `then`."""
        updates = list(self._latest.values())
        self._commit = self._commit_lane.submit(self._commit_now, updates, meta, first, then)

    def wait_ready(self, unit: Unit) -> None:
        """Block until the unit's latest weights can be read; raises the update's error."""
        update = self._latest.get(unit.index)
        if update is not None:
            update.ready.result()

    def check(self) -> None:
        """Raise the error of an update or commit that has failed; does not wait."""
        for future in (*(update.ready for update in self._latest.values()), self._commit):
            if future.done():
                future.result()

    def flush(self) -> None:
        """Wait for every queued update and commit; raises the first error."""
        for update in list(self._latest.values()):
            update.ready.result()
            update.durable.result()
        self._commit.result()

    def close(self) -> None:
        """Stop the lanes; queued updates that have not begun are dropped."""
        self._lane.shutdown(wait=True, cancel_futures=True)
        self._commit_lane.shutdown(wait=True, cancel_futures=True)

    # ---- the lanes' threads ----

    def _commit_now(
        self, updates: list[UnitUpdate], meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]
    ) -> None:
        for update in updates:
            update.durable.result()
        first()
        with self._trace.span("nvme_write", "commit"):
            self._states.store.commit(meta)
        then()

    def _run(self, job: _Job) -> None:
        try:
            if self._failed is not None:  # its buffers are lost to the ring: nobody may wait for them
                raise self._failed
            job.before.result()
            writes = _Writes(job.state, job.update)
            if not job.present:  # no gradient: its state is as it was, and what of it lives in RAM may be due
                self._write_homes(job, writes)
                return
            elements = job.state.unit.layout.trainable_elements
            starts = list(range(0, elements, CHUNK_ELEMENTS))
            ahead = self._load(job, starts[0])
            for following in [*starts[1:], None]:
                chunk = ahead
                chunk.wait()
                if following is not None:
                    ahead = self._load(job, following)
                with self._trace.span("optimizer", job.state.unit.name):
                    chunk.step(job.present, job.steps, job.hyper, self._scratch)
                chunk.store(writes, job.durable, self._ring)
            if "param" in job.state.homes:
                job.update.ready.set_result(None)
            writes.finish()
        except BaseException as error:
            self._failed = error
            job.update.fail(error)
            raise
        finally:
            if job.done is not None:
                job.done()

    def _write_homes(self, job: _Job, writes: _Writes) -> None:
        for role in job.state.updated_roles:
            home = job.state.homes.get(role)
            if job.durable and home is not None:
                writes.add(role, job.state.write(role, 0, home[: job.state.store.padded(job.state.key(role))]))
        job.update.ready.set_result(None)
        writes.finish()

    def _load(self, job: _Job, start: int) -> _Chunk:
        return _Chunk(job, start, self._ring.acquire(self._timeout), self._gradient_dtype)


@dataclass
class _Job:
    """One unit's update in one step; see `UpdateStream.submit`. `before` is the commit it has to wait for."""

    state: UnitState
    present: set[str]
    steps: dict[str, int]
    hyper: Hyper
    durable: bool
    landing: Tensor | None
    done: Callable[[], None] | None
    before: Future[None]
    update: UnitUpdate = field(default_factory=UnitUpdate)


class _Scratch:
    """Cache-sized working memory of the optimizer lane: the float32 master, a widened gradient, and bits of either."""

    def __init__(self) -> None:
        self.master, self.gradient = torch.empty(2, adamw.CACHE_ELEMENTS, dtype=torch.float32)
        self.bits = torch.empty(adamw.CACHE_ELEMENTS, dtype=torch.int32)


class _Chunk:
    """One chunk of one unit's state: views into RAM homes where it has them, else parts of a ring buffer being read."""

    def __init__(self, job: _Job, start: int, buffer: Tensor, gradient_dtype: torch.dtype) -> None:
        self._state = job.state
        self._start = start
        self._count = min(CHUNK_ELEMENTS, job.state.unit.layout.trainable_elements - start)
        self._buffer = buffer
        self._end = 0
        self._reads: list[Request] = []
        self._raw: dict[str, Tensor] = {}
        self.roles = {role: self._role(role) for role in job.state.updated_roles}
        self._gradient = self._waiting_gradient(job.landing, gradient_dtype)

    def wait(self) -> None:
        """Return when everything this chunk reads has arrived."""
        for request in self._reads:
            request.wait()

    def step(self, present: set[str], steps: dict[str, int], hyper: Hyper, scratch: _Scratch) -> None:
        """AdamW over the pieces of parameters in this chunk, a cache-sized part at a time."""
        layout = self._state.unit.layout
        for at in range(0, self._count, adamw.CACHE_ELEMENTS):
            stop = min(at + adamw.CACHE_ELEMENTS, self._count)
            pieces = [
                (p.name, offset, offset + count)
                for p, _, count, offset in layout.pieces(True, self._start + at, self._start + stop)
                if p.name in present
            ]
            if pieces:
                self._step_part(pieces, at, stop, steps, hyper, scratch)

    def _step_part(
        self,
        pieces: list[tuple[str, int, int]],
        at: int,
        stop: int,
        steps: dict[str, int],
        hyper: Hyper,
        scratch: _Scratch,
    ) -> None:
        n = stop - at
        param, exp_avg, exp_avg_sq = (self.roles[role][at:stop] for role in ("param", "exp_avg", "exp_avg_sq"))
        gradient = self._gradient[at:stop]
        if gradient.dtype != torch.float32:
            gradient = scratch.gradient[:n].copy_(gradient)
        if hyper.coefficient is not None:
            gradient.mul_(hyper.coefficient)
        low = self.roles["master"][at:stop] if "master" in self.roles else None
        master = param
        if low is not None:
            master = scratch.master[:n]
            adamw.merge_master(param, low, exp_avg_sq, master, scratch.bits[:n])
        adamw.fused_step(
            [master[a:b] for _, a, b in pieces],
            [gradient[a:b] for _, a, b in pieces],
            [exp_avg[a:b] for _, a, b in pieces],
            [exp_avg_sq[a:b] for _, a, b in pieces],
            [steps[name] for name, _, _ in pieces],
            hyper,
        )
        if low is not None:
            adamw.split_master(master, param, low, exp_avg_sq, scratch.bits[:n])

    def store(self, writes: _Writes, durable: bool, ring: Ring) -> None:
        """Start the writes of this chunk; the ring buffer goes back when those that leave from it are done."""
        leaving: list[Request] = []
        for role in self._state.updated_roles:
            itemsize = role_dtype(role, self._state.dtype).itemsize
            home = self._state.homes.get(role)
            if home is None:
                leaving.append(self._state.write(role, self._start * itemsize, self._raw[role]))
            elif durable:
                first = self._start * itemsize
                stop = min(first + CHUNK_ELEMENTS * itemsize, self._state.store.padded(self._state.key(role)))
                writes.add(role, self._state.write(role, first, home[first:stop]))
        buffer = self._buffer
        left = _Countdown(len(leaving), lambda: ring.release(buffer))
        for role, request in zip(
            [r for r in self._state.updated_roles if r not in self._state.homes], leaving, strict=True
        ):
            writes.add(role, request)
            request.add_done_callback(lambda _: left.down())

    def _role(self, role: str) -> Tensor:
        dtype = role_dtype(role, self._state.dtype)
        home = self._state.homes.get(role)
        if home is not None:
            return home.view(dtype)[self._start : self._start + self._count]
        part = self._take(dtype, role)
        self._read(role, dtype)
        return part

    def _waiting_gradient(self, landing: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The chunk's gradient where it waits: just landed, in its RAM home, or on its way from the store."""
        span = slice(self._start, self._start + self._count)
        if landing is not None:
            return landing.view(torch.float32)[span]
        home = self._state.gradient_home
        if home is not None:
            return home.view(dtype)[span]
        waiting = self._take(dtype, "grad")
        self._read("grad", dtype)
        return waiting

    def _read(self, role: str, dtype: torch.dtype) -> None:
        key = self._state.key(role)
        offset = self._start * dtype.itemsize
        self._reads.append(self._state.store.read(key, offset, self._raw[role], Priority.STATE))

    def _take(self, dtype: torch.dtype, role: str | None = None) -> Tensor:
        nbytes = -(-self._count * dtype.itemsize // 4096) * 4096
        part = self._buffer[self._end : self._end + nbytes]
        self._end += nbytes
        if role is not None:
            self._raw[role] = part
        return part[: self._count * dtype.itemsize].view(dtype)


class _Writes:
    """All writes of one unit's update; publishes each role when it is complete and settles the update's futures."""

    def __init__(self, state: UnitState, update: UnitUpdate) -> None:
        self._state = state
        self._update = update
        self._roles: set[str] = set()
        self._error: BaseException | None = None
        self._left = _Countdown(1, self._settle)  # one more than the writes: `finish` takes it away

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
        try:
            if self._error is not None:
                raise self._error
            for role in self._roles:
                self._state.store.publish(self._state.key(role))
        except BaseException as error:  # this may run in an I/O thread: whoever waits for the update has to see it
            self._update.fail(error)
            return
        for future in (self._update.ready, self._update.durable):
            if not future.done():
                future.set_result(None)


class _Countdown:
    """Calls a function once, when as many `down`s as `up`s have come."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._then = then
        if count == 0:
            then()

    def up(self) -> None:
        with self._lock:
            self._count += 1

    def down(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._then()


def _dropped(job: _Job) -> None:
    """`close` dropped the job before it began; the commit that waits for it has to hear of it."""
    job.update.fail(OffloadError(f"the update of {job.state.unit.name} was dropped: the engine was closed"))


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
