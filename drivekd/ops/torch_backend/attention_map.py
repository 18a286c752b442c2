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
from drivekd.ops.torch_backend.attention_chunks import (
    WHOLE_MAP_COUNTS,
    Chunk,
    Plan,
    Visibility,
    Workspace,
)
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
    maps = _HeadMean(plan, Workspace(dtype, query.device))
    for chunk in plan.chunks(window):
        seen = plan.visibility(chunk, window, in_logs=False)
        mean = maps.mean(layer, chunk, seen, "mean", in_logs=False)
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
    in_logs = inputs.loss == "kl" or (inputs.loss == "cosine" and layout.is_text is not None)
    plan = Plan(layout, max(layer.query.shape[1] for layer in inputs.student), dtype)
    work = Workspace(dtype, layout.device)
    maps = _HeadMean(plan, work)
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
        targets = _Targets(inputs, maps, chunk, seen, in_logs=in_logs)
        for i, layer in enumerate(inputs.student):
            visible = seen[inputs.windows[i]]
            heads = maps.heads(layer, chunk, visible, in_logs=in_logs)
            value, grad = _loss_rows(inputs.loss, in_logs, heads.mean, targets.of(i), visible)
            rows[i, chunk.samples, chunk.slots] = value
            if dq[i] is not None or dk[i] is not None:
                _student_gradient(layer, chunk, heads, grad, work, dq[i], dk[i], in_logs=in_logs)
    return rows.sum(dim=-1), dq, dk


@dataclass(frozen=True)
class _Block:
    """Some key heads with their query heads: operands and the stack made of their scores."""

    heads: slice
    key_heads: slice
    query: Tensor  # (samples * key heads, group * rows, D), scaled
    key: Tensor  # (samples * key heads, keys, D)
    stack: Tensor  # (samples, heads, rows, keys): P_h, or W_h


@dataclass(frozen=True)
class _Heads:
    """All heads of one layer in one chunk, and their mean."""

    blocks: list[_Block]
    mean: Tensor  # (samples, rows, keys): P or log P
    mass: Tensor | None  # in the log domain: P beside stacks of P_h; None: the stacks are W_h


