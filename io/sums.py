"""Checksums of an extent's blocks: xxh3_64, in the I/O threads or, piece by piece, by whoever works on the bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import xxhash

from .errors import ChecksumError, StoreError
from .manifest import BLOCK, Bytes, Uint64s

# What is known of a block on one side.
UNKNOWN, VALID, PENDING, FAILED = range(4)


@functools.cache
def zero_sum(nbytes: int) -> int:
    """The checksum of a block of zeros."""
    return xxhash.xxh3_64_intdigest(bytes(nbytes))


class BlockSums:
    """The checksums of consecutive blocks, computed while their bytes pass by: a piece that was just written is still
    in a core's cache, and costs a third of what it costs to fetch it again."""

    def __init__(self) -> None:
        self._found: list[int] = []
        self._block = xxhash.xxh3_64()
        self._left = BLOCK

    def update(self, piece: memoryview) -> None:
        """The bytes that follow those of the last call, any number of them."""
        while len(piece):
            part = piece[: self._left]
            self._block.update(part)
            self._left -= len(part)
            piece = piece[len(part) :]
            if not self._left:
                self._close()

    def finish(self) -> list[int]:
        """The sums, one per block; a last block that is shorter ends here."""
        if self._left < BLOCK:
            self._close()
        return self._found

    def _close(self) -> None:
        nbytes, self._left = BLOCK - self._left, BLOCK
        self._found.append(self._block.intdigest())
        self._block.reset()
        self._closed(len(self._found) - 1, nbytes)

    def _closed(self, index: int, nbytes: int) -> None:
        """A block of so many bytes is complete."""


class BlockCheck(BlockSums):
    """Compares blocks `first`... of extent `key`, as their bytes pass by, with the sums of those that are known.

    `places` gives the file and the offset of each block, for the message. update() and finish() raise ChecksumError
    at the end of the first block that is not what was written; nothing made from it may be kept then.
    """

    def __init__(
        self, key: str, first: int, sums: Uint64s, known: Bytes, places: Callable[[int], tuple[Path, int]]
    ) -> None:
        super().__init__()
        self._key = key
        self._first = first
        self._sums = sums
        self._known = known
        self._places = places

    def finish(self) -> list[int]:
        """Also raises StoreError when not all bytes came by."""
        found = super().finish()
        if len(found) != len(self._sums):
            raise StoreError(f"extent '{self._key}': {len(found)} of {len(self._sums)} blocks read were checked")
        return found

    def _closed(self, index: int, nbytes: int) -> None:
        if self._known[index] == VALID and self._found[index] != int(self._sums[index]):
            path, offset = self._places(index)
            raise mismatch(self._key, self._first + index, path, offset, nbytes)


def checker(key: str, path: Path, offset: int, first: int, sums: Uint64s, known: Bytes) -> Callable[[memoryview], None]:
    """Compares what was read, blocks `first`... of an extent, with the checksums of those blocks that are known."""

    def check(view: memoryview) -> None:
        for index, expected in enumerate(sums.tolist()):
            block = view[index * BLOCK : (index + 1) * BLOCK]
            if known[index] == VALID and xxhash.xxh3_64_intdigest(block) != expected:
                raise mismatch(key, first + index, path, offset + index * BLOCK, len(block))

    return check


def summer(sums: Uint64s) -> Callable[[memoryview], None]:
    """Puts the checksums of the blocks about to be written into `sums`."""

    def compute(view: memoryview) -> None:
        for index in range(len(sums)):
            sums[index] = xxhash.xxh3_64_intdigest(view[index * BLOCK : (index + 1) * BLOCK])

    return compute


def mismatch(key: str, block: int, path: Path, offset: int, nbytes: int) -> ChecksumError:
    """The error for a block whose bytes are not those that were written."""
    return ChecksumError(
        f"extent '{key}', block {block}: the bytes read are not those written",
        path=path,
        offset=offset,
        length=nbytes,
        advice="The drive or the memory returned wrong data: check both, and restore the last export.",
    )
