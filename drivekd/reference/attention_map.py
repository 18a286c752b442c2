"""Attention maps and their losses, written out: every map in memory, one formula after another.

The independent evidence for the fused ops: plain differentiable torch, best in float64. Slow and
large on purpose.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def visible_cells(
    num_tokens: int,
    *,
    valid: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Which key each query sees, (B or 1, N, N) bool."""
    row = torch.arange(num_tokens)[:, None]
    key = torch.arange(num_tokens)[None, :]
    seen = torch.ones(1, num_tokens, num_tokens, dtype=torch.bool)
    if causal:
        seen = seen & (key <= row)
    if window is not None:
        seen = seen & ((row - key).abs() < window)
    if valid is not None:
        seen = seen & valid[:, :, None] & valid[:, None, :]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return seen


def region_cells(
    num_tokens: int,
    *,
    valid: Tensor | None = None,
    segment_ids: Tensor | None = None,
    is_text: Tensor | None = None,
    is_vision: Tensor | None = None,
) -> Tensor:
    """Cells of the region among valid tokens of one segment, (B or 1, N, N) bool."""
    cells = visible_cells(num_tokens, valid=valid, segment_ids=segment_ids, causal=False)
    if is_text is not None and is_vision is not None:
        cells = cells & is_text[:, :, None] & is_vision[:, None, :]
    return cells


def log_attention_map(q: Tensor, k: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Logarithm of the head-mean map, (B, N, N); -inf where nothing is seen."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # Rows that see nothing are let see everything, and hidden again at the end: no NaN on the way.
    usable = seen | ~seen.any(dim=-1, keepdim=True)
    log_p = scores.masked_fill(~usable[:, None], -torch.inf).log_softmax(dim=-1)
    log_p = log_p.masked_fill(~usable[:, None], -1e300)  # finite, for the sake of the gradient
    log_mean = log_p.logsumexp(dim=1) - torch.tensor(float(q.shape[1]), dtype=q.dtype).log()
    return log_mean.masked_fill(~seen, -torch.inf)


def attention_map(q: Tensor, k: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Head-mean map, (B, N, N)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    usable = seen | ~seen.any(dim=-1, keepdim=True)
    p = scores.masked_fill(~usable[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
    return p * seen


def attention_map_loss(
    q_student: Tensor,
    k_student: Tensor,
    teachers: Sequence[tuple[Tensor, Tensor]],
    *,
    loss: str = "mse",
    denominator: str = "official",
    is_text: Tensor | None = None,
    is_vision: Tensor | None = None,
    valid: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sample_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: Sequence[float | None] | None = None,
) -> Tensor:
    """Loss of one student layer against the mean map of teacher layers; masks select the region."""
    seen, region = _cells(q_student, valid, segment_ids, is_text, is_vision, causal, window)
    scales = [None] * len(teachers) if scale_teacher is None else scale_teacher
    make = attention_map if loss == "mse" else log_attention_map
    maps = torch.stack([make(q, k, seen, s) for (q, k), s in zip(teachers, scales, strict=True)])
    if loss == "mse":
        target = maps.mean(dim=0)
    else:
        target = maps.logsumexp(dim=0) - torch.tensor(float(len(maps))).log()
    student = make(q_student, k_student, seen, scale_student)
    return _loss(student, target, seen, region, loss, denominator, sample_weight)


def attention_map_target_loss(
    q_student: Tensor,
    k_student: Tensor,
    target: Tensor,
    *,
    loss: str = "mse",
    denominator: str = "official",
    is_text: Tensor | None = None,
    is_vision: Tensor | None = None,
    valid: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sample_weight: Tensor | None = None,
    scale_student: float | None = None,
) -> Tensor:
    """Loss of one student layer against a whole map (B, N, N) that is given."""
    seen, region = _cells(q_student, valid, segment_ids, is_text, is_vision, causal, window)
    make = attention_map if loss == "mse" else log_attention_map
    student = make(q_student, k_student, seen, scale_student)
    if loss != "mse":
        target = target.clamp(min=1e-300).log()  # 0 log 0 is 0
    return _loss(student, target, seen, region, loss, denominator, sample_weight)


def spread_rest(values: Tensor, indices: Tensor, rest: Tensor, seen: Tensor) -> Tensor:
    """The whole map (B, N, N) of rows of which some cells are given, row by row."""
    num_samples, num_tokens, _ = values.shape
    result = torch.zeros(num_samples, num_tokens, num_tokens, dtype=torch.float64)
    for b in range(num_samples):
        for i in range(num_tokens):
            is_kept = indices[b, i] >= 0
            keys, kept = indices[b, i][is_kept].long(), values[b, i][is_kept].double()
            others = seen[b, i].clone()
            others[keys] = False
            left = float(rest[b, i]) if bool(others.any()) else 0.0
            result[b, i, others] = left / max(int(others.sum()), 1)
            if len(keys) > 0:
                result[b, i, keys] = kept * ((1 - left) / kept.sum())
    return result


def _cells(
    query: Tensor,
    valid: Tensor | None,
    segment_ids: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Cells that are visible, and those of the region, (B, N, N) bool."""
    num_samples, _, num_tokens, _ = query.shape
    seen = visible_cells(
        num_tokens, valid=valid, segment_ids=segment_ids, causal=causal, window=window
    )
    region = region_cells(
        num_tokens, valid=valid, segment_ids=segment_ids, is_text=is_text, is_vision=is_vision
    )
    return seen.expand(num_samples, -1, -1), region.expand(num_samples, -1, -1)


def _loss(
    student: Tensor,
    target: Tensor,
    seen: Tensor,
    region: Tensor,
    loss: str,
    denominator: str,
    sample_weight: Tensor | None,
) -> Tensor:
    """Distance of two maps, of their logarithms unless it is mse."""
    counted = (seen & region).any(dim=-1)  # (B, N)
    if loss == "mse":
        sums = ((student - target).square() * region).sum(dim=(1, 2))
        counts = (region & seen if denominator == "live" else region).sum(dim=(1, 2))
    else:
        cells = seen & region | ~counted[..., None]  # a row that does not count may be anything
        log_s = student.masked_fill(~cells, -torch.inf).masked_fill(~counted[..., None], 0)
        log_t = target.masked_fill(~cells, -torch.inf).masked_fill(~counted[..., None], 0)
        rows = _cosine(log_s, log_t) if loss == "cosine" else _kl(log_s, log_t, cells)
        sums, counts = (rows * counted).sum(dim=-1), counted.sum(dim=-1)
    used = counts > 0
    weight = torch.ones_like(sums) if sample_weight is None else sample_weight.to(sums.dtype)
    total: Tensor = (sums * weight * used / counts.clamp(min=1)).sum() / used.sum().clamp(min=1)
    return total


def _cosine(log_s: Tensor, log_t: Tensor) -> Tensor:
    """1 - cos of rows; dividing a row by its maximum changes nothing but the range."""
    p_s = (log_s - log_s.amax(dim=-1, keepdim=True).detach()).exp()
    p_t = (log_t - log_t.amax(dim=-1, keepdim=True)).exp()
    return 1 - torch.nn.functional.cosine_similarity(p_s, p_t, dim=-1)


def _kl(log_s: Tensor, log_t: Tensor, cells: Tensor) -> Tensor:
    """KL(P_t || P_s) of rows, both renormalised over the cells."""
    log_s, log_t = log_s.log_softmax(dim=-1), log_t.log_softmax(dim=-1)
    gap = log_t.masked_fill(~cells, 0) - log_s.masked_fill(~cells, 0)
    divergence: Tensor = torch.linalg.vecdot(log_t.exp(), gap)
    return divergence