class _HeadMean:
    """Head-mean maps of single chunks, or their logarithms."""

    def __init__(self, plan: Plan, work: Workspace) -> None:
        self._plan = plan
        self._work = work
        self._clean: dict[int, bool] = {}

    def mean(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, name: str, *, in_logs: bool
    ) -> Tensor:
        """P or log P of one layer, (samples, rows, keys), in the workspace's tensor `name`."""
        if in_logs:
            return self._log_heads(layer, chunk, seen, name, keep=False).mean
        return self._heads(layer, chunk, seen, name, keep=False).mean

    def heads(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, *, in_logs: bool
    ) -> _Heads:
        """The same with every head's stack kept in memory until the next call."""
        if in_logs:
            return self._log_heads(layer, chunk, seen, "mean", keep=True)
        return self._heads(layer, chunk, seen, "mean", keep=True)

    def _heads(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, name: str, *, keep: bool
    ) -> _Heads:
        blocks = []
        total = self._work.take(name, *chunk.shape)
        for block, scores in self._blocks(layer, chunk, seen, keep=keep):
            lse = self._lse(layer, chunk, seen, block)
            if lse is None:
                torch.ops.aten._softmax.out(scores, -1, False, out=block.stack)
            else:
                exp_(torch.sub(scores, lse, out=block.stack))
            self._add(total, block.stack, first=block.heads.start == 0)
            blocks.append(block)
        return _Heads(blocks, total.div_(layer.query.shape[1]), None)

    def _log_heads(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, name: str, *, keep: bool
    ) -> _Heads:
        """Log P with stacks of P_h where no visible P underflows, else with stacks of W_h."""
        if self._plan.readable:
            heads = self._heads(layer, chunk, seen, f"{name} mass", keep=keep)
            limits = torch.finfo(heads.mean.dtype)
            smallest = seen.raised(heads.mean)
            if float(smallest.amin()) > limits.tiny / limits.eps:
                mass = heads.mean.clamp_(min=limits.tiny)
                logs = torch.log(mass, out=self._work.take(name, *chunk.shape))
                return _Heads(heads.blocks, seen.hide(logs), mass)
        blocks, weights = [], []
        total = self._work.take(name, *chunk.shape)
        for block, scores in self._blocks(layer, chunk, seen, keep=keep):
            lse = self._lse(layer, chunk, seen, block)
            if lse is None:
                torch.ops.aten._log_softmax.out(scores, -1, False, out=block.stack)
            else:
                torch.sub(scores, lse, out=block.stack)
            top = block.stack.amax(dim=1)
            exp_(block.stack.sub_(top[:, None]))
            part = block.stack.sum(dim=1).log_().add_(top)
            first = block.heads.start == 0
            total.copy_(part) if first else torch.logaddexp(total, part, out=total)
            blocks.append(block)
            weights.append(top)
        if keep:
            for block, top in zip(blocks, weights, strict=True):
                block.stack.mul_(exp_(top.sub_(total))[:, None])
        return _Heads(blocks, total.sub_(math.log(layer.query.shape[1])), None)

    def _add(self, total: Tensor, stack: Tensor, *, first: bool) -> None:
        if first:
            torch.sum(stack, dim=1, out=total)
        else:
            total.add_(torch.sum(stack, dim=1, out=self._work.take("part", *total.shape)))

    def _blocks(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, *, keep: bool
    ) -> Iterator[tuple[_Block, Tensor]]:
        """Blocks of heads with an unfilled stack, and their scores (samples, heads, rows, keys)."""
        num_heads, num_key_heads = layer.query.shape[1], layer.key.shape[1]
        group = num_heads // num_key_heads
        samples, rows, keys = chunk.shape
        limit = _BLOCK_BYTES.get(layer.query.device.type, _BLOCK_BYTES_ELSEWHERE)
        head_bytes = rows * keys * self._work.dtype.itemsize
        if layer.query.shape[2] >= WHOLE_MAP_COUNTS:
            limit = min(limit, samples * layer.query.shape[2] ** 2 * self._work.dtype.itemsize // 2)
        step = max(1, limit // (samples * group * head_bytes))
        for first in range(0, num_key_heads, step):
            key_heads = slice(first, min(first + step, num_key_heads))
            heads = slice(first * group, key_heads.stop * group)
            query, key = self._operands(layer, chunk, seen, heads, key_heads)
            shape = (samples, heads.stop - heads.start, rows, keys)
            scores = self._work.take("scores", *shape)
            torch.bmm(query, key.mT, out=scores.view(query.shape[0], query.shape[1], keys))
            seen.hide(scores)
            stack = self._work.take(f"stack {first}" if keep else "stack", *shape)
            yield _Block(heads, key_heads, query, key, stack), scores

    def _operands(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, heads: slice, key_heads: slice
    ) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys of one block, ready for a batched product."""
        query = chunk.gather(layer.query[:, heads]).to(self._work.dtype) * layer.scale
        key = layer.key[chunk.samples, key_heads, chunk.keys].to(self._work.dtype)
        # With a given log-sum-exp, which rows of padding lack, their scores must not overflow exp.
        zeroed = layer.lse is not None or not self._is_clean(layer)
        if seen.dead is not None and self._plan.valid is not None and zeroed:
            query.masked_fill_(seen.dead[:, None, :, None], 0)
            padding = ~self._plan.valid[chunk.samples, chunk.keys]
            key = key.masked_fill(padding[:, None, :, None], 0)
        query = query.reshape(key.shape[0] * key.shape[1], -1, query.shape[-1])
        return query, key.flatten(0, 1)

    def _is_clean(self, layer: AttentionLayer) -> bool:
        """Whether scores at padding are known to vanish beside HIDDEN without being zeroed."""
        if not self._plan.readable:
            return False
        if id(layer) not in self._clean:
            norms = [torch.linalg.vector_norm(each) for each in (layer.query, layer.key)]
            self._clean[id(layer)] = all(float(norm) < 1e10 for norm in norms)
        return self._clean[id(layer)]

    def _lse(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, block: _Block
    ) -> Tensor | None:
        if layer.lse is None:
            return None
        lse = chunk.gather(layer.lse[:, block.heads]).to(self._work.dtype)
        if seen.dead is not None:
            lse = lse.masked_fill(seen.dead[:, None], 0)
        return lse[..., None]


class _Targets:
    """Teacher maps of one chunk, each computed once, and freed after its last group."""

    def __init__(
        self,
        inputs: AttentionMapLossInputs,
        maps: _HeadMean,
        chunk: Chunk,
        seen: dict[int | None, Visibility],
        *,
        in_logs: bool,
    ) -> None:
        self._inputs = inputs
        self._maps = maps
        self._chunk = chunk
        self._seen = seen
        self._in_logs = in_logs
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
        if not self._in_logs:
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
            mean = self._maps.mean(
                layer, self._chunk, self._seen[window], name, in_logs=self._in_logs
            )
            self._ready[teacher, window] = (name, mean)
        return self._ready[teacher, window][1]

    def _release(self, teacher: int, window: int | None) -> None:
        self._uses[teacher, window] -= 1
        if self._uses[teacher, window] == 0:
            self._free.append(self._ready[teacher, window][0])


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
    student: _Heads,
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
