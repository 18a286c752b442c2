"""Settings of a distillation: signals, how they are mixed, weighted and joined.

Plain frozen dataclasses, checked when they are made. Nothing here knows perception, reasoning or
planning: capabilities are whatever names the signals and the question types of the data carry.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from drivekd.pairing import check_layers
from drivekd.reweighting import BalancedWeights, OnlineWeights, StaticWeights
from drivekd.reweighting.checks import is_finite
from drivekd.train.liger import Implementation

LayerSpec = int | str | tuple[int, ...]
SignalKind = Literal["attention", "hidden", "logits"]
Region = Literal["full", "text_to_vision"]
MapLoss = Literal["mse", "cosine", "kl"]
Denominator = Literal["official", "live"]
Weighting = Literal["balance", "static", "online"]
ProjectionMethod = Literal["agp", "stage1", "stage2", "pcgrad", "none"]
MissingGradients = Literal["zero", "official"]
AnchorMultiplicity = Literal["official", "once"]
ProjectionInterval = Literal["microbatch", "step"]

ANCHOR = "ce"
_WEIGHTINGS = {"balance": BalancedWeights, "static": StaticWeights, "online": OnlineWeights}
_LOG_PREFIXES = ("cosine", "conflict")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about a name: the nearest valid one, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(names) or 'none'}"


def _check_choice(name: str, value: object, alias: object) -> None:
    choices = get_args(alias)
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ValueError(f"{name} is {value!r}, wanted one of {list(choices)}; {hint}")


def _check_number(
    name: str, value: object, *, at_least: float = 0.0, positive: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, wanted a number")
    if not is_finite(value) or value < at_least or (positive and value == 0):
        wanted = "a finite number above 0" if positive else f"a finite number from {at_least} on"
        raise ValueError(f"{name} is {value!r}, wanted {wanted}")


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}, wanted a mapping")


def _check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or "/" in value:
        raise ValueError(f"{name} is {value!r}, wanted a string without '/' that is not empty")


@dataclass(frozen=True, kw_only=True)
class SignalConfig:
    """One thing that the student learns from one teacher.

    Args:
        name: The signal's name, in the log and in mixing; any but "ce".
        teacher: Name of the teacher.
        kind: "attention" compares attention maps, "hidden" hidden states through a linear map that
            is trained along and not saved with the student, "logits" next-token distributions.
        student_layers: Layers of the student's maps: "first", "penultimate", "last", an int, a
            sequence of ints, or an inclusive range such as "0..-2". Not for logits.
        teacher_layers: Layers of the teacher's maps, likewise. As many as the student's are paired
            one to one, otherwise by `drivekd.match_layer_groups`.
        region: Cells that are compared: "full", or "text_to_vision" (text queries, vision keys).
            Attention only.
        loss: "mse", "cosine" or "kl" of the head-mean maps; attention only.
        denominator: Which cells the "mse" divides by (`drivekd.functional.attention_map_loss`).
        temperature: Softens both distributions; logits only.
        vocabulary: Compare only this many first entries; for models of one tokenizer whose
            embeddings are padded to different sizes. None wants equal sizes. Logits only.
        implementation: What computes the divergences: "torch", "liger" (Liger-Kernel), or "auto",
            which is Liger's on a GPU where it is installed. Logits only.
        share: Under weighting "balance" the share of the cross-entropy's gradient norm at which
            this signal's is held; 0.02 to 0.25 were useful.
        weight: Under weighting "static" the loss's factor, under "online" its start and proportion.
            A static weight of 0 switches the signal off: nothing is run or computed for it.

    Raises:
        TypeError: A value has the wrong kind.
        ValueError: A value is not legal, or belongs to the other kind of signal.
    """

    name: str
    teacher: str
    kind: SignalKind = "attention"
    student_layers: LayerSpec | None = None
    teacher_layers: LayerSpec | None = None
    region: Region | None = None
    loss: MapLoss = "mse"
    denominator: Denominator = "official"
    temperature: float = 2.0
    vocabulary: int | None = None
    implementation: Implementation = "auto"
    share: float = 0.1
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        _check_name("teacher", self.teacher)
        if self.name == ANCHOR:
            raise ValueError(f"name is {ANCHOR!r}, which is the cross-entropy's own")
        if self.name in _LOG_PREFIXES or "." in self.name:
            raise ValueError(
                f"name is {self.name!r}; names hold no '.', and {', '.join(_LOG_PREFIXES)} are "
                "taken by the log"
            )
        _check_choice("kind", self.kind, SignalKind)
        _check_choice("loss", self.loss, MapLoss)
        _check_choice("denominator", self.denominator, Denominator)
        _check_choice("implementation", self.implementation, Implementation)
        if self.implementation != "auto" and self.kind != "logits":
            raise ValueError(f"signal {self.name!r}: implementation belongs to kind 'logits'")
        _check_number("temperature", self.temperature, positive=True)
        _check_number("share", self.share, positive=True)
        _check_number("weight", self.weight)
        if self.vocabulary is not None:
            if self.kind != "logits":
                raise ValueError(f"signal {self.name!r}: vocabulary belongs to kind 'logits'")
            if isinstance(self.vocabulary, bool) or not isinstance(self.vocabulary, int):
                raise TypeError(f"vocabulary is {self.vocabulary!r}, wanted an int")
            _check_number("vocabulary", self.vocabulary, at_least=1)
        layers = (self.student_layers, self.teacher_layers)
        if self.kind == "logits":
            if layers != (None, None) or self.region is not None:
                raise ValueError(
                    f"signal {self.name!r} compares logits; student_layers, teacher_layers and "
                    "region belong to kind 'attention'"
                )
            return
        if self.kind == "hidden":
            if None in layers or self.region is not None or self.loss != "mse":
                raise ValueError(
                    f"signal {self.name!r} compares hidden states: it needs student_layers and "
                    "teacher_layers; region and loss belong to kind 'attention'"
                )
        elif None in layers or self.region is None:
            raise ValueError(
                f"signal {self.name!r} compares attention maps and needs student_layers, "
                "teacher_layers and region ('full' or 'text_to_vision')"
            )
        if self.region is not None:
            _check_choice("region", self.region, Region)
        for which in ("student_layers", "teacher_layers"):
            spec = getattr(self, which)
            check_layers(which, spec)
            if isinstance(spec, Sequence) and not isinstance(spec, str):
                object.__setattr__(self, which, tuple(spec))


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How the gradients of cross-entropy and signals are joined (`drivekd.GradientProjector`).

    Args:
        method: "agp", one of its stages, "pcgrad", or "none" for the plain weighted sum.
        missing: What an absent gradient counts as.
        ce_multiplicity: How often the cross-entropy counts. "once" is the default here, unlike in
            GradientProjector and the public code ("official": once per capability present), so
            that a projected run and a plain sum are comparable at one weight; with "official"
            compare AGP at n times the plain sum's weight, n being the capabilities present.
        every: Project each micro-batch's gradients, as the public code does, or the accumulated
            ones of an optimizer step. Several processes then communicate once per step.
        seed: Seed of the projection order.

    Raises:
        TypeError: `seed` is no int.
        ValueError: A value is not legal.
    """

    method: ProjectionMethod = "agp"
    missing: MissingGradients = "zero"
    ce_multiplicity: AnchorMultiplicity = "once"
    every: ProjectionInterval = "microbatch"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("method", self.method, ProjectionMethod)
        _check_choice("missing", self.missing, MissingGradients)
        _check_choice("ce_multiplicity", self.ce_multiplicity, AnchorMultiplicity)
        _check_choice("every", self.every, ProjectionInterval)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed is {self.seed!r}, wanted an int")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}, wanted an int of 64 bits")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """All of a distillation but models and data; without signals it is plain training.

    Args:
        signals: What is learnt beside the answers.
        mixing: For each question type the sample weight of each signal on its records; a signal
            that is not named (or has 0) skips them, a type that is not named gets cross-entropy
            alone. None: each signal on the question type of its own name if the data have it, else
            on all.
        weighting: How losses are weighted against cross-entropy. "balance" holds each signal's
            gradient norm at its `share` of cross-entropy's, "static" uses its `weight`, "online"
            is the GradNorm-like rule of `drivekd.reweighting.OnlineWeights`.
        weighting_options: Further arguments of the class behind `weighting`
            (`drivekd.reweighting.BalancedWeights`, `OnlineWeights`).
        projection: How gradients are joined.
        small_share_warning: A signal whose weighted gradient norm stays under this share of
            cross-entropy's is reported once: it does next to nothing.

    Raises:
        TypeError: A value has the wrong kind.
        ValueError: Two signals share a name, mixing names an unknown signal, or a value is not
            legal.
    """

    signals: tuple[SignalConfig, ...] = ()
    mixing: Mapping[str, Mapping[str, float]] | None = None
    weighting: Weighting = "balance"
    weighting_options: Mapping[str, float] = field(default_factory=dict)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    small_share_warning: float = 0.005

    def __post_init__(self) -> None:
        if not isinstance(self.signals, Sequence):
            raise TypeError(
                f"signals is a {type(self.signals).__name__}, wanted a list of SignalConfig"
            )
        object.__setattr__(self, "signals", tuple(self.signals))
        for signal in self.signals:
            if not isinstance(signal, SignalConfig):
                raise TypeError(f"signals holds a {type(signal).__name__}, wanted SignalConfig")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"signals are named {list(self.names)}; every name may occur once")
        _check_choice("weighting", self.weighting, Weighting)
        _check_number("small_share_warning", self.small_share_warning)
        _check_mapping("weighting_options", self.weighting_options)
        options = list(inspect.signature(_WEIGHTINGS[self.weighting]).parameters)[1:]
        for name in self.weighting_options:
            if name not in options:
                raise ValueError(
                    f"weighting_options names {name!r}, which weighting {self.weighting!r} does "
                    f"not have; {nearest(name, options)}"
                )
        if not isinstance(self.projection, ProjectionConfig):
            raise TypeError(f"projection is {self.projection!r}, wanted a ProjectionConfig")
        if self.mixing is not None:
            _check_mapping("mixing", self.mixing)
        for question_type, weights in (self.mixing or {}).items():
            _check_mapping(f"mixing[{question_type!r}]", weights)
            for name, weight in weights.items():
                if name not in self.names:
                    raise ValueError(
                        f"mixing[{question_type!r}] names the signal {name!r}, which does not "
                        f"exist; {nearest(name, self.names)}"
                    )
                _check_number(f"mixing[{question_type!r}][{name!r}]", weight)
        if self.mixing is not None:
            frozen = {key: MappingProxyType(dict(value)) for key, value in self.mixing.items()}
            object.__setattr__(self, "mixing", MappingProxyType(frozen))
        frozen_options = MappingProxyType(dict(self.weighting_options))
        object.__setattr__(self, "weighting_options", frozen_options)

    @property
    def names(self) -> tuple[str, ...]:
        """The signals' names, in order."""
        return tuple(signal.name for signal in self.signals)

    @property
    def active(self) -> tuple[SignalConfig, ...]:
        """The signals that can change anything: all but those with a static weight of 0."""
        static = self.weighting == "static"
        return tuple(signal for signal in self.signals if not (static and signal.weight == 0))

    def teacher_layers(self, *, cached: bool = False) -> dict[str, list[LayerSpec] | None]:
        """For each teacher the layers that its signals read; None if one needs all of it.

        Args:
            cached: Whether the targets of attention signals come from a cache, so that only other
                signals need a teacher.
        """
        needs: dict[str, list[LayerSpec] | None] = {}
        for signal in self.active:
            if cached and signal.kind == "attention":
                continue
            together = needs.setdefault(signal.teacher, [])
            if signal.teacher_layers is None or signal.region is None:  # logits, hidden states
                needs[signal.teacher] = None
            elif together is not None:
                together.append(signal.teacher_layers)
        return needs

    def resolve_mixing(self, question_types: Collection[str]) -> dict[str, dict[str, float]]:
        """Say which signal works on which question types of a data set, and how strongly.

        Args:
            question_types: The question types that the data have.

        Returns:
            For each signal, in order, its sample weight by question type, zeros left out.

        Raises:
            ValueError: mixing names a question type that the data do not have, or leaves a signal
                without any.
        """
        types = sorted(set(question_types))
        if self.mixing is None:
            return {
                name: {kind: 1.0 for kind in types if kind == name or name not in types}
                for name in self.names
            }
        for question_type in self.mixing:
            if question_type not in types:
                raise ValueError(
                    f"mixing names the question type {question_type!r}, which the data do not "
                    f"have; {nearest(question_type, types)}"
                )
        resolved = {
            name: {
                question_type: float(weights[name])
                for question_type, weights in self.mixing.items()
                if weights.get(name, 0.0) > 0
            }
            for name in self.names
        }
        for name, weights in resolved.items():
            if not weights:
                raise ValueError(f"mixing gives the signal {name!r} no question type")
        return resolved
