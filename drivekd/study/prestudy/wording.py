"""How alike the words of two records are, and similarities with that taken out.

Questions of one capability are worded alike. Their maps are then alike whatever the teacher makes
of the picture, most of all in the first layers: an untrained model shows it too. What is asked is
how alike maps are at equal wording.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from drivekd.study.prestudy.resampling import Array, Members

MAX_GAP = 2.0  # standard deviations over which wording may be extrapolated


def wording_similarity(words: Sequence[npt.NDArray[np.int64]]) -> Array:
    """(2, n, n): cosine of two records' counts of text tokens, and ratio of their lengths."""
    vocabulary, places = np.unique(np.concatenate(words), return_inverse=True)
    ends = np.cumsum([len(each) for each in words])
    counts = np.zeros((len(words), len(vocabulary)))
    for row, own in zip(counts, np.split(places, ends[:-1]), strict=True):
        np.add.at(row, own, 1)
    unit = counts / np.linalg.norm(counts, axis=1, keepdims=True)
    lengths = counts.sum(1)
    longer = np.maximum(lengths[:, None], lengths)
    return np.stack([unit @ unit.T, np.minimum(lengths[:, None], lengths) / longer])


def at_equal_wording(similarity: Array, wording: Array, labels: Sequence[str]) -> Array:
    """Similarities as they would be if all pairs were worded equally alike (on average).

    How much wording matters is seen among pairs of the same two capabilities (analysis of
    covariance: one slope a layer, the least-squares one, over all pairs), so that what capabilities
    differ in is not mistaken for it.

    Args:
        similarity: (L, n, n) symmetric; NaN is left alone.
        wording: (2, n, n), as `wording_similarity` gives it.
        labels: The n records' capabilities.

    Returns:
        (L, n, n).
    """
    upper = np.triu_indices(len(labels), 1)
    _, numbers = np.unique(labels, return_inverse=True)
    low, high = (pick(numbers[upper[0]], numbers[upper[1]]) for pick in (np.minimum, np.maximum))
    kinds = low * (numbers.max() + 1) + high
    pairs = wording[:, *upper]  # (2, pairs)
    causes = _within_kinds(pairs, kinds).T
    adjusted = similarity.copy()
    for layer in adjusted:
        effects = layer[upper]
        known = np.isfinite(effects)
        centred = _within_kinds(np.where(known, effects, 0)[None, :], kinds)[0]
        slopes = np.linalg.lstsq(causes[known], centred[known], rcond=1e-9)[0]
        layer -= np.tensordot(slopes, wording - pairs.mean(1)[:, None, None], axes=1)
    return adjusted


def wording_gap(wording: Array, members: Members) -> tuple[float, float, float]:
    """How differently some records are worded from the others.

    Returns:
        Mean cosine of words of two of them, of one of them and another, and the difference in
        standard deviations among pairs of one kind: above MAX_GAP there are no pairs from which the
        effect of wording on both kinds could be told. NaN without pairs.
    """
    words = wording[0]
    inside = words[members][:, members][np.triu_indices(int(members.sum()), 1)]
    outside = words[members][:, ~members].ravel()
    if not (len(inside) and len(outside)):
        return float("nan"), float("nan"), float("nan")
    spread = np.sqrt((inside.var() + outside.var()) / 2)
    gap = abs(inside.mean() - outside.mean())
    return float(inside.mean()), float(outside.mean()), float(gap / max(spread, 1e-9))


def _within_kinds(values: Array, kinds: npt.NDArray[np.int64]) -> Array:
    """(k, pairs) minus the mean of each kind of pair."""
    counts = np.bincount(kinds)
    means = np.stack([np.bincount(kinds, row) / np.maximum(counts, 1) for row in values])
    centred: Array = values - means[:, kinds]
    return centred
