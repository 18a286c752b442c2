"""Ops `drivekd::attention_map_target_loss` and the making of compact targets.

As in `drivekd.ops.attention_map`, with target maps that are given instead of teachers. The lists
`indices` and `rest` are empty where the targets are rectangles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drivekd.ops import dispatch
from drivekd.ops.attention_inputs import AttentionMapLossInputs, GivenTarget
from drivekd.ops.attention_map import evaluate, fake_results, layers_of, layout_of, work_dtype
from drivekd.ops.torch_backend import target_maps as _torch_backend  # noqa: F401  (registers)


@torch.library.custom_op("drivekd::attention_map_target_loss", mutates_args=())
def attention_map_target_loss(
    q_student: Sequence[Tensor],
    k_student: Sequence[Tensor],
    values: Sequence[Tensor],
    exponents: Sequence[Tensor],
    indices: Sequence[Tensor],
    rest: Sequence[Tensor],
    lse_student: Sequence[Tensor | None],
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    sample_weight: Tensor | None,
    scale_student: Sequence[float],
    windows: Sequence[int],
    causal: bool,
    loss: str,
    denominator: str,
    needs_dq: Sequence[bool],
    needs_dk: Sequence[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Loss of each student layer against its given target, with the gradients in forward.

    Returns what `drivekd.ops.attention_map.attention_map_loss` returns.
    """
    nothing: list[Tensor | None] = [None] * len(values)
    inputs = AttentionMapLossInputs(
        student=layers_of(q_student, k_student, scale_student, lse_student),
        teacher=(),
        groups=tuple(() for _ in q_student),
        windows=tuple(window or None for window in windows),
        layout=layout_of(q_student[0], valid, segment_ids, is_text, is_vision, causal),
        loss=loss,
        needs_dq=tuple(needs_dq),
        needs_dk=tuple(needs_dk),
        dtype=work_dtype([*q_student, *values]),
        given=tuple(
            GivenTarget(*each)
            for each in zip(values, exponents, indices or nothing, rest or nothing, strict=True)
        ),
    )
    return evaluate("attention_map_target_loss", inputs, denominator, sample_weight, backend)


@attention_map_target_loss.register_fake
def _(
    q_student: Sequence[Tensor],
    k_student: Sequence[Tensor],
    values: Sequence[Tensor],
    exponents: Sequence[Tensor],
    indices: Sequence[Tensor],
    rest: Sequence[Tensor],
    lse_student: Sequence[Tensor | None],
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    sample_weight: Tensor | None,
    scale_student: Sequence[float],
    windows: Sequence[int],
    causal: bool,
    loss: str,
    denominator: str,
    needs_dq: Sequence[bool],
    needs_dk: Sequence[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    dtype = work_dtype([*q_student, *values])
    return fake_results(q_student, k_student, needs_dq, needs_dk, dtype)


def attention_map_targets(
    q_teacher: Sequence[Tensor],
    k_teacher: Sequence[Tensor],
    lse_teacher: Sequence[Tensor | None],
    groups: Sequence[tuple[int, ...]],
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    scale_teacher: Sequence[float],
    windows: Sequence[int | None],
    causal: bool,
    top_k: int | None,
    backend: str,
) -> list[GivenTarget]:
    """Compact mean maps of groups of teacher layers; no graph, no op that a compiler sees."""
    inputs = AttentionMapLossInputs(
        student=(),
        teacher=layers_of(q_teacher, k_teacher, scale_teacher, lse_teacher),
        groups=tuple(groups),
        windows=tuple(windows),
        layout=layout_of(q_teacher[0], valid, segment_ids, is_text, is_vision, causal),
        loss="mse",
        needs_dq=(),
        needs_dk=(),
        dtype=work_dtype(q_teacher),
    )
    with torch.no_grad(), torch.autocast(inputs.layout.device.type, enabled=False):
        made: list[GivenTarget] = dispatch.get("attention_map_targets", backend)(inputs, top_k)
    return made
