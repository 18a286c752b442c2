"""The one document behind a report: what was run, under which settings, with which results.

`Study` and its parts are frozen dataclasses. `Study.to_json` and `Study.from_json` turn them into
`report.json` and back; tables and plots are made from them and from nothing else. Accuracies are
kept as counts of answers per kind of question, so that every mean and error can be worked out
again.
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any

from drivekd.study.statistics import Tally

FORMAT = 1

# capability -> kind of question -> how many were answered correctly
Tallies = dict[str, dict[str, Tally]]
Setting = str | int | float | bool | list[str] | list[int] | list[float] | None


@dataclass(frozen=True)
class CurvePoint:
    """Accuracies in the middle of a run, on the validation set.

    Attributes:
        step: optimiser steps done.
        cpu_seconds: processor time of the run so far, without the time spent on evaluation.
        accuracy: capability -> accuracy, 0..1.
    """

    step: int
    cpu_seconds: float
    accuracy: dict[str, float]


@dataclass(frozen=True)
class LossPoint:
    """Unweighted loss values at a step, by name ("ce", "perception", ...)."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Signal:
    """How one distillation loss' gradient stands to cross-entropy's.

    Attributes:
        share: norm of the weighted gradient over the norm of cross-entropy's.
        cosine: cosine between the two, -1..1.
        conflict: 1.0 where the cosine is negative, else 0.0; a rate where steps were averaged.
    """

    share: float
    cosine: float
    conflict: float


@dataclass(frozen=True)
class ProjectionPoint:
    """The gradients of a step (or the mean over a logging interval that ends there), by loss."""

    step: int
    signals: dict[str, Signal]


@dataclass(frozen=True)
class Arm:
    """One way of training the student.

    Attributes:
        name: short identifier ("ce", "cosine", "mse+agp"); letters, digits and `_ . + -`.
        label: how tables and plots call it.
        description: one sentence that says what is different about it.
    """

    name: str
    label: str
    description: str = ""


@dataclass(frozen=True)
class Run:
    """One student trained with one seed.

    Attributes:
        arm: name of an arm of the study.
        seed: what fixes initial weights and data order; runs of one seed are compared in pairs.
        steps: optimiser steps.
        parameters: trainable and frozen parameters of the student.
        cpu_seconds: processor time of the training, evaluation left out.
        accuracy: tallies on the test set.
        teacher_cpu_seconds: the part of `cpu_seconds` spent on teachers (live, or caching maps).
        wall_seconds: time of the training, evaluation left out; 0 if it was not measured.
        blank: tallies on the test set with every image blanked; empty when not measured.
        learning_curve: points on the validation set.
        loss_curve: training losses.
        projection_log: gradient shares, cosines and conflicts.
    """

    arm: str
    seed: int
    steps: int
    parameters: int
    cpu_seconds: float
    accuracy: Tallies
    teacher_cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    blank: Tallies = field(default_factory=dict)
    learning_curve: tuple[CurvePoint, ...] = ()
    loss_curve: tuple[LossPoint, ...] = ()
    projection_log: tuple[ProjectionPoint, ...] = ()

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Run:
        """A run from parsed JSON, as `dataclasses.asdict` gave it; errors as `Study.from_json`."""
        run: Run = decode(cls, dict(document), "run")
        return run


@dataclass(frozen=True)
class Teacher:
    """A teacher and its own results on the students' test set."""

    name: str
    parameters: int
    accuracy: Tallies
    blank: Tallies = field(default_factory=dict)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Teacher:
        """A teacher from parsed JSON, likewise."""
        teacher: Teacher = decode(cls, dict(document), "teacher")
        return teacher


@dataclass(frozen=True)
class Baseline:
    """A rule without a model, such as always giving the training set's most frequent answer."""

    name: str
    accuracy: Tallies


@dataclass(frozen=True)
class Comparison:
    """A pair of arms whose difference the report shows, beside those against the reference."""

    arm: str
    against: str


