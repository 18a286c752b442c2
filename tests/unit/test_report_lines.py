"""Drawing lines: seed means, smoothing, labels that do not overlap, odd data."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from drivekd.study.lines import (
    _spread,
    _trailing,
    cycle,
    draw_lines,
    draw_panels,
    figure_of,
    mean_line,
    use_log_scale,
)
from drivekd.study.plots import make_plots
from drivekd.study.schema import LossPoint, ProjectionPoint, Signal
from tests.helpers.studies import make_study


def points(pairs):
    return {step: np.array([step, y], dtype=float) for step, y in pairs}


def test_the_mean_runs_over_steps_that_every_seed_has():
    seeds = [points([(0, 1), (10, 3), (20, 5)]), points([(0, 3), (20, 1)]), {}]
    line = mean_line("a", "red", "-", seeds)
    assert line.x.tolist() == [0, 20]
    assert line.y.tolist() == [2, 3]
    assert len(line.seeds) == 2


def test_a_single_seed_is_not_drawn_twice():
    assert mean_line("a", "red", "-", [points([(0, 1)])]).seeds == ()


def test_seeds_without_a_common_step_give_an_empty_line():
    line = mean_line("a", "red", "-", [points([(0, 1)]), points([(1, 1)])])
    assert line.x.size == line.y.size == 0


def test_trailing_mean_skips_what_is_not_finite():
    got = _trailing([np.nan, 2.0, 4.0, np.inf, np.nan, 6.0], 2)
    np.testing.assert_array_equal(got, [np.nan, 2.0, 3.0, 4.0, np.nan, 6.0])


@pytest.mark.parametrize(
    "wanted", [[0.5] * 5, [0.0, 0.01, 0.02], [1.0, 0.99, 0.98, 0.1], [0.3], [0.1, 0.9]]
)
def test_labels_do_not_overlap_and_keep_their_order_inside_the_panel(wanted):
    sizes = [0.1 + 0.05 * (i % 2) for i in range(len(wanted))]
    placed = dict(_spread(wanted, sizes))
    assert sorted(placed) == list(range(len(wanted)))
    order = sorted(placed, key=placed.__getitem__)
    assert [wanted[i] for i in order] == sorted(wanted)
    for low, high in itertools.pairwise(order):
        assert placed[high] - placed[low] >= (sizes[low] + sizes[high]) / 2 - 1e-9
    assert placed[order[0]] - sizes[order[0]] / 2 >= -1e-9
    assert placed[order[-1]] + sizes[order[-1]] / 2 <= 1 + 1e-9


def test_labels_with_room_stay_where_they_belong():
    assert _spread([0.2, 0.8], [0.1, 0.1]) == [(0, 0.2), (1, pytest.approx(0.8))]


def test_more_lines_than_colours_differ_by_their_dashes():
    looks = [cycle(i) for i in range(21)]
    assert len({str(look) for look in looks}) == 21


def test_a_line_of_nan_is_drawn_without_a_label():
    axis = Figure().subplots()
    draw_lines(axis, [mean_line("gone", "red", "-", [points([(0, np.nan)])])], {})
    assert not axis.texts


@pytest.mark.parametrize(("count", "in_a_legend"), [(3, False), (11, True)])
def test_names_stand_at_the_ends_of_lines_or_in_one_legend_if_they_do_not_fit(count, in_a_legend):
    names = [f"three teachers, way {i}" for i in range(count)]
    lines = [
        mean_line(name, *cycle(i), [points([(0, 1), (1, i + 1)])]) for i, name in enumerate(names)
    ]
    with figure_of(2, [2.3, 2.3]) as (figure, axes):
        draw_panels(axes, [(lines, {"majority": 2.0}), (lines[:2], {})], log=True)
        assert axes[0].get_yscale() == "log"
        legends = [[text.get_text() for text in each.texts] for each in figure.legends]
        assert legends == ([[*names, "majority"]] if in_a_legend else [])
        assert len(axes[0].texts) == (0 if in_a_legend else count + 1)
        assert len(axes[1].texts) == (0 if in_a_legend else 2)


@pytest.mark.parametrize(("values", "ticks"), [((1, 12), [1, 2, 5, 10]), ((1e-6, 1), [1e-4, 1e-2])])
def test_a_logarithmic_axis_over_many_decades_has_few_numbers(values, ticks):
    with figure_of(1, [1.9]) as (figure, (axis,)):
        axis.plot([0, 1], values)
        use_log_scale(axis)
        figure.canvas.draw()
        shown = {float(f"{tick:g}") for tick in axis.get_yticks()}
    assert set(ticks) <= shown
    assert len(shown) <= 9


def test_the_reference_arm_is_ink_whatever_its_place():
    names = ("cosine", "ce")
    plain = make_plots(make_study(arms=names, seeds=(0,), curves=False))[0]
    other = make_plots(make_study(arms=names, seeds=(0,), curves=False, reference="cosine"))[0]
    assert plain.png != other.png


def test_losses_that_are_not_finite_or_not_positive_still_plot():
    study = make_study(arms=("ce",), seeds=(0,), curves=False)
    curve = (LossPoint(0, {"ce": 1.0, "gone": np.nan}), LossPoint(1, {"ce": -1.0, "late": 2.0}))
    log = (ProjectionPoint(0, {"a": Signal(0.0, np.nan, np.nan), "b": Signal(1.0, 0.5, 0.0)}),)
    run = replace(study.runs[0], loss_curve=curve, projection_log=log)
    plots = make_plots(replace(study, runs=(run,)))
    assert [plot.name for plot in plots] == ["accuracy", "losses", "gradients_ce"]


def test_every_plot_explains_itself():
    for plot in make_plots(make_study(arms=("ce", "cosine+agp"), seeds=(0,))):
        assert plot.title
        assert plot.caption.endswith(".")
        assert plot.alt.endswith(".")
        assert not any(word in plot.alt for word in ("nan", "None"))
