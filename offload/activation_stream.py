"""Activations by plan: what of each micro-batch's pass through a unit stays, leaves and returns, or is computed again.

    forward    unit i's inner activations ──d2h──► RAM, CXL memory or scratch file    (while units i, i+1, .. run)
    backward   unit i's come back to a staging buffer of the device                  (while unit i+1 runs backward)

*Inner* activations are what autograd saves inside a unit (`activation_saving`); *boundary* activations, a unit's
outputs, are inputs of the next and leave once nothing in the rest of the forward can use them. A lane for each
direction, each with its own thread. The main thread alone hands out room and staging buffers, in the order of backward;
the lanes wait only for transfers, and the inward lane for what the outward lane began before. So there is no cycle.

What leaves is on the device until it has been copied away, tensor by tensor. A pass begins when those of earlier passes
take no more than the plan has beside it. On a CPU it goes on only as fast as they leave: for every tensor that it saves
one of theirs has to be gone, so that no room is needed for both.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.activation_places import Place, Tier
from offload.activation_saving import SavedTensors, Shares, whole
from offload.activation_uses import is_unused
from offload.boundary import MicroBatch
from offload.device import Device, limit_lane_threads
from offload.errors import OffloadError
from offload.io import Ledger
from offload.planner import Plan
from offload.trace import Trace
from offload.transit import Transit, storage_bytes, taken
from offload.unit_pass import Record
from offload.units import Unit

logger = logging.getLogger(__name__)

# Passes whose activations are brought back ahead of the one that runs backward.
AHEAD = 1


@dataclass
class _Away:
    """Bytes on their way to one or more tiers, or there."""

    parts: list[tuple[Tier, Place, int]]  # the last: position among the bytes that come back
    left: Future[None]


@dataclass
class _Parked:
    """A boundary activation away from the device: its tensor stays, with a storage of no bytes."""

    record: Record  # whose output it is
    storage: torch.UntypedStorage
    nbytes: int
    away: _Away


@dataclass
class _Coming:
    """A pass whose activations are on their way back, or there."""

    arrived: list[Future[None]] = field(default_factory=list)
    staging: Tensor | None = None


class ActivationStream:
    """Keeps, moves and brings back activations as the plan says; one per run.

    Args:
        tiers: "cpu", "cxl" and "nvme", as far as the plan uses them.
        staging: device buffers (uint8) for what comes back.
        kept_room: bytes of inner activations that may stay on the device at one time.
        kept_memory: so many bytes (uint8) for them, where they would leave holes in the heap between what a pass frees
            again; None: they stay as they are.
        micro_batches: M of the plan.
        generation: of a unit's bound weights, None while it is not bound.
        constants: device buffers that live through the step, such as the resident unit's weights.
        timeout: seconds compute waits for one pass's activations before it gives up with an error.
    """

    def __init__(
        self,
        plan: Plan,
        tiers: dict[str, Tier],
        staging: Sequence[Tensor],
        kept_room: int,
        kept_memory: Tensor | None,
        micro_batches: int,
        generation: Callable[[Unit], int | None],
        constants: Sequence[Tensor],
        device: Device,
        ledger: Ledger,
        trace: Trace,
        timeout: float,
    ) -> None:
        self._plan = {unit.name: unit for unit in plan.units}
        self._tiers = tiers
        self._staging: list[tuple[Tensor, torch.cuda.Event | None]] = [(buffer, None) for buffer in staging]
        self._staging_bytes = min((b.numel() for b in staging), default=0)
        self._kept_room = kept_room
        self._kept_memory = kept_memory
        self._kept = self._kept_end = 0
        self._micro_batches = micro_batches
        self._generation = generation
        self._constants = {b.untyped_storage()._cdata for b in constants}
        self._device = device
        self._ledger = ledger
        self._trace = trace
        self._timeout = timeout
        self.fallbacks = 0
        """Passes of the latest step that took more room than planned, and were run again or left on the device."""
        self._told: set[str] = set()
        self._inner: dict[int, _Away] = {}  # by id of the record
        self._parked: dict[int, _Parked] = {}  # by id of the tensor
        self._transit = Transit(lambda unit: trace.stall("activations leaving", unit), timeout)
        self._leaving: deque[Future[None]] = deque()  # transfers of inner activations that were not done yet
        self._spare = 0  # bytes of the plan beside the pass that runs
        self._jobs: list[Future[None]] = []
        self._upcoming: deque[Record] = deque()
        self._coming: dict[int, _Coming] = {}  # by id of the record
        self._out = ThreadPoolExecutor(1, thread_name_prefix="activations-out", initializer=limit_lane_threads)
        self._in = ThreadPoolExecutor(1, thread_name_prefix="activations-in", initializer=limit_lane_threads)

    # ---- forward ----

    def begin(self) -> None:
        """A step begins: all room is free."""
        self.fallbacks = 0
        self._kept_end = 0
        for tier in self._tiers.values():
            tier.clear()

    def make_room(self, unit: Unit, spare: int, backward: bool) -> None:
        """Wait until what is leaving leaves room for a micro-batch's pass through `unit`, beside which the plan has
        `spare` bytes on the device. Raises what went wrong on the way out."""
        while self._leaving and self._leaving[0].done():
            self._leaving.popleft().result()
        self._spare = spare if backward else spare + self._plan[unit.name].framework.get("saved", 0)
        self._transit.wait(self._spare, unit.name)

    def saving(self, unit: Unit, index: int) -> SavedTensors | None:
        """How micro-batch `index` passes `unit`, whose weights are bound; None: without a graph, to run again."""
        planned = self._plan[unit.name].activations
        rest = 1.0 - planned["recompute"]
        if rest <= 1e-9 or index < round(planned["recompute"] * self._micro_batches):
            return None
        shares = Shares(
            keep=planned["keep"] / rest,
            cpu=planned["swap_cpu"] / rest,
            cxl=planned["swap_cxl"] / rest,
            nvme=planned["swap_nvme"] / rest,
        )
        rooms = [self._kept_room - self._kept] if shares.keep else []
        rooms += [self._left(tier) for tier in shares.away]

        def grown(saved: int) -> None:
            if self._device.in_host_memory:  # a GPU has not begun what is launched here
                self._transit.wait(self._spare - saved, unit.name)

        return SavedTensors(unit, self._device.name, self._generation, self._constants, shares, sum(rooms), grown)

    def passed(self, run: MicroBatch) -> None:
        """A micro-batch has passed a unit: what the plan wants elsewhere leaves the device, beside compute."""
        record = run.tape[-1]
        if record.saved is not None:
            self._settle(record)
        for earlier in run.tape[-3:-1] if run.loss is None else ():  # with its loss, a micro-batch turns round at once
            if self._plan[earlier.unit.name].placement["activation"] != "gpu":
                self._park(earlier, run.tape[-3:])

    def _settle(self, record: Record) -> None:
        """Decide for every inner activation of a pass; one that takes more room than planned is given up."""
        saved = record.saved
        assert saved is not None
        saved.settle([*record.leaves, *(leaf for _, _, leaf in record.side)])
        sizes: dict[str, int] = {}
        for split_first in (True, False):
            sizes = saved.place(split_first)
            if saved.image_bytes <= self._staging_bytes:
                break
        kept = max(self._kept, self._kept_end) + saved.kept_bytes
        fits = saved.image_bytes <= self._staging_bytes and kept <= self._kept_room
        if saved.dropped or not fits or any(n > self._left(tier) for tier, n in sizes.items()):
            self._fall_back(record.unit, "its inner activations are computed again in backward")
            saved.give_up()
            record.saved = record.kept = None
            return
        if self._kept_memory is not None and saved.kept_bytes:
            begin, self._kept_end = self._kept_end, self._kept_end + saved.kept_bytes
            with self._trace.span("compute", f"keep activations of {record.unit.name}"):
                saved.keep_in(self._kept_memory[begin : self._kept_end])
        self._count_kept(saved.kept_bytes)
        parts, position = [], 0
        for tier, nbytes in sizes.items():
            if nbytes:
                place = self._tiers[tier].reserve(nbytes)
                assert place is not None
                parts.append((self._tiers[tier], place, position))
                position += nbytes
        if parts:
            away = self._send(parts, saved.leave(), record.unit, None)
            self._inner[id(record)] = away
            self._leaving.append(away.left)

    def _count_kept(self, nbytes: int) -> None:
        self._kept += nbytes
        if self._kept_memory is not None:
            return  # it is counted as reserved
        if nbytes > 0:
            self._ledger.add("gpu", "activations", nbytes)
        else:
            self._ledger.remove("gpu", "activations", -nbytes)

    def _park(self, record: Record, tape: Sequence[Record]) -> None:
        """Move a unit's outputs out if nothing in the rest of the forward, nor the glue's graph, can use them."""
        tier = self._tiers[self._plan[record.unit.name].placement["activation"]]
        for i in range(len(record.leaves)):
            # one that is leaving looks unused again shortly before its storage is empty
            if id(record.leaves[i]) in self._parked or not is_unused(record.leaves, i, tape):
                continue
            storage = record.leaves[i].untyped_storage()
            nbytes = storage.nbytes()
            place = tier.reserve(nbytes)
            if place is None:
                self._fall_back(record.unit, "its outputs stay on the device")
                continue
            away = self._send([(tier, place, 0)], [(0, whole(record.leaves[i]))], record.unit, storage)
            self._parked[id(record.leaves[i])] = _Parked(record, storage, nbytes, away)
            record.nbytes -= nbytes
            self._ledger.remove("gpu", "activations", nbytes)

    def _send(
        self,
        parts: list[tuple[Tier, Place, int]],
        pieces: list[tuple[int, Tensor]],
        unit: Unit,
        storage: torch.UntypedStorage | None,
    ) -> _Away:
        """Queue a transfer out; the lane lets the pieces go, and empties `storage`, when they are safe elsewhere."""
        mark, name = self._device.mark(), f"activations of {unit.name}"
        left = storage_bytes(pieces) if storage is None else 0  # a boundary is left out of what is in the way
        self._transit.begin(left)

        def gone(nbytes: int) -> None:
            nonlocal left
            nbytes = min(nbytes, left)
            left -= nbytes
            self._device.heap.freed(nbytes)
            self._transit.gone(nbytes)

        def take() -> None:
            try:
                self._device.wait(mark)
                for tier, place, position in parts:
                    tier.take(place, taken(pieces, position, position + place.nbytes, gone), name)
            finally:
                pieces.clear()
                gone(left)
            if storage is not None:
                storage.resize_(0)
                self._device.heap.freed(sum(place.nbytes for _, place, _ in parts))

        job = self._out.submit(take)
        self._jobs.append(job)
        return _Away(parts, job)

    def _left(self, tier: str) -> int:
        return self._tiers[tier].left if tier in self._tiers else 0

    def _fall_back(self, unit: Unit, what: str) -> None:
        self.fallbacks += 1
        if unit.name not in self._told:
            self._told.add(unit.name)
            logger.warning("%s takes more room than the plan has for its activations: %s", unit.name, what)

    # ---- backward ----

    def expect(self, order: Sequence[Record]) -> None:
        """Announce the passes in the order of their backward, and start to bring the first of them back."""
        self._upcoming = deque(order)
        self._bring_ahead()

    @contextmanager
    def present(self, record: Record) -> Iterator[None]:
        """What the backward of `record` needs is on the device inside the body; the next ones come in beside it."""
        if self._upcoming and self._upcoming[0] is record:
            self._upcoming.popleft()
        coming = self._coming.pop(id(record), None) or self._bring(record)
        for future in coming.arrived:
            self._await(future, "activations", record.unit.name)
        saved = record.saved
        if saved is not None:
            saved.put_head()
        try:
            yield
        finally:
            if saved is not None:
                saved.give_up()
                self._count_kept(-saved.kept_bytes)
            if coming.staging is not None:
                self._staging.append((coming.staging, self._device.mark()))
            self._bring_ahead()

    def end(self) -> None:
        """The step's backward is over: wait for what is still leaving, and report what failed."""
        for future in self._jobs:
            self._await(future, "activations leaving", "the end of the step")
        for left_over in (self._jobs, self._leaving, self._inner, self._parked, self._upcoming, self._coming):
            left_over.clear()

    def close(self) -> None:
        """Stop both lanes; transfers that have not begun are dropped."""
        for lane in (self._out, self._in):
            lane.shutdown(wait=True, cancel_futures=True)
        for left_over in (self._staging, self._inner, self._parked, self._upcoming, self._coming):
            left_over.clear()
        self._kept_memory = None

    def _bring_ahead(self) -> None:
        while self._upcoming and len(self._coming) <= AHEAD:
            record = self._upcoming[0]
            if id(record) in self._inner and not self._staging:
                return
            self._upcoming.popleft()
            if id(record) in self._inner or self._absent(record):
                self._coming[id(record)] = self._bring(record)

    def _absent(self, record: Record) -> list[_Parked]:
        """The boundary activations that a pass's backward needs and that are away."""
        if not record.differentiable:
            return []
        needed = [*record.inputs, *(record.leaves if record.saved is not None else [])]
        return [self._parked[key] for key in dict.fromkeys(map(id, needed)) if key in self._parked]

    def _bring(self, record: Record) -> _Coming:
        coming = _Coming()
        name = f"activations of {record.unit.name}"
        for parked in self._absent(record):
            self._parked = {key: p for key, p in self._parked.items() if p is not parked}
            parked.record.nbytes += parked.nbytes
            self._ledger.add("gpu", "activations", parked.nbytes)
            coming.arrived.append(self._in.submit(self._unpark, parked, name))
        away = self._inner.pop(id(record), None)
        if away is not None:
            if not self._staging:
                raise OffloadError(f"no buffer is free for the activations of {record.unit.name}")
            coming.staging, released = self._staging.pop(0)
            assert record.saved is not None
            target = record.saved.arrive(coming.staging)
            coming.arrived.append(self._in.submit(self._fetch, away, target, released, name))
        return coming

    def _await(self, future: Future[None], reason: str, name: str) -> None:
        """Wait for a transfer, and name it in the trace if it keeps compute waiting."""
        if not future.done():
            with self._trace.stall(reason, name):
                try:
                    future.result(self._timeout)
                except TimeoutError:
                    raise OffloadError(
                        f"waited {self._timeout:.0f} s for {reason} ({name}); see the trace's lanes for what holds "
                        "them, and `offload doctor` for the store's speed"
                    ) from None
        future.result()

    # ---- the inward lane ----

    def _fetch(self, away: _Away, target: Tensor, released: torch.cuda.Event | None, name: str) -> None:
        away.left.result(self._timeout)
        self._device.wait(released)
        for tier, place, position in away.parts:
            tier.give(place, target[position:], name)

    def _unpark(self, parked: _Parked, name: str) -> None:
        parked.away.left.result(self._timeout)
        parked.storage.resize_(parked.nbytes)
        self._device.wait(self._device.mark())  # the memory may just have been compute's
        target = torch.empty(0, dtype=torch.uint8, device=parked.storage.device).set_(parked.storage)
        for tier, place, _ in parked.away.parts:
            tier.give(place, target, name)