@dataclass(frozen=True)
class Study:
    """Everything that a report says.

    Attributes:
        title: heading of the report.
        settings: what was run, in the order in which it is to be read: frames, seeds, sizes,
            versions, the machine's cores.
        notes: what a reader must know before believing a number; whole sentences.
        capabilities: in the order of the tables' columns.
        arms: in the order of the tables' rows; each has at least one run.
        runs: at most one for each arm and seed.
        teachers: may be empty.
        baselines: may be empty.
        reference: name of the arm that the others are compared with.
        comparisons: further pairs of arms.

    Raises:
        ValueError: what does not fit together, with the place: unknown arms or capabilities,
            a second run of an arm and seed, test sets of different sizes, times below 0.
    """

    title: str
    settings: dict[str, Setting]
    notes: tuple[str, ...]
    capabilities: tuple[str, ...]
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    teachers: tuple[Teacher, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    reference: str = "ce"
    comparisons: tuple[Comparison, ...] = ()

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(problem)

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def runs_of(self, arm: str) -> list[Run]:
        """The arm's runs, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def to_json(self) -> str:
        """The document as JSON text; numbers that are not finite become null."""
        document = {"format": FORMAT, **asdict(self)}
        return json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Study:
        """Read what `to_json` wrote; null in the place of a float becomes NaN.

        Raises:
            ValueError: not JSON, another format, a missing or unknown key (with its place).
            TypeError: a value of the wrong kind (with its place).
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"study: not a drivekd report document of format {FORMAT}")
        study: Study = decode(cls, document, "study")
        return study


def _problems(study: Study) -> Iterator[str]:
    """What does not fit together, as sentences."""
    names = [arm.name for arm in study.arms]
    if not study.capabilities:
        yield "capabilities is empty"
    if not names:
        yield "arms is empty"
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name):
            yield f"arm name {name!r} may hold only letters, digits and _ . + -"
        if names.count(name) > 1:
            yield f"arm {name!r} is listed twice"
        if not study.runs_of(name):
            yield f"arm {name!r} has no run; leave it out of arms"
    wanted = [study.reference, *(n for c in study.comparisons for n in (c.arm, c.against))]
    for name in wanted:
        if name not in names:
            yield f"reference or comparison arm {name!r} is not one of {names}"
    seen = set()
    for run in study.runs:
        where = f"run {run.arm!r} seed {run.seed}"
        if run.arm not in names:
            yield f"{where}: its arm is not one of {names}"
        if (run.arm, run.seed) in seen:
            yield f"{where} is there twice"
        seen.add((run.arm, run.seed))
        if not 0 <= run.teacher_cpu_seconds <= run.cpu_seconds < math.inf:
            yield f"{where}: 0 <= teacher_cpu_seconds <= cpu_seconds does not hold"
        if not 0 <= run.wall_seconds < math.inf:
            yield f"{where}: wall_seconds is {run.wall_seconds}; it must be finite and not negative"
        if run.steps < 0 or run.parameters < 0:
            yield f"{where}: steps and parameters must not be negative"
        for point in run.learning_curve:
            if unknown := sorted(point.accuracy.keys() - set(study.capabilities)):
                yield f"{where}: learning_curve has unknown capabilities {unknown}"
    yield from _test_set_problems(study)


def _test_set_problems(study: Study) -> Iterator[str]:
    """Every result must cover the same capabilities, and the same questions of the test set."""
    results = [(f"run {r.arm!r} seed {r.seed}", r.accuracy, r.blank) for r in study.runs]
    results += [(f"teacher {t.name!r}", t.accuracy, t.blank) for t in study.teachers]
    results += [(f"baseline {b.name!r}", b.accuracy, {}) for b in study.baselines]
    sizes = None
    for where, accuracy, blank in results:
        for name, tallies in (("accuracy", accuracy), ("blank", blank)):
            covered = set(tallies) == set(study.capabilities) and all(tallies.values())
            if not covered and (name == "accuracy" or tallies):
                yield f"{where}: {name} must have questions of each of {study.capabilities}"
        size = {c: {q: t.total for q, t in kinds.items()} for c, kinds in accuracy.items()}
        sizes = sizes or size
        if size != sizes:
            yield f"{where}: its test set differs from the first run's: {size} is not {sizes}"


def finite(value: Any) -> Any:
    """The same document with None for every float that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated kind from parsed JSON, strictly."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, _of(dict, value, where), where)
    if origin is tuple:
        items = _of(list, value, where)
        return tuple(decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin is dict:
        items = _of(dict, value, where)
        return {key: decode(arguments[1], v, f"{where}[{key!r}]") for key, v in items.items()}
    if origin is types.UnionType:  # a setting: anything flat
        if isinstance(value, dict):
            raise TypeError(f"{where} is an object; a setting is a string, a number or a list")
        return value
    if kind is float:
        return math.nan if value is None else float(_of((int, float), value, where))
    return _of(kind, value, where)


def _decode_dataclass(kind: type, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"{where} has unknown keys {unknown}")
    arguments = {}
    for each in fields(kind):
        place = f"{where}.{each.name}"
        if each.name in value:
            arguments[each.name] = decode(hints[each.name], value[each.name], place)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{place} is missing")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def _of(kind: type | tuple[type, ...], value: Any, where: str) -> Any:
    """The value itself, if it is of that kind; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = "/".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{where} is {value!r}; wanted {names}")
    return value
