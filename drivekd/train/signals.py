"""From settings to losses: which teacher runs on which samples, and what is compared."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from drivekd.capture import CapturedAttention, capture_attention
from drivekd.capture.model import decoder_depth, find_decoder
from drivekd.data.collate import Route, Source
from drivekd.errors import RecipeError, TokenMismatchError
from drivekd.functional.projection import on_device
from drivekd.losses import AttentionMapLoss
from drivekd.pairing import resolve_layers
from drivekd.phases import phase
from drivekd.tokens import TokenLayout
from drivekd.train.config import DistillConfig, SignalConfig
from drivekd.train.guards import TaskLoss
from drivekd.train.hidden import HiddenStateLoss, capture_hidden_states, width
from drivekd.train.liger import check_installed
from drivekd.train.logits import logit_distillation_loss


@dataclass(frozen=True)
class ForwardOutput:
    """What a forward leaves: captured attention, hidden states, logits, or several of them."""

    capture: CapturedAttention | None
    hidden: Mapping[int, Tensor]
    logits: Tensor | None

    def zero(self, signal: Signal) -> Tensor:
        """An exact 0 that depends on all that the signal reads, for a batch without its samples.

        Its gradient is zeros where that of the signal's loss is numbers.
        """
        if signal.loss is None:
            read = [self.logits]
        elif self.capture is not None and isinstance(signal.loss, AttentionMapLoss):
            records = [self.capture[layer] for layer in signal.student_layers]
            read = [tensor for record in records for tensor in (record.query, record.key)]
        else:
            read = [self.hidden[layer] for layer in signal.student_layers]
        # Sums over nothing: 0 whatever the values, which need not be finite.
        sums = [tensor[:0].float().sum() for tensor in read if tensor is not None]
        return torch.stack(sums).sum()


@dataclass(frozen=True)
class Signal:
    """A signal bound to models and data.

    Attributes:
        config: Its settings.
        route: Name of the route whose samples it works on.
        sample_weights: Weight of a sample by its question type; types of other samples are absent.
        loss: The loss with resolved layers; None for a logits signal.
    """

    config: SignalConfig
    route: str
    sample_weights: Mapping[str, float]
    loss: AttentionMapLoss | HiddenStateLoss | None

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student that the signal reads, non-negative."""
        return () if self.loss is None else tuple(self.loss.student_layers)


@dataclass(frozen=True)
class CachedSignal:
    """A signal whose targets were made before.

    Attributes:
        loss: The loss with resolved layers.
        source: Where a batch finds its targets.
        entries: How many records' targets there are.
    """

    loss: AttentionMapLoss
    source: Source
    entries: int


class StudentCapture:
    """Captures what signals read of the student's forward, in a `with`.

    Args:
        model: The student.
        signals: The signals of the batch.
    """

    def __init__(self, model: nn.Module, signals: Sequence[Signal]) -> None:
        self._model = model
        self._layers = {
            kind: sorted({n for s in signals if isinstance(s.loss, kind) for n in s.student_layers})
            for kind in (AttentionMapLoss, HiddenStateLoss)
        }
        self._stack = contextlib.ExitStack()
        self._capture: CapturedAttention | None = None
        self._hidden: Mapping[int, Tensor] = {}

    def __enter__(self) -> StudentCapture:
        with contextlib.ExitStack() as stack:
            if layers := self._layers[AttentionMapLoss]:
                self._capture = stack.enter_context(capture_attention(self._model, layers))
            if layers := self._layers[HiddenStateLoss]:
                self._hidden = stack.enter_context(capture_hidden_states(self._model, layers))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def output(self, logits: Tensor | None) -> ForwardOutput:
        """What was captured, with the forward's logits."""
        return ForwardOutput(self._capture, self._hidden, logits)


