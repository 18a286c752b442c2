"""From settings to losses: which teacher runs on which samples, and what is compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.capture import CapturedAttention, capture_attention
from drivekd.capture.model import decoder_depth, find_decoder
from drivekd.data.collate import Route
from drivekd.errors import RecipeError, TokenMismatchError
from drivekd.losses import AttentionMapLoss
from drivekd.pairing import resolve_layers
from drivekd.tokens import TokenLayout
from drivekd.train.config import DistillConfig, SignalConfig
from drivekd.train.logits import logit_distillation_loss


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher's forward on a route leaves: captured attention, logits, or both."""

    capture: CapturedAttention | None
    logits: Tensor | None


@dataclass(frozen=True)
class Signal:
    """A signal bound to models and data.

    Attributes:
        config: Its settings.
        route: Name of the route whose samples it works on.
        sample_weights: Weight of a sample by its question type; types of other samples are absent.
        loss: The attention loss with resolved layers; None for a logits signal.
    """

    config: SignalConfig
    route: str
    sample_weights: Mapping[str, float]
    loss: AttentionMapLoss | None

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student that the signal reads, non-negative."""
        return () if self.loss is None else tuple(self.loss.student_layers)


@dataclass(frozen=True)
class _TeacherRoute:
    """One forward of a teacher: the layers to capture, and whether it must run to its end."""

    teacher: nn.Module
    layers: tuple[int, ...]
    needs_logits: bool


class SignalPlan:
    """All active signals of a distillation, bound to a student, its teachers and the data's types.

    Signals that share a teacher and the question types that they work on share one route: one
    forward of the teacher, on those samples only, which stops after the last layer that any of
    them needs (a logits signal needs the whole forward).

    Args:
        config: The settings.
        student: The student, for the depth of its decoder.
        teachers: Teachers by name; one module under two names counts as one teacher.
        question_types: The question types of the data.

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
    ) -> None:
        mixing = config.resolve_mixing(question_types)
        first_name: dict[int, str] = {}
        for name, teacher in teachers.items():
            first_name.setdefault(id(teacher), name)
        self.signals: list[Signal] = []
        self.routes: dict[str, frozenset[str]] = {}
        layers: dict[str, set[int]] = {}
        logits: set[str] = set()
        routed: dict[str, nn.Module] = {}
        for signal in config.active:
            types = frozenset(mixing[signal.name])
            teacher = teachers[signal.teacher]
            route = f"{first_name[id(teacher)]}({', '.join(sorted(types))})"
            loss = attention_loss(signal, student, teacher)
            self.routes[route] = types
            routed[route] = teacher
            layers.setdefault(route, set()).update(() if loss is None else loss.teacher_layers)
            if loss is None:
                logits.add(route)
            self.signals.append(Signal(signal, route, mixing[signal.name], loss))
        self._forwards = {
            route: _TeacherRoute(teacher, tuple(sorted(layers[route])), route in logits)
            for route, teacher in routed.items()
        }

    def present(self, routes: Mapping[str, Route]) -> list[Signal]:
        """The signals that have samples in a batch with these routes."""
        return [signal for signal in self.signals if signal.route in routes]

    def run_teachers(self, routes: Mapping[str, Route]) -> dict[str, TeacherOutput]:
        """Run every teacher on its samples, without gradients.

        Args:
            routes: The batch's routes; copied to the teachers' devices.

        Returns:
            One output for each route, on its teacher's device.
        """
        outputs: dict[str, TeacherOutput] = {}
        for name, route in routes.items():
            forward = self._forwards[name]
            place = next(forward.teacher.parameters()).device
            if place.type != "meta":  # weights that accelerate's hooks bring in; they move inputs
                route = route.to(place, non_blocking=place.type != "cpu")
            inputs = {**route.inputs, "use_cache": False}
            with torch.no_grad():
                if not forward.layers:
                    outputs[name] = TeacherOutput(None, forward.teacher(**inputs).logits)
                    continue
                stops = not forward.needs_logits
                with capture_attention(
                    forward.teacher, forward.layers, stop_after_last=stops
                ) as capture:
                    output: Any = forward.teacher(**inputs)
            outputs[name] = TeacherOutput(capture, None if stops else output.logits)
        return outputs

    def losses(
        self,
        signals: Sequence[Signal],
        batch: Mapping[str, Any],
        teachers: Mapping[str, TeacherOutput],
        capture: CapturedAttention | None,
        logits: Tensor | None,
    ) -> dict[str, Tensor]:
        """Compute the losses of the signals that have samples in a batch.

        Args:
            signals: What `present` gave.
            batch: The batch of `drivekd.data.Collator`.
            teachers: What `run_teachers` gave.
            capture: The student's captured attention on the whole batch; None if no signal of
                kind "attention" is present.
            logits: (B, N, V) logits of the student; None if no logits signal is present.

        Returns:
            0-d losses by signal name.

        Raises:
            TokenMismatchError: A teacher saw other tokens than the student; names the record.
        """
        selected: dict[str, tuple[CapturedAttention | None, TokenLayout]] = {}
        losses: dict[str, Tensor] = {}
        for signal in signals:
            route: Route = batch["routes"][signal.route]
            if signal.route not in selected:
                selected[signal.route] = _select(route, batch["tokens"], capture)
            student, tokens = selected[signal.route]
            weight = _sample_weight(signal, batch["question_types"], route.rows.device)
            output = teachers[signal.route]
            if signal.loss is not None:
                try:
                    value = signal.loss(student, output.capture, tokens, weight)
                except TokenMismatchError as error:
                    raise _with_record(error, signal, route, batch) from error
                losses[signal.config.name] = value
                continue
            if logits is None or output.logits is None:
                raise ValueError(f"signal {signal.config.name!r} needs logits of both models")
            losses[signal.config.name] = logit_distillation_loss(
                logits[route.rows],
                output.logits.to(logits.device),
                batch["labels"][route.rows],
                temperature=signal.config.temperature,
                sample_weight=weight,
            )
        return losses


def depth(model: nn.Module) -> int:
    """Number of layers of the (whole) model's text decoder."""
    return decoder_depth(find_decoder(model))


def attention_loss(
    signal: SignalConfig, student: nn.Module, teacher: nn.Module
) -> AttentionMapLoss | None:
    """The loss of an attention signal with its layers resolved; None for a logits signal."""
    if signal.student_layers is None or signal.teacher_layers is None or signal.region is None:
        return None
    try:
        return AttentionMapLoss(
            student_layers=resolve_layers(signal.student_layers, depth(student)),
            teacher_layers=resolve_layers(signal.teacher_layers, depth(teacher)),
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
    return torch.tensor(weights, dtype=torch.float32, device=device)
