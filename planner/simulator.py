"""Event simulation of operations on queues that share resources.

An operation belongs to one queue (a thread of the engine, first in first out), waits for other operations, and takes
some seconds when it runs alone. Operations that run at the same time share resources: when several ask for more than
there is of one, all that use it slow down in proportion. Between two events every speed is constant, so the simulation
steps from one end of an operation to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Demands = tuple[tuple[int, float], ...]  # (resource, share of it that the operation takes at full speed)


@dataclass
class Program:
    """Operations in the order in which the engine issues them; every list has one entry per operation."""

    resources: Sequence[Mapping[str, float]]  # share of each resource that a lane takes
    yields: Mapping[str, float] = field(default_factory=dict)  # a lane's speed while compute runs, where it is less
    lane: list[str] = field(default_factory=list)
    queue: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    after: list[tuple[int, ...]] = field(default_factory=list)
    label: list[tuple[str, int]] = field(default_factory=list)  # (what, unit index)
    _demands: dict[str, Demands] = field(default_factory=dict)

    def add(
        self, what: str, unit: int, queue: str, lane: str, seconds: float, after: Sequence[int | None] = ()
    ) -> int:
        """Append an operation of `seconds` alone on `lane`; returns its number. None in `after` waits for nothing."""
        self.lane.append(lane)
        self.queue.append(queue)
        self.seconds.append(seconds)
        self.after.append(tuple([x for x in after if x is not None]))
        self.label.append((what, unit))
        return len(self.lane) - 1

    def demands(self, lane: str) -> Demands:
        """The shared resources a lane takes part of."""
        if lane not in self._demands:
            shared = [(i, r[lane]) for i, r in enumerate(self.resources) if lane in r and len(r) > 1]
            self._demands[lane] = tuple(shared)
        return self._demands[lane]


@dataclass(frozen=True)
class Timeline:
    """When every operation of a program began and ended, in seconds."""

    begin: list[float]
    end: list[float]


def run(program: Program) -> Timeline:
    """Simulate. Raises ValueError naming an operation that waits for what never comes."""
    count = len(program.lane)
    begin, end = [-1.0] * count, [-1.0] * count
    waiting_for = [0] * count
    followers: list[list[int]] = [[] for _ in range(count)]
    for op, before in enumerate(program.after):
        waiting_for[op] = len(before)
        for other in before:
            followers[other].append(op)
    queues: dict[str, list[int]] = {}
    for op in range(count - 1, -1, -1):
        queues.setdefault(program.queue[op], []).append(op)  # reversed: the head is the last
    of_lane = {lane: program.demands(lane) for lane in set(program.lane)}
    demands = [of_lane[lane] for lane in program.lane]
    left = list(program.seconds)
    usage = [0.0] * len(program.resources)
    # a lane that takes more than all of a resource does so only beside compute
    beside = [max(shares.values(), default=0.0) > 1.0 for shares in program.resources]
    running: list[int] = []
    computing = 0  # operations of compute among them
    now = 0.0

    def start(names: list[str]) -> None:
        """Begin what stands at the head of these queues and waits for nothing; what takes no time ends at once."""
        nonlocal computing
        while names:
            line = queues[names.pop()]
            if not line or begin[line[-1]] >= 0.0 or waiting_for[line[-1]]:
                continue
            op = line[-1]
            begin[op] = now
            if left[op] > 0.0:
                running.append(op)
                computing += program.lane[op] == "compute"
                for r, share in demands[op]:
                    usage[r] += share
            else:
                names += finish(op)

    def finish(op: int) -> list[str]:
        """The queues whose heads may begin now."""
        end[op] = now
        queues[program.queue[op]].pop()
        ready = [program.queue[op]]
        for other in followers[op]:
            waiting_for[other] -= 1
            if waiting_for[other] == 0:
                ready.append(program.queue[other])
        return ready

    start(list(queues))
    while running:
        shortest, speeds = float("inf"), []
        for op in running:
            speed = 1.0
            for r, _ in demands[op]:
                if usage[r] > 1.0 and (computing or not beside[r]) and speed * usage[r] > 1.0:
                    speed = 1.0 / usage[r]
            if computing and program.lane[op] in program.yields:
                speed = min(speed, program.yields[program.lane[op]])
            speeds.append(speed)
            needed = left[op] / speed
            if needed < shortest:
                shortest = needed
        now += shortest
        done = []
        for op, speed in zip(running, speeds, strict=True):
            left[op] -= shortest * speed
            if left[op] <= 1e-12 * program.seconds[op]:
                done.append(op)
        if not done:  # rounding
            done = [min(running, key=lambda op: left[op])]
        for op in done:
            running.remove(op)
            computing -= program.lane[op] == "compute"
            left[op] = 0.0
            for r, share in demands[op]:
                usage[r] -= share
        start([name for op in done for name in finish(op)])
    stuck = next((op for op in range(count) if end[op] < 0.0), None)
    if stuck is not None:
        raise ValueError(f"the simulated step cannot end: {program.label[stuck]} waits for {program.after[stuck]}")
    return Timeline(begin, end)


def waits(program: Program, times: Timeline, queue: str, since: float) -> dict[str, float]:
    """Seconds after `since` that `queue` stood still, by the lane it waited for.

    A gap is walked back from the operation that ended it through what that one waited for in turn, to the gap's begin.
    """
    found: dict[str, float] = {}
    members = [op for op in range(len(program.lane)) if program.queue[op] == queue]
    before: dict[int, int] = {}
    last_of: dict[str, int] = {}
    for op, name in enumerate(program.queue):
        if name in last_of:
            before[op] = last_of[name]
        last_of[name] = op
    for op in members:
        previous = before.get(op)
        gap_begin = max(since, times.end[previous] if previous is not None else 0.0)
        at, current = times.begin[op], op
        while at > gap_begin:
            causes = list(program.after[current])
            if current != op and current in before:
                causes.append(before[current])
            if not causes:
                break
            current = max(causes, key=times.end.__getitem__)
            start = max(gap_begin, min(at, times.begin[current]))
            found[program.lane[current]] = found.get(program.lane[current], 0.0) + at - start
            at = start
    return found
