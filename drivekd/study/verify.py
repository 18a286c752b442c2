"""Fused losses against eager ones, on a user's own student, teacher and batch."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.capture import capture_attention
from drivekd.capture.model import find_decoder, path_to
from drivekd.errors import CaptureError
from drivekd.losses import AttentionMapLoss
from drivekd.study.eager import eager_loss, placed
from drivekd.study.measure import evaluating, now, peak_bytes
from drivekd.tokens import TokenLayout, reads_text_alone
from drivekd.train.config import Region, SignalConfig
from drivekd.train.models import check_same_vision
from drivekd.train.signals import signal_loss

AGREES, DIFFERS, NOTHING = "agrees", "differs", "nothing to learn"


def _signal(name: str, layers: str, region: Region) -> SignalConfig:
    return SignalConfig(
        name=name, teacher="teacher", student_layers=layers, teacher_layers=layers, region=region
    )


PAPER_SIGNALS = (
    _signal("perception", "first", "text_to_vision"),
    _signal("reasoning", "0..-2", "full"),
    _signal("planning", "penultimate", "text_to_vision"),
)
# Two float32 ways of computing one gradient are so far apart, in the worst of all tensors.
FLOOR = 1e-4
# Losses of maps that are the same but for rounding; such gradients are noise.
_ROUNDING = {"mse": 1e-13, "cosine": 1e-6, "kl": 1e-6}
_WHOLE, _SINGLE = 2.0, 4.0  # times eager's own error: of all gradients, of one tensor's
_SMALL = 1e-3  # of the largest gradient; tensors below are compared with that


@dataclass(frozen=True)
class Check:
    """One signal: the fused way beside the eager way, both against eager attention in float32.

    Errors are relative. What is allowed is twice what eager attention in the models' own dtype is
    off by (four times for a single tensor), and never less than float32's noise. That is wide in 16
    bits, so the fused way runs in float32 too, where it may be off by that noise only. There is no
    use in float64: transformers takes norms and softmax in float32 whatever the weights are in.

    Attributes:
        signal: Name.
        dtype: In which the models ran.
        loss: The fused loss.
        loss_eager: The eager loss.
        loss_exact: The eager loss in float32.
        loss_error: Of the fused loss.
        loss_allowed: Bound on it.
        gradient_error: Of the gradients of all parameters together.
        gradient_error_eager: The same of the eager way.
        gradient_allowed: Bound on `gradient_error`.
        worst_parameter: The parameter with the largest error for what it is allowed.
        worst_error: Its largest error, relative to its largest entry.
        worst_allowed: Bound on it.
        float32_loss_error: Of the fused loss when both models are in float32.
        float32_gradient_error: Of its gradients.
        float32_allowed: Bound on both.
        gradients: Number of parameters with a gradient.
        only_fused: Parameters that have a gradient the fused way only.
        only_eager: Parameters that have one the eager way only.
        seconds: Median of a step the fused way: teacher, student, loss and backward.
        seconds_eager: The same the eager way.
        peak_bytes: Most memory that a step takes beside the models, the fused way.
        peak_bytes_eager: The same the eager way.
        verdict: "agrees", "differs", or "nothing to learn" where both ways find that student and
            teacher have the same maps, or that no cell counts (a batch without image).
        reasons: What differs, or why there is nothing to learn; empty when it agrees.
    """

    signal: str
    dtype: str
    loss: float
    loss_eager: float
    loss_exact: float
    loss_error: float
    loss_allowed: float
    gradient_error: float
    gradient_error_eager: float
    gradient_allowed: float
    worst_parameter: str
    worst_error: float
    worst_allowed: float
    float32_loss_error: float
    float32_gradient_error: float
    float32_allowed: float
    gradients: int
    only_fused: tuple[str, ...]
    only_eager: tuple[str, ...]
    seconds: float
    seconds_eager: float
    peak_bytes: int
    peak_bytes_eager: int
    verdict: str
    reasons: tuple[str, ...]


def verify(
    student: nn.Module,
    teachers: nn.Module | Mapping[str, nn.Module],
    batch: Mapping[str, Any],
    signals: Sequence[SignalConfig] = PAPER_SIGNALS,
    *,
    tokens: TokenLayout | None = None,
    autocast: torch.dtype | None = None,
    repeats: int = 3,
) -> list[Check]:
    """Compare the fused losses and their gradients with eager attention's, and with float32's.

    Each signal runs three ways: as in training (the models' own attention, captured queries and
    keys, fused loss), with eager attention and `output_attentions=True` in the same dtype, and the
    latter again in float32. The models are left as they were; copies of them take memory.

    Args:
        student: The student; the gradients of its parameters that require one are compared.
        teachers: Teachers by name, or one for all signals; on any device.
        batch: Inputs of the models, on the student's device; other entries than tensors and the
            labels are left out.
        signals: What is compared; those of kind "logits" are left out. Default: the paper's three.
        tokens: What each token is; None reads it from the batch and the student's config. For
            InternVL's remote code `TokenLayout.from_batch(batch, student)`.
        autocast: dtype under which both ways run; None for none.
        repeats: How often each way is timed.

    Returns:
        One check for each signal.

    Raises:
        ValueError: A layer does not exist, or there is no attention signal.
        TokenMismatchError: Student and teacher make different tokens of an image.
        drivekd.errors.CaptureError: A model cannot be captured.
    """
    chosen = [signal for signal in signals if signal.kind == "attention"]
    if not chosen:
        raise ValueError("signals holds none of kind 'attention'; there is nothing to compare")
    inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    if tokens is None:
        config = student.config
        tokens = TokenLayout.from_batch(inputs, None if reads_text_alone(config) else config)
    checks = []
    for signal in chosen:
        teacher = teachers if isinstance(teachers, nn.Module) else teachers[signal.teacher]
        check_same_vision(signal.teacher, teacher, student)
        checks.append(_check(signal, student, teacher, inputs, tokens, autocast, repeats))
    return checks


def _check(
    signal: SignalConfig,
    student: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Tensor],
    tokens: TokenLayout,
    autocast: torch.dtype | None,
    repeats: int,
) -> Check:
    settings = signal_loss(signal, student, teacher)
    if not isinstance(settings, AttentionMapLoss):
        raise ValueError(f"signal {signal.name!r} compares no maps, wanted kind 'attention'")
    place = next(student.parameters()).device
    dtype = autocast or next(student.parameters()).dtype

    def fused(student: nn.Module = student, teacher: nn.Module = teacher) -> Tensor:
        captured = capture_attention(teacher, settings.teacher_layers, stop_after_last=True)
        with torch.no_grad(), captured:
            teacher(**placed(inputs, teacher), use_cache=False)
        with capture_attention(student, settings.student_layers) as own:
            student(**inputs, use_cache=False)
        loss: Tensor = settings(own, captured, tokens)
        return loss

    with evaluating(student, teacher):
        with _autocast(place, autocast):
            loss, gradients = _gradients(student, fused)
            seconds, peak = _cost(student, fused, place, repeats)
        eager_student, eager_teacher = (_eager_copy(model) for model in (student, teacher))

        def eager() -> Tensor:
            return eager_loss(eager_student, eager_teacher, inputs, tokens, settings)

        with _autocast(place, autocast):
            loss_eager, gradients_eager = _gradients(eager_student, eager)
            seconds_eager, peak_eager = _cost(eager_student, eager, place, repeats)
        for model in (eager_student, eager_teacher):
            model.float()
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        loss_exact, gradients_exact = _gradients(eager_student, eager)
        loss_float32, gradients_float32 = _gradients(
            eager_student, lambda: fused(eager_student, eager_teacher)
        )

    floor = max(FLOOR, torch.finfo(dtype).eps / 2)  # half: one rounding
    error, error_eager = (
        _whole_error(each, gradients_exact) for each in (gradients, gradients_eager)
    )
    scale = abs(loss_exact) or 1.0
    loss_error = abs(loss - loss_exact) / scale
    float32_loss_error = abs(loss_float32 - loss_exact) / scale
    float32_gradient_error = _whole_error(gradients_float32, gradients_exact)
    float32_allowed = FLOOR + _ROUNDING[settings.loss] / scale
    loss_allowed = _WHOLE * max(abs(loss_eager - loss_exact) / scale, error_eager) + floor
    gradient_allowed = _WHOLE * error_eager + floor
    largest = max((each.abs().max().item() for each in gradients_exact.values()), default=0.0)
    worst = ("", 0.0, floor)
    for name, exact in gradients_exact.items():
        if name in gradients and name in gradients_eager:
            least = _SMALL * largest or 1.0
            own, reference = (
                _tensor_error(each[name], exact, least) for each in (gradients, gradients_eager)
            )
            allowed = _SINGLE * max(reference, error_eager) + floor
            if own / allowed >= worst[1] / worst[2]:
                worst = (name, own, allowed)
    only_fused = tuple(sorted(set(gradients) - set(gradients_eager)))
    only_eager = tuple(sorted(set(gradients_eager) - set(gradients)))
    reasons = []
    is_nothing = max(abs(loss), abs(loss_exact)) <= _ROUNDING[settings.loss]
    if not loss_error <= loss_allowed:
        reasons.append(f"the loss is {loss:.6g} and should be {loss_exact:.6g}")
    if not error <= gradient_allowed:
        reasons.append(f"gradients are off by {error:.1e}, {gradient_allowed:.1e} is allowed")
    if not worst[1] <= worst[2]:
        reasons.append(f"the gradient of {worst[0]} is off by {worst[1]:.1e}")
    if not max(float32_loss_error, float32_gradient_error) <= float32_allowed:
        reasons.append(
            f"in float32 the loss is off by {float32_loss_error:.1e} and the gradients by "
            f"{float32_gradient_error:.1e}, {float32_allowed:.1e} is allowed"
        )
    for names, way in ((only_fused, "fused"), (only_eager, "eager")):
        if names:
            reasons.append(f"{len(names)} gradients exist the {way} way only, such as {names[0]}")
    if is_nothing:
        reasons = ["both ways: " + _why_nothing(settings, tokens, max(abs(loss), abs(loss_exact)))]
    verdict = NOTHING if is_nothing else DIFFERS if reasons else AGREES
    return Check(
        signal=signal.name,
        dtype=str(dtype).removeprefix("torch."),
        loss=loss,
        loss_eager=loss_eager,
        loss_exact=loss_exact,
        loss_error=loss_error,
        loss_allowed=loss_allowed,
        gradient_error=error,
        gradient_error_eager=error_eager,
        gradient_allowed=gradient_allowed,
        worst_parameter=worst[0],
        worst_error=worst[1],
        worst_allowed=worst[2],
        float32_loss_error=float32_loss_error,
        float32_gradient_error=float32_gradient_error,
        float32_allowed=float32_allowed,
        gradients=len(gradients),
        only_fused=only_fused,
        only_eager=only_eager,
        seconds=seconds,
        seconds_eager=seconds_eager,
        peak_bytes=peak,
        peak_bytes_eager=peak_eager,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def _why_nothing(settings: AttentionMapLoss, tokens: TokenLayout, loss: float) -> str:
    if settings.region == "text_to_vision":
        has_cells = tokens.is_vision.any(1) & tokens.is_text.any(1)
        if not bool(has_cells.any()):
            return "no sample of the batch has text and image tokens"
    if loss == 0.0:
        return "no cell of the batch counts, or student and teacher have the very same maps"
    return "student and teacher have the same maps but for rounding"


@contextlib.contextmanager
def _autocast(place: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(place.type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def _eager_copy(model: nn.Module) -> nn.Module:
    """A copy with eager attention, of its language model only where nothing more can switch."""
    twin = copy.deepcopy(model)
    for _, module in path_to(twin, find_decoder(twin)):
        if callable(switch := getattr(module, "set_attn_implementation", None)):
            switch("eager")
            return twin
    raise CaptureError(
        f"{type(model).__name__} holds no transformers model, so that there is no eager attention "
        "to compare with"
    )


def _gradients(
    student: nn.Module, compute: Callable[[], Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """A loss and the gradients that it has, by parameter name."""
    loss = compute()
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.item(), {n: g for n, g in zip(named, found, strict=True) if g is not None}


def _whole_error(gradients: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Norm of the error of all gradients over their norm."""
    names = [name for name in exact if name in gradients]
    off = [(gradients[name].to(exact[name]) - exact[name]).norm() for name in names]
    size = [exact[name].norm() for name in names]
    if not size:
        return 0.0
    return float(torch.stack(off).norm() / torch.stack(size).norm().clamp(min=1e-30))


def _tensor_error(gradient: Tensor, exact: Tensor, least: float) -> float:
    """Largest error of an entry over the largest entry, or over `least`."""
    return (gradient.to(exact) - exact).abs().max().item() / max(exact.abs().max().item(), least)


def _cost(
    student: nn.Module, compute: Callable[[], Tensor], place: torch.device, repeats: int
) -> tuple[float, int]:
    """Median seconds of a step and the most bytes that it takes on the device."""
    seconds = []
    for _ in range(repeats):
        begin = now(place)
        _gradients(student, compute)
        seconds.append(now(place) - begin)
    return statistics.median(seconds), peak_bytes(lambda: _gradients(student, compute), place)
