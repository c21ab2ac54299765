"""What the simulation of the engine's schedule says of one step in the steady state."""

from __future__ import annotations

from dataclasses import dataclass

from offload.planner.choice import Choice
from offload.planner.memory import moments
from offload.planner.plan import LANES, Hardware, Workload
from offload.planner.schedule import Builder
from offload.planner.simulator import Program, Timeline, run, waits
from offload.planner.timing import Estimate, Step, Traffic, commit_interval, estimate, lanes, whole_step


@dataclass(frozen=True)
class Prediction:
    """One step in the steady state. `memory`: per tier, (seconds from the step's begin, bytes) wherever it changes."""

    step_seconds: float
    lane_seconds: dict[str, float]
    busiest_lane: str
    commit_every: int
    stall_seconds: dict[str, float]
    nvme_bytes: float
    memory: dict[str, list[tuple[float, int]]]


def predict(w: Workload, hw: Hardware, choice: Choice, memory: bool = False) -> Prediction:
    """Simulate two steps; the second, which begins with the first's updates and trailing writes, is the prediction.

    Zeroth-order steps are not simulated: one pass over the units is as long as its busiest resource, the estimate.
    """
    step = whole_step(w, hw, choice)
    moved = estimate(w, hw, step)
    if w.zo:
        return _estimated(w, hw, step, moved)
    builder = Builder(w, hw, choice, moved.commit_every)
    ends = [builder.step(), builder.step()]
    program = builder.program
    times = run(program)
    begin, end = times.end[ends[0]], times.end[ends[1]]
    lane_seconds = dict.fromkeys(LANES, 0.0)
    busy = [0.0] * len(program.resources)
    taken = {
        lane: [(r, shares[lane]) for r, shares in enumerate(program.resources) if lane in shares]
        for lane in set(program.lane)
    }
    for op in range(builder.first_of_second, len(program.lane)):
        lane = program.lane[op]
        if lane in lane_seconds:
            lane_seconds[lane] += program.seconds[op]
        for r, share in taken[lane]:
            busy[r] += share * program.seconds[op]
    # Writes that nothing waits for pile up over two steps; over many, no resource can be busy longer than the step.
    # CXL memory is used by operations of several lanes at once.
    seconds = max(end - begin, *busy, (step.forward.cxl + step.backward.cxl) / hw.cxl)
    if w.commit_every == "auto":  # the interval follows from the real step, not from the estimate
        every = commit_interval(w, hw, sum(k.behind for k in builder.work), seconds)
    else:
        every = w.commit_every
    return Prediction(
        seconds,
        lane_seconds,
        max(lane_seconds, key=lambda name: lane_seconds[name]),
        every,
        waits(program, times, "compute", begin),
        moved.nvme_bytes,
        _memory(w, choice, program, times, builder.first_of_second, begin) if memory else {},
    )


def _estimated(w: Workload, hw: Hardware, step: Step, moved: Estimate) -> Prediction:
    """The prediction of a step that is a single stage."""
    stage = Traffic(**vars(step.forward))
    stage.nvme_write += step.behind / moved.commit_every
    busy = lanes(stage, w, hw)
    lane_seconds = {name: busy[name] for name in LANES}
    busiest = max(lane_seconds, key=lambda name: lane_seconds[name])
    return Prediction(moved.step_seconds, lane_seconds, busiest, moved.commit_every, {}, moved.nvme_bytes, {})


def _memory(
    w: Workload, choice: Choice, program: Program, times: Timeline, first: int, begin: float
) -> dict[str, list[tuple[float, int]]]:
    """Bytes of what comes and goes, by tier, while the step runs: activations and the framework's temporaries.

    What is reserved for the whole step (slots, rings, homes, pools) is constant and left out.
    """
    forward = {m.unit: m for m in moments(w, choice) if not m.backward}
    backward = {m.unit: m for m in moments(w, choice) if m.backward}
    found: list[tuple[float, int]] = []
    for op in range(first, len(program.lane)):
        what, unit = program.label[op]
        if what in ("forward", "backward"):
            moment = (forward if what == "forward" else backward)[unit]
            found.append((times.begin[op] - begin, moment.activations + moment.framework))
    return {"gpu": found}
