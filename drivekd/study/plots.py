"""A study's plots, as PNG bytes with a caption and an alternative text each.

One column of panels a figure, so that a phone can show it; lines are labelled at their ends;
colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb

from drivekd.study.lines import (
    INK,
    QUIET,
    Array,
    Line,
    Panel,
    cycle,
    draw_lines,
    draw_panels,
    figure_of,
    mean_line,
    save_png,
    use_log_scale,
)
from drivekd.study.schema import Arm, Run, Signal, Study
from drivekd.study.statistics import mean_over_seeds
from drivekd.study.tables import by_capability


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: file name without its ending.
        title: heading.
        caption: what is drawn, and how to read it.
        alt: what it shows, in words and numbers, for readers who do not see it.
        png: the picture.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Drawn:
    """Plots of which some may be missing.

    Attributes:
        plots: What could be drawn.
        notes: What could not be, and why, as sentences.
    """

    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()


def make_plots(study: Study) -> list[Plot]:
    """Every plot that the study has data for, in the order of the report."""
    plots = [_accuracy_bars(study)]
    if any(run.learning_curve for run in study.runs):
        plots.append(_learning_curves(study, against="steps"))
        plots.append(_learning_curves(study, against="CPU seconds"))
    if any(run.loss_curve for run in study.runs):
        plots.append(_loss_curves(study))
    for arm in study.arms:
        if any(run.projection_log for run in study.runs_of(arm.name)):
            plots.append(_projection(study, arm))
    return plots


def _accuracy_bars(study: Study) -> Plot:
    """Final accuracies with errors, one panel a capability."""
    count = len(study.arms)
    blank = any(run.blank for run in study.runs)
    labels = [textwrap.fill(arm.label, 26) for arm in study.arms]
    lines = sum(label.count("\n") + 1 for label in labels)
    height = 0.75 + 0.17 * (lines + count)
    with figure_of(len(study.capabilities), [height] * len(study.capabilities)) as (figure, axes):
        for i, (axis, capability) in enumerate(zip(axes, study.capabilities, strict=True)):
            axis.set_title(capability)
            for row, arm in enumerate(study.arms):
                _bar(study, axis, arm, row, i)
            for baseline in study.baselines:
                value = 100 * by_capability(study, baseline.accuracy)[i].accuracy
                axis.axvline(value, color=QUIET, linewidth=1.1, linestyle=(0, (4, 2)))
                axis.annotate(
                    f"{baseline.name} {value:.1f}",
                    (value, 1),
                    (3, -1),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    color=QUIET,
                    fontsize=8,
                    va="bottom",
                )
            axis.set_yticks(range(count), labels)
            axis.set_ylim(count - 0.45, -0.55)
            axis.set_xlim(0, 100)
            axis.tick_params(axis="y", length=0)
            axis.grid(visible=False, axis="y")
            axis.spines["left"].set_visible(False)
        axes[-1].set_xlabel("accuracy on the test set, %" + (" (◇ image blanked)" if blank else ""))
        png = save_png(figure)
    return Plot(
        "accuracy",
        "Final accuracy",
        "Bars: mean over seeds, with its standard error (one seed: the binomial one). Dots: single "
        "seeds. Open diamonds: the same models with blanked images. Dashed: baselines.",
        "Bar chart of test accuracy. " + _accuracy_words(study),
        png,
    )


def _bar(study: Study, axis: Any, arm: Arm, row: int, capability: int) -> None:
    """One arm's bar, error, seeds, blank-image diamond and number."""
    runs = study.runs_of(arm.name)
    tallies = {run.seed: [by_capability(study, run.accuracy)[capability]] for run in runs}
    estimate = mean_over_seeds(tallies)
    mean, error = 100 * estimate.mean, 100 * estimate.standard_error
    pale = 0.7 * np.array(to_rgb(_colour(study, arm)[0])) + 0.3
    axis.barh(row, mean, height=0.62, color=pale, linewidth=0)
    axis.errorbar(mean, row, xerr=error, color=INK, elinewidth=1.2, capsize=2.5)
    if len(runs) > 1:
        values = [100 * tally.accuracy for (tally,) in tallies.values()]
        axis.plot(values, [row + 0.2] * len(values), "o", color=INK, markersize=2.2)
    blank = [by_capability(study, run.blank)[capability].accuracy for run in runs if run.blank]
    if blank:
        axis.plot(
            100 * np.mean(blank), row, "D", mfc="white", mec=INK, markersize=4.5, markeredgewidth=1
        )
    axis.annotate(
        f"{mean:.1f} ± {error:.1f}",
        (1.02, row),
        xycoords=("axes fraction", "data"),
        va="center",
        annotation_clip=False,
    )


def _learning_curves(study: Study, *, against: str) -> Plot:
    """Validation accuracy per capability against steps or processor time."""
    by_time = against == "CPU seconds"
    with figure_of(len(study.capabilities), [2.3] * len(study.capabilities)) as (figure, axes):
        panels = []
        for i, (axis, capability) in enumerate(zip(axes, study.capabilities, strict=True)):
            axis.set_title(capability)

            def points(run: Run, capability: str = capability) -> Iterator[tuple[int, Array]]:
                for p in run.learning_curve:
                    if capability in p.accuracy:
                        x = p.cpu_seconds if by_time else p.step
                        yield p.step, np.array([x, 100 * p.accuracy[capability]])

            lines = _arm_lines(study, points)
            levels = {
                b.name: 100 * by_capability(study, b.accuracy)[i].accuracy for b in study.baselines
            }
            panels.append((lines, levels))
            axis.set_ylabel("accuracy, %")
        draw_panels(axes, panels)
        axes[-1].set_xlabel("CPU seconds of training" if by_time else "optimiser steps")
        png = save_png(figure)
    return Plot(
        "learning_cpu" if by_time else "learning_steps",
        f"Learning curves against {against}",
        "Accuracy on the validation set. Thick: mean over seeds; thin: single seeds. Dashed grey: "
        "baselines on the test set.",
        f"Line chart of validation accuracy against {against}. Last points: " + _last_words(study),
        png,
    )


