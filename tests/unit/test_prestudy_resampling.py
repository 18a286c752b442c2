"""Means, similarities, contrasts and comparisons of the pre-study: exact, and not fooled."""

import warnings

import numpy as np
import pytest

from drivekd.study.prestudy.resampling import (
    MIN_PICTURES,
    Estimate,
    Resampling,
    compare,
    contrast,
    cosines,
    dispersion,
)
from drivekd.study.prestudy.wording import (
    MAX_GAP,
    at_equal_wording,
    wording_gap,
    wording_similarity,
)

CAPABILITIES = ("perception", "reasoning", "planning")


def pictures_of(count, each):
    return [i // each for i in range(count)]


def test_similarity_is_the_mean_over_pairs_of_different_pictures():
    generator = np.random.default_rng(0)
    pictures = pictures_of(18, 2)
    features = generator.random((18, 3, 5))
    matrix = cosines(features)
    first = np.arange(18) % 3 == 0
    draws = Resampling(pictures, resamples=10, seed=0)
    for second in (first, ~first):
        found = draws.similarity(matrix, first, second).value
        for layer in range(3):
            wanted = [
                features[i, layer]
                @ features[j, layer]
                / np.linalg.norm(features[i, layer])
                / np.linalg.norm(features[j, layer])
                for i in np.flatnonzero(first)
                for j in np.flatnonzero(second)
                if pictures[i] != pictures[j]
            ]
            assert found[layer] == pytest.approx(np.mean(wanted), rel=1e-12)


def test_questions_about_one_picture_do_not_make_a_capability_look_alike():
    """Features that are the picture's alone: no contrast, though pairs of a picture are equal."""
    generator = np.random.default_rng(1)
    pictures = [i // 4 for i in range(240)]
    looks = generator.random((60, 1, 32)) ** 3
    features = looks[pictures]
    members = np.arange(240) % 4 < 2  # two of each picture's four questions
    draws = Resampling(pictures, resamples=400, seed=0)
    matrix = cosines(features)
    found = contrast(
        draws.similarity(matrix, members, members), draws.similarity(matrix, members, ~members)
    )
    assert abs(found.value[0]) < 1e-12
    low, high = found.interval()
    assert low[0] <= 1e-12 and high[0] >= -1e-12


def test_bounds_of_a_mean_hold_it_as_often_as_they_say():
    """Records of a picture go together: bounds as if they were independent would be too tight."""
    generator = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        values = generator.standard_normal(30).repeat(5) + 0.1 * generator.standard_normal(150)
        draws = Resampling(pictures_of(150, 5), resamples=300, seed=trial)
        low, high = draws.mean(values[:, None], np.ones(150, dtype=bool)).interval()
        hits += low[0] <= 0 <= high[0]
    assert 0.88 <= hits / 200 <= 0.99


def test_too_few_pictures_have_no_bounds():
    count = MIN_PICTURES - 1
    draws = Resampling(list(range(count)), resamples=50, seed=0)
    found = draws.mean(np.ones((count, 2)), np.ones(count, dtype=bool))
    assert found.value.tolist() == [1, 1]
    assert np.isnan(found.interval()).all()
    assert compare(found, 0) is None


def test_nothing_to_compare_with_is_nan_and_no_warning():
    draws = Resampling(list(range(10)), resamples=20, seed=0)
    everyone = np.ones(10, dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within = draws.similarity(cosines(np.ones((10, 2, 3))), everyone, everyone)
        across = draws.similarity(cosines(np.ones((10, 2, 3))), everyone, ~everyone)
        assert within.value == pytest.approx(1) and np.isnan(across.value).all()
        assert np.isnan(contrast(within, across).value).all()
        assert np.isnan(contrast(within, across).interval()).all()
        one = Resampling([0] * 10, resamples=20, seed=0)
        alone = one.similarity(cosines(np.ones((10, 2, 3))), everyone, everyone)
        assert np.isnan(alone.value).all()


def test_contrast_is_one_for_a_pattern_of_a_capability_alone_and_zero_without():
    features = np.zeros((30, 2, 6))
    generator = np.random.default_rng(3)
    members = np.arange(30) < 10
    features[members, 0, 0] = 1  # the first layer: all the same, others elsewhere
    features[~members, 0, 1 + np.arange(20) % 5] = 1
    features[:, 1] = generator.random((30, 6))
    draws = Resampling(list(range(30)), resamples=100, seed=0)
    matrix = cosines(features)
    found = contrast(
        draws.similarity(matrix, members, members), draws.similarity(matrix, members, ~members)
    )
    assert found.value[0] == pytest.approx(1)
    assert abs(found.value[1]) < 0.3
    same = cosines(np.ones((30, 2, 6)) + 1e-9 * generator.random((30, 2, 6)))
    nothing = contrast(
        draws.similarity(same, members, members), draws.similarity(same, members, ~members)
    )
    assert nothing.value.tolist() == [0, 0]  # rounding is no pattern


def test_dispersion_is_one_minus_the_cosine_to_the_groups_mean():
    features = np.random.default_rng(4).random((7, 2, 5))
    members = np.arange(7) < 4
    found = dispersion(features, members)
    mean = features[:4].mean(0)
    for i in range(7):
        for layer in range(2):
            x, m = features[i, layer], mean[layer]
            wanted = 1 - x @ m / np.linalg.norm(x) / np.linalg.norm(m)
            assert found[i, layer] == pytest.approx(wanted, abs=1e-12)


def test_of_many_candidates_that_are_no_better_one_wins_seldom():
    """The best of twenty looks better nearly always; with all counted, one time in twenty."""
    generator = np.random.default_rng(5)
    wins = naive = 0
    for trial in range(300):
        values = generator.standard_normal((40, 21))
        draws = Resampling(list(range(40)), resamples=200, seed=trial)
        found = compare(draws.mean(values, np.ones(40, dtype=bool)), 0)
        wins += found.p <= 0.05
        naive += found.low > 0
    assert wins / 300 <= 0.09
    assert naive / 300 > 0.25  # what a plain interval of the best would say


def test_the_best_of_the_better_candidates_is_named_not_the_surest():
    values = np.array([0.0, 0.1, 1.0])
    noise = np.random.default_rng(6).standard_normal((500, 3)) * np.array([1e-3, 1e-3, 0.2])
    found = compare(Estimate(values, values + noise), 0)
    assert found.index == 2 and found.p < 0.01 and found.tested == 2
    assert found.low < found.gain < found.high and found.gain == pytest.approx(1.0)


def worded_records(generator, count, *, spread):
    """Words of kinds of questions; kinds of a capability share words, as much as `spread` says."""
    words, labels = [], []
    for i in range(count):
        capability = i % 3
        kind = generator.integers(6)
        own = 100 * capability if generator.random() > spread else 100 * generator.integers(3)
        base = np.concatenate([own + np.arange(10), 1000 + 20 * kind + np.arange(12)])
        words.append(np.concatenate([base, generator.integers(0, 2000, 4)]))
        labels.append(CAPABILITIES[capability])
    return words, labels


def test_a_contrast_that_is_wording_alone_goes_away_at_equal_wording():
    """Features that are a random image of the words: what an untrained model does."""
    generator = np.random.default_rng(7)
    words, labels = worded_records(generator, 150, spread=0.3)
    embed = generator.standard_normal((3000, 64))
    features = np.stack([embed[w].mean(0) for w in words])[:, None]
    features = features + 0.05 * generator.standard_normal(features.shape)
    wording = wording_similarity(words)
    draws = Resampling(list(range(150)), resamples=200, seed=0)
    raw = cosines(features)
    adjusted = at_equal_wording(raw, wording, labels)
    for name in CAPABILITIES:
        members = np.array([label == name for label in labels])
        before, after = (
            contrast(draws.similarity(m, members, members), draws.similarity(m, members, ~members))
            for m in (raw, adjusted)
        )
        assert before.value[0] > 0.1
        assert abs(after.value[0]) < 0.2 * before.value[0]
        assert wording_gap(wording, members)[2] < MAX_GAP


def test_a_contrast_beyond_wording_stays():
    generator = np.random.default_rng(8)
    words, labels = worded_records(generator, 150, spread=0.3)
    embed = generator.standard_normal((3000, 64))
    features = np.stack([embed[w].mean(0) for w in words])
    pattern = {name: generator.standard_normal(64) * 0.4 for name in CAPABILITIES}
    features += np.stack([pattern[label] for label in labels])
    wording = wording_similarity(words)
    draws = Resampling(list(range(150)), resamples=200, seed=0)
    adjusted = at_equal_wording(cosines(features[:, None]), wording, labels)
    members = np.array([label == "planning" for label in labels])
    found = contrast(
        draws.similarity(adjusted, members, members), draws.similarity(adjusted, members, ~members)
    )
    assert found.value[0] > 0.4 and found.interval()[0][0] > 0.3


def test_one_template_a_capability_is_seen_as_a_gap():
    words = [np.arange(10) + 100 * (i % 3) + np.eye(10, dtype=int)[i % 7] for i in range(60)]
    labels = np.arange(60) % 3
    within, across, gap = wording_gap(wording_similarity(words), labels == 0)
    assert within > 0.8 and across < 0.1 and gap > MAX_GAP


def test_similarity_of_words_counts_them_and_their_number():
    words = [np.array([1, 1, 2]), np.array([1, 2, 2, 3]), np.array([9])]
    found = wording_similarity(words)
    assert found[0, 0, 1] == pytest.approx(4 / np.sqrt(5 * 6))
    assert found[0, 0, 2] == 0 and found[0, 2, 2] == pytest.approx(1)
    assert found[1, 0, 1] == pytest.approx(3 / 4) and found[1, 2, 1] == pytest.approx(1 / 4)


def test_unknown_similarities_stay_unknown_and_harm_no_others():
    generator = np.random.default_rng(9)
    words, labels = worded_records(generator, 30, spread=0.3)
    matrix = cosines(generator.random((30, 2, 4)))
    broken = matrix.copy()
    broken[1] = np.nan
    wording = wording_similarity(words)
    found = at_equal_wording(broken, wording, labels)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[0], at_equal_wording(matrix, wording, labels)[0])
