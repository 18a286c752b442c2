"""Means, similarities and their uncertainty, by drawing pictures anew."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Members = npt.NDArray[np.bool_]

MIN_PICTURES = 8  # with fewer, nothing is said about uncertainty
SIGNIFICANT = 0.05
_SAME = 1e-6  # 1 - cosine below this is rounding


@dataclass(frozen=True)
class Estimate:
    """A statistic and what it is in each draw.

    Attributes:
        value: (...) the statistic of all records.
        draws: (S, ...) the same in each draw; empty where there are too few pictures.
    """

    value: Array
    draws: Array

    def interval(self) -> tuple[Array, Array]:
        """(...) bounds of the central 95 % of the draws; NaN where there are none."""
        if not len(self.draws):
            return np.full_like(self.value, np.nan), np.full_like(self.value, np.nan)
        is_known = np.isfinite(self.draws).sum(0) > 1
        low, high = np.nanquantile(np.where(is_known, self.draws, 0), (0.025, 0.975), axis=0)
        return np.where(is_known, low, np.nan), np.where(is_known, high, np.nan)


@dataclass(frozen=True)
class Comparison:
    """The candidate that beats the default.

    Attributes:
        index: Which candidate.
        gain: Its statistic minus the default's.
        low: Lower bound of the 95 % interval of that, of this candidate alone.
        high: Its upper bound.
        p: How often, if no candidate were better than the default, one of *all* of them would look
            at least as much better, in units of its standard error (the draws' largest one).
        tested: Number of candidates.
    """

    index: int
    gain: float
    low: float
    high: float
    p: float
    tested: int


class Resampling:
    """Draws of pictures with replacement.

    Questions about one picture are not independent, so pictures are drawn, with all their records.
    For the same reason only records of different pictures are compared with each other.

    Args:
        pictures: For each record what it shows; equal ones belong together.
        resamples: Number of draws S.
        seed: Of the draws.
    """

    def __init__(self, pictures: Sequence[Hashable], *, resamples: int, seed: int) -> None:
        numbers = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
        self._index = np.array([numbers[picture] for picture in pictures])
        generator = np.random.default_rng(seed)
        even = np.full(len(numbers), 1 / len(numbers))
        counts = generator.multinomial(len(numbers), even, size=resamples)
        self._weights: Array = counts[:, self._index].astype(np.float64)  # (S, n)
        self._apart: Array = (self._index[:, None] != self._index[None]).astype(np.float64)

    def pictures(self, members: Members) -> int:
        """How many different pictures some records have."""
        return len(np.unique(self._index[members]))

    def mean(self, values: Array, members: Members) -> Estimate:
        """Mean of (n, ...) values over some records; NaN is left out, cell by cell."""
        chosen = values[members].reshape(int(members.sum()), -1)
        is_known = np.isfinite(chosen)
        filled, known = np.where(is_known, chosen, 0), is_known.astype(np.float64)

        def of(weights: Array) -> Array:
            return _ratio(weights @ filled, weights @ known).reshape(-1, *values.shape[1:])

        everyone = np.ones((1, len(chosen)))
        draws = self._weights[:, members] if self._enough(members) else everyone[:0]
        return Estimate(of(everyone)[0], of(draws))

    def similarity(self, matrix: Array, first: Members, second: Members) -> Estimate:
        """Mean of an (L, n, n) similarity over pairs of records of different pictures."""
        matrix = np.where(np.isfinite(matrix), matrix, 0) * self._apart
        block = matrix[:, first][:, :, second]
        pairs = self._apart[first][:, second]
        among = np.flatnonzero(first), np.flatnonzero(second)

        def of(weights: Array) -> Array:
            own, other = (weights[:, each] for each in among)
            total = np.stack([((own @ layer) * other).sum(1) for layer in block], axis=1)
            return _ratio(total, ((own @ pairs) * other).sum(1)[:, None])

        everyone = np.ones((1, len(self._index)))
        draws = self._weights if self._enough(first) and self._enough(second) else everyone[:0]
        return Estimate(of(everyone)[0], of(draws))

    def _enough(self, members: Members) -> bool:
        return self.pictures(members) >= MIN_PICTURES


def cosines(features: Array) -> Array:
    """(L, n, n) cosines of (n, L, F) features, layer by layer; NaN for zeros and NaN."""
    by_layer = features.transpose(1, 0, 2)
    unit = _ratio(by_layer, np.linalg.norm(by_layer, axis=-1, keepdims=True))
    return np.asarray(unit @ unit.transpose(0, 2, 1))


def dispersion(features: Array, members: Members) -> Array:
    """(n, L) 1 - cosine of each record's (n, L, F) features to the mean over some records."""
    mean = np.nanmean(features[members], axis=0)
    dot = (features * mean).sum(-1)
    sizes = np.linalg.norm(features, axis=-1) * np.linalg.norm(mean, axis=-1)
    return 1 - _ratio(dot, sizes)


def contrast(within: Estimate, across: Estimate) -> Estimate:
    """`(within - across) / (1 - across)`: how much of the difference between records goes away.

    0: records of a capability are as different from each other as from others. 1: they are all the
    same, and the others not. Has no unit, so that layers and kinds of maps can be compared. Where
    all records are the same but for rounding, it is 0.
    """

    def of(inside: Array, outside: Array) -> Array:
        apart = 1 - outside
        is_same = (apart < _SAME) & np.isfinite(inside)
        return np.where(is_same, 0.0, _ratio(inside - outside, apart))

    size = min(len(within.draws), len(across.draws))
    return Estimate(of(within.value, across.value), of(within.draws[:size], across.draws[:size]))


def compare(estimate: Estimate, default: int) -> Comparison | None:
    """Whether any of (C,) candidates has a larger statistic than the default one.

    The candidate named is the best of those that are better with p up to 0.05, or if none is, the
    most clearly better one. That it is one of many is accounted for: p is that of the largest of
    all differences, each in units of its own standard error.

    Returns:
        None where nothing can be said: too few pictures, or no candidate that differs.
    """
    gains = estimate.value - estimate.value[default]
    draws = estimate.draws - estimate.draws[:, [default]]
    if not len(draws):
        return None
    whole = draws[np.isfinite(draws[:, default])]
    spread = np.std(whole, axis=0, ddof=1) if len(whole) > 1 else np.full(len(gains), np.nan)
    usable = np.flatnonzero(np.isfinite(gains) & (spread > 1e-9))
    if not len(usable):
        return None
    scores = gains[usable] / spread[usable]
    largest = ((whole[:, usable] - gains[usable]) / spread[usable]).max(1)
    chances = (1 + (largest[:, None] >= scores).sum(0)) / (1 + len(largest))
    is_better = chances <= SIGNIFICANT
    chosen = (
        np.where(is_better, gains[usable], -np.inf).argmax() if any(is_better) else scores.argmax()
    )
    index, p = int(usable[chosen]), float(chances[chosen])
    low, high = np.quantile(whole[:, index], (0.025, 0.975))
    return Comparison(index, float(gains[index]), float(low), float(high), p, len(usable))


def _ratio(top: Array, bottom: Array) -> Array:
    """NaN where the divisor is 0."""
    top, bottom = np.broadcast_arrays(top, bottom)
    ratio: Array = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
    return ratio
