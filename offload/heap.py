"""glibc's heap on the CPU device: what it holds free stays within what the plan has for it.

Tensors below `MMAP_THRESHOLD` live in the heap. What they leave free is not given back by itself, and mostly cannot be
used again for tensors of the same size: PyTorch asks for aligned memory, and before glibc 2.38 a freed block is too
small for an equal aligned one. Each pass through a unit so leaves holes between what it keeps (some 9 MiB of 40 in a
llama block), and a step without what is done here took up to 270 MiB more than its tensors. Trimming gives the pages of
all holes back, and each is then faulted in anew: at every growth it made a step of a 60M gpt2 43 % longer. So it is
done only where the process would otherwise leave its plan.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from offload.planner.memory import HEAP_KEEPS

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Heap:
    """Watches the process at every pass through a unit and trims its heap; without glibc, or with tensors on a GPU,
    it does nothing.

    Args:
        used: whether the framework's tensors live in this process's heap.
    """

    def __init__(self, used: bool) -> None:
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None) if used else None
        if self._trim is not None:
            self._trim(0)  # of what planning left
        self._before = _resident_bytes()
        self._allowed = 0
        self._kind = ""
        self._resident = self._held = 0  # bytes when the heap was last known to be tight
        self._freed = 0

    def allow(self, nbytes: int) -> None:
        """Trim nothing before the process has grown by so many bytes since this object was made."""
        self._allowed = nbytes

    def enter(self, kind: str, held: int) -> None:
        """A micro-batch passes a unit next: trim if the process has grown by more than what it holds has.

        Args:
            kind: of the unit, and the direction. What a pass of another kind left is of no use to it, and the
                activations that backward has used up stay only among units of one kind.
            held: bytes of activations that are alive.
        """
        if self._trim is None:
            return
        resident = _resident_bytes()
        since = max(0, held - self._held) if kind == self._kind else held - self._held
        if resident - self._resident - since > HEAP_KEEPS and resident > self._before + self._allowed:
            self._trim(0)
            self._resident, self._held = _resident_bytes(), held
        self._kind = kind

    def freed(self, nbytes: int) -> None:
        """So many bytes have left the device from a lane, while units run; called from its thread."""
        self._freed += nbytes
        if self._trim is not None and self._freed >= HEAP_KEEPS:
            self._freed = 0
            if _resident_bytes() > self._before + self._allowed:
                self._trim(0)


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
