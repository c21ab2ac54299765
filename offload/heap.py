"""glibc's heap on the CPU device: what it holds free stays within what the plan has for it.

Tensors below `MMAP_THRESHOLD` live in the heap. What they leave free is not given back by itself, and mostly cannot be
used again for tensors of the same size: PyTorch asks for aligned memory, and before glibc 2.38 a freed block is too
small for an equal aligned one. So each pass through a unit leaves holes around what outlives it: its outputs, and what
is still on its way out. Inner activations that are kept do not stay there: they are copied into memory of the engine's
as soon as the unit is done (`SavedTensors.keep_in`). While they did, a step without what is done here took up to 270
MiB more than its tensors.

Trimming gives the pages of all holes back, and each is then faulted in anew: at every growth it made a step of a 60M
gpt2 43 % longer, and gave one of a 271M llama within its smallest budget 250 thousand page faults instead of 30. So it
is done only where the process would otherwise leave its plan: where what it holds, with what the pass to come may take,
is more than is planned.

That cannot be seen from the size of the process while parts of what the engine reserved have never been touched: holes
that seem to have room would stand beside them once they are. A llama of two micro-batches had 240 MiB of holes when the
first backward touched 110 MiB of buffers at once. So in the first steps holes are given back wherever they are.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offload.planner.memory import HEAP_KEEPS, PROGRAM_LATE

# Steps in which a run comes to touch all that it reserved: with clipping the first gradients are used up in the second.
FIRST_STEPS = 2
# Resident bytes, without files, of a process that has its modules and nothing else: what plans are counted from.
_footprint = 0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def begin() -> None:
    """Planning begins: what is resident now is part of every run's footprint, what planning leaves is not."""
    global _footprint
    _footprint = _resident_bytes()


def left_by_planning() -> int:
    """Bytes that planning has left in this process beyond its footprint, once free pages are given back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not _footprint:
        return 0
    trim(0)
    return max(0, _resident_bytes() - _footprint)


@contextmanager
def in_footprint(most: int) -> Iterator[None]:
    """What the body takes for good is part of every run's footprint, whenever it is loaded: at most `most` bytes, since
    other threads may take memory meanwhile that is not."""
    global _footprint
    before = _resident_bytes()
    try:
        yield
    finally:
        if _footprint:
            _footprint += max(0, min(most, _resident_bytes() - before))


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
        if not _footprint:
            begin()
        self._allowed = self._framework = self._coming = 0
        self._kind = ""
        self._steps = 0
        self._resident = self._held = 0  # bytes when the heap was last known to be tight
        self._freed = 0

    def allow(self, planned: int, framework: int) -> None:
        """Trim nothing while the process, with what the next pass may take, is at most `planned` bytes above its
        footprint. `framework`: what a pass may take of which nothing else is known.
        """
        self._allowed, self._framework = planned - PROGRAM_LATE, framework

    def begin_step(self) -> None:
        """A training step begins."""
        self._steps += 1

    def enter(self, kind: str, held: int, coming: int | None = None) -> None:
        """A micro-batch passes a unit next: trim if the process holds more than is planned with what the pass takes.

        Args:
            kind: of the unit, and the direction. Of what a pass left, the next of its kind uses about half again and
                others nothing, and the activations that backward has used up stay only among units of one kind.
            held: bytes of activations that are alive in the framework's memory.
            coming: bytes that the pass may take, HEAP_KEEPS of them for what the heap has free now.
        """
        if self._trim is None:
            return
        self._coming = self._framework if coming is None else coming
        resident, again = _resident_bytes(), kind == self._kind
        since = max(0, held - self._held) if again else held - self._held
        tight = self._resident + since
        holes = resident - tight
        smaller, larger = sorted((holes, self._coming))
        taken = larger + (smaller // 2 if again else smaller)
        if holes > HEAP_KEEPS and self._leaves(tight + taken):
            self._trim(0)
            self._resident, self._held = _resident_bytes(), held
        self._kind = kind

    def freed(self, nbytes: int) -> None:
        """So many bytes have left the device from a lane, while units run; called from its thread."""
        self._freed += nbytes
        if self._trim is not None and self._freed >= HEAP_KEEPS:
            self._freed = 0
            if self._leaves(_resident_bytes() + self._coming):
                self._trim(0)

    def _leaves(self, nbytes: int) -> bool:
        """Whether a process that takes so much leaves its plan, or may once all that is reserved is touched."""
        return self._steps <= FIRST_STEPS or nbytes - HEAP_KEEPS > _footprint + self._allowed


def _resident_bytes() -> int:
    """Without the pages of files: libraries that are loaded late are no tensors, and part of every run's footprint."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, of_files, *_ = file.read().split()
        return (int(resident) - int(of_files)) * _PAGE
