"""Attention maps and their losses through Triton kernels: what is launched, in which order.

Rows are taken in chunks. Per chunk: the teachers' head-mean maps, each once, into a workspace that
is reused as soon as no group needs it, or a given target, laid out in one; then for each student
layer its map, the loss and W, dq and dk. The workspaces hold a chunk of rows of single maps:
nothing has a head axis and two axes of tokens. kernels/README.md has the maths.
"""

import math
import os
from dataclasses import replace

import torch
from drivekd_kernels import launch, launch_dq_dk, launch_given
from drivekd_kernels.operands import LOG2E, MAP_ROWS, Chunk, Group, Heads, Tokens, map_shape
from torch import Tensor

from drivekd.ops.attention_inputs import (
    AttentionLayer,
    AttentionLayout,
    AttentionMapLossInputs,
    GivenTarget,
)
from drivekd.ops.dispatch import register
from drivekd.ops.target_rows import LargestCells, rectangle_shape
from drivekd.ops.triton_backend.plan import Plan, Step
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
    _, keys = map_shape(1, N)
    at_once = min(_MAP_ROWS, _REACH // (MAP_ROWS * keys) * MAP_ROWS)
    for first in range(0, N, at_once):
        rows = out[:, first : first + at_once]
        count = rows.shape[1]
        tile = out.new_zeros((layout.batch_size, *map_shape(count, N)))
        launch.map_tile(heads, tokens, Chunk(first, count, N), tile, log=False)
        rows.copy_(tile[:, :count, :N])
    return out


@register("attention_map_target_loss", "triton", devices=_DEVICES, dtypes=_DTYPES)
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
    teachers = _Teachers(inputs, plan, tokens)
    spans: dict[tuple[int | None, int], Tensor] = {}  # of layers with one window and tile
    students = [
        _Student(inputs, i, plan, _heads(layer, tokens[window]), tokens[window], spans)
        for i, (layer, window) in enumerate(zip(inputs.student, inputs.windows, strict=True))
    ]
    work = _Workspace(inputs, plan)
    for number, chunk in enumerate(plan.chunks):
        for step in plan.steps:
            student = students[step.student]
            if inputs.given:
                _lay_out(inputs.given[step.student], student.tokens, chunk, work, plan)
            teachers.add(step, chunk, work)
            student.add(number, chunk, work, Group(step.members))
    return (
        torch.stack([student.sums() for student in students]),
        [student.dq() for student in students],
        [student.dk() for student in students],
    )


@register("attention_map_targets", "triton", devices=_DEVICES, dtypes=_DTYPES)
def attention_map_targets(inputs: AttentionMapLossInputs, top_k: int | None) -> list[GivenTarget]:
    """The mean map of each group: its region's cells, or the largest `top_k` of each full row.

    Of a region it reads the numbers of text and vision tokens back from the device.
    """
    region = inputs.layout.is_text is not None
    # Rectangles are made of logarithms, as kl's are: no row underflows.
    inputs = replace(inputs, loss="kl" if region else "mse")
    plan = Plan(inputs)
    tokens = {
        window: kernel_tokens(inputs.layout, window, compact=True)
        for window in dict.fromkeys(inputs.windows)
    }
    teachers = _Teachers(inputs, plan, tokens)
    work = _Workspace(inputs, plan)
    makers = [(_Rectangle if region else _Rows)(inputs, top_k) for _ in inputs.groups]
    for chunk in plan.chunks:
        for step in plan.steps:
            if not region:
                for _, slot in step.new:
                    work.targets(chunk)[slot].zero_()  # no tile that nobody sees is written
            teachers.add(step, chunk, work)
            window = inputs.windows[step.student]
            makers[step.student].add(
                work.targets(chunk), Group(step.members), tokens[window], chunk
            )
    return [each.target() for each in makers]


class _Rectangle:
    """Text rows x vision keys."""

    def __init__(self, inputs: AttentionMapLossInputs, top_k: int | None) -> None:
        rows, keys = inputs.layout.region_rows, inputs.layout.region_keys
        assert rows is not None and keys is not None
        shape = rectangle_shape(rows, keys)
        self._values = torch.zeros(shape, dtype=torch.float32, device=rows.device)
        self._exponents = torch.zeros(shape[:2], dtype=torch.int16, device=rows.device)

    def add(self, maps: Tensor, group: Group, tokens: Tokens, chunk: Chunk) -> None:
        launch_given.pack(maps, group, tokens, chunk, self._values, self._exponents)

    def target(self) -> GivenTarget:
        return GivenTarget(self._values, self._exponents, None, None)


class _Rows:
    """The largest cells of each row of the full map."""

    def __init__(self, inputs: AttentionMapLossInputs, top_k: int | None) -> None:
        self._largest = LargestCells(inputs, top_k)

    def add(self, maps: Tensor, group: Group, tokens: Tokens, chunk: Chunk) -> None:
        cells = maps[:, :, : chunk.count, : chunk.keys]
        mean = cells[group.maps[0]]
        if len(group.maps) > 1:
            share = 1 / len(group.maps)
            mean = mean * share
            for each in group.maps[1:]:
                mean.add_(cells[each], alpha=share)
        rows = slice(chunk.first, chunk.first + chunk.count)
        self._largest.add(slice(None), rows, 0, mean)

    def target(self) -> GivenTarget:
        return self._largest.target()


class _Teachers:
    """Teacher maps, each made when the first group needs it."""

    def __init__(
        self, inputs: AttentionMapLossInputs, plan: Plan, tokens: dict[int | None, Tokens]
    ) -> None:
        self._tokens = tokens
        self._in_logs = plan.in_logs
        self._heads = {
            (each.index, each.window): _heads(inputs.teacher[each.index], tokens[each.window])
            for each in plan.maps
        }

    def add(self, step: Step, chunk: Chunk, work: "_Workspace") -> None:
        for each, slot in step.new:
            launch.map_tile(
                self._heads[each.index, each.window],
                self._tokens[each.window],
                chunk,
                work.targets(chunk)[slot],
                log=self._in_logs,
            )


def _lay_out(
    given: GivenTarget, tokens: Tokens, chunk: Chunk, work: "_Workspace", plan: Plan
) -> None:
    """A chunk of a target, as the teacher's map would lie."""
    out, log = work.targets(chunk)[0], plan.in_logs
    if given.indices is None or given.rest is None:
        launch_given.rectangle(given.values, given.exponents, tokens, chunk, out, log=log)
    else:
        launch_given.largest(given.values, given.indices, given.rest, tokens, chunk, out, log=log)


class _Workspace:
    """Maps of one chunk after the other: the teachers', the student's, and its W.

    The same memory serves all chunks, whatever their rows and keys.
    """

    def __init__(self, inputs: AttentionMapLossInputs, plan: Plan) -> None:
        self._device = inputs.layout.device
        self._batch_size = inputs.layout.batch_size
        self._cells = max(math.prod(self._shape(chunk)) for chunk in plan.chunks)
        self._targets = self._empty((plan.num_slots, self._cells), torch.float32)
        self._map: Tensor | None = None
        self._w: dict[torch.dtype, Tensor] = {}

    def targets(self, chunk: Chunk) -> Tensor:
        """(maps, B, slots, keys) float32."""
        shape = self._shape(chunk)
        return self._targets[:, : math.prod(shape)].view(-1, *shape)

    def map(self, chunk: Chunk) -> Tensor:
        """(B, slots, keys) float32."""
        if self._map is None:
            self._map = self._empty((self._cells,), torch.float32)
        return self._view(self._map, chunk)

    def w(self, chunk: Chunk, like: Tensor) -> Tensor:
        """(B, slots, keys): bfloat16 for bfloat16 models, else float32."""
        dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
        if dtype not in self._w:
            self._w[dtype] = self._empty((self._cells,), dtype)
        return self._view(self._w[dtype], chunk)

    def _shape(self, chunk: Chunk) -> tuple[int, int, int]:
        return (self._batch_size, *map_shape(chunk.count, chunk.keys))

    def _view(self, cells: Tensor, chunk: Chunk) -> Tensor:
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
        heads: Heads,
        tokens: Tokens,
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

    def add(self, number: int, chunk: Chunk, work: _Workspace, group: Group) -> None:
        """Loss and gradients of one chunk, whose targets are in the workspace."""
        heads, tokens, sums = self._heads, self.tokens, self._sums[number]
        needed = self._dq is not None or self._planes is not None
        w = work.w(chunk, heads.query) if needed else None
        targets, logs = work.targets(chunk), None
        if self._loss == "mse":
            launch.mse(heads, tokens, chunk, targets, group, w, sums)
        else:
            own = work.map(chunk)
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


def _heads(layer: AttentionLayer, tokens: Tokens) -> Heads:
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
        lse2 = (layer.lse.to(torch.float32) * LOG2E).contiguous()
    return Heads(query, key, layer.scale, lse2)


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