@dataclass(frozen=True)
class _TeacherRoute:
    """One forward of a teacher: the layers to capture, and whether it must run to its end."""

    teacher: nn.Module
    layers: tuple[int, ...]
    hidden_layers: tuple[int, ...]
    needs_logits: bool

    def run(self, route: Route) -> ForwardOutput:
        """Run the teacher on a route's samples, no further than it must."""
        place = next(self.teacher.parameters()).device
        if place.type != "meta":  # weights that accelerate's hooks bring in; they move inputs
            route = route.to(place, non_blocking=place.type != "cpu")
        inputs = {**route.inputs, "use_cache": False}
        stops = not self.needs_logits and not self.hidden_layers
        with torch.no_grad(), contextlib.ExitStack() as stack:
            capture = None
            hidden: Mapping[int, Tensor] = {}
            if self.layers:
                capture = stack.enter_context(
                    capture_attention(self.teacher, self.layers, stop_after_last=stops)
                )
            if self.hidden_layers:
                hidden = stack.enter_context(
                    capture_hidden_states(self.teacher, self.hidden_layers)
                )
            output: Any = self.teacher(**inputs)
        return ForwardOutput(capture, hidden, output.logits if self.needs_logits else None)


class SignalPlan:
    """All active signals of a distillation, bound to a student, its teachers and the data's types.

    Signals that share a teacher and the question types that they work on share one route: one
    forward of the teacher, on those samples only, which stops after the last layer that any of
    them needs (logits and hidden states need the whole forward).

    Args:
        config: The settings.
        student: The student, for the depth of its decoder.
        teachers: Teachers by name; one module under two names counts as one teacher.
        question_types: The question types of the data.
        cached: Signals that need no teacher, by name.

    Attributes:
        signals: The active signals.
        routes: For each route the question types of its samples.
        sources: For each route of a cached signal where its targets are found.
        helpers: What is trained beside the student.

    Raises:
        RecipeError: A layer does not exist.
        ValueError: Mixing does not fit the data.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        question_types: Collection[str],
        cached: Mapping[str, CachedSignal] | None = None,
    ) -> None:
        cached = {} if cached is None else cached
        mixing = config.resolve_mixing(question_types)
        first_name: dict[int, str] = {}
        for name, teacher in teachers.items():
            first_name.setdefault(id(teacher), name)
        self.signals: list[Signal] = []
        self.routes: dict[str, frozenset[str]] = {}
        self.sources: dict[str, Source] = {}
        layers: dict[str, set[int]] = {}
        hidden: dict[str, set[int]] = {}
        logits: set[str] = set()
        routed: dict[str, nn.Module] = {}
        for signal in config.active:
            types = frozenset(mixing[signal.name])
            if signal.name in cached:
                route, ready = f"{signal.name}, cached", cached[signal.name]
                self.routes[route], self.sources[route] = types, ready.source
                self.signals.append(Signal(signal, route, mixing[signal.name], ready.loss))
                continue
            teacher = teachers[signal.teacher]
            route = f"{first_name[id(teacher)]}({', '.join(sorted(types))})"
            loss = signal_loss(signal, student, teacher)
            self.routes[route] = types
            routed[route] = teacher
            if loss is None:
                logits.add(route)
            else:
                of_kind = layers if isinstance(loss, AttentionMapLoss) else hidden
                of_kind.setdefault(route, set()).update(loss.teacher_layers)
            self.signals.append(Signal(signal, route, mixing[signal.name], loss))
        self._forwards = {
            route: _TeacherRoute(
                teacher,
                tuple(sorted(layers.get(route, ()))),
                tuple(sorted(hidden.get(route, ()))),
                route in logits,
            )
            for route, teacher in routed.items()
        }
        # What is trained beside the student, and thrown away afterwards.
        self.helpers = nn.ModuleDict(
            {
                signal.config.name: signal.loss
                for signal in self.signals
                if isinstance(signal.loss, HiddenStateLoss)
            }
        )

    @property
    def teachers(self) -> list[nn.Module]:
        """The teachers that run, each once."""
        return list(dict.fromkeys(forward.teacher for forward in self._forwards.values()))

    def present(self, routes: Mapping[str, Route]) -> list[Signal]:
        """The signals that have samples in a batch with these routes."""
        return [signal for signal in self.signals if signal.route in routes]

    def run_teachers(self, routes: Mapping[str, Route]) -> dict[str, ForwardOutput]:
        """Run every teacher on its samples, without gradients.

        Args:
            routes: The batch's routes; copied to the teachers' devices.

        Returns:
            One output for each route that has a teacher, on its teacher's device.
        """
        outputs: dict[str, ForwardOutput] = {}
        for name, route in routes.items():
            if name in self.sources:
                continue
            users = (signal.config.name for signal in self.signals if signal.route == name)
            with phase(f"teacher of {', '.join(users)}"):
                outputs[name] = self._forwards[name].run(route)
        return outputs

    def losses(
        self,
        signals: Sequence[Signal],
        batch: Mapping[str, Any],
        teachers: Mapping[str, ForwardOutput],
        student: ForwardOutput,
    ) -> dict[str, TaskLoss]:
        """Compute the losses of the signals that have samples in a batch.

        Args:
            signals: What `present` gave.
            batch: The batch of `drivekd.data.Collator`.
            teachers: What `run_teachers` gave.
            student: What the student's forward on the whole batch left.

        Returns:
            Losses by signal name.

        Raises:
            TokenMismatchError: A teacher saw other tokens than the student; names the record.
        """
        selected: dict[str, tuple[CapturedAttention | None, TokenLayout]] = {}
        losses: dict[str, TaskLoss] = {}
        for signal in signals:
            route: Route = batch["routes"][signal.route]
            with phase(f"loss of {signal.config.name}"):
                if signal.route not in selected:
                    selected[signal.route] = _select(route, batch["tokens"], student.capture)
                own, tokens = selected[signal.route]
                output = teachers.get(signal.route)
                layers = self._layers(signal, batch, route, own, tokens, output, student)
            losses[signal.config.name] = self._task_loss(signal, layers, batch)
        return losses

    def _layers(
        self,
        signal: Signal,
        batch: Mapping[str, Any],
        route: Route,
        own: CapturedAttention | None,
        tokens: TokenLayout,
        teacher: ForwardOutput | None,
        student: ForwardOutput,
    ) -> Tensor:
        """(L,) losses of a signal, one per student layer."""
        weight = _sample_weight(signal, batch["question_types"], route.rows.device)
        layers: Tensor
        if teacher is None:
            if own is None or not isinstance(signal.loss, AttentionMapLoss):
                raise ValueError(f"signal {signal.config.name!r} needs the student's capture")
            stored = cast(Any, route.stored)
            layers = signal.loss.with_targets(own, stored, tokens, weight, reduction="none")
        elif isinstance(signal.loss, AttentionMapLoss):
            try:
                layers = signal.loss(own, teacher.capture, tokens, weight, reduction="none")
            except TokenMismatchError as error:
                raise _with_record(error, signal, route, batch) from error
        elif signal.loss is not None:
            states = {n: student.hidden[n][route.rows] for n in signal.student_layers}
            place = tokens.valid.device
            theirs = {n: teacher.hidden[n].to(place) for n in signal.loss.teacher_layers}
            layers = signal.loss(states, theirs, tokens.valid, weight)
        else:
            layers = self._logit_loss(signal, batch, route, teacher, student, weight)[None]
        return layers

    @staticmethod
    def _task_loss(signal: Signal, layers: Tensor, batch: Mapping[str, Any]) -> TaskLoss:
        types, ids = batch["question_types"], batch.get("record_ids", ())
        records = [i for i, kind in zip(ids, types, strict=False) if kind in signal.sample_weights]
        return TaskLoss(layers, signal.student_layers, records)

    @staticmethod
    def _logit_loss(
        signal: Signal,
        batch: Mapping[str, Any],
        route: Route,
        teacher: ForwardOutput,
        student: ForwardOutput,
        weight: Tensor | None,
    ) -> Tensor:
        if student.logits is None or teacher.logits is None:
            raise ValueError(f"signal {signal.config.name!r} needs logits of both models")
        entries = signal.config.vocabulary
        sizes = (student.logits.shape[-1], teacher.logits.shape[-1])
        if entries is not None and entries > min(sizes):
            raise TokenMismatchError(
                f"signal {signal.config.name!r} compares {entries} entries but the student has "
                f"{sizes[0]} and the teacher {sizes[1]}; give vocabulary the tokenizer's size"
            )
        return logit_distillation_loss(
            student.logits[route.rows, :, :entries],
            teacher.logits[..., :entries],
            batch["labels"][route.rows],
            temperature=signal.config.temperature,
            sample_weight=weight,
            implementation=signal.config.implementation,
        )


def depth(model: nn.Module) -> int:
    """Number of layers of the (whole) model's text decoder."""
    return decoder_depth(find_decoder(model))


