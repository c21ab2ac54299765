"""What a store remembers of itself: its layout on the paths, and the manifest of the last commit.

The manifest is one file of two lines: a header with the format and the checksum of the second line, and the body as
JSON. It is replaced as a whole: new file, fsync, rename, fsync of the directory.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .buffers import round_up
from .errors import StoreError, StoreFull, from_os_error

FORMAT = 1
BLOCK = 4 << 20
"""Bytes of an extent that share one checksum, and the granularity of reads and writes."""
STRIPE = 8 << 20
"""Bytes that follow each other on one path before the next path takes over; also the largest backend request."""

MANIFEST = "manifest.json"
TEMPORARY = "manifest.tmp"

Uint64s = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extent:
    """A named range of `nbytes` bytes. Durable extents are part of commits; with two sides they can be rewritten
    after the first commit. Scratch extents (not durable) have one side and do not survive closing."""

    key: str
    nbytes: int
    sides: int
    durable: bool

    def __post_init__(self) -> None:
        if self.nbytes <= 0 or self.sides not in (1, 2) or (self.sides == 2 and not self.durable):
            raise StoreError(
                f"extent '{self.key}': needs a positive size and one or two sides (two only when durable), "
                f"not nbytes={self.nbytes}, sides={self.sides}, durable={self.durable}"
            )

    @property
    def padded(self) -> int:
        return round_up(self.nbytes)

    @property
    def blocks(self) -> int:
        return -(-self.nbytes // BLOCK)


@dataclass(frozen=True)
class StorePath:
    """A directory for a store and the most bytes of data the store may keep under it.

    `bandwidth`, bytes per second, decides the path's share of every extent when all paths of a store have one; without,
    the sizes do. `tbw` is the drive's rating in terabytes (1e12 bytes) written, None when it is not known.
    """

    path: Path
    size: int
    bandwidth: float | None = None
    tbw: float | None = None


@dataclass(frozen=True)
class Side:
    """Where each block of one side of an extent lies: index of the path, and offset in its data file."""

    files: Bytes
    offsets: Offsets


def shares(needed: int, sizes: Sequence[int], bandwidths: Sequence[float | None]) -> list[float]:
    """How many of `needed` bytes each path shall hold: in proportion to bandwidth, and what would not fit in a fast
    path's size goes to the others; in proportion to size when a bandwidth is not known."""
    rates = [rate or 0.0 for rate in bandwidths]
    if min(rates) <= 0:
        return [float(size) for size in sizes]
    result = [0.0] * len(sizes)
    left, open_ = float(needed), set(range(len(sizes)))
    while left > 0 and open_:
        level = left / sum(rates[index] for index in open_)
        full = {index for index in open_ if rates[index] * level >= sizes[index]}
        for index in full or open_:
            result[index] = float(sizes[index]) if full else rates[index] * level
        if not full:
            break
        left -= sum(sizes[index] for index in full)
        open_ -= full
    return [max(share, 1.0) for share in result]


