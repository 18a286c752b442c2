"""Attention overlays: where teacher and student look on a frame, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from drivekd.study.lines import STYLE, save_png

_COLUMN = 2.9  # inches


@dataclass(frozen=True)
class Overlay:
    """One row of the figure.

    Attributes:
        image: (H, W, 3) uint8, or floats in 0..1.
        teacher: (rows, columns) attention per patch, finite, not negative; patches tile the image.
        student: the same for the student, on the same grid.
        title: what the row shows, such as the question and its answer.
    """

    image: npt.NDArray[Any]
    teacher: npt.NDArray[np.floating[Any]]
    student: npt.NDArray[np.floating[Any]]
    title: str


def plot_overlays(overlays: Sequence[Overlay], *, title: str = "") -> bytes:
    """Draw frames with the teacher's map, the student's map, and student minus teacher.

    Teacher and student share one colour scale, from 0 to the largest value of all rows; the
    difference has a diverging scale, symmetric about 0. Maps are drawn patch by patch, without
    smoothing, on a pale grey version of the frame: where a map is 0 the frame shows through.

    Args:
        overlays: the rows, at least one. Maps keep their values: normalise before, if at all.
        title: heading of the figure.

    Returns:
        The figure as PNG.

    Raises:
        ValueError: no rows, a wrong shape, values that are not finite or below 0, or float pixels
            outside 0..1; the message names the row.
    """
    if not overlays:
        raise ValueError("overlays is empty; give at least one row")
    for row, overlay in enumerate(overlays):
        _check(overlay, f"overlays[{row}]")
    top = max(float(max(o.teacher.max(), o.student.max())) for o in overlays) or 1.0
    apart = max(float(np.abs(o.student - o.teacher).max()) for o in overlays) or 1.0
    scales = {
        "teacher": ScalarMappable(Normalize(0, top), "YlOrRd"),
        "student": ScalarMappable(Normalize(0, top), "YlOrRd"),
        "student − teacher": ScalarMappable(Normalize(-apart, apart), "PuOr_r"),  # noqa: RUF001
    }
    heights = [_COLUMN * o.image.shape[0] / o.image.shape[1] + 0.3 for o in overlays]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        size = (_COLUMN * 4 + 0.3, sum(heights) + 0.75)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(overlays), 4, squeeze=False, height_ratios=heights)
        for row, overlay in enumerate(overlays):
            maps = (overlay.teacher, overlay.student, overlay.student - overlay.teacher)
            _draw_frame(grid[row, 0], overlay)
            for axis, values, scale in zip(grid[row, 1:], maps, scales.values(), strict=True):
                _draw_map(axis, overlay.image, values, scale)
        for axis, name in zip(grid[-1], ["frame", *scales], strict=True):
            axis.set_xlabel(name)
        _colour_bar(figure, scales["teacher"], grid[:, 1:3], "attention per patch")
        _colour_bar(figure, scales["student − teacher"], grid[:, 3], "difference")  # noqa: RUF001
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        return save_png(figure)


def _check(overlay: Overlay, where: str) -> None:
    image = overlay.image
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{where}.image has shape {image.shape}; wanted (H, W, 3)")
    if image.dtype != np.uint8 and not (
        np.issubdtype(image.dtype, np.floating) and ((image >= 0) & (image <= 1)).all()
    ):
        raise ValueError(f"{where}.image must be uint8, or floating with values in 0..1")
    for name, values in (("teacher", overlay.teacher), ("student", overlay.student)):
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"{where}.{name} has shape {values.shape}; wanted (rows, columns)")
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{where}.{name} must be finite and not negative")
    if overlay.teacher.shape != overlay.student.shape:
        raise ValueError(
            f"{where}: teacher has a grid of {overlay.teacher.shape}, student of "
            f"{overlay.student.shape}; both must look at the same patches"
        )


def _draw_frame(axis: Any, overlay: Overlay) -> None:
    """The frame itself, with the row's title over it."""
    axis.imshow(overlay.image, interpolation="nearest")
    axis.set_title(" ")  # keeps the row's pictures at one height
    axis.annotate(
        overlay.title,
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        annotation_clip=False,
    ).set_in_layout(False)  # as wide as the figure, not as the frame
    _bare(axis)


def _draw_map(axis: Any, image: npt.NDArray[Any], values: Any, scale: ScalarMappable) -> None:
    """The map's colours, patch by patch, multiplied with a pale grey version of the frame."""
    height, width = image.shape[:2]
    rows, columns = values.shape
    per_pixel = values[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    pixels = image / 255 if image.dtype == np.uint8 else image
    grey = pixels @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    span = float(np.ptp(grey))
    pale = 0.7 + 0.3 * (grey - grey.min()) / span if span else np.ones_like(grey)
    colours = scale.to_rgba(per_pixel)[:, :, :3]
    axis.imshow(colours * pale[:, :, None], interpolation="nearest")
    axis.set_title(" ")  # keeps the row's pictures at one height
    _bare(axis)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _colour_bar(figure: Any, scale: ScalarMappable, axes: Any, label: str) -> None:
    bar = figure.colorbar(
        scale, ax=axes, location="bottom", label=label, aspect=40, shrink=0.7, pad=0.02
    )
    bar.outline.set_visible(False)