def signal_loss(
    signal: SignalConfig, student: nn.Module, teacher: nn.Module
) -> AttentionMapLoss | HiddenStateLoss | None:
    """The loss of a signal with its layers resolved; None for a logits signal."""
    if signal.implementation == "liger":
        check_installed()
    if signal.student_layers is None or signal.teacher_layers is None:
        return None
    if signal.region is not None:
        return attention_loss(signal, depth(student), depth(teacher))
    try:
        return HiddenStateLoss(
            student_layers=resolve_layers(signal.student_layers, depth(student)),
            teacher_layers=resolve_layers(signal.teacher_layers, depth(teacher)),
            student_width=width(student),
            teacher_width=width(teacher),
        )
    except ValueError as error:
        raise RecipeError(f"signal {signal.name!r}: {error}") from error


def attention_loss(
    signal: SignalConfig, student_depth: int, teacher_depth: int
) -> AttentionMapLoss:
    """The loss of an attention signal between decoders of so many layers.

    Raises:
        RecipeError: A layer does not exist.
    """
    if signal.student_layers is None or signal.teacher_layers is None or signal.region is None:
        raise RecipeError(f"signal {signal.name!r} does not compare attention maps")
    try:
        return AttentionMapLoss(
            student_layers=resolve_layers(signal.student_layers, student_depth),
            teacher_layers=resolve_layers(signal.teacher_layers, teacher_depth),
            region=signal.region,
            loss=signal.loss,
            denominator=signal.denominator,
        )
    except ValueError as error:
        raise RecipeError(f"signal {signal.name!r}: {error}") from error


def _with_record(
    error: TokenMismatchError, signal: Signal, route: Route, batch: Mapping[str, Any]
) -> TokenMismatchError:
    """The same error with the names of signal and record."""
    records = batch.get("record_ids")
    where = f"signal {signal.config.name!r}"
    if error.sample is not None and records is not None:
        where += f", record {records[int(route.rows[error.sample])]!r}"
    return TokenMismatchError(f"{where}: {error}", error.sample)


def _select(
    route: Route, tokens: TokenLayout, capture: CapturedAttention | None
) -> tuple[CapturedAttention | None, TokenLayout]:
    """The student's capture and the layout for a route's samples."""
    if len(route.rows) == tokens.batch_size:
        return capture, tokens
    chosen = None if capture is None else capture.select(route.rows)
    return chosen, tokens.select(route.rows)


def _sample_weight(
    signal: Signal, question_types: Sequence[str], device: torch.device
) -> Tensor | None:
    """(B_route,) float32 weights of the route's samples; None if all are 1."""
    table = signal.sample_weights
    weights = [table[question_type] for question_type in question_types if question_type in table]
    if all(weight == 1.0 for weight in weights):
        return None
    return on_device(torch.tensor(weights, dtype=torch.float32), device)
