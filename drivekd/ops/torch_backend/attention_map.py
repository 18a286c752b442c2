"""Attention maps and their losses in row-chunked torch, with gradients in closed form.

A chunk holds some query rows of some samples. Per chunk: the teachers' head-mean maps, each once;
then for each student layer its per-head probabilities P_h, their mean P, the loss, G = dL/dP, and

    dS_h = P_h * (G - delta_h) / H,   delta_h[i] = sum_j P_h[i, j] G[i, j],
    dq_h = scale * dS_h k,            dk = scale * sum over the group's h of dS_h^T q_h,

over all visible keys, also those outside the region. In the log domain the stack holds
W_h = P_h / (H P), a softmax over heads that exists where P underflows. With U = P * G the same
gradient is dS_h = W_h * (U - d_h H P), d_h[i] = sum_j W_h[i, j] U[i, j].
Nothing larger than one chunk's (samples, H, rows, N) is in memory.
"""

import torch
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionLayer, AttentionLayout, AttentionMapLossInputs
from drivekd.ops.dispatch import register
from drivekd.ops.torch_backend.attention_chunks import Chunk, Plan, Visibility, Workspace
from drivekd.ops.torch_backend.attention_losses import (
    cosine_rows,
    exp_,
    log_cosine_rows,
    log_kl_rows,
    mse_rows,
)
from drivekd.ops.torch_backend.head_mean import HeadMean, Heads
from drivekd.ops.torch_backend.targets import GivenMaps, TeacherTargets


@register("attention_map", "torch")
def attention_map(layer: AttentionLayer, layout: AttentionLayout, window: int | None) -> Tensor:
    """Head-mean map (B, N, N) in float32, float64 for float64 inputs."""
    query = layer.query
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = (layout.batch_size, layout.num_tokens, layout.num_tokens)
    result = torch.zeros(shape, dtype=dtype, device=query.device)
    plan = Plan(layout, query.shape[1], dtype)
    maps = HeadMean(plan, Workspace(dtype, query.device))
    for chunk in plan.chunks(window):
        seen = plan.visibility(chunk, window, in_logs=False)
        mean = maps.mean(layer, chunk, seen, "mean", in_logs=False)
        if seen.dead is not None:
            mean.masked_fill_(seen.dead[..., None], 0)
        result[chunk.samples, chunk.rows, chunk.keys] = mean
    return result


@register("attention_map_target_loss", "torch")
@register("attention_map_loss", "torch")
def attention_map_loss(
    inputs: AttentionMapLossInputs,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Sums over cells (mse) or rows (cosine, kl), (L, B), and their gradients in q and k."""
    layout, dtype = inputs.layout, inputs.dtype
    in_logs = inputs.loss == "kl" or (inputs.loss == "cosine" and layout.is_text is not None)
    plan = Plan(layout, max(layer.query.shape[1] for layer in inputs.student), dtype)
    work = Workspace(dtype, layout.device)
    maps = HeadMean(plan, work)
    given = GivenMaps(inputs, work, in_logs=in_logs) if inputs.given else None
    dq = [
        torch.zeros_like(layer.query, dtype=dtype) if needed else None
        for layer, needed in zip(inputs.student, inputs.needs_dq, strict=True)
    ]
    dk = [
        torch.zeros_like(layer.key, dtype=dtype) if needed else None
        for layer, needed in zip(inputs.student, inputs.needs_dk, strict=True)
    ]
    shape = (len(inputs.student), layout.batch_size, layout.num_tokens)
    rows = torch.zeros(shape, dtype=dtype, device=layout.device)
    widest = None if None in inputs.windows else max(w for w in inputs.windows if w is not None)
    for chunk in plan.chunks(widest):
        seen = {
            window: plan.visibility(chunk, window, in_logs=in_logs)
            for window in dict.fromkeys(inputs.windows)
        }
        teachers = TeacherTargets(inputs, maps, chunk, seen, in_logs=in_logs)
        for i, layer in enumerate(inputs.student):
            visible = seen[inputs.windows[i]]
            heads = maps.heads(layer, chunk, visible, in_logs=in_logs)
            target = teachers.of(i) if given is None else given.of(i, chunk, visible)
            value, grad = _loss_rows(inputs.loss, in_logs, heads.mean, target, visible)
            rows[i, chunk.samples, chunk.slots] = value
            if dq[i] is not None or dk[i] is not None:
                _student_gradient(layer, chunk, heads, grad, work, dq[i], dk[i], in_logs=in_logs)
    return rows.sum(dim=-1), dq, dk


def _loss_rows(
    loss: str, in_logs: bool, mean: Tensor, target: Tensor, seen: Visibility
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and dL/dP or dL/dlog P."""
    if loss == "mse":
        return mse_rows(mean, target, seen)
    if loss == "kl":
        return log_kl_rows(mean, target, seen)
    return (log_cosine_rows if in_logs else cosine_rows)(mean, target, seen)


def _student_gradient(
    layer: AttentionLayer,
    chunk: Chunk,
    student: Heads,
    grad: Tensor,
    work: Workspace,
    dq: Tensor | None,
    dk: Tensor | None,
    *,
    in_logs: bool,
) -> None:
    """Add one chunk's part of dq and dk; `grad` is dL/dP, or dL/dlog P (see the module)."""
    num_heads = layer.query.shape[1]
    log_mass = None
    if not in_logs:
        grad = grad.div_(num_heads)
    elif student.mass is not None:
        grad = grad.div_(student.mass).div_(num_heads)
    else:
        log_mass = exp_(student.mean).mul_(num_heads)[:, None]
    for block in student.blocks:
        ds = torch.mul(block.stack, grad[:, None], out=work.take("scores", *block.stack.shape))
        delta = ds.sum(dim=-1, keepdim=True)
        if in_logs and num_heads == 1:
            # The derivative along a rescaling of the row, which cosine and kl ignore.
            delta.zero_()
        elif layer.lse is not None:
            # A row of P_h sums to 1 only as well as the given log-sum-exp is rounded; where nearly
            # all of it is one cell, that would be all that is left of dS_h.
            mass = block.stack if log_mass is None else block.stack * log_mass
            delta.div_(mass.sum(dim=-1, keepdim=True))
        if log_mass is None:
            ds.addcmul_(block.stack, delta, value=-1)
        else:
            torch.mul(log_mass, delta, out=ds)
            torch.sub(grad[:, None], ds, out=ds).mul_(block.stack)
        ds = ds.view(block.query.shape[0], block.query.shape[1], -1)
        if dq is not None:
            values = torch.bmm(ds, block.key).mul_(layer.scale)
            shape = (*block.stack.shape[:3], values.shape[-1])
            chunk.scatter(dq[:, block.heads], values.view(shape))
        if dk is not None:
            part = dk[chunk.samples, block.key_heads, chunk.keys]
            if part.shape[0] == 1:
                part[0].baddbmm_(ds.mT, block.query)
            else:
                part.add_(torch.bmm(ds.mT, block.query).view(part.shape))
