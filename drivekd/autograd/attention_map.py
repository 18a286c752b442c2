"""Autograd of the attention-map losses: gradients computed in forward, scaled in backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from drivekd.ops.attention_map import attention_map_loss
from drivekd.ops.attention_target import attention_map_target_loss


@dataclass(frozen=True)
class AttentionMapTargetLossSpec:
    """Everything of one call that is not a tensor; see `drivekd.ops.attention_target`."""

    scale_student: tuple[float, ...]
    windows: tuple[int, ...]
    causal: bool
    loss: str
    denominator: str
    needs_dq: tuple[bool, ...]
    needs_dk: tuple[bool, ...]
    backend: str


@dataclass(frozen=True)
class AttentionMapLossSpec(AttentionMapTargetLossSpec):
    """The same of a call with teachers; see `drivekd.ops.attention_map`."""

    group_members: tuple[int, ...]
    group_offsets: tuple[int, ...]
    scale_teacher: tuple[float, ...]


class AttentionMapLossFunction(torch.autograd.Function):
    """Losses (L,) of L student layers; only their queries and keys receive gradients.

    Saved for backward: the gradients of the unscaled sums, of the size of the student's q and k,
    and their factors (L, B). No map and no tensor of the teacher is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: AttentionMapLossSpec,
        num_student: int,
        num_teacher: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Takes q, k of the student, q, k of the teacher, both lse, then the five masks."""
        q_student, k_student, q_teacher, k_teacher, lse_student, lse_teacher, masks = _split(
            tensors, [num_student] * 2 + [num_teacher] * 2 + [num_student, num_teacher, 5]
        )
        losses, dq, dk, factor = attention_map_loss(
            cast(Sequence[Tensor], q_student),
            cast(Sequence[Tensor], k_student),
            cast(Sequence[Tensor], q_teacher),
            cast(Sequence[Tensor], k_teacher),
            lse_student,
            lse_teacher,
            spec.group_members,
            spec.group_offsets,
            *masks,
            spec.scale_student,
            spec.scale_teacher,
            spec.windows,
            spec.causal,
            spec.loss,
            spec.denominator,
            spec.needs_dq,
            spec.needs_dk,
            spec.backend,
        )
        _save(ctx, spec, dq, dk, factor, (*q_student, *k_student))
        ctx.num_rest = 2 * num_teacher + num_student + num_teacher + 5
        return cast(Tensor, losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Scale on the device, out of place, and cast last."""
        grads = _scaled(ctx, grad_losses)
        return None, None, None, *grads, *[None] * ctx.num_rest


class AttentionMapTargetLossFunction(torch.autograd.Function):
    """Losses (L,) of L student layers against given targets; saves what its sibling saves."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: AttentionMapTargetLossSpec,
        num_student: int,
        num_sparse: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Takes q, k, of the targets values, exponents, indices, rest, then lse, five masks."""
        sizes = [num_student] * 4 + [num_sparse] * 2 + [num_student, 5]
        q_student, k_student, *target, lse_student, masks = _split(tensors, sizes)
        losses, dq, dk, factor = attention_map_target_loss(
            cast(Sequence[Tensor], q_student),
            cast(Sequence[Tensor], k_student),
            *(cast(Sequence[Tensor], part) for part in target),
            lse_student,
            *masks,
            spec.scale_student,
            spec.windows,
            spec.causal,
            spec.loss,
            spec.denominator,
            spec.needs_dq,
            spec.needs_dk,
            spec.backend,
        )
        _save(ctx, spec, dq, dk, factor, (*q_student, *k_student))
        ctx.num_rest = sum(sizes[2:])
        return cast(Tensor, losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """As in `AttentionMapLossFunction`."""
        grads = _scaled(ctx, grad_losses)
        return None, None, None, *grads, *[None] * ctx.num_rest


def _save(
    ctx: Any,
    spec: AttentionMapTargetLossSpec,
    dq: Sequence[Tensor],
    dk: Sequence[Tensor],
    factor: Tensor,
    inputs: Sequence[Tensor | None],
) -> None:
    """Keep for backward the gradients, their factors, and which inputs get them in which dtype."""
    ctx.save_for_backward(*dq, *dk, factor)
    ctx.needed = (*spec.needs_dq, *spec.needs_dk)
    ctx.dtypes = tuple(cast(Tensor, each).dtype for each in inputs)


def _scaled(ctx: Any, grad_losses: Tensor) -> list[Tensor | None]:
    """The saved gradients of all q and then all k, times their factors."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "attention-map losses have no second derivatives: their gradients are computed in "
            "forward; call backward or autograd.grad without create_graph=True"
        )
    *unscaled, factor = ctx.saved_tensors
    scale = factor * grad_losses[:, None]  # (L, B)
    num_layers = scale.shape[0]
    return [
        (each * scale[i % num_layers, :, None, None, None]).to(dtype) if needed else None
        for i, (each, needed, dtype) in enumerate(
            zip(unscaled, ctx.needed, ctx.dtypes, strict=True)
        )
    ]


def _split(
    tensors: tuple[Tensor | None, ...], sizes: Sequence[int]
) -> list[tuple[Tensor | None, ...]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(tensors[start : start + size])
        start += size
    return parts
