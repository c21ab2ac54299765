"""The report's figures as SVG, each in two widths: nothing to load, and text that stays readable on a phone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from offload.tables import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 300  # a curve of more steps is averaged down to this many points
GAP = 1 / 400  # of a timeline's width: a shorter pause between two operations of a lane is not drawn
LANES = ("compute", "h2d", "d2h", "nvme_read", "nvme_write", "optimizer")
COLOURS = ("#1f6feb", "#2da44e", "#8250df", "#bf8700", "#cf222e", "#0b7a75", "#8c959f")
# What memory is used for, from the bottom of a stack to its top.
GROUPS = {
    "program": "#d0d7de",
    "weights": "#1f6feb",
    "optimizer state": "#8250df",
    "gradients": "#bf8700",
    "buffers": "#0b7a75",
    "activations": "#2da44e",
    "framework": "#cf222e",
}
GIB = 2**30
OVER = "#b42318"  # the budget's line
# Text is drawn by the browser: one family that every one has, for layout the widest of those it may mean.
_STYLE: Any = {  # matplotlib's type for it is a list of all its keys
    "svg.fonttype": "none", "svg.hashsalt": "offload", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
}  # fmt: skip

Picture = dict[str, str]  # {"wide": address, "narrow": address}


def _pictures(height: float, draw: Callable[[Axes], None]) -> Picture:
    """The figure 9 inches wide, and 4.2 for narrow screens; `draw` fills the axes."""
    return {"wide": _render(9.0, height, draw), "narrow": _render(4.2, height + 1.0, draw)}


def _render(width: float, height: float, draw: Callable[[Axes], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    return _address(figure)


def _address(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    for pattern, instead in _SHORTER:
        svg = re.sub(pattern, instead, svg)
    # No double quote is left in it: it may stand in an attribute as it is.
    quoted = quote(svg, safe=" =/,;.()!*:<>'")
    return "data:image/svg+xml," + quoted.replace("http:", "http%3A")  # names of namespaces: nothing is fetched


def _rounded(tag: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), tag[0])


# What a picture of the same looks does without: half of its size. Coordinates are points, of which a tenth is enough.
_SHORTER: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r'<metadata>.*?</metadata>', ""),
    (r"'DejaVu Sans', ", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"<[^>]*>", _rounded),
    (r"\s+", " "),
    (r" ?([<>]) ?", r"\1"),
    (r'<g id="[^"#]*">', "<g>"),
    (r'"', "'"),
]


def _legend_below(axes: Axes) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    columns = 4 if width > 6 else 2
    place = (-0.02, -0.75 / height)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=place, ncols=columns, borderaxespad=0)


def thin(values: Sequence[float]) -> list[float]:
    """`values` averaged in equal groups, at most `POINTS` of them."""
    group = -(-len(values) // POINTS) or 1
    return [sum(values[i : i + group]) / len(values[i : i + group]) for i in range(0, len(values), group)]


def loss(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], evals: Sequence[tuple[int, float]]) -> Picture:
    """The loss by step of each named run, evaluations as points."""

    def draw(axes: Axes) -> None:
        for (name, (steps, losses)), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(thin(steps), thin(losses), color=colour, label=name, marker="." if len(steps) < 3 else None)
        if evals:
            at, values = zip(*evals, strict=True)
            axes.plot(thin(at), thin(values), "o", color=COLOURS[4], label="eval")
        if evals or len(curves) > 1:
            axes.legend(frameon=False, fontsize="small")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3)

    return _pictures(2.8, draw)


def memory(at: Sequence[float], stack: Mapping[str, Sequence[float]], lines: Mapping[str, int]) -> Picture:
    """Bytes over one step, stacked by what they are for, with horizontal lines (planned peak, budget); `at` in seconds.

    A line that is far above everything else is named in the legend instead of drawn.
    """
    sums = [sum(values) for values in zip(*stack.values(), strict=True)]
    height = max(sums, default=0)
    scale, unit = (GIB, "GiB") if height >= GIB else (2**20, "MiB")

    def draw(axes: Axes) -> None:
        names = [name for name in GROUPS if name in stack]
        rows = [[value / scale for value in stack[name]] for name in names]
        axes.stackplot(at, *rows, labels=names, colors=[GROUPS[name] for name in names], alpha=0.85)
        for (name, value), (colour, style) in zip(lines.items(), (("black", "--"), (OVER, "-")), strict=False):
            look: Any = {"color": colour, "linestyle": style, "linewidth": 1.5, "zorder": 3 if style == "--" else 2}
            if value <= 2.5 * height or height == 0:
                axes.axhline(value / scale, label=f"{name} {size(value)}", **look)
            else:
                axes.plot([], [], label=f"{name} {size(value)}, above", **look)
        if height:
            highest = sums.index(height) if min(sums) < height else len(sums) // 2
            axes.plot(at[highest], height / scale, "kv", markersize=4, label=f"peak {size(height)}")
        axes.set_xlabel("seconds of the step")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        _legend_below(axes)

    return _pictures(3.4, draw)


def lanes(busy: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> Picture:
    """Busy seconds of each lane by step, under the duration of the step."""

    def draw(axes: Axes) -> None:
        steps = thin([float(i + 1) for i in range(len(seconds))])
        marker = "." if len(steps) < 3 else None
        axes.plot(steps, thin(seconds), color="black", linewidth=2, label="step", marker=marker)
        for lane, values in busy.items():
            axes.plot(steps, thin(values), color=_colour(lane), label=lane, marker=marker)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("steps logged")
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        _legend_below(axes)

    return _pictures(3.2, draw)


def timeline(spans: Sequence[tuple[str, float, float]]) -> Picture:
    """Operations of one step: (lane, begin, duration) in milliseconds from its start. Rows that are no lanes come
    last, in grey."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    rows = dict.fromkeys(span[0] for span in spans)
    names = [*(lane for lane in LANES if lane in rows), *(row for row in rows if row not in LANES)]
    end = max(begin + length for _, begin, length in spans)

    def draw(axes: Axes) -> None:
        for row, lane in enumerate(names):
            mine = [(begin, begin + length) for of, begin, length in spans if of == lane]
            bars = [
                Path.unit_rectangle().transformed(Affine2D().scale(right - left, 0.7).translate(left, row - 0.35))
                for left, right in joined(mine, GAP * end)
            ]
            axes.add_patch(PathPatch(Path.make_compound_path(*bars), color=_colour(lane), linewidth=0.5))
        axes.set_xlim(0, end)
        axes.set_ylim(-0.5, len(names) - 0.5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("ms")

    return _pictures(1.0 + 0.26 * len(names), draw)


def joined(intervals: Sequence[tuple[float, float]], gap: float = 0.0) -> list[list[float]]:
    """The union of intervals, pauses up to `gap` closed, in order."""
    found: list[list[float]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1] + gap:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return found


def units(
    names: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, str]
) -> Picture:
    """A map: one column a unit, one row a role (or what happens to activations), coloured by what was decided: each
    decision takes its share of the row's height, in the order of `colours`."""

    def draw(axes: Axes) -> None:
        for y, decided in enumerate(rows.values()):
            begin = 0
            for x in range(1, len(decided) + 1):
                if x == len(decided) or decided[x] != decided[begin]:
                    top = y - 0.4
                    for name in (n for n in colours if n in decided[begin]):
                        height = 0.8 * decided[begin][name]
                        axes.broken_barh([(begin, x - begin)], (top, height), color=colours[name])
                        top += height
                    begin = x
        used = [name for name in colours if any(name in unit for decided in rows.values() for unit in decided)]
        for name in used:
            axes.plot([], [], "s", color=colours[name], label=name)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlim(0, len(names))
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(f"units, from {names[0]} to {names[-1]}")
        _legend_below(axes)

    return _pictures(1.2 + 0.3 * len(rows), draw)


def _colour(lane: str) -> Any:
    return COLOURS[LANES.index(lane)] if lane in LANES else COLOURS[-1]
