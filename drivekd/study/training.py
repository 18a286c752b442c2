"""The report of one training run, drawn from its log."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drivekd.errors import DataError
from drivekd.study.lines import (
    INK,
    Line,
    cycle,
    draw_lines,
    figure_of,
    save_png,
    use_log_scale,
)
from drivekd.study.page import page, plot_section
from drivekd.study.plots import Drawn, Plot
from drivekd.study.tables import NOT_MEASURED, Row, Table, to_html

LOG = "log.jsonl"
REPORT = "report.html"
_LAYER = re.compile(r"(.+)/layer_(\d+)")
# What is drawn; a row may hold anything else beside it.
_NUMBER = re.compile(
    r"loss|ce|eval_loss|projected|learning_rate|grad_norm|tokens_per_second|memory_gib|seconds_left"
    r"|.+/(loss|share|weight|coefficient|cosine_ce|conflict_ce|layer_\d+)|(cosine|conflict)/.+/.+"
)

Rows = Sequence[Mapping[str, Any]]


def write_training_report(run: Path, *, overlays: Drawn | None = None) -> Path:
    """Draw the log of a training run.

    Writes `report.html` into the run's folder: self-contained, pictures inlined, no scripts. Works
    while the run goes on, too.

    Args:
        run: folder with `log.jsonl`, the `training.output_dir` of a recipe.
        overlays: attention overlays and what is to be said about them; None leaves them out.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: the folder has no log.
        DataError: as `read_log`.
    """
    rows = read_log(run)
    plots = [_losses(rows)]
    plots += [plot for plot in (_layers(rows), _gradients(rows)) if plot is not None]
    if (tasks := _compared(rows)) is not None:
        plots.append(_conflicts(rows, tasks))
    plots.append(_speed(rows))
    note = f'<p class="note">Every number and curve here comes from {LOG} beside it.</p>\n'
    body = to_html(_summary(rows)) + plot_section(plots) + note
    if overlays is not None:
        body += plot_section(overlays.plots, heading="Attention", notes=overlays.notes, wide=True)
    path = run / REPORT
    path.write_text(page(f"Training run {run.resolve().name}", body), encoding="utf-8")
    return path


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, a last line that is still being written left out.

    Raises:
        FileNotFoundError: the folder has no log.
        DataError: the log has no row of training, or a line is no row: an object with a number as
            its `step`, whose values that are drawn are numbers or null.
    """
    file = run / LOG
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no {LOG}; give the training.output_dir of a run")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error
    lines = text.split("\n")  # what follows the last line's end is still being written, or nothing
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{file}, line {number} is not JSON: {error}") from error
        rows.append(_checked(row, f"{file}, line {number}"))
    if not any("loss" in row for row in rows):
        raise DataError(f"{file} has no row of training yet")
    return rows


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{where} is {_short(row)}, wanted an object such as {{"step": 1}}')
    if not _is_number(row.get("step")) or not math.isfinite(row["step"]):
        came = f"step {_short(row['step'])}" if "step" in row else "no step"
        raise DataError(f"{where} has {came}, wanted a finite number")
    for key, value in row.items():
        if value is not None and _NUMBER.fullmatch(key) and not _is_number(value):
            raise DataError(f"{where} has {key} {_short(value)}, wanted a number or null")
    return row


def _is_number(value: object) -> bool:
    """Whether it is one that a float holds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _signals(rows: Rows) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key.removesuffix("/loss") for key in keys if key.endswith("/loss")]


def _line(rows: Rows, key: str, label: str, number: int) -> Line:
    """The values of a key over steps; those that are not finite are gaps."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    x = np.array([step for step, _ in points], dtype=np.float64)
    y = np.array([np.nan if value is None else value for _, value in points], dtype=np.float64)
    return Line(label, *cycle(number), x, y)


def _draw(axis: Any, title: str, lines: Sequence[Line], *, log: bool = False) -> None:
    axis.set_title(title)
    lines = [line for line in lines if len(line.x)]
    if log and all((line.y[np.isfinite(line.y)] > 0).all() for line in lines):
        use_log_scale(axis)
    draw_lines(axis, lines, {})


def _losses(rows: Rows) -> Plot:
    names = _signals(rows)
    with figure_of(1 + len(names), [1.9] * (1 + len(names))) as (figure, axes):
        both = [_line(rows, "ce", "training", 0), _line(rows, "eval_loss", "evaluation", 1)]
        if not len(both[0].x):
            both[0] = _line(rows, "loss", "training", 0)
        _draw(axes[0], "cross-entropy", both, log=True)
        for number, (axis, name) in enumerate(zip(axes[1:], names, strict=True)):
            _draw(axis, name, [_line(rows, f"{name}/loss", name, number + 1)], log=True)
        axes[-1].set_xlabel("optimiser steps")
        png = save_png(figure)
    shown = ", ".join(["cross-entropy", *names])
    caption = "Unweighted means since the last row of the log."
    return Plot("losses", "Losses", caption, f"Line chart of {shown} against steps.", png)


