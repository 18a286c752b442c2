"""nn.Module shells over `drivekd.functional`: they hold settings and read captures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from drivekd.errors import TokenMismatchError
from drivekd.functional import (
    AttentionMapTarget,
    layerwise_attention_map_loss,
    layerwise_attention_map_target_loss,
)
from drivekd.functional.attention import (
    Denominator,
    Loss,
    Region,
    check_groups,
    check_settings,
)
from drivekd.functional.targets import check_targets
from drivekd.pairing import match_layer_groups
from drivekd.tokens import TokenLayout


class LayerRecord(Protocol):
    """What a capture holds of one layer; see `drivekd.capture.CapturedLayer`."""

    @property
    def query(self) -> Tensor: ...  # noqa: D102
    @property
    def key(self) -> Tensor: ...  # noqa: D102
    @property
    def scale(self) -> float: ...  # noqa: D102
    @property
    def lse(self) -> Tensor | None: ...  # noqa: D102
    @property
    def window(self) -> int | None: ...  # noqa: D102


class CaptureRecords(Protocol):
    """What a loss reads of a capture; see `drivekd.capture_attention`."""

    @property
    def input_ids(self) -> Tensor | None: ...  # noqa: D102
    def __getitem__(self, layer: int, /) -> LayerRecord: ...


class AttentionMapLoss(nn.Module):
    """Attention-map loss of one capability, between layers of two captures.

    It holds no weight: multiply the loss, or give `weights` to `GradientProjector.backward`. Where
    a weight is the number 0, leave out the call, and with it the capture and the teacher that
    nothing else needs; the trainer does so.

    Args:
        student_layers: Student layers, negative ones count from the end.
        teacher_layers: Teacher layers.
        region: `"full"`, or `"text_to_vision"`: text queries x vision keys.
        loss: `"mse"`, `"cosine"` or `"kl"`; see `drivekd.functional.attention_map_loss`.
        denominator: `"official"` or `"live"`; used by `mse` only.
        groups: For each student layer its teachers, as positions in `teacher_layers`. Default: one
            to one where both lists are equally long, else `drivekd.match_layer_groups`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: No layer is named, a setting is unknown, or `groups` does not fit the layers.

    Example:
        >>> perception = AttentionMapLoss(
        ...     student_layers=[0], teacher_layers=[0], region="text_to_vision"
        ... )
        >>> perception.groups
        [[0]]
    """

    def __init__(
        self,
        *,
        student_layers: Sequence[int],
        teacher_layers: Sequence[int],
        region: Region,
        loss: Loss = "mse",
        denominator: Denominator = "official",
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.student_layers = _layers("student_layers", student_layers)
        self.teacher_layers = _layers("teacher_layers", teacher_layers)
        k, m = len(self.student_layers), len(self.teacher_layers)
        if groups is None:
            groups = match_layer_groups(k, m)
        check_settings(region, loss, denominator)
        self.region: Region = region
        self.loss: Loss = loss
        self.denominator: Denominator = denominator
        self.groups = [list(group) for group in check_groups(groups, k, m)]

    def forward(
        self,
        student_capture: CaptureRecords,
        teacher_capture: CaptureRecords,
        tokens: TokenLayout | None,
        sample_weight: Tensor | None = None,
        *,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Loss between the captured layers, 0-d; (L,) for `reduction="none"`.

        Args:
            student_capture: Captured forward of the student; gradients flow to its model, which
                may be spread over several devices: the loss is on that of its first layer named.
            teacher_capture: Captured forward of the teacher, made under `torch.no_grad()`; copied
                to the student's device where it is on another.
            tokens: What each token is; None only for the full region without padding.
            sample_weight: (B,) floating, one weight a sample.
            reduction: `"mean"` over student layers, or `"none"`.

        Raises:
            TokenMismatchError: The two models saw different tokens. Shapes are always compared;
                `input_ids` and `position_ids`, where both captures know them, and the padding of
                their (B, N) `attention_mask`, by value on the CPU, and on other devices (where that
                synchronises) under `DRIVEKD_DEBUG=1`.
            NotImplementedError: A student layer and its teacher have different sliding windows.
            ValueError: As `drivekd.functional.layerwise_attention_map_loss`, or `tokens` is None or
                counts tokens as valid although a model's `attention_mask` says that they are
                padding; compared where `input_ids` are.
            drivekd.errors.CaptureError: A layer was not captured.
        """
        device = student_capture[self.student_layers[0]].query.device
        students = [_on(device, student_capture[layer]) for layer in self.student_layers]
        teachers = [_on(device, teacher_capture[layer]) for layer in self.teacher_layers]
        _check_same_tokens(student_capture, teacher_capture, students[0], teachers[0], tokens)
        return layerwise_attention_map_loss(
            [(each.query, each.key) for each in students],
            [(each.query, each.key) for each in teachers],
            self.groups,
            tokens,
            reduction=reduction,
            region=self.region,
            loss=self.loss,
            denominator=self.denominator,
            window=self._windows(students, teachers),
            sample_weight=sample_weight,
            scale_student=[each.scale for each in students],
            scale_teacher=[each.scale for each in teachers],
            lse_student=[each.lse for each in students],
            lse_teacher=[each.lse for each in teachers],
        )

    def with_targets(
        self,
        student_capture: CaptureRecords,
        targets: Sequence[AttentionMapTarget],
        tokens: TokenLayout | None,
        sample_weight: Tensor | None = None,
        *,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """The same loss against targets that were kept; no teacher runs.

        Args:
            student_capture: Captured forward of the student.
            targets: One for each student layer, made by `drivekd.functional.attention_map_targets`
                of this loss's groups.
            tokens: What each token is; None only for the full region without padding.
            sample_weight: (B,) floating, one weight a sample.
            reduction: `"mean"` over student layers, or `"none"`.

        Raises:
            NotImplementedError: A student layer has another sliding window than its target.
            TypeError: `targets` is no list of targets.
            ValueError: As `drivekd.functional.layerwise_attention_map_target_loss`, the targets are
                of another region, or not one for each student layer, or `tokens` is None or counts
                tokens as valid that are padding.
            drivekd.errors.CaptureError: A layer was not captured.
        """
        check_targets("targets", targets)
        if len(targets) != len(self.student_layers):
            raise ValueError(
                f"targets has {len(targets)} entries but the loss has {len(self.student_layers)} "
                "student layers"
            )
        students = [student_capture[layer] for layer in self.student_layers]
        for layer, student, target in zip(self.student_layers, students, targets, strict=True):
            if target.region != self.region:
                raise ValueError(
                    f"the target of student layer {layer} is of region {target.region!r}, the loss "
                    f"of {self.region!r}"
                )
            own, other = (_window_within(student.query, each.window) for each in (student, target))
            if own != other:
                raise NotImplementedError(
                    f"student layer {layer} attends within a window of {own} tokens but its target "
                    f"within {other}; pair layers with the same window"
                )
        _check_padding(("student", student_capture, students[0]), tokens=tokens)
        return layerwise_attention_map_target_loss(
            [(each.query, each.key) for each in students],
            targets,
            tokens,
            reduction=reduction,
            loss=self.loss,
            denominator=self.denominator,
            sample_weight=sample_weight,
            scale_student=[each.scale for each in students],
            lse_student=[each.lse for each in students],
        )

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return (
            f"student_layers={self.student_layers}, teacher_layers={self.teacher_layers}, "
            f"region={self.region!r}, loss={self.loss!r}, denominator={self.denominator!r}"
        )

    def _windows(
        self, students: list[LayerRecord], teachers: list[LayerRecord]
    ) -> list[int | None]:
        """The window of each student layer; a window that covers all tokens is none."""
        windows = []
        for layer, student, group in zip(self.student_layers, students, self.groups, strict=True):
            window = _effective_window(student)
            for teacher in group:
                other = _effective_window(teachers[teacher])
                if other != window:
                    raise NotImplementedError(
                        f"student layer {layer} attends within a window of {window} tokens but "
                        f"teacher layer {self.teacher_layers[teacher]} within {other}; pair layers "
                        "with the same window"
                    )
            windows.append(window)
        return windows


@dataclass(frozen=True)
class _Copy:
    """A record on another device, in the same graph."""

    query: Tensor
    key: Tensor
    scale: float
    lse: Tensor | None
    window: int | None


def _on(device: torch.device, record: LayerRecord) -> LayerRecord:
    if record.query.device == device:
        return record

    def copied(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=device.type != "cpu")  # the host would not wait

    lse = None if record.lse is None else copied(record.lse)
    return _Copy(copied(record.query), copied(record.key), record.scale, lse, record.window)


def _effective_window(record: LayerRecord) -> int | None:
    return _window_within(record.query, record.window)


def _window_within(query: Tensor, window: int | None) -> int | None:
    """A window that covers all tokens is none."""
    return None if window is None or window >= query.shape[2] else window


def _check_same_tokens(
    student: CaptureRecords,
    teacher: CaptureRecords,
    student_layer: LayerRecord,
    teacher_layer: LayerRecord,
    tokens: TokenLayout | None,
) -> None:
    seen = [(each.query.shape[0], each.query.shape[2]) for each in (student_layer, teacher_layer)]
    if seen[0] != seen[1]:
        raise TokenMismatchError(
            f"the student saw {seen[0][0]} samples of {seen[0][1]} tokens but the teacher "
            f"{seen[1][0]} of {seen[1][1]}; give both models the same batch"
        )
    _compare("input_ids", student.input_ids, teacher.input_ids, tokens)
    # Captures of other makers need not have them.
    own, other = (getattr(each, "position_ids", None) for each in (student, teacher))
    _compare("position_ids", own, other, tokens)
    _check_padding(
        ("student", student, student_layer), ("teacher", teacher, teacher_layer), tokens=tokens
    )


def _compare(
    name: str, own: Tensor | None, other: Tensor | None, tokens: TokenLayout | None
) -> None:
    """Complain about the first valid token at which two models were given something else."""
    if own is None or other is None:
        return
    try:  # one row of positions may stand for all samples
        shape = torch.broadcast_shapes(own.shape, other.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        shape = None
    if shape is None or (name == "input_ids" and own.shape != other.shape):
        raise TokenMismatchError(
            f"{name} of the student have shape {tuple(own.shape)}, those of the teacher "
            f"{tuple(other.shape)}; give both models the same batch"
        )
    if not _may_read(own, other):
        return
    differ = own != other.to(own.device)
    if tokens is not None and tokens.valid.shape[-1] == differ.shape[-1]:
        differ = differ & tokens.valid.to(own.device)
    if bool(differ.any()):
        *axis, sample, position = (int(index) for index in differ.nonzero()[0])
        values = [
            int(each.expand(differ.shape)[(*axis, sample, position)]) for each in (own, other)
        ]
        what = "tokens" if name == "input_ids" else "positions"
        remedy = (
            "both need the same tokenizer and the same batch"
            if name == "input_ids"
            else "both need the same position_ids, and image grids counted in the same way"
        )
        raise TokenMismatchError(
            f"student and teacher saw different {what}: sample {sample}, position {position} is "
            f"{values[0]} for the student and {values[1]} for the teacher; {remedy}",
            sample,
        )


def _may_read(*tensors: Tensor) -> bool:
    """Whether values may be looked at: on other devices than the CPU that would synchronise."""
    on_cpu = all(each.device.type == "cpu" for each in tensors)
    debugging = os.environ.get("DRIVEKD_DEBUG") == "1"
    return not torch.compiler.is_compiling() and (on_cpu or debugging)


def _check_padding(
    *models: tuple[str, CaptureRecords, LayerRecord], tokens: TokenLayout | None
) -> None:
    """Complain where the loss would count padding, or where two models saw another padding."""
    masks, unknown = [], False
    for name, capture, layer in models:
        count = (layer.query.shape[0], layer.query.shape[2])
        mask: Any = getattr(capture, "attention_mask", "unknown")  # to captures of other makers
        if isinstance(mask, Tensor) and mask.shape == count:
            masks.append((name, mask))
        elif mask is not None:
            unknown = True
    layout = [] if tokens is None else [tokens.valid]
    if not masks or not _may_read(*(mask for _, mask in masks), *layout):
        return
    device = masks[0][1].device
    real = [(name, mask.to(device) != 0) for name, mask in masks]
    valid = torch.ones_like(real[0][1]) if tokens is None else tokens.valid.to(device)
    if valid.shape != real[0][1].shape:
        return  # the loss complains
    for name, each in real:
        if bool((valid & ~each).any()):
            sample, position = (int(index) for index in (valid & ~each).nonzero()[0])
            said = "is None" if tokens is None else "counts it as valid"
            raise ValueError(
                f"tokens {said}, but the {name}'s attention_mask says that sample {sample}, "
                f"position {position} is padding; give TokenLayout.from_batch(batch, config), or a "
                "layout with the batch's valid tokens"
            )
    if len(models) == 1 or unknown:
        return
    own = real[0][1]
    other = real[1][1] if len(real) == 2 else torch.ones_like(own)  # without a mask all are seen
    # Behind the last valid token causal attention makes no difference.
    counts = valid.flip(-1).cumsum(-1).flip(-1) > 0
    differ = (own != other) & counts
    if bool(differ.any()):
        sample, position = (int(index) for index in differ.nonzero()[0])
        raise TokenMismatchError(
            "student and teacher were given different padding in attention_mask: sample "
            f"{sample}, position {position} is padding for one and not for the other; give both "
            "models the same batch, and tokens of that batch",
            sample,
        )


def _layers(name: str, layers: Sequence[int]) -> list[int]:
    if isinstance(layers, str | bytes) or not isinstance(layers, Sequence):
        raise TypeError(f"{name} is a {type(layers).__name__}; wanted a list of layer indices")
    if len(layers) == 0:
        raise ValueError(f"{name} is empty; wanted at least one layer")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"{name} holds a {type(layer).__name__}; wanted layer indices (int)")
    return list(layers)
