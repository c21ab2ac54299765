"""The report's figures, as SVG in data addresses: nothing to load, and no clash of ids between figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000  # a curve of more steps is averaged down to this many points
SPANS = 4000  # rectangles of a timeline; the longest are kept
LANES = ("compute", "h2d", "d2h", "nvme_read", "nvme_write", "optimizer", "stall")
COLOURS = ("#1f6feb", "#2da44e", "#8250df", "#bf8700", "#cf222e", "#0b7a75", "#8c959f")
GIB = 2**30


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _address(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "offload"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue().encode()).decode()


def thin(values: Sequence[float]) -> list[float]:
    """`values` averaged in equal groups, at most `POINTS` of them."""
    group = -(-len(values) // POINTS) or 1
    return [sum(values[i : i + group]) / len(values[i : i + group]) for i in range(0, len(values), group)]


def loss(steps: Sequence[int], losses: Sequence[float], evals: Sequence[tuple[int, float]]) -> str:
    """The loss by step, evaluations as points."""
    figure, axes = _figure(3)
    axes.plot(thin(steps), thin(losses), color=COLOURS[0], label="train", marker="." if len(steps) < 3 else None)
    if evals:
        axes.plot(*zip(*evals, strict=True), "o", color=COLOURS[4], label="eval")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    return _address(figure)


def memory(tiers: Mapping[str, tuple[int, int, int]]) -> str:
    """Per tier the measured peak as a bar, the planned peak and the budget as marks: (peak, planned, budget) bytes.

    Each is drawn as a share of its budget, since tiers differ by orders of magnitude.
    """
    figure, axes = _figure(0.8 + 0.5 * len(tiers))
    for row, (peak, planned, budget) in enumerate(tiers.values()):
        whole = budget or max(peak, planned, 1)
        axes.barh(row, 100 * peak / whole, height=0.5, color=COLOURS[4] if peak > whole else COLOURS[0])
        axes.plot([100 * planned / whole] * 2, [row - 0.35, row + 0.35], color="black", linewidth=2)
    axes.axvline(100, color=COLOURS[4], linestyle="--")
    axes.set_yticks(range(len(tiers)), list(tiers))
    axes.invert_yaxis()
    axes.set_xlabel("% of the budget (dashed); bar: measured peak, black mark: planned peak")
    return _address(figure)


def lanes(busy: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> str:
    """Busy seconds of each lane by step, under the duration of the step."""
    figure, axes = _figure(3)
    steps = thin([float(i + 1) for i in range(len(seconds))])
    marker = "." if len(steps) < 3 else None
    axes.plot(steps, thin(seconds), color="black", linewidth=2, label="step", marker=marker)
    for lane, values in busy.items():
        axes.plot(steps, thin(values), color=_colour(lane), label=lane, marker=marker)
    axes.set_xlabel("steps logged")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=4, fontsize="small")
    return _address(figure)


def timeline(spans: Sequence[tuple[str, float, float]]) -> str:
    """Operations of one step: (lane, begin, duration) in milliseconds from its start."""
    figure, axes = _figure(2.6)
    names = [lane for lane in LANES if any(span[0] == lane for span in spans)]
    for row, lane in enumerate(names):
        mine = sorted((s for s in spans if s[0] == lane), key=lambda s: -s[2])[: SPANS // len(names)]
        axes.broken_barh(
            [(begin, max(length, 0.01)) for _, begin, length in mine], (row - 0.35, 0.7), color=_colour(lane)
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return _address(figure)


def _colour(lane: str) -> Any:
    return COLOURS[LANES.index(lane)] if lane in LANES else "#57606a"
