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

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

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

# Bytes of the scores of one block of heads.
_BLOCK_BYTES = {"cpu": 2**22}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20


@register("attention_map", "torch")
def attention_map(layer: AttentionLayer, layout: AttentionLayout, window: int | None) -> Tensor:
    """Head-mean map (B, N, N) in float32, float64 for float64 inputs."""
    query = layer.query
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = (layout.batch_size, layout.num_tokens, layout.num_tokens)
    result = torch.zeros(shape, dtype=dtype, device=query.device)
    plan = Plan(layout, query.shape[1], dtype)
    maps = _HeadMean(plan, Workspace(dtype, query.device), log_domain=False)
    for chunk in plan.chunks(window):
        seen = plan.visibility(chunk, window, log_domain=False)
        mean = maps.mean(layer, chunk, seen)
        if seen.dead is not None:
            mean.masked_fill_(seen.dead[..., None], 0)
        result[chunk.samples, chunk.rows, chunk.keys] = mean
    return result


@register("attention_map_loss", "torch")
def attention_map_loss(
    inputs: AttentionMapLossInputs,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Sums over cells (mse) or rows (cosine, kl), (L, B), and their gradients in q and k."""
    layout, dtype = inputs.layout, inputs.dtype
    log_domain = inputs.loss == "kl" or (inputs.loss == "cosine" and layout.is_text is not None)
    plan = Plan(layout, max(layer.query.shape[1] for layer in inputs.student), dtype)
    work = Workspace(dtype, layout.device)
    maps = _HeadMean(plan, work, log_domain=log_domain)
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
            window: plan.visibility(chunk, window, log_domain=log_domain)
            for window in dict.fromkeys(inputs.windows)
        }
        targets = _Targets(inputs, maps, chunk, seen)
        for i, layer in enumerate(inputs.student):
            visible = seen[inputs.windows[i]]
            blocks: list[_Block] = []
            mean = maps.mean(layer, chunk, visible, keep=blocks)
            value, grad = _loss_rows(inputs.loss, log_domain, mean, targets.of(i), visible)
            rows[i, chunk.samples, chunk.slots] = value
            if dq[i] is not None or dk[i] is not None:
                weight = mean if log_domain else None
                _student_gradient(layer, chunk, blocks, grad, weight, work, dq[i], dk[i])
    return rows.sum(dim=-1), dq, dk


@dataclass(frozen=True)
class _Block:
    """Scores or probabilities of some key heads and their query heads, and what they came from."""

    heads: slice
    key_heads: slice
    query: Tensor  # (samples * key heads, group * rows, D), scaled
    key: Tensor  # (samples * key heads, keys, D)
    stack: Tensor  # (samples, heads, rows, keys): P_h, or W_h up to `log_weight`
    log_weight: Tensor | None  # (samples, rows, keys)


class _HeadMean:
    """Head-mean maps of single chunks, or their logarithms."""

    def __init__(self, plan: Plan, work: Workspace, *, log_domain: bool) -> None:
        self._plan = plan
        self._work = work
        self.log_domain = log_domain

    def mean(
        self,
        layer: AttentionLayer,
        chunk: Chunk,
        seen: Visibility,
        *,
        name: str = "mean",
        keep: list[_Block] | None = None,
    ) -> Tensor:
        """P or log P of one layer, (samples, rows, keys), in the workspace's tensor `name`.

        With `keep` the stacks stay in memory and are listed there, P_h or W_h.
        """
        total = self._work.take(name, *chunk.shape)
        for number, block in enumerate(self._blocks(layer, chunk, seen, keep is not None)):
            if block.log_weight is None:
                part = total if number == 0 else self._work.take("part", *chunk.shape)
                torch.sum(block.stack, dim=1, out=part)
                if number > 0:
                    total.add_(part)
            else:
                part = block.stack.sum(dim=1).log_().add_(block.log_weight)
                total.copy_(part) if number == 0 else torch.logaddexp(total, part, out=total)
            if keep is not None:
                keep.append(block)
        num_heads = layer.query.shape[1]
        if not self.log_domain:
            return total.div_(num_heads)
        for block in keep or ():
            assert block.log_weight is not None
            block.stack.mul_(exp_(block.log_weight.sub_(total))[:, None])
        return total.sub_(math.log(num_heads))

    def _blocks(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, keep: bool
    ) -> Iterator[_Block]:
        num_heads, num_key_heads = layer.query.shape[1], layer.key.shape[1]
        group = num_heads // num_key_heads
        samples, rows, keys = chunk.shape
        limit = _BLOCK_BYTES.get(layer.query.device.type, _BLOCK_BYTES_ELSEWHERE)
        block_bytes = samples * group * rows * keys * self._work.dtype.itemsize
        step = max(1, limit // block_bytes)
        for first in range(0, num_key_heads, step):
            key_heads = slice(first, min(first + step, num_key_heads))
            heads = slice(first * group, key_heads.stop * group)
            query, key = self._operands(layer, chunk, seen, heads, key_heads)
            shape = (samples, heads.stop - heads.start, rows, keys)
            scores = self._work.take("scores", *shape)
            torch.bmm(query, key.mT, out=scores.view(query.shape[0], query.shape[1], keys))
            if seen.bias is not None:
                scores[..., seen.start :].add_(seen.bias)
            stack = self._work.take(f"stack {first}" if keep else "stack", *shape)
            log_weight = self._normalise(layer, chunk, seen, heads, scores, stack)
            yield _Block(heads, key_heads, query, key, stack, log_weight)

    def _operands(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, heads: slice, key_heads: slice
    ) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys of one block, ready for a batched product; 0 at padding."""
        query = chunk.gather(layer.query[:, heads]).to(self._work.dtype) * layer.scale
        key = layer.key[chunk.samples, key_heads, chunk.keys].to(self._work.dtype)
        if seen.dead is not None and self._plan.valid is not None:
            query.masked_fill_(seen.dead[:, None, :, None], 0)
            padding = ~self._plan.valid[chunk.samples, chunk.keys]
            key = key.masked_fill(padding[:, None, :, None], 0)
        samples, num_key_heads = key.shape[:2]
        query = query.reshape(samples * num_key_heads, -1, query.shape[-1])
        return query, key.flatten(0, 1)

    def _normalise(
        self,
        layer: AttentionLayer,
        chunk: Chunk,
        seen: Visibility,
        heads: slice,
        scores: Tensor,
        stack: Tensor,
    ) -> Tensor | None:
        """Scores to probabilities in `stack`; in the log domain to exp(log P_h - log_weight)."""
        if layer.lse is not None:
            lse = chunk.gather(layer.lse[:, heads]).to(scores.dtype)
            if seen.dead is not None:
                lse = lse.masked_fill(seen.dead[:, None], 0)
            torch.sub(scores, lse[..., None], out=stack)
            if not self.log_domain:
                exp_(stack)
                return None
        elif self.log_domain:
            torch.ops.aten._log_softmax.out(scores, -1, False, out=stack)
        else:
            torch.ops.aten._softmax.out(scores, -1, False, out=stack)
            return None
        top = stack.amax(dim=1)
        exp_(stack.sub_(top[:, None]))
        return top


class _Targets:
    """Teacher maps of one chunk, each computed once, and freed after its last group."""

    def __init__(
        self,
        inputs: AttentionMapLossInputs,
        maps: _HeadMean,
        chunk: Chunk,
        seen: dict[int | None, Visibility],
    ) -> None:
        self._inputs = inputs
        self._maps = maps
        self._chunk = chunk
        self._seen = seen
        self._ready: dict[tuple[int, int | None], tuple[str, Tensor]] = {}
        self._free: list[str] = []
        self._uses = Counter(
            (teacher, window)
            for group, window in zip(inputs.groups, inputs.windows, strict=True)
            for teacher in group
        )

    def of(self, student: int) -> Tensor:
        """Mean of the maps of one group, (samples, rows, keys), or its logarithm; read only."""
        group, window = self._inputs.groups[student], self._inputs.windows[student]
        members = [self._map(teacher, window) for teacher in group]
        for teacher in group:
            self._release(teacher, window)
        if len(members) == 1:
            return members[0]
        if not self._maps.log_domain:
            total = members[0] + members[1]
            for member in members[2:]:
                total.add_(member)
            return total.div_(len(members))
        total = torch.logaddexp(members[0], members[1])
        for member in members[2:]:
            torch.logaddexp(total, member, out=total)
        return total.sub_(math.log(len(members)))

    def _map(self, teacher: int, window: int | None) -> Tensor:
        if (teacher, window) not in self._ready:
            name = self._free.pop() if self._free else f"teacher {len(self._ready)}"
            layer = self._inputs.teacher[teacher]
            mean = self._maps.mean(layer, self._chunk, self._seen[window], name=name)
            self._ready[teacher, window] = (name, mean)
        return self._ready[teacher, window][1]

    def _release(self, teacher: int, window: int | None) -> None:
        self._uses[teacher, window] -= 1
        if self._uses[teacher, window] == 0:
            self._free.append(self._ready[teacher, window][0])


def _loss_rows(
    loss: str, log_domain: bool, mean: Tensor, target: Tensor, seen: Visibility
) -> tuple[Tensor, Tensor]:
    """Each row's loss, and dL/dP or dL/dlog P."""
    if loss == "mse":
        return mse_rows(mean, target, seen)
    if loss == "kl":
        return log_kl_rows(mean, target, seen)
    return (log_cosine_rows if log_domain else cosine_rows)(mean, target, seen)


def _student_gradient(
    layer: AttentionLayer,
    chunk: Chunk,
    blocks: list[_Block],
    grad: Tensor,
    log_mean: Tensor | None,
    work: Workspace,
    dq: Tensor | None,
    dk: Tensor | None,
) -> None:
    """Add one chunk's part of dq and dk; `grad` is dL/dP, with `log_mean` = log P dL/dlog P."""
    num_heads = layer.query.shape[1]
    if log_mean is None:
        grad = grad.div_(num_heads)
    else:
        mass = exp_(log_mean).mul_(num_heads)[:, None]
    for block in blocks:
        ds = torch.mul(block.stack, grad[:, None], out=work.take("scores", *block.stack.shape))
        delta = ds.sum(dim=-1, keepdim=True)
        if log_mean is None:
            ds.addcmul_(block.stack, delta, value=-1)
        else:
            torch.mul(mass, delta, out=ds)
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