def _layers(rows: Rows) -> Plot | None:
    found: dict[str, set[int]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if match := _LAYER.fullmatch(key):
            found.setdefault(match[1], set()).add(int(match[2]))
    if not found:
        return None
    with figure_of(len(found), [2.6] * len(found)) as (figure, axes):
        for axis, (name, layers) in zip(axes, found.items(), strict=True):
            last = [row for row in rows if f"{name}/layer_{min(layers)}" in row]
            first = {layer: last[0].get(f"{name}/layer_{layer}") for layer in layers}
            now = {layer: last[-1].get(f"{name}/layer_{layer}") for layer in layers}
            x = np.array(sorted(layers), dtype=np.float64)
            lines = []
            for number, (label, values) in enumerate(
                [(f"step {last[0]['step']}", first), (f"step {last[-1]['step']}", now)]
            ):
                y = [values[int(layer)] for layer in x]
                y = [np.nan if value is None else value for value in y]
                lines.append(Line(label, *cycle(number), x, np.array(y, dtype=np.float64)))
            _draw(axis, name, lines, log=True)
            axis.set_xlabel("student layer")
        png = save_png(figure)
    return Plot(
        "layers",
        "Losses by student layer",
        "The first and the last row of the log.",
        f"Line chart of the losses of {', '.join(found)} against student layers.",
        png,
    )


def _gradients(rows: Rows) -> Plot | None:
    names = [name for name in _signals(rows) if any(f"{name}/share" in row for row in rows)]
    if not names:
        return None
    panels = {
        "share": "gradient norm as a share of cross-entropy's",
        "cosine_ce": "cosine to cross-entropy's gradient",
        "conflict_ce": "how often it opposes cross-entropy's",
        "weight": "loss weight relative to cross-entropy's",
        "coefficient": "coefficient in the update, projection included",
    }
    with figure_of(len(panels) + 1, [1.9] * (len(panels) + 1)) as (figure, axes):
        for axis, (key, title) in zip(axes[:-1], panels.items(), strict=True):
            lines = [_line(rows, f"{n}/{key}", n, i + 1) for i, n in enumerate(names)]
            _draw(axis, title, lines, log=key in ("share", "weight"))
        _draw(axes[-1], "how often a projection fired", [_line(rows, "projected", "any", 0)])
        axes[-1].set_xlabel("optimiser steps")
        png = save_png(figure)
    return Plot(
        "gradients",
        "Gradients",
        "Each signal's gradient beside cross-entropy's. A share under about half a percent does "
        "nothing; a gradient that opposes cross-entropy's is projected by agp and stage1.",
        f"Line charts for {', '.join(names)}: {'; '.join(panels.values())}.",
        png,
    )


def _compared(rows: Rows) -> list[str] | None:
    names = [name for name in _signals(rows) if any(f"{name}/cosine_ce" in row for row in rows)]
    return ["ce", *names] if names else None


def conflict_matrix(rows: Rows, tasks: Sequence[str]) -> tuple[Any, Any]:
    """Mean cosines of the tasks' raw gradients, and how often they oppose each other.

    Returns:
        Two (K, K) arrays; NaN on the diagonal and for pairs that never met in a micro-batch.
    """
    means = np.full((2, len(tasks), len(tasks)), np.nan)
    for i, first in enumerate(tasks):
        for j, second in enumerate(tasks):
            for which, what in enumerate(("cosine", "conflict")):
                keys = [f"{what}/{first}/{second}", f"{what}/{second}/{first}"]
                if "ce" in (first, second):
                    keys = [f"{second if first == 'ce' else first}/{what}_ce"]
                values = [row[key] for row in rows for key in keys if row.get(key) is not None]
                if values and i != j:
                    means[which, i, j] = np.mean(values)
    return means[0], means[1]


def _conflicts(rows: Rows, tasks: Sequence[str]) -> Plot:
    cosines, often = conflict_matrix(rows, tasks)
    words = []
    with figure_of(1, [0.8 + 0.55 * len(tasks)]) as (figure, (axis,)):
        top = max(1e-3, float(np.abs(np.nan_to_num(cosines)).max()))
        axis.imshow(cosines, cmap="PuOr", vmin=-top, vmax=top)
        for i, j in np.argwhere(np.isfinite(cosines)):
            text = f"{cosines[i, j]:+.3f}\n{100 * often[i, j]:.0f} %"
            dark = abs(cosines[i, j]) > 0.6 * top
            axis.text(j, i, text, ha="center", va="center", color="white" if dark else INK)
            if i < j:
                words.append(f"{tasks[i]} and {tasks[j]} {text.replace(chr(10), ', ')}")
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.grid(visible=False)
        png = save_png(figure)
    return Plot(
        "conflicts",
        "Conflicts",
        "Mean cosine of two tasks' raw gradients over the rows of the log, and in how many of the "
        "micro-batches they oppose each other.",
        f"Matrix: {'; '.join(words)}.",
        png,
    )


def _speed(rows: Rows) -> Plot:
    panels = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_second": "tokens a second",
        "memory_gib": "peak memory, GiB",
    }
    known = {key: title for key, title in panels.items() if any(key in row for row in rows)}
    known = known or {"loss": "loss"}
    with figure_of(len(known), [1.6] * len(known)) as (figure, axes):
        for axis, (key, title) in zip(axes, known.items(), strict=True):
            _draw(axis, title, [_line(rows, key, title, 0)])
        axes[-1].set_xlabel("optimiser steps")
        png = save_png(figure)
    words = f"Line charts of {', '.join(known.values())} against steps."
    return Plot("speed", "Optimiser and speed", "One point a row of the log.", words, png)


def _summary(rows: Rows) -> Table:
    training = [row for row in rows if "loss" in row]
    keys = ["loss", "eval_loss", *(f"{name}/loss" for name in _signals(rows))]
    lines = []
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            cells = tuple(f"{value:.4g}" for value in (values[0], values[-1], min(values)))
            lines.append(Row(key, cells, "arm"))
    last = training[-1]
    left = last.get("seconds_left")
    notes = [f"{last['step']:,} steps."]
    if left is not None:
        notes.append(f"About {left / 60:.0f} minutes were left then." if left else "It has ended.")
    if not lines:
        lines.append(Row("loss", (NOT_MEASURED,) * 3, "arm"))
    return Table("Losses", ("", "first", "last", "lowest"), tuple(lines), tuple(notes))
