"""A pre-study's plots, in the house style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from drivekd.study.lines import (
    INK,
    QUIET,
    STYLE,
    Array,
    Line,
    Panel,
    cycle,
    draw_panels,
    figure_of,
    save_png,
)
from drivekd.study.plots import Plot
from drivekd.study.prestudy.result import Curve, Prestudy

_KINDS = {
    "text_to_vision": "attention of text to vision",
    "full": "the whole attention map",
    "hidden": "hidden state of the text",
}
_BANDS = "Bands: 95 % of draws of pictures; none where there were too few."


def make_plots(study: Prestudy, *, prefix: str = "prestudy") -> list[Plot]:
    """Every plot that the study has data for.

    Args:
        study: What was measured.
        prefix: Of the plots' names, so that those of several teachers differ.
    """
    plots = [
        _lines(
            study,
            f"{prefix}_contrast",
            "What the records of a capability have in common, by layer",
            {
                title: {c.name: c.similarity[kind].beyond_words for c in study.capabilities}
                for kind, title in _KINDS.items()
            },
            "contrast",
            "Contrast at equal wording: how much of the difference between records goes away "
            "inside a capability. 0 (grey): as different as from others; 1: all the same.",
            zero=True,
        ),
        _lines(
            study,
            f"{prefix}_dispersion",
            "How far records of a capability scatter, by layer",
            {
                title: {c.name: c.similarity[kind].dispersion for c in study.capabilities}
                for kind, title in _KINDS.items()
            },
            "1 - cosine",
            "Mean 1 - cosine of a record to the mean of its capability.",
        ),
        _lines(
            study,
            f"{prefix}_alignment",
            "How hidden states change, by layer",
            {
                "input and output of a layer": {c.name: c.adjacent for c in study.capabilities},
                "mean vision and mean text token": {
                    c.name: c.vision_text for c in study.capabilities
                },
            },
            "cosine",
            "Above: mean over tokens. Below: between the mean hidden states behind the layer.",
        ),
        _lines(
            study,
            f"{prefix}_sinks",
            "Where the text's attention goes, by layer",
            {
                "of all its attention, to vision": {
                    c.name: c.vision_mass for c in study.capabilities
                },
                "of that, to the few tokens all rows share": {
                    c.name: c.sink_share for c in study.capabilities
                },
            },
            "share",
            "Text behind the picture. The few are one vision token in 64; even attention would "
            f"give them {np.mean([c.sink_floor for c in study.capabilities]):.1%}.",
        ),
        _margins(study, f"{prefix}_margin"),
    ]
    if study.capabilities[0].alignment:
        plots.append(_pairing(study, f"{prefix}_pairing"))
    return plots


def _lines(
    study: Prestudy,
    name: str,
    title: str,
    panels: Mapping[str, Mapping[str, Curve]],
    unit: str,
    caption: str,
    *,
    zero: bool = False,
) -> Plot:
    """One panel for each group of curves over layers."""
    layers = np.arange(study.num_layers, dtype=np.float64)
    with figure_of(len(panels), [1.9] * len(panels)) as (figure, axes):
        drawn: list[Panel] = []
        for axis, (heading, curves) in zip(axes, panels.items(), strict=True):
            axis.set_title(heading)
            axis.set_ylabel(unit)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            drawn.append((_with_bands(axis, curves, layers), {}))
            if zero:
                axis.axhline(0, color=QUIET, linewidth=0.9)
        draw_panels(axes, drawn)
        axes[-1].set_xlabel("layer of the teacher")
        png = save_png(figure)
    words = [
        f"{heading}: "
        + "; ".join(f"{label} {_most(curve, layers)}" for label, curve in curves.items())
        for heading, curves in panels.items()
    ]
    alt = f"Line chart of {unit} over {study.num_layers} layers. " + ". ".join(words) + "."
    return Plot(name, title, f"{caption} {_BANDS}", alt, png)


def _margins(study: Prestudy, name: str) -> Plot:
    curves = {c.name: c.margins.along for c in study.capabilities}
    curves |= {kind: margins.along for kind, margins in study.general.items()}
    means = [f"{c.name} {c.margins.mean.value[0]:.1f}" for c in study.capabilities]
    means += [f"{kind} {margins.mean.value[0]:.1f}" for kind, margins in study.general.items()]
    stretches = len(study.capabilities[0].margins.along.value)
    place = (np.arange(stretches) + 0.5) / stretches
    with figure_of(1, [2.4]) as (figure, axes):
        lines = _with_bands(axes[0], curves, place)
        axes[0].axhline(0, color=QUIET, linewidth=0.9)
        draw_panels(axes, [(lines, {})])
        axes[0].set_ylabel("margin, logits")
        axes[0].set_xlabel("place in the answer, from its first token to its last")
        png = save_png(figure)
    tau = study.settings["tau"]
    return Plot(
        name,
        "How sure the teacher is along the answer",
        f"Generalized margin of the right token at tau = {tau:g} (at 1 its log-odds); above 0 the "
        f"right token is likelier than all others together. {_BANDS}",
        f"Line chart of the margin along the answer. Means: {', '.join(means)}.",
        png,
    )


def _with_bands(axis: Any, curves: Mapping[str, Curve], x: Array) -> list[Line]:
    """Draw the bands; the lines that belong on them."""
    lines = []
    for number, (label, curve) in enumerate(curves.items(), 1):
        colour, dash = cycle(number)
        low, high = np.array(curve.low), np.array(curve.high)
        if np.isfinite(low).any():
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        lines.append(Line(label, colour, dash, x, np.array(curve.value)))
    return lines


def _most(curve: Curve, x: Array) -> str:
    """Where a curve is highest, in words."""
    values = np.array(curve.value)
    if not np.isfinite(values).any():
        return "not measurable"
    top = int(np.nanargmax(values))
    return f"highest {values[top]:.2g} at {x[top]:g}"


def _pairing(study: Prestudy, name: str) -> Plot:
    """Heat maps of student layers x teacher layers."""
    maps = {
        region: np.mean([np.array(c.alignment[region]) for c in study.capabilities], axis=0)
        for region in study.capabilities[0].alignment
    }
    rows, columns = next(iter(maps.values())).shape
    height = max(1.2, min(3.6, 4.2 * rows / columns)) + 0.65
    words = []
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(5.2, height * len(maps)), layout="constrained")
        axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
        for axis, (region, values) in zip(axes, maps.items(), strict=True):
            picture = axis.imshow(values, cmap="cividis", aspect="auto", interpolation="nearest")
            best = np.nanargmax(np.nan_to_num(values, nan=-2.0), axis=1)
            axis.plot(best, range(rows), "o", color="white", mec=INK, markersize=4)
            axis.set_title(_KINDS[region])
            axis.set_ylabel("layer of the student")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(picture, ax=axis, label="cosine")
            pairs = ", ".join(f"{s} to {t}" for s, t in enumerate(best))
            words.append(f"{_KINDS[region]}: student layer to closest teacher layer {pairs}")
        axes[-1].set_xlabel("layer of the teacher")
        png = save_png(figure)
    return Plot(
        name,
        "Which layers of student and teacher look alike",
        "Mean cosine of the rows of their head-mean maps, over all capabilities. Dots: the "
        "teacher's layer that is closest to a layer of the student.",
        f"Heat maps of {rows} student layers by {columns} teacher layers. {'; '.join(words)}.",
        png,
    )
