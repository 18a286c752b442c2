"""Statistics against numbers worked out by hand."""

import math

import pytest

from drivekd.study.statistics import (
    Estimate,
    Tally,
    count_answers,
    macro,
    mean_over_seeds,
    micro,
    paired_difference,
)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-15)


def test_binomial_standard_error_of_a_tally():
    # p = .8, n = 100: sqrt(.8 * .2 / 100) = sqrt(.0016) = .04
    assert Tally(80, 100).accuracy == close(0.8)
    assert Tally(80, 100).standard_error == close(0.04)
    assert Tally(0, 7).standard_error == 0.0
    assert Tally(7, 7).standard_error == 0.0


@pytest.mark.parametrize(
    ("correct", "total", "error"),
    [(1, 0, ValueError), (-1, 3, ValueError), (4, 3, ValueError), (1.0, 2, TypeError)],
)
def test_a_tally_refuses_impossible_counts(correct, total, error):
    with pytest.raises(error):
        Tally(correct, total)


def test_count_answers_keeps_the_kinds_apart():
    outcomes = [("lane", True), ("count", False), ("lane", False), ("lane", True)]
    assert count_answers(outcomes) == {"lane": Tally(2, 3), "count": Tally(0, 1)}


def test_micro_pools_questions_and_macro_averages_kinds():
    tallies = [Tally(9, 10), Tally(15, 30)]
    # micro 24 / 40 = .6; macro (.9 + .5) / 2 = .7
    assert micro(tallies) == Tally(24, 40)
    assert micro(tallies).accuracy == close(0.6)
    assert macro(tallies) == close(0.7)


@pytest.mark.parametrize("function", [micro, macro])
def test_micro_and_macro_refuse_nothing(function):
    with pytest.raises(ValueError, match="at least one"):
        function([])


def test_mean_over_three_seeds():
    runs = {0: [Tally(70, 100)], 1: [Tally(74, 100)], 2: [Tally(78, 100)]}
    # mean .74; deviations -.04, 0, .04: sd = sqrt(.0032 / 2) = .04; se = .04 / sqrt(3)
    got = mean_over_seeds(runs)
    assert (got.n, got.kind) == (3, "seeds")
    assert got.mean == close(0.74)
    assert got.standard_error == close(0.04 / math.sqrt(3))


def test_one_seed_has_the_binomial_error_of_its_run():
    got = mean_over_seeds({5: [Tally(80, 100)]})
    assert got == Estimate(close(0.8), close(0.04), 1, "binomial")


def test_one_seeds_mean_of_capabilities_adds_their_variances():
    # errors .04 and .03 (p = .9, n = 100); mean of two: sqrt(.04^2 + .03^2) / 2 = .025
    got = mean_over_seeds({0: [Tally(80, 100), Tally(90, 100)]})
    assert got.mean == close(0.85)
    assert got.standard_error == close(0.025)


def test_mean_of_capabilities_is_taken_inside_a_seed_first():
    runs = {0: [Tally(1, 2), Tally(90, 100)], 1: [Tally(1, 2), Tally(70, 100)]}
    # .7 and .6: mean .65, sd = .0707.., se = .05
    got = mean_over_seeds(runs)
    assert got.mean == close(0.65)
    assert got.standard_error == close(0.05)


def test_paired_difference_cancels_what_the_seed_does():
    # Seeds differ by tens of points, the arms by 7, 9, 8 points.
    arm = {0: [Tally(47, 100)], 1: [Tally(69, 100)], 2: [Tally(88, 100)]}
    reference = {0: [Tally(40, 100)], 1: [Tally(60, 100)], 2: [Tally(80, 100)]}
    got = paired_difference(arm, reference)
    # mean .08; sd .01; se .01 / sqrt(3)
    assert (got.n, got.kind) == (3, "seeds")
    assert got.mean == close(0.08)
    assert got.standard_error == pytest.approx(0.01 / math.sqrt(3), rel=1e-9)  # cancellation


def test_paired_difference_uses_only_seeds_in_common():
    arm = {0: [Tally(5, 10)], 1: [Tally(7, 10)], 9: [Tally(0, 10)]}
    reference = {1: [Tally(4, 10)], 0: [Tally(4, 10)], 7: [Tally(10, 10)]}
    got = paired_difference(arm, reference)
    # .1 and .3: mean .2, sd .1414.., se .1
    assert got.n == 2
    assert got.mean == close(0.2)
    assert got.standard_error == close(0.1)


def test_one_seeds_difference_adds_the_two_binomial_variances():
    # errors .04 and .03: sqrt(.0025) = .05
    got = paired_difference({3: [Tally(80, 100)]}, {3: [Tally(90, 100)]})
    assert got == Estimate(close(-0.1), close(0.05), 1, "binomial")


def test_paired_difference_refuses_disjoint_seeds_and_names_them():
    with pytest.raises(ValueError, match=r"runs has \[0\], reference has \[1\]"):
        paired_difference({0: [Tally(1, 2)]}, {1: [Tally(1, 2)]})


def test_a_mean_refuses_no_seeds():
    with pytest.raises(ValueError, match="at least one seed"):
        mean_over_seeds({})