def place(
    extents: Sequence[Extent], sizes: Sequence[int], bandwidths: Sequence[float | None] = ()
) -> tuple[dict[str, tuple[Side, ...]], list[int]]:
    """Lay the extents out over paths of `sizes` bytes; also the bytes used on each.

    Each side is cut into stripes, and each stripe goes to the path that is emptiest relative to its share (see shares),
    so every path gets its part of every long run. The result depends on the arguments alone: opening a store computes
    it again. Raises StoreFull when the paths are too small.
    """
    needed = sum(extent.padded * extent.sides for extent in extents)
    wanted = shares(needed, sizes, bandwidths or [None] * len(sizes))
    used = [0] * len(sizes)
    placed: dict[str, tuple[Side, ...]] = {}
    for extent in extents:
        sides = []
        for _ in range(extent.sides):
            side = Side(np.zeros(extent.blocks, np.uint8), np.zeros(extent.blocks, np.int64))
            done = 0
            while done < extent.padded:
                left = extent.padded - done
                smallest = min(left, BLOCK)
                fits = [index for index, size in enumerate(sizes) if size - used[index] >= smallest]
                if not fits:
                    raise _too_small(extents, sizes)
                index = min(fits, key=lambda index: used[index] / wanted[index])
                room = sizes[index] - used[index]
                length = min(STRIPE, left)
                if length > room:
                    length = BLOCK
                for start in range(0, length, BLOCK):
                    side.files[(done + start) // BLOCK] = index
                    side.offsets[(done + start) // BLOCK] = used[index] + start
                used[index] += length
                done += length
            sides.append(side)
        placed[extent.key] = tuple(sides)
    return placed, used


def _too_small(extents: Sequence[Extent], sizes: Sequence[int]) -> StoreFull:
    needed = sum(extent.padded * extent.sides for extent in extents)
    return StoreFull(
        f"the store does not fit its budget: needed {needed} bytes, available {sum(sizes)} bytes "
        f"({' + '.join(str(size) for size in sizes)}; up to {BLOCK} bytes at the end of each path stay unused)",
        advice="Raise the size of a path, or add one.",
    )


@dataclass
class Manifest:
    """One committed version. `sides` holds the committed side (0 or 1) of each block of each durable extent,
    `checksums` the xxh3_64 of those blocks, `written` the bytes written to each path since the store was made."""

    name: str
    version: int
    paths: tuple[StorePath, ...]
    extents: tuple[Extent, ...]
    sides: Mapping[str, Bytes]
    checksums: Mapping[str, Uint64s]
    meta: dict[str, Any]
    written: tuple[int, ...]

    def place(self) -> tuple[dict[str, tuple[Side, ...]], list[int]]:
        """Where everything lies; see place."""
        return place(self.extents, [item.size for item in self.paths], [item.bandwidth for item in self.paths])

    def encode(self) -> bytes:
        body = {
            "name": self.name,
            "version": self.version,
            "block": BLOCK,
            "stripe": STRIPE,
            "paths": [asdict(item) | {"path": str(item.path)} for item in self.paths],
            "written": self.written,
            "extents": [asdict(extent) for extent in self.extents],
            "committed": {
                key: {"sides": _pack(np.packbits(self.sides[key])), "xxh3_64": _pack(sums.astype("<u8"))}
                for key, sums in self.checksums.items()
            },
            "meta": self.meta,
        }
        line = json.dumps(body, separators=(",", ":")).encode()
        header = json.dumps({"format": FORMAT, "xxh3_64": xxhash.xxh3_64_hexdigest(line)}).encode()
        return header + b"\n" + line + b"\n"

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Manifest:
        """Raises StoreError when the bytes are not a whole manifest of a format known here."""
        header_line, _, rest = data.partition(b"\n")
        line = rest[:-1]
        try:
            header = json.loads(header_line)
            if header["format"] != FORMAT:
                raise StoreError(
                    f"manifest has format {header['format']}, this version reads {FORMAT}",
                    path=path,
                    advice="Use the version of the program that wrote it.",
                )
            if header["xxh3_64"] != xxhash.xxh3_64_hexdigest(line) or rest[-1:] != b"\n":
                raise ValueError("checksum mismatch")
            body = json.loads(line)
            if (body["block"], body["stripe"]) != (BLOCK, STRIPE):
                raise ValueError(f"block {body['block']} and stripe {body['stripe']} are not {BLOCK} and {STRIPE}")
            extents = tuple(Extent(**item) for item in body["extents"])
            sides, checksums = {}, {}
            for extent in extents:
                if extent.durable:
                    committed = body["committed"][extent.key]
                    packed = np.frombuffer(base64.b64decode(committed["sides"]), np.uint8)
                    sides[extent.key] = np.unpackbits(packed, count=extent.blocks)
                    sums = np.frombuffer(base64.b64decode(committed["xxh3_64"]), "<u8").astype(np.uint64)
                    if len(sums) != extent.blocks:
                        raise ValueError(f"{len(sums)} checksums for the {extent.blocks} blocks of '{extent.key}'")
                    checksums[extent.key] = sums
            return cls(
                name=body["name"],
                version=body["version"],
                paths=tuple(StorePath(**item | {"path": Path(item["path"])}) for item in body["paths"]),
                extents=extents,
                sides=sides,
                checksums=checksums,
                meta=body["meta"],
                # a store of a version that did not count: from here on
                written=tuple(body.get("written") or [0] * len(body["paths"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the manifest is damaged ({error})",
                path=path,
                advice="It is only ever replaced as a whole, so the file was changed from outside or the device lost "
                "it: restore it from a copy.",
            ) from error


def _pack(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def load(directory: Path) -> Manifest:
    """The manifest in `directory`. Raises StoreError when there is none, or it is damaged."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(
            "no committed store", path=path, advice="Nothing was ever committed here, or the path is wrong."
        ) from error
    except OSError as error:
        raise from_os_error(error, "cannot read the manifest", path) from error
    return Manifest.decode(data, path)


def write_temporary(directory: Path, data: bytes) -> None:
    """First half of a replacement: the new manifest beside the old one, durable. Leaves nothing behind on OSError."""
    path = directory / TEMPORARY
    try:
        write_durably(path, data)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """A new file with `data`, synced; its name is durable once the directory is synced too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, memoryview(data)[done:], done)
        os.fsync(fd)
    finally:
        os.close(fd)


def put_in_place(directory: Path) -> None:
    """Second half: the new manifest takes the old one's name, durably."""
    os.replace(directory / TEMPORARY, directory / MANIFEST)
    sync(directory)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
