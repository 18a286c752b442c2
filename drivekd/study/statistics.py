"""Counts, means over seeds and paired differences, with standard errors.

Two kinds of uncertainty are told apart. The *binomial* standard error of one run says how far its
accuracy may be off because the test set is finite. The standard error *over seeds* says how far
the mean of several runs may be off because training is random. One run has only the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, order=True)
class Tally:
    """How many of a set of questions were answered correctly.

    Raises:
        TypeError: a count that is not an int.
        ValueError: `total` below 1, or `correct` outside 0..total.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        for name, count in (("correct", self.correct), ("total", self.total)):
            if type(count) is not int:
                raise TypeError(f"{name} is {count!r}; it must be an int")
        if self.total < 1:
            raise ValueError(f"total is {self.total}; a tally needs at least one question")
        if not 0 <= self.correct <= self.total:
            raise ValueError(f"correct is {self.correct}; it must lie in 0..{self.total}")

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0..1."""
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy, sqrt(p (1 - p) / total).

        Questions about one picture are correlated, so this is a little optimistic.
        """
        p = self.accuracy
        return float(np.sqrt(p * (1 - p) / self.total))


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        mean: the mean over `n` seeds.
        standard_error: over seeds where `n` is 2 or more, else the binomial one of the single run.
        n: how many seeds.
        kind: which of the two errors it is.
    """

    mean: float
    standard_error: float
    n: int
    kind: Literal["seeds", "binomial"]


def count_answers(outcomes: Iterable[tuple[str, bool]]) -> dict[str, Tally]:
    """Tallies per question kind, from (question kind, was the answer correct) pairs."""
    counts: dict[str, list[int]] = {}
    for question, is_correct in outcomes:
        row = counts.setdefault(question, [0, 0])
        row[0] += bool(is_correct)
        row[1] += 1
    return {question: Tally(correct, total) for question, (correct, total) in counts.items()}


def micro(tallies: Iterable[Tally]) -> Tally:
    """All questions pooled: each question counts once, so frequent kinds weigh more.

    Raises:
        ValueError: no tallies.
    """
    tallies = list(tallies)
    return Tally(sum(t.correct for t in tallies), sum(t.total for t in tallies))


def macro(tallies: Iterable[Tally]) -> float:
    """Mean of the kinds' accuracies: each kind of question counts once.

    Raises:
        ValueError: no tallies.
    """
    accuracies = [tally.accuracy for tally in tallies]
    if not accuracies:
        raise ValueError("tallies is empty; a macro accuracy needs at least one kind of question")
    return float(np.mean(accuracies))


def mean_over_seeds(runs: Mapping[int, Sequence[Tally]]) -> Estimate:
    """Mean accuracy of an arm over its seeds.

    Args:
        runs: for each seed, the tallies whose accuracies are averaged: one for a single
            capability, several for the plain mean of capabilities.

    Returns:
        The mean over seeds. Its error is the sample standard deviation over sqrt(n), or for one
        seed the binomial error of that run.

    Raises:
        ValueError: no seeds, or a seed without tallies.
    """
    if not runs:
        raise ValueError("runs is empty; a mean needs at least one seed")
    values = [macro(tallies) for tallies in runs.values()]
    if len(values) > 1:
        return _over_seeds(values)
    (tallies,) = runs.values()
    return Estimate(values[0], _binomial_error(tallies), 1, "binomial")


def paired_difference(
    runs: Mapping[int, Sequence[Tally]], reference: Mapping[int, Sequence[Tally]]
) -> Estimate:
    """Mean of an arm's accuracy minus the reference's, seed by seed.

    Only seeds that both have are used: runs of one seed share initial weights and data order, so
    that what the seed itself does cancels.

    Args:
        runs: as for `mean_over_seeds`.
        reference: the same for the reference arm.

    Returns:
        The mean difference. Its error is that of the differences over seeds, or for one seed the
        binomial error of a difference of two independent runs (the two variances added).

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds:
        raise ValueError(
            f"no seed in common: runs has {sorted(runs)}, reference has {sorted(reference)}"
        )
    values = [macro(runs[seed]) - macro(reference[seed]) for seed in seeds]
    if len(values) > 1:
        return _over_seeds(values)
    error = np.hypot(_binomial_error(runs[seeds[0]]), _binomial_error(reference[seeds[0]]))
    return Estimate(values[0], float(error), 1, "binomial")


def _over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean of two values or more."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return Estimate(float(np.mean(values)), float(error), len(values), "seeds")


def _binomial_error(tallies: Sequence[Tally]) -> float:
    """Standard error of the plain mean of independent tallies' accuracies."""
    return float(np.linalg.norm([tally.standard_error for tally in tallies]) / len(tallies))
