"""Head-mean attention maps of one chunk of rows, with or without every head's own."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionLayer
from drivekd.ops.torch_backend.attention_chunks import (
    WHOLE_MAP_COUNTS,
    Chunk,
    Plan,
    Visibility,
    Workspace,
)
from drivekd.ops.torch_backend.attention_losses import exp_

# Bytes of the scores of one block of heads.
_BLOCK_BYTES = {"cpu": 2**22}
_BLOCK_BYTES_ELSEWHERE = 64 * 2**20


@dataclass(frozen=True)
class Block:
    """Some key heads with their query heads: operands and the stack made of their scores."""

    heads: slice
    key_heads: slice
    query: Tensor  # (samples * key heads, group * rows, D), scaled
    key: Tensor  # (samples * key heads, keys, D)
    stack: Tensor  # (samples, heads, rows, keys): P_h, or W_h


@dataclass(frozen=True)
class Heads:
    """All heads of one layer in one chunk, and their mean."""

    blocks: list[Block]
    mean: Tensor  # (samples, rows, keys): P or log P
    mass: Tensor | None  # in the log domain: P beside stacks of P_h; None: the stacks are W_h


class HeadMean:
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
    ) -> Heads:
        """The same with every head's stack kept in memory until the next call."""
        if in_logs:
            return self._log_heads(layer, chunk, seen, "mean", keep=True)
        return self._heads(layer, chunk, seen, "mean", keep=True)

    def _heads(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, name: str, *, keep: bool
    ) -> Heads:
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
        return Heads(blocks, total.div_(layer.query.shape[1]), None)

    def _log_heads(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, name: str, *, keep: bool
    ) -> Heads:
        """Log P with stacks of P_h where no visible P underflows, else with stacks of W_h."""
        if self._plan.readable:
            heads = self._heads(layer, chunk, seen, f"{name} mass", keep=keep)
            limits = torch.finfo(heads.mean.dtype)
            smallest = seen.raised(heads.mean)
            if float(smallest.amin()) > limits.tiny / limits.eps:
                mass = heads.mean.clamp_(min=limits.tiny)
                logs = torch.log(mass, out=self._work.take(name, *chunk.shape))
                return Heads(heads.blocks, seen.hide(logs), mass)
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
        return Heads(blocks, total.sub_(math.log(layer.query.shape[1])), None)

    def _add(self, total: Tensor, stack: Tensor, *, first: bool) -> None:
        if first:
            torch.sum(stack, dim=1, out=total)
        else:
            total.add_(torch.sum(stack, dim=1, out=self._work.take("part", *total.shape)))

    def _blocks(
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, *, keep: bool
    ) -> Iterator[tuple[Block, Tensor]]:
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
            yield Block(heads, key_heads, query, key, stack), scores

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
        self, layer: AttentionLayer, chunk: Chunk, seen: Visibility, block: Block
    ) -> Tensor | None:
        if layer.lse is None:
            return None
        lse = chunk.gather(layer.lse[:, block.heads]).to(self._work.dtype)
        if seen.dead is not None:
            lse = lse.masked_fill(seen.dead[:, None], 0)
        return lse[..., None]
