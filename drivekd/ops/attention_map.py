"""Ops `drivekd::attention_map` and `drivekd::attention_map_loss`: schema, fake, one call down.

Lists travel flat: the teachers of student layer i are
`group_members[group_offsets[i]:group_offsets[i + 1]]`; a window of 0 is no window, a denominator's
or region's absent mask is None. A backend returns plain sums and the gradients of those sums; what
each sum is divided and multiplied by is decided here, once for all backends, and stays beside the
gradients as `factor` until backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drivekd.ops import dispatch
from drivekd.ops.attention_inputs import AttentionLayer, AttentionLayout, AttentionMapLossInputs
from drivekd.ops.torch_backend import attention_map as _torch_backend  # noqa: F401  (registers)


@torch.library.custom_op("drivekd::attention_map", mutates_args=())
def attention_map(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    valid: Tensor | None,
    segment_ids: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    backend: str,
) -> Tensor:
    """Head-mean attention map (B, N, N), float32 or float64; rows of padding are zero."""
    layout = layout_of(query, valid, segment_ids, None, None, causal)
    layer = AttentionLayer(query, key, scale, lse)
    with torch.autocast(query.device.type, enabled=False):
        result: Tensor = dispatch.get("attention_map", backend)(layer, layout, window or None)
    return result


@attention_map.register_fake
def _(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    valid: Tensor | None,
    segment_ids: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    backend: str,
) -> Tensor:
    batch_size, _, num_tokens, _ = query.shape
    shape = (batch_size, num_tokens, num_tokens)
    return query.new_empty(shape, dtype=work_dtype([query]))


@torch.library.custom_op("drivekd::attention_map_loss", mutates_args=())
def attention_map_loss(
    q_student: Sequence[Tensor],
    k_student: Sequence[Tensor],
    q_teacher: Sequence[Tensor],
    k_teacher: Sequence[Tensor],
    lse_student: Sequence[Tensor | None],
    lse_teacher: Sequence[Tensor | None],
    group_members: Sequence[int],
    group_offsets: Sequence[int],
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    sample_weight: Tensor | None,
    scale_student: Sequence[float],
    scale_teacher: Sequence[float],
    windows: Sequence[int],
    causal: bool,
    loss: str,
    denominator: str,
    needs_dq: Sequence[bool],
    needs_dk: Sequence[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Loss of each student layer, with the gradients in forward.

    `is_text` and `is_vision` are given for the text-to-vision region and None for the full one.

    Returns:
        The losses (L,); for each layer the gradient in q and in k of the sums that its loss is
        made of, of no elements where not needed; and `factor` (L, B): the loss of layer i is
        `sum_b factor[i, b] * sum_b`, so `factor[i, b] * dq[i][b]` is its gradient. All are
        float32, or float64 where one of the inputs is.
    """
    inputs = AttentionMapLossInputs(
        student=layers_of(q_student, k_student, scale_student, lse_student),
        teacher=layers_of(q_teacher, k_teacher, scale_teacher, lse_teacher),
        groups=tuple(
            tuple(group_members[group_offsets[i] : group_offsets[i + 1]])
            for i in range(len(q_student))
        ),
        windows=tuple(window or None for window in windows),
        layout=layout_of(q_student[0], valid, segment_ids, is_text, is_vision, causal),
        loss=loss,
        needs_dq=tuple(needs_dq),
        needs_dk=tuple(needs_dk),
        dtype=work_dtype([*q_student, *q_teacher]),
    )
    return evaluate("attention_map_loss", inputs, denominator, sample_weight, backend)


@attention_map_loss.register_fake
def _(
    q_student: Sequence[Tensor],
    k_student: Sequence[Tensor],
    q_teacher: Sequence[Tensor],
    k_teacher: Sequence[Tensor],
    lse_student: Sequence[Tensor | None],
    lse_teacher: Sequence[Tensor | None],
    group_members: Sequence[int],
    group_offsets: Sequence[int],
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    sample_weight: Tensor | None,
    scale_student: Sequence[float],
    scale_teacher: Sequence[float],
    windows: Sequence[int],
    causal: bool,
    loss: str,
    denominator: str,
    needs_dq: Sequence[bool],
    needs_dk: Sequence[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    dtype = work_dtype([*q_student, *q_teacher])
    return fake_results(q_student, k_student, needs_dq, needs_dk, dtype)


def evaluate(
    op: str,
    inputs: AttentionMapLossInputs,
    denominator: str,
    sample_weight: Tensor | None,
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Let a backend make sums and gradients, and divide, weight and average the sums."""
    with torch.autocast(inputs.layout.device.type, enabled=False):
        sums, dq, dk = dispatch.get(op, backend)(inputs)
        denominators = inputs.denominators(denominator)
        counted = denominators > 0
        factor = counted.to(inputs.dtype)
        if sample_weight is not None:
            factor = factor * sample_weight.to(inputs.dtype)
        factor = factor / denominators.clamp(min=1)
        factor = factor / counted.sum(dim=-1, keepdim=True).clamp(min=1)
        losses = (factor * sums).sum(dim=-1)
    nothing = sums.new_empty
    return (
        losses,
        [nothing(0) if each is None else each for each in dq],
        [nothing(0) if each is None else each for each in dk],
        factor,
    )


def work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Dtype of workspaces and losses: float64 where one of the tensors is, else float32."""
    has_double = any(each.dtype == torch.float64 for each in tensors)
    return torch.float64 if has_double else torch.float32


def fake_results(
    q_student: Sequence[Tensor],
    k_student: Sequence[Tensor],
    needs_dq: Sequence[bool],
    needs_dk: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """What `evaluate` returns, without values."""
    first = q_student[0]
    num_layers, batch_size = len(q_student), first.shape[0]
    return (
        first.new_empty((num_layers,), dtype=dtype),
        [_like(each, needed, dtype) for each, needed in zip(q_student, needs_dq, strict=True)],
        [_like(each, needed, dtype) for each, needed in zip(k_student, needs_dk, strict=True)],
        first.new_empty((num_layers, batch_size), dtype=dtype),
    )


def _like(tensor: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype) if needed else tensor.new_empty(0, dtype=dtype)


def layers_of(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    scales: Sequence[float],
    lses: Sequence[Tensor | None],
) -> tuple[AttentionLayer, ...]:
    """Lists, one entry a layer, as one tuple of layers."""
    return tuple(
        AttentionLayer(query, key, scale, lse)
        for query, key, scale, lse in zip(queries, keys, scales, lses, strict=True)
    )


def layout_of(
    like: Tensor,
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    causal: bool,
) -> AttentionLayout:
    """The layout of a batch with the shape and device of these queries."""
    return AttentionLayout(
        batch_size=like.shape[0],
        num_tokens=like.shape[2],
        device=like.device,
        causal=causal,
        valid=valid,
        segment_ids=segment_ids,
        is_text=is_text,
        is_vision=is_vision,
    )
