"""Scoring of multiple-choice answers: accuracy with its error, and what guessing would give."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from drivekd.data.records import Record
from drivekd.driving.extraction import extract_choice
from drivekd.errors import DataError

_LISTED_OPTION = re.compile(
    r"(?<![\w.])\(?([A-Z])[.)]\s+(\S.*?)(?=[\s,;]+\(?[A-Z][.)]\s|\s*$)", re.S
)


@dataclass(frozen=True)
class Tally:
    """How a group of questions was answered.

    Args:
        count: Number of questions.
        correct: Number of right answers.
        unparsable: Number of answers without a readable choice; they count as wrong.
        majority: Accuracy of giving each question id its most common reference answer; None without
            a reference.
    """

    count: int
    correct: int
    unparsable: int
    majority: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy.

        Questions about one picture are correlated, so it is a little optimistic.
        """
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)


@dataclass(frozen=True)
class Scores:
    """Tallies by question id, by capability, and of everything."""

    by_question: Mapping[str, Tally]
    by_capability: Mapping[str, Tally]
    total: Tally

    def to_dict(self) -> dict[str, object]:
        """Give everything as JSON values, with accuracy and standard error."""

        def values(tally: Tally) -> dict[str, object]:
            derived = {"accuracy": tally.accuracy, "standard_error": tally.standard_error}
            return {**asdict(tally), **derived}

        return {
            "by_question": {name: values(t) for name, t in self.by_question.items()},
            "by_capability": {name: values(t) for name, t in self.by_capability.items()},
            "total": values(self.total),
        }


def score(
    records: Sequence[Record],
    answers: Sequence[str],
    *,
    reference: Iterable[Record] | None = None,
) -> Scores:
    """Score answers to multiple-choice records.

    Options and right letter come from ``meta`` (``options``, ``label``) or else from the texts: a
    question that lists "A. ... B. ...", and the record's own answer. The question id is
    ``meta["qid"]`` or else the question type.

    Args:
        records: The questions.
        answers: One free-text answer a record, in the same order.
        reference: Records, usually the training split, whose most common answer to each question id
            gives the majority baseline.

    Returns:
        The tallies.

    Raises:
        ValueError: If the lengths differ, there are no records, or a question id is not in the
            reference.
        DataError: If a record is not multiple-choice or has no readable right answer.

    Example:
        >>> from drivekd.data import Message, Record
        >>> question = Message("user", "Is any vehicle ahead? A. yes B. no")
        >>> record = Record((question, Message("assistant", "Final: A. yes")), (), "perception")
        >>> score([record], ["Yes, a car."]).total.accuracy
        1.0
    """
    if len(records) != len(answers):
        raise ValueError(f"answers has {len(answers)} entries for {len(records)} records")
    if not records:
        raise ValueError("records is empty; there is nothing to score")
    guesses = None if reference is None else _majority_labels(reference)
    results = []
    for index, (record, answer) in enumerate(zip(records, answers, strict=True)):
        options, label = read_choice(record, index)
        qid = _question_id(record)
        if guesses is not None and qid not in guesses:
            raise ValueError(f"reference has no record of question {qid!r}")
        guess = None if guesses is None else guesses[qid] == label
        choice = extract_choice(answer, options)
        results.append(_Result(qid, record.question_type, choice == label, choice is None, guess))
    return Scores(
        by_question=_tallies(results, [r.qid for r in results]),
        by_capability=_tallies(results, [r.capability for r in results]),
        total=_tally(results),
    )


def read_choice(record: Record, index: int | None = None) -> tuple[tuple[str, ...], str]:
    """Give a record's options and the letter of the right one.

    Args:
        record: A multiple-choice record.
        index: Its place in a list, for the error message.

    Returns:
        The options in the order of their letters, and the right letter.

    Raises:
        DataError: If the record is not multiple-choice or its answer cannot be read.
    """
    name = record.id or (f"at {index}" if index is not None else "without id")
    listed = record.meta.get("options")
    options = tuple(map(str, listed)) if isinstance(listed, list | tuple) else _options_of(record)
    if len(options) < 2:
        raise DataError(f"record {name} lists no options A, B, ...; only those can be scored")
    label = record.meta.get("label")
    if label is None:
        label = extract_choice(record.answer, options)
    if not isinstance(label, str) or label not in string.ascii_uppercase[: len(options)]:
        raise DataError(f"record {name} has no right answer among its {len(options)} options")
    return options, label


@dataclass(frozen=True)
class _Result:
    qid: str
    capability: str
    correct: bool
    unparsable: bool
    guess: bool | None


def _question_id(record: Record) -> str:
    return str(record.meta.get("qid", record.question_type))


def _options_of(record: Record) -> tuple[str, ...]:
    """Read the options that the question's text lists, as far as the letters are in sequence."""
    options: list[str] = []
    for letter, text in _LISTED_OPTION.findall(record.question):
        if letter == string.ascii_uppercase[len(options) % 26]:
            options.append(text.strip(" .,;\n"))
    return tuple(options)


def _majority_labels(records: Iterable[Record]) -> dict[str, str]:
    """Give the most common label of each question id; of equals, the first letter."""
    counts: dict[str, Counter[str]] = {}
    for index, record in enumerate(records):
        counts.setdefault(_question_id(record), Counter())[read_choice(record, index)[1]] += 1
    return {qid: max(sorted(c), key=c.__getitem__) for qid, c in counts.items()}


def _tallies(results: Sequence[_Result], groups: Sequence[str]) -> dict[str, Tally]:
    members: dict[str, list[_Result]] = {}
    for group, result in zip(groups, results, strict=True):
        members.setdefault(group, []).append(result)
    return {group: _tally(found) for group, found in members.items()}


def _tally(results: Sequence[_Result]) -> Tally:
    guesses = [r.guess for r in results if r.guess is not None]
    return Tally(
        count=len(results),
        correct=sum(r.correct for r in results),
        unparsable=sum(r.unparsable for r in results),
        majority=sum(guesses) / len(guesses) if guesses else None,
    )
