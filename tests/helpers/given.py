"""Losses against given targets: made of a case's teachers, run, and their float64 twin."""

from dataclasses import replace

import torch
from torch import Tensor

from drivekd.functional import (
    AttentionMapTarget,
    attention_map_target_loss,
    attention_map_targets,
)
from drivekd.reference import attention_map as reference
from tests.helpers.attention import Case

KEPT = 7  # cells of a row of a full map


def make_target(
    case: Case, dtype=torch.float32, *, top_k=KEPT, layers=torch.float64, backend="torch"
) -> AttentionMapTarget:
    """The mean of all of the case's teachers, with the case's region, window and order."""
    settings = case.settings
    region = settings.get("region", "full")
    (target,) = attention_map_targets(
        [tuple(each.to(layers) for each in pair) for pair in case.teachers],
        [list(range(len(case.teachers)))],
        case.tokens,
        region=region,
        top_k=top_k if region == "full" else None,
        dtype=dtype,
        causal=settings.get("causal", True),
        window=settings.get("window"),
        backend=backend,
    )
    return target


def change_parts(target: AttentionMapTarget, change) -> AttentionMapTarget:
    """The target with its tensors changed by `change(name, tensor)`."""
    names = ("values", "exponents", "indices", "rest")
    parts = {name: getattr(target, name) for name in names}
    return replace(
        target, **{name: change(name, part) for name, part in parts.items() if part is not None}
    )


def run_given(
    case: Case, target: AttentionMapTarget, upstream=1.7, device="cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dq and dk, on the CPU."""
    q, k = (each.to(device, case.dtype, copy=True).requires_grad_() for each in case.student)
    weight = case.sample_weight
    names = ("loss", "denominator", "causal", "backend", "lse_student")
    loss = attention_map_target_loss(
        q,
        k,
        target.to(device),
        case.tokens.to(device),
        sample_weight=None if weight is None else weight.to(device),
        **{name: case.settings[name] for name in names if name in case.settings},
    )
    dq, dk = torch.autograd.grad(upstream * loss, (q, k))
    return loss.detach().cpu(), dq.cpu(), dk.cpu()


def run_given_twin(
    case: Case, target: AttentionMapTarget, upstream=1.7
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the float64 twin, of the whole map."""
    q, k = (each.clone().requires_grad_() for each in case.student)
    tokens, inside = case.tokens, target.indices is None
    names = ("loss", "denominator", "causal")
    loss = reference.attention_map_target_loss(
        q,
        k,
        whole_map(case, target),
        valid=tokens.valid,
        segment_ids=tokens.segment_ids,
        is_text=tokens.is_text if inside else None,
        is_vision=tokens.is_vision if inside else None,
        window=target.window,
        sample_weight=case.sample_weight,
        **{name: case.settings[name] for name in names if name in case.settings},
    )
    return loss, *torch.autograd.grad(upstream * loss, (q, k))


def whole_map(case: Case, target: AttentionMapTarget) -> Tensor:
    """(B, N, N) float64: what a target says about every visible cell; 0 elsewhere."""
    tokens = case.tokens
    N = tokens.num_tokens
    seen = reference.visible_cells(
        N,
        valid=tokens.valid,
        segment_ids=tokens.segment_ids,
        causal=case.settings.get("causal", True),
        window=target.window,
    ).expand(tokens.valid.shape[0], -1, -1)
    if target.indices is not None and target.rest is not None:
        return reference.spread_rest(target.values, target.indices, target.rest, seen)
    values = torch.ldexp(target.values.double(), target.exponents[..., None].int())
    whole = torch.zeros(seen.shape, dtype=torch.float64)
    for b in range(len(whole)):
        rows = (tokens.is_text & tokens.valid)[b].nonzero()[:, 0]
        keys = (tokens.is_vision & tokens.valid)[b].nonzero()[:, 0]
        whole[b, rows[:, None], keys] = values[b, : len(rows), : len(keys)]
    return whole * seen