def _loss_curves(study: Study) -> Plot:
    """Training losses, one panel a loss."""
    names = dict.fromkeys(n for r in study.runs for p in r.loss_curve for n in p.values)
    with figure_of(len(names), [1.9] * len(names)) as (figure, axes):
        panels: list[Panel] = []
        for axis, name in zip(axes, names, strict=True):
            axis.set_title(name)

            def points(run: Run, name: str = name) -> Iterator[tuple[int, Array]]:
                for p in run.loss_curve:
                    if name in p.values:
                        yield p.step, np.array([p.step, p.values[name]])

            panels.append((_arm_lines(study, points, smooth=20), {}))
            axis.set_ylabel("loss, unweighted")
        draw_panels(axes, panels, log=True)
        axes[-1].set_xlabel("optimiser steps")
        png = save_png(figure)
    return Plot(
        "losses",
        "Training losses",
        "Unweighted, smoothed by a trailing mean over a twentieth of the run. Thick: mean over "
        "seeds; thin: single seeds.",
        f"Line chart of the training losses {', '.join(names)} against optimiser steps.",
        png,
    )


def _projection(study: Study, arm: Arm) -> Plot:
    """How the distillation gradients of an arm stand to cross-entropy's."""
    runs = study.runs_of(arm.name)
    names = list(dict.fromkeys(n for r in runs for p in r.projection_log for n in p.signals))
    readers: dict[str, Callable[[Signal], float]] = {
        "gradient norm as a share of cross-entropy's, %": lambda s: 100 * s.share,
        "cosine to cross-entropy's gradient": lambda s: s.cosine,
        "steps in conflict (negative cosine), %": lambda s: 100 * s.conflict,
    }
    means = []
    with figure_of(len(readers), [1.9] * len(readers)) as (figure, axes):
        for axis, (title, read) in zip(axes, readers.items(), strict=True):
            axis.set_title(title)
            lines = []
            for number, name in enumerate(names):
                seeds = [
                    {
                        p.step: np.array([p.step, read(p.signals[name])])
                        for p in run.projection_log
                        if name in p.signals
                    }
                    for run in runs
                ]
                colour, dash = cycle(number + 1)
                line = mean_line(name, colour, dash, seeds, smooth=10)
                lines.append(replace(line, seeds=()) if axis is axes[2] else line)
                values = [y for points in seeds for _, y in points.values() if np.isfinite(y)]
                if values:
                    means.append(f"{title}, {name}: mean {np.mean(values):.2g}")
            if axis is axes[0] and all((line.y[np.isfinite(line.y)] > 0).all() for line in lines):
                use_log_scale(axis)
            draw_lines(axis, lines, {})
        axes[1].axhline(0, color=QUIET, linewidth=0.9)
        axes[2].set_ylim(-4, 104)
        axes[-1].set_xlabel("optimiser steps")
        png = save_png(figure)
    return Plot(
        f"gradients_{arm.name}",
        f"Gradients of {arm.label}",
        "Each distillation loss' gradient beside cross-entropy's, smoothed by a trailing mean over "
        "a tenth of the run. A share under about half a percent does nothing.",
        "Line chart. " + "; ".join(means) + ".",
        png,
    )


def _colour(study: Study, arm: Arm) -> tuple[str, Any]:
    """The reference arm is ink; the others take the colours in their order."""
    others = [each.name for each in study.arms if each.name != study.reference]
    return cycle(0 if arm.name == study.reference else 1 + others.index(arm.name))


def _arm_lines(
    study: Study, points: Callable[[Run], Iterable[tuple[int, Array]]], *, smooth: int = 0
) -> list[Line]:
    """One line an arm, for arms that have points."""
    lines = []
    for arm in study.arms:
        seeds = [dict(points(run)) for run in study.runs_of(arm.name)]
        if any(seeds):
            lines.append(mean_line(arm.label, *_colour(study, arm), seeds, smooth=smooth))
    return lines


def _accuracy_words(study: Study) -> str:
    """Final accuracies as a sentence a capability."""
    sentences = []
    for i, capability in enumerate(study.capabilities):
        parts = []
        for arm in study.arms:
            runs = study.runs_of(arm.name)
            estimate = mean_over_seeds(
                {r.seed: [by_capability(study, r.accuracy)[i]] for r in runs}
            )
            parts.append(f"{arm.label} {100 * estimate.mean:.1f} %")
        for baseline in study.baselines:
            value = 100 * by_capability(study, baseline.accuracy)[i].accuracy
            parts.append(f"{baseline.name} {value:.1f} %")
        sentences.append(f"{capability}: {', '.join(parts)}.")
    return " ".join(sentences)


def _last_words(study: Study) -> str:
    """Each arm's last validation accuracies, mean over seeds."""
    parts = []
    for arm in study.arms:
        last = [run.learning_curve[-1] for run in study.runs_of(arm.name) if run.learning_curve]
        values = [
            f"{c} {100 * np.mean([p.accuracy[c] for p in last]):.1f} %"
            for c in study.capabilities
            if last and all(c in p.accuracy for p in last)
        ]
        if values:
            parts.append(f"{arm.label}: {', '.join(values)}")
    return "; ".join(parts) + "."
