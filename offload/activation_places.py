"""Where activations wait for their backward: pools in RAM and CXL memory, and scratch files beside the store.

All are filled anew every step: taken from front to back in forward, and empty again when the step ends. So there is
nothing to fragment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import xxhash
from torch import Tensor

from offload.device import Device
from offload.errors import OffloadError
from offload.io import (
    PAGE,
    ChecksumError,
    DirectFile,
    HostTier,
    IOTimeout,
    Ledger,
    Priority,
    Request,
    Ring,
    Store,
    moving,
    round_up,
)
from offload.io.request import Transfer
from offload.planner import Plan
from offload.trace import Trace

# The scratch file in each of the store's directories; not part of any commit.
SWAP_FILE = "activations.bin"
# Of the ledger, as the plan calls it.
CATEGORY = "swapped activations"
# Transfers under way for one set of activations.
AHEAD = 2
Pieces = Iterable[tuple[int, Tensor]]
"""(position, 1-D uint8 device tensor), in order; bytes between them are of no interest."""


@dataclass(frozen=True)
class Place:
    """Bytes reserved in one tier for one set of activations, until the step ends."""

    offset: int
    nbytes: int


class Tier(Protocol):
    """Takes bytes from the device and brings them back; the calls block, so they belong on a lane."""

    def reserve(self, nbytes: int) -> Place | None:
        """Room for `nbytes`; None when there is not enough left. Main thread only."""
        ...

    @property
    def left(self) -> int:
        """Bytes that can still be reserved in this step."""
        ...

    def clear(self) -> None:
        """The step is over: all room is free again."""
        ...

    def take(self, place: Place, pieces: Pieces, name: str) -> None:
        """Device to here; positions count from the beginning of the place. Lets each piece go before it asks for the
        next."""
        ...

    def give(self, place: Place, target: Tensor, name: str) -> None:
        """Back to the device: all bytes of the place to `target`, which is at least as long."""
        ...

    def close(self) -> None:
        """Give memory or files back."""
        ...


class _Room:
    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._used = 0

    def reserve(self, nbytes: int) -> Place | None:
        if nbytes > self.left:
            return None
        place = Place(self._used, nbytes)
        self._used += round_up(nbytes)
        return place

    @property
    def left(self) -> int:
        return self._nbytes - self._used

    def clear(self) -> None:
        self._used = 0


class HostPool(_Room):
    """One page-locked buffer of `nbytes` in a host memory."""

    def __init__(self, nbytes: int, tier: HostTier, device: Device, ledger: Ledger, trace: Trace) -> None:
        super().__init__(nbytes)
        self._tier = tier
        self._device = device
        self._trace = trace
        self._buffer = tier.allocate(nbytes, ledger, CATEGORY)
        device.pin(self._buffer.tensor)

    def take(self, place: Place, pieces: Pieces, name: str) -> None:
        with self._trace.span("d2h", name, place.nbytes), moving(place.nbytes, self._tier):
            for at, piece in pieces:
                start = place.offset + at
                self._device.copy(self._buffer.tensor[start : start + piece.numel()], piece)
                del piece

    def give(self, place: Place, target: Tensor, name: str) -> None:
        with self._trace.span("h2d", name, place.nbytes), moving(place.nbytes, self._tier):
            self._device.copy(target[: place.nbytes], self._buffer.tensor[place.offset : place.offset + place.nbytes])

    def close(self) -> None:
        self._buffer.free()


class SwapFiles(_Room):
    """`nbytes` on the store's paths, in one pre-allocated scratch file each, striped by chunks of the bounce ring.

    The bytes of every chunk are checked against their sum when they come back.

    Args:
        store: its directories hold the files, and one that a killed run left there is replaced; its backend moves the
            bytes, and what is written is counted with its own.
        bounce: page-locked host chunks for the way between device and file.
    """

    def __init__(
        self,
        nbytes: int,
        store: Store,
        bounce: Ring,
        device: Device,
        ledger: Ledger,
        trace: Trace,
        timeout: float,
    ) -> None:
        super().__init__(nbytes)
        self._store = store
        self._backend = store.backend
        self._bounce = bounce
        self._device = device
        self._ledger = ledger
        self._trace = trace
        self._timeout = timeout
        self._sums: dict[int, int] = {}  # of every transfer written in this step, by its position
        self._files: list[DirectFile] = []
        directories = store.directories
        sizes = [0] * len(directories)
        for i, start in enumerate(range(0, nbytes, bounce.nbytes)):
            sizes[i % len(sizes)] += min(bounce.nbytes, nbytes - start)
        try:
            for directory, size in zip(directories, sizes, strict=True):
                path = directory / SWAP_FILE
                path.unlink(missing_ok=True)
                self._files.append(DirectFile(path, create=True))
                if size:
                    self._files[-1].reserve(size)
        except BaseException:
            self._remove()
            raise
        ledger.add("nvme", CATEGORY, nbytes)

    def clear(self) -> None:
        super().clear()
        self._sums.clear()

    def take(self, place: Place, pieces: Pieces, name: str) -> None:
        flying: deque[tuple[Request, Tensor]] = deque()

        def land() -> None:
            request, buffer = flying.popleft()
            request.wait()
            self._bounce.release(buffer)

        rest = iter(pieces)
        left = next(rest, None)  # of a piece
        for at, length in self._cuts(place):
            buffer = self._chunk(flying, land)
            filled = 0
            with self._trace.span("d2h", name, length):
                while left is not None and left[0] < at + length:
                    start, piece = left
                    here = min(piece.numel(), at + length - start)
                    self._device.copy(buffer[start - at : start - at + here], piece[:here])
                    filled = start - at + here
                    left = (start + here, piece[here:]) if here < piece.numel() else None
                    del piece
                    left = left or next(rest, None)
            buffer[filled:length].zero_()
            flying.append((self._write(place.offset + at, buffer[:length], name), buffer))
        while flying:
            land()

    def give(self, place: Place, target: Tensor, name: str) -> None:
        if target.device.type == "cpu" and target.data_ptr() % PAGE == 0 and target.numel() >= round_up(place.nbytes):
            cuts = self._cuts(place)
            for request in [self._read(place.offset + at, target[at : at + n], name) for at, n in cuts]:
                request.wait()
            return
        flying: deque[tuple[Request, Tensor, int]] = deque()

        def land() -> None:
            request, buffer, at = flying.popleft()
            request.wait()
            useful = min(request.nbytes, place.nbytes - at)
            with self._trace.span("h2d", name, useful):
                self._device.copy(target[at : at + useful], buffer[:useful])
            self._bounce.release(buffer)

        for at, length in self._cuts(place):
            buffer = self._chunk(flying, land)
            flying.append((self._read(place.offset + at, buffer[:length], name), buffer, at))
        while flying:
            land()

    def close(self) -> None:
        if self._files:
            self._remove()
            self._ledger.remove("nvme", CATEGORY, self._nbytes)

    def _remove(self) -> None:
        for file in self._files:
            file.path.unlink(missing_ok=True)
            file.close()
        self._files.clear()

    def _cuts(self, place: Place) -> list[tuple[int, int]]:
        """The place as (position in it, bytes) of whole pages that each lie in one chunk of the stripe."""
        cuts, at, end = [], place.offset, place.offset + round_up(place.nbytes)
        while at < end:
            stop = min(end, (at // self._bounce.nbytes + 1) * self._bounce.nbytes)
            cuts.append((at - place.offset, stop - at))
            at = stop
        return cuts

    def _chunk(self, flying: Sized, land: Callable[[], None]) -> Tensor:
        """A free chunk of the ring. Never waits for one while it holds another, because other lanes do so."""
        while len(flying) >= AHEAD:
            land()
        try:
            return self._bounce.acquire(0.0)
        except IOTimeout:
            while flying:
                land()
            return self._bounce.acquire(self._timeout)

    def _where(self, position: int) -> tuple[DirectFile, int]:
        chunk, rest = divmod(position, self._bounce.nbytes)
        file = self._files[chunk % len(self._files)]
        return file, chunk // len(self._files) * self._bounce.nbytes + rest

    def _write(self, position: int, buffer: Tensor, name: str) -> Request:
        def remember(view: memoryview) -> None:
            self._sums[position] = xxhash.xxh3_64_intdigest(view)

        file, offset = self._where(position)
        transfer = Transfer("write", file, offset, buffer, Priority.WRITE, label=name, before=remember)
        transfer.add_done_callback(self._store.wear_counter(self._files.index(file)))
        self._backend.submit(transfer)
        return transfer

    def _read(self, position: int, buffer: Tensor, name: str) -> Request:
        file, offset = self._where(position)

        def check(view: memoryview) -> None:
            if xxhash.xxh3_64_intdigest(view) != self._sums[position]:
                raise ChecksumError(
                    f"the {name} that come back from disk are not those that were written",
                    path=file.path,
                    offset=offset,
                    length=len(view),
                    advice="The drive or its cable is failing: check its health before you go on.",
                )

        transfer = Transfer("read", file, offset, buffer, Priority.COMPUTE, label=name, after=check)
        self._backend.submit(transfer)
        return transfer


def activation_tiers(
    plan: Plan,
    memories: Mapping[str, HostTier],
    store: Store,
    bounce: Ring,
    device: Device,
    ledger: Ledger,
    trace: Trace,
    timeout: float,
    stack: ExitStack,
) -> dict[str, Tier]:
    """What the plan reserved for activations outside of the device, by tier; `stack` closes it."""
    for directory in store.directories:
        (directory / SWAP_FILE).unlink(missing_ok=True)  # of a run that was killed, with another plan
    tiers: dict[str, Tier] = {}
    for name, memory in memories.items():
        if (pool := plan.buffer(f"activations.{name}")) is not None:
            tiers[name] = HostPool(pool.total, memory, device, ledger, trace)
    if (files := plan.buffer("activations.nvme")) is not None:
        tiers["nvme"] = SwapFiles(files.total, store, bounce, device, ledger, trace, timeout)
    for tier in tiers.values():
        stack.callback(tier.close)
    for unit in plan.units:
        wanted = unit.placement["activation"]
        if wanted not in ("gpu", *tiers):
            raise OffloadError(f"the plan puts the outputs of {unit.name} on {wanted}, where it reserves no room")
    return tiers
