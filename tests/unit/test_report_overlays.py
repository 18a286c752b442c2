"""Attention overlays: one picture, shared scales, the map's own values, refusals."""

import io
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from drivekd.study import overlays
from drivekd.study.overlays import Overlay, plot_overlays


def make_overlay(seed=0, *, size=(24, 60), grid=(3, 5)):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return Overlay(image, rng.gamma(0.5, 0.1, grid), rng.gamma(0.5, 0.1, grid), f"frame {seed}")


@pytest.fixture
def drawn(monkeypatch):
    """(values, scale) of every map that is drawn."""
    seen = []
    original = overlays._draw_map

    def spy(axis, image, values, scale):
        seen.append((values, scale))
        original(axis, image, values, scale)

    monkeypatch.setattr(overlays, "_draw_map", spy)
    return seen


def test_gives_one_png_that_grows_with_the_rows():
    one = Image.open(io.BytesIO(plot_overlays([make_overlay()])))
    three = Image.open(io.BytesIO(plot_overlays([make_overlay(i) for i in range(3)], title="t")))
    assert one.format == three.format == "PNG"
    assert one.width == three.width
    assert three.height > 1.5 * one.height


def test_teacher_and_student_of_all_rows_share_one_scale_and_the_difference_is_symmetric(drawn):
    rows = [make_overlay(i) for i in range(2)]
    plot_overlays(rows)
    top = max(max(r.teacher.max(), r.student.max()) for r in rows)
    apart = max(abs(r.student - r.teacher).max() for r in rows)
    limits = [(scale.norm.vmin, scale.norm.vmax) for _, scale in drawn]
    assert limits == [(0, top), (0, top), (-apart, apart)] * 2
    assert drawn[0][1].cmap.name == drawn[1][1].cmap.name != drawn[2][1].cmap.name
    np.testing.assert_array_equal(drawn[5][0], rows[1].student - rows[1].teacher)


def test_a_patch_is_drawn_at_its_place(monkeypatch):
    pictures = []

    class Axis:
        spines: ClassVar = {}

        def imshow(self, picture, **_):
            pictures.append(picture)

        def __getattr__(self, name):
            return lambda *_: None

    scale = overlays.ScalarMappable(overlays.Normalize(0, 1), "YlOrRd")
    values = np.zeros((2, 3))
    values[1, 2] = 1.0  # the lower right one of 2 x 3 patches
    overlays._draw_map(Axis(), np.zeros((5, 8, 3), np.uint8), values, scale)
    (picture,) = pictures
    marked = (picture != picture[0, 0]).any(-1)
    rows, columns = np.nonzero(marked)
    assert set(rows) == {3, 4}  # 5 pixels over 2 patches: pixels 3 and 4 have index 2 * i // 5 = 1
    assert set(columns) == {6, 7}
    assert marked.sum() == 4


def test_maps_of_zeros_and_flat_frames_are_drawn():
    flat = Overlay(np.full((8, 8, 3), 0.5), np.zeros((1, 1)), np.zeros((1, 1)), "")
    assert plot_overlays([flat])


def test_the_same_rows_give_the_same_bytes():
    assert plot_overlays([make_overlay()]) == plot_overlays([make_overlay()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((4, 4))}, r"overlays\[1\]\.image has shape \(4, 4\)"),
        ({"image": np.full((4, 4, 3), 2.0)}, r"image must be uint8"),
        ({"image": np.zeros((4, 4, 3), np.int64)}, r"image must be uint8"),
        ({"teacher": np.zeros(15)}, r"teacher has shape \(15,\)"),
        ({"student": np.zeros((5, 3))}, "both must look at the same patches"),
        ({"student": np.full((3, 5), np.nan)}, "student must be finite"),
        ({"teacher": np.full((3, 5), -1.0)}, "teacher must be finite and not negative"),
    ],
)
def test_refuses_what_cannot_be_drawn_and_names_the_row(changes, message):
    rows = [make_overlay(), replace(make_overlay(), **changes)]
    with pytest.raises(ValueError, match=message):
        plot_overlays(rows)


def test_refuses_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        plot_overlays([])
