"""When the heap is trimmed: where the coming pass would take the process out of its plan, and not before."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import reference
import zoo
from forcing import MACHINE
from offload.io import yield_to_compute
from offload.io.scheduling import NICENESS
from offload.planner.memory import HEAP_KEEPS, PROGRAM_LATE, PROGRAM_RUN
from offload.planner.plan import PROGRAM_BYTES

import offload
from offload import heap
from offload.engine import prepare

MIB = 1 << 20
TIGHT, COMING = 100 * MIB, 60 * MIB  # resident when nothing is free, and what a pass may take


class Process:
    """A heap whose free bytes are told here; counts its trims."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, planned: int) -> None:
        self.free, self.trims = 0, 0
        monkeypatch.setattr(heap, "_resident_bytes", lambda: TIGHT + self.free)
        self.heap = heap.Heap(used=True)
        self.heap._trim = self._trim  # type: ignore[assignment]
        monkeypatch.setattr(heap, "_footprint", 0)
        self.heap.allow(planned + PROGRAM_LATE, COMING)
        self.heap._resident, self.heap._kind = TIGHT, "block"
        for _ in range(heap.FIRST_STEPS + 1):
            self.heap.begin_step()

    def _trim(self, _: int) -> int:
        self.free, self.trims = 0, self.trims + 1
        return 1

    def enter(self, free: int, kind: str = "block") -> int:
        self.free = free
        self.heap.enter(kind, 0, COMING)
        return self.trims


def test_what_planning_left_is_planned_with(monkeypatch: pytest.MonkeyPatch, fast_path: Path) -> None:
    """A process that holds more after units were timed than the constant has room for."""
    cfg = offload.Config.load(reference.config(fast_path / "run", 1, 1))
    planned = []
    for left in (0, 50 * MIB):
        monkeypatch.setattr(heap, "left_by_planning", lambda left=left: left)
        plan = prepare(cfg, zoo.make("llama")).plan
        planned.append(plan.categories["cpu"]["program"])
    assert planned == [PROGRAM_BYTES, 50 * MIB + PROGRAM_RUN]
    assert prepare(cfg, zoo.make("llama"), MACHINE).plan.categories["cpu"]["program"] == PROGRAM_BYTES


def test_only_what_is_beyond_the_footprint_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_resident_bytes", lambda: 100 * MIB)
    for footprint, left in ((0, 0), (80 * MIB, 20 * MIB), (120 * MIB, 0)):  # 0: nobody has looked
        monkeypatch.setattr(heap, "_footprint", footprint)
        assert heap.left_by_planning() == left


def test_the_next_of_a_kind_uses_half_of_what_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 40 * MIB
    fits = TIGHT + COMING + free // 2 - HEAP_KEEPS
    assert Process(monkeypatch, fits).enter(free) == 0
    assert Process(monkeypatch, fits - 1).enter(free) == 1
    # what another kind left is of no use to it
    assert Process(monkeypatch, fits + free // 2).enter(free, "head") == 0
    assert Process(monkeypatch, fits + free // 2 - 1).enter(free, "head") == 1


def test_what_the_plan_has_for_holes_is_never_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Process(monkeypatch, 0).enter(HEAP_KEEPS) == 0
    assert Process(monkeypatch, 0).enter(HEAP_KEEPS + 1) == 1


def test_holes_do_not_wait_in_memory_that_is_reserved_and_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first steps the process looks smaller than it will be."""
    process = Process(monkeypatch, 1 << 40)
    process.heap._steps = 1
    assert process.enter(HEAP_KEEPS + 1) == 1
    assert process.enter(HEAP_KEEPS) == 1
    process.free = HEAP_KEEPS  # lanes let go of tensors while units run
    process.heap.freed(HEAP_KEEPS)
    assert process.trims == 2
    process.heap._steps = heap.FIRST_STEPS + 1
    assert process.enter(COMING) == 2
    process.heap.freed(HEAP_KEEPS)
    assert process.trims == 2


def test_what_planning_leaves_is_no_part_of_the_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and what is compiled are, whenever they are loaded."""
    resident = 300 * MIB
    monkeypatch.setattr(heap, "_resident_bytes", lambda: resident)
    monkeypatch.setattr(heap, "_footprint", 0)
    with heap.in_footprint(64 * MIB):  # before anything is planned: counted when planning begins
        resident += 10 * MIB
    heap.begin()
    resident += 20 * MIB
    with heap.in_footprint(64 * MIB):
        resident += 40 * MIB
    assert heap._footprint == 350 * MIB
    with heap.in_footprint(48 * MIB):
        resident += 300 * MIB  # other threads' too
    assert heap._footprint == 398 * MIB
    with heap.in_footprint(48 * MIB):
        resident -= 200 * MIB
    assert heap._footprint == 398 * MIB


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="threads have no priority of their own here")
def test_a_lane_yields_and_the_thread_that_computes_does_not() -> None:
    before, found = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), []

    def lane() -> None:
        yield_to_compute()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=lane)
    thread.start()
    thread.join()
    assert found == [NICENESS] and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
