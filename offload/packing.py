"""Which tokens stand in which row, and which rows in which batch: pure functions of lengths and seeds.

A *piece* is a run of at least two tokens of one document; a *row* is up to `sequence_length` tokens of pieces, padded
at the end. Two tokens at least, because the first token of a piece is never predicted: a shorter piece counts nothing,
and in a packed row a position 0 that no position 1 follows is then always padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

Piece = tuple[int, int]  # first token, number of tokens

OPEN_ROWS = 64  # rows that first-fit packing keeps open


def shuffled(positions: np.ndarray, length: int, *seed: int) -> np.ndarray:
    """What stands at `positions` of a permutation of range(length) that `seed` chooses; int64, without ever listing it.

    A Feistel network permutes the next larger range of 4**k; walking on from numbers outside [0, length) until one is
    inside makes it a permutation of range(length) (cycle walking: Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=64).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    out = np.asarray(positions, dtype=np.uint64).copy()
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[outside] = (left << half) | right
        outside = out >= np.uint64(length)
    return out.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def windows(document: Piece, size: int) -> Iterator[Piece]:
    """Cuts a document into pieces of `size` tokens (at least 3); none is left with a single token."""
    start, length = document
    while length:
        take = min(size, length)
        if length - take == 1:
            take -= 1
        yield start, take
        start, length = start + take, length - take


def fill_rows(documents: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Rows filled to the end: documents follow each other and are cut where a row is full.

    One or two places at the end of a row stay empty where a cut would leave a piece of one token.
    """
    row: list[Piece] = []
    space = size
    for document in documents:
        start, length = document
        while length:
            take = min(space, length)
            if length - take == 1:
                take -= 1
            if take < 2:
                yield row
                row, space = [], size
                continue
            row.append((start, take))
            start, length, space = start + take, length - take, space - take
            if space < 2:
                yield row
                row, space = [], size
    if row:
        yield row


def fit_rows(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Rows of whole pieces (each of at most `size` tokens), first fit among the rows that are open.

    When none of `OPEN_ROWS` open rows has room, the oldest is closed; rows come in the order in which they close.
    """
    rows: list[tuple[int, list[Piece]]] = []  # space left, pieces
    for piece in pieces:
        for at, (space, row) in enumerate(rows):
            if piece[1] <= space:
                row.append(piece)
                rows[at] = (space - piece[1], row)
                if rows[at][0] < 2:
                    yield rows.pop(at)[1]
                break
        else:
            if size - piece[1] < 2:
                yield [piece]
                continue
            if len(rows) == OPEN_ROWS:
                yield rows.pop(0)[1]
            rows.append((size - piece[1], [piece]))
    for _, row in rows:
        yield row


def pack(
    documents: Iterable[Piece], size: int, *, packing: bool, whole: bool, counted: Callable[[Piece], bool]
) -> Iterator[list[Piece]]:
    """Rows of `documents`: filled, or with `whole` from uncut examples; without `packing` one piece per row.

    An example longer than a row is cut into windows even with `whole`; windows that `counted` refuses are left out.
    """
    if packing and not whole:
        return fill_rows(documents, size)
    pieces = (
        piece
        for document in documents
        for piece in windows(document, size)
        if not whole or document[1] <= size or counted(piece)
    )
    return fit_rows(pieces, size) if packing else ([piece] for piece in pieces)
