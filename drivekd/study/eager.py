"""Attention-map losses the materialised way: from the maps that eager attention returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.capture.model import attention_module, find_decoder
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout


def eager_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Any],
    tokens: TokenLayout,
    settings: AttentionMapLoss,
) -> Tensor:
    """The loss of `settings`, from `output_attentions=True`; differentiable, whole maps in memory.

    Args:
        student: Student with eager attention.
        teacher: Teacher with eager attention.
        batch: Inputs of both models, on any device.
        tokens: What each token is, on the student's device.
        settings: Layers (non-negative), region, loss, denominator and groups.

    Returns:
        0-d loss, in float32 or the models' own dtype if that is wider.
    """
    with torch.no_grad():
        targets = list(_maps(teacher, batch, settings.teacher_layers))
    own = list(_maps(student, batch, settings.student_layers))
    losses = []
    for layer, student_map, group in zip(
        settings.student_layers, own, settings.groups, strict=True
    ):
        target = torch.stack([targets[index] for index in group]).mean(0).to(student_map)
        losses.append(_loss(student_map, target, _seen(student, layer, tokens), tokens, settings))
    return torch.stack(losses).mean()


def placed(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch on the device of a model's weights."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _maps(model: nn.Module, batch: Mapping[str, Any], layers: Sequence[int]) -> Iterator[Tensor]:
    """Head-mean maps (B, N, N) of some layers, on the model's device."""
    inputs = placed(batch, model)
    attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    for layer in layers:
        attention: Tensor = attentions[layer]
        yield attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(1)


def _seen(model: nn.Module, layer: int, tokens: TokenLayout) -> Tensor:
    """Cells that the layer's attention may reach, (B, N, N) bool."""
    place = torch.arange(tokens.num_tokens, device=tokens.device)
    distance = place[:, None] - place[None, :]
    seen = _together(tokens) & (distance >= 0)
    window = getattr(attention_module(find_decoder(model), layer), "sliding_window", None)
    return seen if window is None else seen & (distance < window)


def _together(tokens: TokenLayout) -> Tensor:
    """Cells between valid tokens of one segment, (B, N, N) bool."""
    cells = tokens.valid[:, :, None] & tokens.valid[:, None, :]
    if tokens.segment_ids is not None:
        cells = cells & (tokens.segment_ids[:, :, None] == tokens.segment_ids[:, None, :])
    return cells


def _loss(
    own: Tensor, target: Tensor, seen: Tensor, tokens: TokenLayout, settings: AttentionMapLoss
) -> Tensor:
    """Mean over samples of one layer's loss."""
    region = _together(tokens)
    if settings.region == "text_to_vision":
        region = region & tokens.is_text[:, :, None] & tokens.is_vision[:, None, :]
    seen = seen & region
    if settings.loss == "mse":
        cells = seen if settings.denominator == "live" else region
        per_sample = ((own - target).square() * seen).sum((1, 2))
        counts = cells.sum((1, 2))
    else:
        counted = seen.any(-1)
        rows = _cosine(own, target, seen) if settings.loss == "cosine" else _kl(own, target, seen)
        per_sample = rows.masked_fill(~counted, 0).sum(-1)
        counts = counted.sum(-1)
    used = counts > 0
    return (per_sample / counts.clamp(min=1) * used).sum() / used.sum().clamp(min=1)


def _cosine(own: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    own, target = own * seen, target * seen
    return 1 - nn.functional.cosine_similarity(own, target, dim=-1, eps=1e-12)


def _kl(own: Tensor, target: Tensor, seen: Tensor) -> Tensor:
    """KL(target || own) of rows, both renormalised over the cells."""
    tiny = torch.finfo(own.dtype).tiny
    log_own, log_target = (
        (row / row.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=tiny).log()
        for row in (own * seen, target * seen)
    )
    return ((log_target - log_own) * log_target.exp() * seen).sum(-1)
