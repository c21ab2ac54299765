"""Saved tensors on their way out: how many bytes of them are still on the device, and waiting until few enough are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor

from offload.errors import OffloadError


class Transit:
    """Counts what is leaving. The main thread adds and waits, the lane takes away, so that neither waits for itself.

    Args:
        stalled: what the main thread's waiting is recorded with, by the name of the unit that waits.
        timeout: seconds after which waiting ends with an error.
    """

    def __init__(self, stalled: Callable[[str], AbstractContextManager[None]], timeout: float) -> None:
        self._stalled = stalled
        self._timeout = timeout
        self._nbytes = 0
        self._changed = threading.Condition()

    def begin(self, nbytes: int) -> None:
        """So many bytes are to leave."""
        with self._changed:
            self._nbytes += nbytes

    def gone(self, nbytes: int) -> None:
        """So many bytes have left the device, or never will."""
        with self._changed:
            self._nbytes -= nbytes
            self._changed.notify()

    def wait(self, room: int, unit: str) -> None:
        """Return when at most `room` bytes are leaving, or none."""
        if self._nbytes <= max(0, room):
            return
        with self._stalled(unit), self._changed:
            if not self._changed.wait_for(lambda: self._nbytes <= max(0, room), self._timeout):
                raise OffloadError(
                    f"waited {self._timeout:.0f} s for activations leaving ({unit}); see the trace's lanes for what "
                    "holds them, and `offload doctor` for the store's speed"
                )


def storage_bytes(pieces: Iterable[tuple[int, Tensor]]) -> int:
    """Bytes of the pieces' storages, each of its own."""
    return sum(piece.untyped_storage().nbytes() for _, piece in pieces)


def taken(
    pieces: list[tuple[int, Tensor]], start: int, stop: int, gone: Callable[[int], None]
) -> Iterator[tuple[int, Tensor]]:
    """Take the bytes whose positions lie before `stop` off the front of `pieces`, with positions from `start` on.

    Whoever asks for the next one has let the one before go: `gone` is told the bytes of each storage after its last.
    """
    while pieces and pieces[0][0] < stop:
        at, piece = pieces.pop(0)
        nbytes = piece.untyped_storage().nbytes()
        if at + piece.numel() > stop:
            pieces.insert(0, (stop, piece[stop - at :]))
            piece, nbytes = piece[: stop - at], 0
        yield at - start, piece
        del piece
        gone(nbytes)
