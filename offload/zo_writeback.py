"""Updated weights on their way home, and commits, on lanes of their own.

    device slot ──copy──► RAM home ──(at a commit)──► shadow extents in the store
    device slot ──(staging ring)──► shadow extents in the store

A unit goes home once per step, while its forward passes run. What a commit names never changes under it: writes to the
store wait for the commit before them, and a RAM home waits for its own writes only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from offload.device import Device, limit_lane_threads
from offload.io import Priority, Request, Ring, moving
from offload.state import States, UnitState
from offload.trace import Trace
from offload.units import Unit
from offload.zo_pieces import Pieces


class WriteBack:
    """Takes clean weights and moments out of slots; commits what has arrived.

    Args:
        ring: staging buffers for a device that the store cannot write from.
        timeout: seconds one chunk may wait for a buffer.
    """

    def __init__(
        self, states: States, pieces: Pieces, device: Device, ring: Ring, trace: Trace, timeout: float
    ) -> None:
        self._states = states
        self._pieces = pieces
        self._device = device
        self._ring = ring
        self._trace = trace
        self._timeout = timeout
        self._latest: dict[int, Future[None]] = {}
        self._dirty: set[int] = set()  # units whose RAM homes the store does not have yet
        self._behind: dict[int, list[Request]] = {}  # writes that still read a unit's homes; the lane's own
        self._commit: Future[None] = _done()
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="d2h", initializer=limit_lane_threads)
        self._commit_lane = ThreadPoolExecutor(1, thread_name_prefix="commit", initializer=limit_lane_threads)

    def send(self, unit: Unit, slot: Tensor) -> Future[None]:
        """Take the unit's written roles home from its slot; the slot may be overwritten when the result is there."""
        state = self._states.units[unit.index]
        if any(role in state.homes for role in state.updated_roles):
            self._dirty.add(unit.index)
        job = self._lane.submit(self._take_home, state, slot, self._device.mark(), self._commit)
        self._latest[unit.index] = job
        return job

    def wait_ready(self, unit: Unit) -> None:
        """Block until the unit's home has what was sent last; raises the error of a failed write-back."""
        if unit.index in self._latest:
            self._latest[unit.index].result(self._timeout)

    def commit(self, meta: dict[str, Any], first: Callable[[], None], then: Callable[[], None]) -> None:
        """Make what was sent so far the store's next version: after it has arrived call `first`, afterwards `then`."""
        behind = self._lane.submit(self._write_behind, sorted(self._dirty), self._commit)
        self._dirty.clear()
        jobs = list(self._latest.values())
        self._commit = self._commit_lane.submit(self._commit_now, jobs, behind, meta, first, then)

    def check(self) -> None:
        """Raise the error of a write-back or commit that has failed; does not wait."""
        for future in (*self._latest.values(), self._commit):
            if future.done():
                future.result()

    def flush(self) -> None:
        """Wait for all write-backs and commits; raises the first error."""
        for future in (*self._latest.values(), self._commit):
            future.result()

    def close(self) -> None:
        """Stop the lanes; what has not begun is dropped."""
        self._lane.shutdown(wait=True, cancel_futures=True)
        self._commit_lane.shutdown(wait=True, cancel_futures=True)

    # ---- the lanes' threads ----

    def _take_home(self, state: UnitState, slot: Tensor, made: torch.cuda.Event | None, before: Future[None]) -> None:
        self._device.wait(made)
        for request in self._behind.pop(state.unit.index, ()):
            request.wait()
        flying: deque[tuple[Request, Tensor | None]] = deque()
        sent = []
        for role in state.updated_roles:
            part = self._pieces.part(state.unit.layout, slot, role)
            home = state.homes.get(role)
            if home is not None:
                with self._trace.span("d2h", state.unit.name, part.numel()), moving(part.numel(), state.tiers[role]):
                    self._device.copy(home[: part.numel()], part)
            else:
                before.result()
                self._to_store(state, role, part, slot, flying)
                sent.append(role)
        self._land(flying, leave=0)
        for role in sent:
            state.store.publish(state.key(role))

    def _to_store(
        self, state: UnitState, role: str, part: Tensor, slot: Tensor, flying: deque[tuple[Request, Tensor | None]]
    ) -> None:
        chunk, total = self._ring.nbytes, state.store.padded(state.key(role))
        start = part.storage_offset() - slot.storage_offset()
        for at in range(0, total, chunk):
            length = min(chunk, total - at)
            if self._device.in_host_memory:  # the slot is host memory, page by page
                flying.append((state.write(role, at, slot[start + at : start + at + length]), None))
                continue
            self._land(flying, leave=1)
            buffer = self._ring.acquire(self._timeout)
            source = part[at : at + chunk]
            with self._trace.span("d2h", state.unit.name, source.numel()):
                self._device.copy(buffer[: source.numel()], source)
            flying.append((state.write(role, at, buffer[:length]), buffer))

    def _land(self, flying: deque[tuple[Request, Tensor | None]], leave: int) -> None:
        while len(flying) > leave:
            request, buffer = flying.popleft()
            request.wait()
            if buffer is not None:
                self._ring.release(buffer)

    def _write_behind(self, units: list[int], before: Future[None]) -> dict[int, list[Request]]:
        """Start to write the RAM homes of these units to the store."""
        before.result()
        started: dict[int, list[Request]] = {}
        for index in units:
            state = self._states.units[index]
            started[index] = [
                state.store.write(state.key(role), 0, home[: state.store.padded(state.key(role))], Priority.WRITE)
                for role in state.updated_roles
                if (home := state.homes.get(role)) is not None
            ]
        self._behind.update(started)
        return started

    def _commit_now(
        self,
        jobs: list[Future[None]],
        behind: Future[dict[int, list[Request]]],
        meta: dict[str, Any],
        first: Callable[[], None],
        then: Callable[[], None],
    ) -> None:
        for job in jobs:
            job.result()
        for index, requests in behind.result().items():
            for request in requests:
                request.wait()
            state = self._states.units[index]
            for role in state.updated_roles:
                if role in state.homes:
                    state.store.publish(state.key(role))
        first()
        with self._trace.span("nvme_write", "commit"):
            self._states.store.commit(meta)
        then()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
