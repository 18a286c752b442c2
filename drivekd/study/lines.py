"""Lines with names at their ends, in the house style of the project's figures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Array = npt.NDArray[np.float64]

INK, QUIET, HAIR = "#222222", "#6b6b6b", "#dddddd"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))  # by times round
LEVEL = {"color": QUIET, "linewidth": 1.1, "linestyle": (0, (4, 2))}  # a horizontal line
WIDTH = 5.2  # inches
DOTS_PER_INCH = 160
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": HAIR,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Line:
    """A named line with its single seeds behind it."""

    label: str
    colour: str
    dash: Any
    x: Array
    y: Array
    seeds: tuple[tuple[Array, Array], ...] = ()


Panel = tuple[Sequence[Line], Mapping[str, float]]  # lines, and levels by name


def save_png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def figure_of(rows: int, heights: Sequence[float], *, width: float = WIDTH) -> Iterator[Any]:
    """A figure in the house style with one column of axes: yields (figure, [axes])."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, height_ratios=list(heights))[:, 0]
        yield figure, list(axes)


class _PlainLocator(LogLocator):
    """Ticks at 1, 2 and 5 times powers of ten; over many decades at the powers alone."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        self.set_params(subs=(1.0, 2.0, 5.0) if vmax < 50 * vmin else (1.0,))
        return super().tick_values(vmin, vmax)


def use_log_scale(axis: Any) -> None:
    """A logarithmic vertical axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(_PlainLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def cycle(number: int) -> tuple[str, Any]:
    """Colour and dash pattern of the n-th line; ink is the first line's alone."""
    if number == 0:
        return INK, DASHES[0]
    times, which = divmod(number - 1, len(COLOURS))
    return COLOURS[which], DASHES[times % len(DASHES)]


def mean_line(
    label: str, colour: str, dash: Any, seeds: Sequence[Mapping[int, Array]], *, smooth: int = 0
) -> Line:
    """The mean of the seeds' points (x, y) over the steps that all of them have.

    With `smooth`, each y is a trailing mean over that fraction (1 / smooth) of the points.
    """
    present = [seed for seed in seeds if seed]
    steps = sorted(set.intersection(*(set(seed) for seed in present))) if present else []
    if not steps:
        return Line(label, colour, dash, np.empty(0), np.empty(0))
    window = max(1, len(steps) // smooth) if smooth else 1
    curves = [
        (np.array([seed[s][0] for s in steps]), _trailing([seed[s][1] for s in steps], window))
        for seed in present
    ]
    x = np.mean([x for x, _ in curves], axis=0)
    y = np.mean([y for _, y in curves], axis=0)
    return Line(label, colour, dash, x, y, tuple(curves) if len(curves) > 1 else ())


def _trailing(values: Sequence[float], window: int) -> Array:
    """Mean of the last `window` finite values up to each point, NaN where there is none."""
    y = np.asarray(values, dtype=np.float64)
    known = np.isfinite(y)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, y, 0.0), kernel)[: len(y)]
    count = np.convolve(known.astype(np.float64), kernel)[: len(y)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw_lines(axis: Any, lines: Sequence[Line], levels: Mapping[str, float]) -> None:
    """Lines over their seeds, dashed levels, and all their names at the right edge."""
    _label_ends(axis, _draw(axis, lines, levels))


def draw_panels(axes: Sequence[Any], panels: Sequence[Panel], *, log: bool = False) -> None:
    """Lines and levels of each panel, named at the right edges or, if too many, in one legend.

    With `log`, panels of which all values are positive have a logarithmic vertical axis.
    """
    ends = []
    for axis, (lines, levels) in zip(axes, panels, strict=True):
        if log and all((line.y[np.isfinite(line.y)] > 0).all() for line in lines):
            use_log_scale(axis)
        ends.append(_draw(axis, lines, levels))
    if all(sum(_label_sizes(axis, each)[1]) <= 1 for axis, each in zip(axes, ends, strict=True)):
        for axis, each in zip(axes, ends, strict=True):
            _label_ends(axis, each)
        return
    names: dict[str, dict[str, Any]] = {}
    for lines, levels in panels:
        names |= {line.label: {"color": line.colour, "linestyle": line.dash} for line in lines}
        names |= dict.fromkeys(levels, LEVEL)
    axes[0].figure.legend(
        handles=[Line2D([], [], label=name, **style) for name, style in names.items()],
        loc="outside upper left", ncols=2, frameon=False, fontsize=8, handlelength=3.2,
    )  # fmt: skip


def _draw(
    axis: Any, lines: Sequence[Line], levels: Mapping[str, float]
) -> list[tuple[str, str, float, float]]:
    """The lines and levels; where they end: label, colour, x, y."""
    for line in lines:
        for x, y in line.seeds:
            axis.plot(x, y, color=line.colour, linewidth=0.6, alpha=0.35)
        single = "o" if len(line.x) == 1 else None
        axis.plot(line.x, line.y, color=line.colour, linestyle=line.dash, marker=single)
    for value in levels.values():
        axis.axhline(value, **LEVEL)
    axis.margins(x=0)
    ends = []
    for line in lines:
        finite = np.flatnonzero(np.isfinite(line.y))
        if len(finite):
            last = finite[-1]
            ends.append((line.label, line.colour, float(line.x[last]), float(line.y[last])))
    right = axis.get_xlim()[1]
    return ends + [(name, QUIET, right, value) for name, value in levels.items()]


def _label_sizes(
    axis: Any, ends: Sequence[tuple[str, str, float, float]]
) -> tuple[list[str], list[float]]:
    """Labels in lines that fit beside the axes, and their heights in units of the axes'."""
    height = axis.figure.get_size_inches()[1] / len(axis.figure.axes) - 0.6
    wrapped = [textwrap.fill(label, 20) for label, *_ in ends]
    return wrapped, [0.135 / height * (text.count("\n") + 1.25) for text in wrapped]


def _label_ends(axis: Any, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Write (label, colour, x, y) beside the axes, apart from each other, with leader lines."""
    axis.autoscale_view()
    to_axes = axis.transData + axis.transAxes.inverted()
    wrapped, sizes = _label_sizes(axis, ends)
    wanted = [float(to_axes.transform((x, y))[1]) for _, _, x, y in ends]
    outside = {"transform": axis.transAxes, "clip_on": False}
    for i, centre in _spread(wanted, sizes):
        _, colour, x, y = ends[i]
        x_end, y_end = to_axes.transform((x, y))
        axis.plot(
            [x_end, 1.02], [y_end, centre], color=colour, linewidth=0.7, linestyle=":", **outside
        )
        axis.plot([1.02, 1.06], [centre, centre], color=colour, **outside)
        axis.text(1.075, centre, wrapped[i], va="center", fontsize=8, transform=axis.transAxes)


def _spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[tuple[int, float]]:
    """Centres in 0..1 close to the wanted ones such that intervals of those sizes do not overlap.

    Neighbours that overlap are merged into blocks, each put at its members' mean displacement.
    What does not fit grows over the top.
    """

    def bottom_of(members: list[int]) -> float:
        below = np.cumsum([0.0, *(sizes[j] for j in members)])
        edges = [wanted[j] - sizes[j] / 2 - b for j, b in zip(members, below[:-1], strict=True)]
        return max(0.0, min(float(np.mean(edges)), 1.0 - float(below[-1])))

    blocks: list[tuple[list[int], float]] = []  # (members from the bottom up, bottom edge)
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        members = [i]
        bottom = bottom_of(members)
        while blocks and blocks[-1][1] + sum(sizes[j] for j in blocks[-1][0]) > bottom:
            members = blocks.pop()[0] + members
            bottom = bottom_of(members)
        blocks.append((members, bottom))
    placed = []
    for members, bottom in blocks:
        edge = bottom
        for j in members:
            placed.append((j, edge + sizes[j] / 2))
            edge += sizes[j]
    return placed
