"""The engine's schedule of one step as a program for the simulator.

forward    unit by unit: its fill (with clipping together with its pending update), then compute of all micro-batches;
backward   in reverse: fill, compute, gradient out; without clipping the update follows each gradient.
Slots, gradient slots and rings are what the plan reserved: an operation that needs one waits for its last user.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.planner.choice import Choice, swaps
from offload.planner.memory import UPDATE_COUNT, is_large, reserve
from offload.planner.plan import Hardware, UnitProfile, Workload
from offload.planner.simulator import Program
from offload.planner.timing import YIELDING, adamw_rate, copy_rates, simulated_resources, sum_seconds, unit_work

MANY_UNITS = 48  # beyond this, a unit is moved in fewer pieces: the pipeline is long enough to hide the difference


@dataclass
class _Slot:
    group: str
    unit: int = -1
    filled: int | None = None  # the operation that completes its contents
    released: tuple[int, ...] = ()  # its last users


@dataclass
class _State:
    """What one step leaves to the next: slots, and the operations that others wait for."""

    slots: list[_Slot]
    gradient_slots: dict[str, list[tuple[int, ...]]]
    written: dict[int, int] = field(default_factory=dict)  # unit: its new state is in the store
    updated: dict[int, int] = field(default_factory=dict)  # unit: its new weights exist
    begin: int | None = None  # all gradients and the norm are known
    ring: list[int] = field(default_factory=list)  # last operations on the update's chunks
    swapped: dict[int, int] = field(default_factory=dict)  # unit: its activations have left


class Builder:
    """Appends one step after the other to a program."""

    def __init__(self, w: Workload, hw: Hardware, choice: Choice, commit_every: int) -> None:
        self.w, self.hw, self.choice = w, hw, choice
        pairs = list(zip(w.alike, choice.units, strict=True))
        known = {(i, c): unit_work(w.units[i], c, w, hw) for i, c in dict.fromkeys(pairs)}
        self.work = [known[pair] for pair in pairs]
        self.every = max(1, commit_every)
        self.program = Program(simulated_resources(w, hw), YIELDING if w.device == "cpu" else {})
        self.copy_in, self.copy_out = copy_rates(w, hw)
        self.adamw = adamw_rate(w, hw)
        self.pieces = 2 if len(w.units) > MANY_UNITS else 4
        counts = {b.name: b.count for b in reserve(w, choice.block_slots, choice)}
        self.state = _State(
            [_Slot(g) for g in ("block", "large") for _ in range(counts.get(f"weights.{g}", 0))],
            {g: [()] * counts.get(f"gradients.{g}", 0) for g in ("block", "large")},
        )
        self.forward_order, self.backward_order = visits(w)
        self.first_of_second = 0
        self._leaving: list[int] = []  # the last operations of saved tensors' way out
        self._came_back: list[int] = []  # the backward of what had been away

    def step(self) -> int:
        """Append one step; returns the operation that ends it."""
        self.first_of_second = len(self.program.lane)
        w, s = self.w, self.state
        sequence = self.forward_order + self.backward_order
        resident = [i for i, u in enumerate(w.units) if u.kind == "resident"]
        start = s.begin
        for i in resident:
            start = self._resident(i)
        if w.clipping and s.begin is not None:
            for i in sorted(self.choice.placed("state", "gpu")):
                self._update_there(i, s.begin)
        compute: int | None = None
        slot: _Slot | None = None
        seen: set[int] = set()
        for at, i in enumerate(self.forward_order):
            slot = self._fill(i, sequence, at, update=w.clipping and i not in seen)
            seen.add(i)
            compute = self._forward(i, at, slot, [compute, start, s.begin])
        outs: list[int] = []
        if self.forward_order and w.units[self.forward_order[-1]].kept:
            i = self.forward_order[-1]
            if sum(1 for x in self.backward_order if x == i) == 0:
                outs += self._gradient(i, compute, slot)
        visits_left = {i: self.backward_order.count(i) for i in set(self.backward_order)}
        for position, i in enumerate(self.backward_order):
            at = len(self.forward_order) + position
            slot = self._fill(i, sequence, at, update=False)
            visits_left[i] -= 1
            compute = self._backward(i, position, slot, compute)
            if visits_left[i] == 0:
                outs += self._gradient(i, compute, slot)
        for i in resident:
            outs += self._gradient(i, compute)
        end = self.program.add("end of step", -1, "compute", "compute", 0.0, [compute, *(outs if w.clipping else [])])
        s.begin = end
        return end

    def _with_cxl(self, seconds: float, cxl_bytes: float, pieces: int = 1) -> float:
        """One of `pieces` of an operation of `seconds` that also moves `cxl_bytes`: the slower of the two."""
        return max(seconds / pieces, self.hw.cxl_seconds(cxl_bytes / pieces))

    # ---- fills and updates ----

    def _resident(self, i: int) -> int | None:
        """The resident unit's weights are brought up to date before anything runs."""
        k, last = self.work[i], self.state.begin
        if self.w.clipping and self.state.begin is not None and self.w.units[i].trainable:
            last = self._update(i, [self.state.begin], ())
        return self.program.add("fill", i, "fill", "h2d", k.fill / self.copy_in, [last, self.state.updated.get(i)])

    def _fill(self, i: int, sequence: list[int], at: int, update: bool) -> _Slot:
        """Weights into a slot, unless they are there; with a pending update, piece by piece behind it."""
        s, k, unit = self.state, self.work[i], self.w.units[i]
        if self.choice.units[i].on_device:
            return _Slot("own", i, s.updated.get(i))
        held = next((slot for slot in s.slots if slot.unit == i), None)
        updates = update and unit.trainable and s.begin is not None
        if held is not None and not updates:
            return held
        slot = held or self._choose(i, sequence, at)
        add = self.program.add
        if updates:  # it leaves the new weights in the slot, and takes the old ones from it if they are there
            copied = self._update(i, [s.begin], slot.released, in_slot=held is not None, place=True)
        else:
            copied = s.updated.get(i)
            ready = [s.written.get(i) if k.fill_read else s.updated.get(i), *slot.released]
            for _ in range(self.pieces):
                read = None
                if k.fill_read:
                    seconds = k.fill_read / self.pieces / self.hw.nvme_read
                    read = add("read weights", i, "read weights", "nvme_read", seconds, ready)
                seconds = self._with_cxl(k.fill / self.copy_in, k.fill_cxl, self.pieces)
                copied = add("fill", i, "fill", "h2d", seconds, [read, *ready])
        slot.unit, slot.filled, slot.released = i, copied, ()
        return slot

    def _choose(self, i: int, sequence: list[int], at: int) -> _Slot:
        """An empty slot, the longest free one first, or the one whose unit is needed again latest."""
        group = "large" if is_large(self.w.units[i], self.w) else "block"
        mine = [slot for slot in self.state.slots if slot.group == group]
        # loads are issued while the unit before is in use
        mine = [slot for slot in mine if at == 0 or slot.unit != sequence[at - 1]] or mine
        empty = [slot for slot in mine if slot.unit < 0]
        if empty:
            return min(empty, key=lambda slot: max(slot.released, default=-1))

        def keeps_best(slot: _Slot) -> tuple[int, int]:
            try:
                next_use = sequence.index(slot.unit, at)
            except ValueError:
                next_use = len(sequence)
            return next_use, -max(slot.released, default=-1)  # of equals the one that is free first

        return max(mine, key=keeps_best)

    def _update(
        self,
        i: int,
        after: list[int | None],
        room: tuple[int, ...],
        in_slot: bool = False,
        place: bool = False,
    ) -> int | None:
        """The optimizer's operations of one unit, piece by piece: read, update, write behind; returns the last.

        Args:
            after: what the update has to wait for beside its state.
            room: the last users of the slot that the new weights go to.
            in_slot: the old weights are there already.
            place: the new weights are copied into a slot.
        """
        k, s, add, n = self.work[i], self.state, self.program.add, self.pieces
        read_bytes = k.state_read + k.gradient_nvme + (0 if in_slot else k.fill_read)
        write_bytes = k.state_write + k.behind / self.every
        cxl_bytes = k.state_cxl + k.gradient_cxl
        last = written = None
        before = s.written.get(i)
        for _ in range(n):
            read = None
            ring = s.ring[-UPDATE_COUNT] if len(s.ring) >= UPDATE_COUNT and read_bytes else None
            if read_bytes:
                first = s.begin if k.gradient_nvme else None
                seconds = read_bytes / n / self.hw.nvme_read
                read = add("read state", i, "read state", "nvme_read", seconds, [first, ring, before])
            seconds = k.updated / self.adamw + sum_seconds(k.summed, self.w, self.hw)
            seconds = self._with_cxl(seconds, cxl_bytes, n)
            last = add("update", i, "optimizer", "optimizer", seconds, [read, *after, *room])
            written = last
            if place:
                last = add("place weights", i, "optimizer", "h2d", k.place / n / self.copy_in, [last])
            if write_bytes:
                written = add("write state", i, "write", "nvme_write", write_bytes / n / self.hw.nvme_write, [last])
            if read_bytes:
                s.ring.append(written)
        if last is not None:
            s.updated[i] = last
        if written is not None:
            s.written[i] = written
        return last

    def _update_there(self, i: int, after: int | None) -> int:
        """The update of a unit that lives on the device; its state is copied out for the commits that fall due."""
        k, s, add, n = self.work[i], self.state, self.program.add, self.pieces
        update = add("update", i, "compute", "compute", k.device_seconds, [after])
        s.updated[i] = update
        for _ in range(n):
            ring = s.ring[-UPDATE_COUNT] if len(s.ring) >= UPDATE_COUNT else None
            seconds = k.copied_out / self.every / n / self.copy_out
            copied = add("copy out", i, "optimizer", "d2h", seconds, [update, ring])
            seconds = k.behind / self.every / n / self.hw.nvme_write
            s.written[i] = add("write state", i, "write", "nvme_write", seconds, [copied])
            s.ring.append(s.written[i])
        return update

    # ---- compute ----

    def _forward(self, i: int, at: int, slot: _Slot, after: list[int | None]) -> int:
        unit, k, add = self.w.units[i], self.work[i], self.program.add
        last_visit = at == len(self.forward_order) - 1
        if swaps(self.choice.units[i]):  # only one pass's saved tensors may still be leaving
            after = [*after, *self._leaving[-2:-1]]
        share = _visit_share(unit, last_visit)
        if unit.kept and last_visit:
            after = [*after, *self._gradient_slot(i)]
        op = add("forward", i, "compute", "compute", k.forward_seconds * share, [*after, slot.filled])
        if unit.kept and last_visit:
            op = add("backward", i, "compute", "compute", k.backward_seconds, [op])
        slot.released = (op,)
        if k.out:
            seconds = self._with_cxl(k.out / self.copy_out, k.out_cxl, unit.visits)
            out = add("swap out", i, "swap out", "d2h", seconds, [op])
            if k.out_nvme:
                seconds = k.out_nvme / unit.visits / self.hw.nvme_write
                out = add("write activations", i, "write activations", "nvme_write", seconds, [out])
            if swaps(self.choice.units[i]):
                self._leaving.append(out)
            self.state.swapped[i] = out
        return op

    def _backward(self, i: int, position: int, slot: _Slot, compute: int | None) -> int:
        unit, k, add = self.w.units[i], self.work[i], self.program.add
        back = self.state.swapped.pop(i, None)
        if back is not None:
            # one (unit, micro-batch) in use and one on its way: no earlier than the one before the last is done
            ahead = self._came_back[-2:-1]
            if k.out_nvme:
                seconds = k.out_nvme / self.hw.nvme_read
                back = add("read activations", i, "read activations", "nvme_read", seconds, [back, *ahead])
            seconds = self._with_cxl(k.out / self.copy_in, k.out_cxl)
            back = add("swap in", i, "swap in", "h2d", seconds, [back, *ahead])
        visits = max(1, unit.visits - unit.kept)
        seconds = 0.0 if unit.kept else k.backward_seconds / visits
        op = add("backward", i, "compute", "compute", seconds, [compute, slot.filled, back, *self._gradient_slot(i)])
        slot.released = (op,)
        if back is not None:
            self._came_back.append(op)
        return op

    # ---- gradients ----

    def _gradient_group(self, i: int) -> str | None:
        unit = self.w.units[i]
        if unit.kind == "resident" or unit.held or not unit.trainable:
            return None
        if self.w.clipping and self.choice.units[i].on_device:
            return None
        return "large" if is_large(unit, self.w) else "block"

    def _gradient_slot(self, i: int) -> tuple[int, ...]:
        """The last users of the gradient slot that the unit gets."""
        group = self._gradient_group(i)
        if group is None or not self.state.gradient_slots[group]:
            return ()
        return self.state.gradient_slots[group][0]

    def _gradient(self, i: int, compute: int | None, slot: _Slot | None = None) -> list[int]:
        """The unit's gradient leaves the device; without clipping its update follows. Returns the last operations."""
        k, add, n, w = self.work[i], self.program.add, self.pieces, self.w
        if not w.units[i].trainable:
            return []
        there = not w.clipping and self.choice.units[i].on_device
        if there:  # at once; the gradient goes out only for its norm
            compute = self._update_there(i, compute)
        group = self._gradient_group(i)
        last: list[int] = []
        spilled: list[int] = []
        drained: list[int] = []
        for _ in range(n):
            room = spilled[-2] if len(spilled) > 1 else None  # half of the staging ring
            seconds = self._with_cxl(k.drain_seconds, k.gradient_cxl, n)
            op = add("gradient", i, "drain", "d2h", seconds, [compute, room])
            drained.append(op)
            if w.clipping and k.gradient_nvme:
                seconds = k.gradient_nvme / n / self.hw.nvme_write
                op = add("spill gradient", i, "write", "nvme_write", seconds, [op])
                spilled.append(op)
            last = [op]
        release: tuple[int, ...] = (drained[-1],)
        if not w.clipping and not there:
            update = self._update(i, [drained[-1]], (), in_slot=slot is not None, place=slot is not None)
            release = (update,) if update is not None else release
            if slot is not None:  # the update takes the weights from the slot
                slot.released = (*slot.released, *release)
            last = list(release)
        if group is not None and self.state.gradient_slots[group]:
            self.state.gradient_slots[group].pop(0)
            self.state.gradient_slots[group].append(release)
        return last


def visits(w: Workload) -> tuple[list[int], list[int]]:
    """Unit indices in the order in which forward, and backward, need their weights; the kept last visit ends forward.

    Where a unit is visited more often, its visits but the last follow each other.
    """
    streamed = [i for i, u in enumerate(w.units) if u.kind != "resident"]
    forward: list[int] = []
    for i in streamed:
        unit = w.units[i]
        forward += [i] * (unit.visits - (1 if unit.kept and unit.visits > 1 else 0))
    kept = [i for i in streamed if w.units[i].kept]
    for i in kept:
        if w.units[i].visits > 1:
            forward.append(i)
        else:
            forward.remove(i)
            forward.append(i)
    backward = forward[::-1]
    if kept:
        backward = backward[1:]
    return forward, backward


def _visit_share(unit: UnitProfile, last: bool) -> float:
    """The share of a unit's forward that one visit takes; of a tied table the look-up is free."""
    if unit.kept and unit.visits > 1:
        return 1.0 if last else 0.0
    return 1.0 / unit.visits
