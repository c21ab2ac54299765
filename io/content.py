"""The state of an extent's blocks, and the pieces and checks of a request on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .backend import Backend
from .buffers import allocate
from .directfile import DirectFile
from .errors import IOTimeout, StoreError
from .ledger import Ledger
from .manifest import BLOCK, STRIPE, Bytes, Extent, Side, Uint64s
from .request import Priority, Transfer
from .sums import FAILED, PENDING, UNKNOWN, VALID, checker, zero_sum

NOT_COMMITTED = 255


class Content:
    """State of one extent, per block: which side reads see, which one the last commit uses, what is known of each."""

    def __init__(self, extent: Extent, sides: tuple[Side, ...]) -> None:
        self.extent = extent
        self.places = sides
        self.current: Bytes = np.zeros(extent.blocks, np.uint8)
        self.committed: Bytes = np.full(extent.blocks, NOT_COMMITTED, np.uint8)
        self.staged: npt.NDArray[np.bool_] = np.zeros(extent.blocks, np.bool_)
        self.state: Bytes = np.full((2, extent.blocks), UNKNOWN, np.uint8)
        self.sums: Uint64s = np.zeros((2, extent.blocks), np.uint64)

    def set_zero(self) -> None:
        """A fresh file reads as zeros: that is the content of side 0 until it is written."""
        self.sums[0, :] = zero_sum(BLOCK)
        self.sums[0, -1] = zero_sum(self.extent.padded - (self.extent.blocks - 1) * BLOCK)
        self.state[0, :] = VALID

    def set_committed(self, sides: Bytes, sums: Uint64s) -> None:
        self.current[:] = self.committed[:] = sides
        blocks = np.arange(self.extent.blocks)
        self.sums[sides, blocks] = sums
        self.state[sides, blocks] = VALID

    def span(self, offset: int, nbytes: int) -> npt.NDArray[np.intp]:
        """The blocks of a request. Raises StoreError unless it covers whole blocks."""
        end = offset + nbytes
        if (
            nbytes <= 0
            or offset < 0
            or offset % BLOCK
            or end > self.extent.padded
            or (end % BLOCK and end != self.extent.padded)
        ):
            raise StoreError(
                f"extent '{self.extent.key}': a request must begin at a multiple of {BLOCK} and end at one or at the "
                f"padded end ({self.extent.padded}), not cover {nbytes} bytes from {offset} on"
            )
        return np.arange(offset // BLOCK, -(-end // BLOCK))

    def target(self, blocks: npt.NDArray[np.intp]) -> Bytes:
        """The side that a write of each block goes to: the other one where the current content is committed.

        Raises StoreError when a block has a write under way, and where a committed extent has one side only.
        """
        current = self.current[blocks]
        committed = current == self.committed[blocks]
        if committed.any() and self.extent.sides == 1:
            raise StoreError(
                f"cannot write extent '{self.extent.key}': it has one side, and its content was committed",
                advice="Give it two sides to change it after the first commit.",
            )
        target = np.where(committed, 1 - current, current).astype(np.uint8)
        pending = self.state[target, blocks] == PENDING
        if pending.any():
            raise StoreError(
                f"cannot write extent '{self.extent.key}', block {int(blocks[pending][0])}: it is still being written: "
                "wait for the write first"
            )
        return target

    def publish(self) -> None:
        """What was written to other sides becomes current. Raises StoreError, and changes nothing, when a write is
        under way or has failed."""
        target = np.where(self.staged, 1 - self.current, self.current).astype(np.uint8)
        self.refuse(np.arange(self.extent.blocks), target, "publish")
        self.current[:] = target
        self.staged[:] = False

    def refuse(self, blocks: npt.NDArray[np.intp], sides: Bytes, what: str) -> None:
        """Raise StoreError when a block of `sides` is being written, or its write failed."""
        state = self.state[sides, blocks]
        for value, reason in (
            (FAILED, "its last write failed: write it again, or reopen the store"),
            (PENDING, "it is still being written: wait for the write first"),
        ):
            if (state == value).any():
                block = int(blocks[state == value][0])
                raise StoreError(f"cannot {what} extent '{self.extent.key}', block {block}: {reason}")


@dataclass(frozen=True)
class Part:
    """Consecutive blocks that lie behind each other in one file. `first` counts from the request's first block."""

    file: int
    offset: int
    first: int
    blocks: int


def parts_of(content: Content, blocks: npt.NDArray[np.intp], sides: Bytes) -> list[Part]:
    parts: list[Part] = []
    for index, (block, side) in enumerate(zip(blocks, sides, strict=True)):
        place = content.places[side]
        file, offset = int(place.files[block]), int(place.offsets[block])
        last = parts[-1] if parts else None
        if (
            last is not None
            and last.file == file
            and last.offset + last.blocks * BLOCK == offset
            and last.blocks < STRIPE // BLOCK
        ):
            parts[-1] = Part(file, last.offset, last.first, last.blocks + 1)
        else:
            parts.append(Part(file, offset, index, 1))
    return parts


def verify_blocks(contents: Iterable[Content], data: Sequence[DirectFile], backend: Backend) -> list[str]:
    """Read every committed block; describe those that cannot be read or fail their checksum.

    Raises IOTimeout when the device hangs, because it would for every further block.
    """
    problems: list[str] = []
    under_way: deque[tuple[Transfer, Tensor]] = deque()
    depth = 4

    with allocate(depth * BLOCK, Ledger(), category="verify") as memory:
        free = [memory.tensor[index * BLOCK : (index + 1) * BLOCK] for index in range(depth)]

        def finish_oldest() -> None:
            transfer, chunk = under_way.popleft()
            try:
                transfer.wait()
            except IOTimeout:
                raise
            except StoreError as error:
                problems.append(str(error))
            free.append(chunk)

        for content in contents:
            extent = content.extent
            for block in range(extent.blocks if extent.durable else 0):
                if not free:
                    finish_oldest()
                chunk = free.pop()
                side = int(content.committed[block])
                file = data[int(content.places[side].files[block])]
                offset = int(content.places[side].offsets[block])
                sums, known = content.sums[side, block : block + 1], np.full(1, VALID, np.uint8)
                check = checker(extent.key, file.path, offset, block, sums, known)
                part = chunk[: min(BLOCK, extent.padded - block * BLOCK)]
                transfer = Transfer("read", file, offset, part, Priority.WRITE, label=extent.key, after=check)
                backend.submit(transfer)
                under_way.append((transfer, chunk))
        while under_way:
            finish_oldest()
    return problems
