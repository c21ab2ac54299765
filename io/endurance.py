"""How much a store has written to each drive, since it was made and over all its resumes, and what that is of a rating.

The totals are part of every manifest. What is written after the last commit and then lost in a crash goes uncounted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from .manifest import StorePath
from .request import Request

TERABYTE = 10**12  # as drives are rated


class Wear:
    """Counts bytes per path. `before` are the totals that the last manifest held."""

    def __init__(self, before: Sequence[int]) -> None:
        self._written = list(before)
        self._lock = threading.Lock()

    def add(self, path: int, nbytes: int) -> None:
        """Count `nbytes` on the path of this index."""
        with self._lock:
            self._written[path] += nbytes

    def counter(self, path: int) -> Callable[[Request], None]:
        """A callback for a write's end: counts it if it succeeded."""

        def count(request: Request) -> None:
            if request.error is None:
                self.add(path, request.nbytes)

        return count

    def totals(self) -> tuple[int, ...]:
        """Bytes per path."""
        with self._lock:
            return tuple(self._written)


def drives(paths: Sequence[StorePath], written: Sequence[int]) -> list[dict[str, Any]]:
    """Per path as plain data: path, written (bytes), tbw (rated terabytes or None), used_share (see used_share)."""
    return [
        {"path": str(item.path), "written": nbytes, "tbw": item.tbw, "used_share": used_share(nbytes, item)}
        for item, nbytes in zip(paths, written, strict=True)
    ]


def used_share(written: int, path: StorePath) -> float | None:
    """Part of the drive's rated endurance that `written` bytes are; None without a rating."""
    return None if path.tbw is None else written / (path.tbw * TERABYTE)
