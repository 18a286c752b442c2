"""Attention maps and their losses through Triton kernels: what is launched, in which order.

Rows are taken in chunks. Per chunk: the teachers' head-mean maps, each once, into a workspace that
is reused as soon as no group needs it; then for each student layer its map, the loss and W, dq and
dk. The workspaces hold a chunk of rows of single maps: nothing has a head axis and two axes of
tokens. kernels/README.md has the maths.
"""

import math
import os

import torch
from drivekd_kernels import launch, launch_dq_dk
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionLayer, AttentionLayout, AttentionMapLossInputs
from drivekd.ops.dispatch import register
from drivekd.ops.triton_backend.plan import Plan
from drivekd.ops.triton_backend.tokens import kernel_tokens

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MAP_ROWS = 16384  # rows of a whole map written by one launch
_REACH = 2**31 - 1  # elements; offsets within a sample are 32 bit
_DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@register("attention_map", "triton", devices=_DEVICES, dtypes=_DTYPES)
def attention_map(layer: AttentionLayer, layout: AttentionLayout, window: int | None) -> Tensor:
    """Head-mean map (B, N, N) in float32."""
    N = layout.num_tokens
    tokens = kernel_tokens(layout, window, compact=False)
    out = torch.empty((layout.batch_size, N, N), dtype=torch.float32, device=layout.device)
    heads = _heads(layer, tokens)
    _, keys = launch.map_shape(1, N)
    at_once = min(_MAP_ROWS, _REACH // (launch.MAP_ROWS * keys) * launch.MAP_ROWS)
    for first in range(0, N, at_once):
        rows = out[:, first : first + at_once]
        count = rows.shape[1]
        tile = out.new_zeros((layout.batch_size, *launch.map_shape(count, N)))
        launch.map_tile(heads, tokens, launch.Chunk(first, count, N), tile, log=False)
        rows.copy_(tile[:, :count, :N])
    return out


@register("attention_map_loss", "triton", devices=_DEVICES, dtypes=_DTYPES)
def attention_map_loss(
    inputs: AttentionMapLossInputs,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Sums over cells (mse) or rows (cosine, kl), (L, B), and their gradients in q and k."""
    plan = Plan(inputs)
    tokens = {
        window: kernel_tokens(inputs.layout, window, compact=True)
        for window in dict.fromkeys(inputs.windows)
    }
    teachers = {
        (each.index, each.window): _heads(inputs.teacher[each.index], tokens[each.window])
        for each in plan.maps
    }
    spans: dict[tuple[int | None, int], Tensor] = {}  # of layers with one window and tile
    students = [
        _Student(inputs, i, plan, _heads(layer, tokens[window]), tokens[window], spans)
        for i, (layer, window) in enumerate(zip(inputs.student, inputs.windows, strict=True))
    ]
    work = _Workspace(inputs, plan)
    for number, chunk in enumerate(plan.chunks):
        for step in plan.steps:
            student = students[step.student]
            for each, slot in step.new:
                launch.map_tile(
                    teachers[each.index, each.window],
                    student.tokens,
                    chunk,
                    work.targets(chunk)[slot],
                    log=plan.in_logs,
                )
            student.add(number, chunk, work, launch.Group(step.members))
    return (
        torch.stack([student.sums() for student in students]),
        [student.dq() for student in students],
        [student.dk() for student in students],
    )


class _Workspace:
    """Maps of one chunk after the other: the teachers', the student's, and its W.

    The same memory serves all chunks, whatever their rows and keys.
    """

    def __init__(self, inputs: AttentionMapLossInputs, plan: Plan) -> None:
        self._device = inputs.layout.device
        self._batch_size = inputs.layout.batch_size
        self._cells = max(math.prod(self._shape(chunk)) for chunk in plan.chunks)
        self._targets = self._empty((plan.num_slots, self._cells), torch.float32)
        self._map = self._empty((self._cells,), torch.float32) if inputs.loss != "mse" else None
        self._w: dict[torch.dtype, Tensor] = {}

    def targets(self, chunk: launch.Chunk) -> Tensor:
        """(maps, B, slots, keys) float32."""
        shape = self._shape(chunk)
        return self._targets[:, : math.prod(shape)].view(-1, *shape)

    def map(self, chunk: launch.Chunk) -> Tensor | None:
        """(B, slots, keys) float32; None where the loss makes no map of the student."""
        return None if self._map is None else self._view(self._map, chunk)

    def w(self, chunk: launch.Chunk, like: Tensor) -> Tensor:
        """(B, slots, keys): bfloat16 for bfloat16 models, else float32."""
        dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
        if dtype not in self._w:
            self._w[dtype] = self._empty((self._cells,), dtype)
        return self._view(self._w[dtype], chunk)

    def _shape(self, chunk: launch.Chunk) -> tuple[int, int, int]:
        return (self._batch_size, *launch.map_shape(chunk.count, chunk.keys))

    def _view(self, cells: Tensor, chunk: launch.Chunk) -> Tensor:
        shape = self._shape(chunk)
        return cells[: math.prod(shape)].view(shape)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)


class _Student:
    """One student layer: its sums and gradients, chunk by chunk."""

    def __init__(
        self,
        inputs: AttentionMapLossInputs,
        index: int,
        plan: Plan,
        heads: launch.Heads,
        tokens: launch.Tokens,
        spans: dict[tuple[int | None, int], Tensor],
    ) -> None:
        self.tokens = tokens
        self._heads = heads
        self._loss = inputs.loss
        self._in_logs = plan.in_logs
        self._query, self._key = inputs.student[index].query, inputs.student[index].key
        parts = [
            launch.mse_size(heads, tokens, chunk) if inputs.loss == "mse" else chunk.count
            for chunk in plan.chunks
        ]
        self._sums = heads.lse2.new_empty((len(parts), tokens.batch_size, max(parts)))
        if len(set(parts)) > 1:
            self._sums.zero_()  # a chunk leaves alone what others need more of
        self._dq: Tensor | None = None
        self._planes: Tensor | None = None
        if inputs.needs_dq[index]:
            # Rows outside the region are not visited.
            make = torch.empty_like if tokens.rows is None else torch.zeros_like
            self._dq = make(heads.query, dtype=torch.float32)
        if inputs.needs_dk[index]:
            planes = max(
                launch_dq_dk.dk_planes(heads, tokens, chunk, log=plan.in_logs)
                for chunk in plan.chunks
            )
            shared = inputs.windows[index], launch_dq_dk.dk_width(heads, tokens, log=plan.in_logs)
            if shared not in spans:
                spans[shared] = launch_dq_dk.key_spans(tokens, shared[1])
            self._spans = spans[shared]
            self._planes = torch.zeros(
                (planes, *self._key.shape), dtype=torch.float32, device=self._key.device
            )

    def add(self, number: int, chunk: launch.Chunk, work: _Workspace, group: launch.Group) -> None:
        """Loss and gradients of one chunk, whose targets are in the workspace."""
        heads, tokens, sums = self._heads, self.tokens, self._sums[number]
        needed = self._dq is not None or self._planes is not None
        w = work.w(chunk, heads.query) if needed else None
        targets, own, logs = work.targets(chunk), work.map(chunk), None
        if own is None:
            launch.mse(heads, tokens, chunk, targets, group, w, sums)
        else:
            launch.map_tile(heads, tokens, chunk, own, log=self._in_logs)
            launch.row_loss(
                self._loss, tokens, chunk, own, targets, group, w, sums, log=self._in_logs
            )
            logs = own if self._in_logs else None
        if w is None:
            return
        if self._dq is not None:
            pairs = launch_dq_dk.dq(heads, tokens, chunk, w, logs, self._dq)
        else:
            pairs = launch_dq_dk.delta(heads, tokens, chunk, w, logs)
        if self._planes is not None:
            launch_dq_dk.dk(heads, tokens, chunk, w, logs, pairs, self._spans, self._planes)

    def sums(self) -> Tensor:
        """(B,) float32."""
        return self._sums.sum(dim=(0, 2), dtype=torch.float64).to(torch.float32)

    def dq(self) -> Tensor | None:
        """In the memory order of q."""
        if self._dq is None or self._query.stride(-1) == 1:
            return self._dq
        return torch.empty_like(self._query, dtype=torch.float32).copy_(self._dq)

    def dk(self) -> Tensor | None:
        """Planes summed in order, in the memory order of k."""
        if self._planes is None:
            return None
        total = torch.empty_like(self._key, dtype=torch.float32)
        return torch.sum(self._planes, dim=0, out=total)


def _heads(layer: AttentionLayer, tokens: launch.Tokens) -> launch.Heads:
    """A layer ready for the kernels, with its log-sum-exp."""
    for tensor in (layer.query, layer.key):
        if _INTERPRETED and tensor.dtype == torch.bfloat16:
            raise NotImplementedError(
                "Triton's interpreter multiplies the raw bits of bfloat16; "
                "use float16 or float32 under TRITON_INTERPRET=1"
            )
    query, key = _addressable(layer.query), _addressable(layer.key)
    if layer.lse is None:
        lse2 = launch.lse(query, key, layer.scale, tokens)
    else:
        lse2 = (layer.lse.to(torch.float32) * launch.LOG2E).contiguous()
    return launch.Heads(query, key, layer.scale, lse2)


def _addressable(tensor: Tensor) -> Tensor:
    """Rows in one piece, and no offset within a sample that 32 bits do not hold.

    Raises:
        NotImplementedError: one sample has 2^31 elements.
    """
    _, heads, tokens, dim = tensor.shape
    reach = (heads - 1) * tensor.stride(1) + (tokens - 1) * tensor.stride(2) + dim
    if tensor.stride(-1) == 1 and reach <= _REACH:
        return tensor
    if heads * tokens * dim > _REACH:
        raise NotImplementedError(
            f"one sample has {heads} x {tokens} x {dim} elements; the triton backend addresses "
            f"{_REACH} of them; use backend='torch'"
        )
    return tensor.contiguous()
