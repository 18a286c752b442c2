"""Compact target maps from a teacher's queries and keys, chunk by chunk of rows."""

import math

import torch
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionMapLossInputs, GivenTarget, token_ranks
from drivekd.ops.dispatch import register
from drivekd.ops.target_rows import LargestCells, rectangle_shape
from drivekd.ops.torch_backend.attention_chunks import HIDDEN, Chunk, Plan, Workspace
from drivekd.ops.torch_backend.head_mean import HeadMean
from drivekd.ops.torch_backend.targets import TeacherTargets


@register("attention_map_targets", "torch")
def attention_map_targets(inputs: AttentionMapLossInputs, top_k: int | None) -> list[GivenTarget]:
    """The mean map of each group: its region's cells, or the largest `top_k` of each full row.

    Reads the numbers of text and vision tokens back from the device.
    """
    layout = inputs.layout
    is_rectangle = layout.is_text is not None
    plan = Plan(layout, max(layer.query.shape[1] for layer in inputs.teacher), inputs.dtype)
    maps = HeadMean(plan, Workspace(inputs.dtype, layout.device))
    writers = [
        _Rectangle(inputs) if is_rectangle else LargestCells(inputs, top_k) for _ in inputs.groups
    ]
    widest = None if None in inputs.windows else max(w for w in inputs.windows if w is not None)
    for chunk in plan.chunks(widest):
        seen = {
            window: plan.visibility(chunk, window, in_logs=is_rectangle)
            for window in dict.fromkeys(inputs.windows)
        }
        targets = TeacherTargets(inputs, maps, chunk, seen, in_logs=is_rectangle)
        for i, writer in enumerate(writers):
            mean = targets.of(i)
            dead = seen[inputs.windows[i]].dead
            if dead is not None:
                mean = mean.masked_fill(dead[..., None], HIDDEN if is_rectangle else 0)
            if isinstance(writer, _Rectangle):
                writer.add(chunk, mean)
            else:
                rows = chunk.rows  # of the full map always a slice: no row is left out
                assert isinstance(rows, slice)
                writer.add(chunk.samples, rows, chunk.keys.start, mean)
    return [writer.target() for writer in writers]


class _Rectangle:
    """Text rows x vision keys, from logarithms: no row underflows."""

    def __init__(self, inputs: AttentionMapLossInputs) -> None:
        rows, keys = inputs.layout.region_rows, inputs.layout.region_keys
        assert rows is not None and keys is not None
        self._rows, self._ranks = rows, token_ranks(rows)
        shape = rectangle_shape(rows, keys)
        order = torch.argsort(keys.logical_not().to(torch.int8), dim=-1, stable=True)
        self._is_key = keys.gather(1, order)[:, : shape[2]]  # (B, V)
        self._keys = order[:, : shape[2]]
        self._logs = torch.full(shape, HIDDEN, dtype=inputs.dtype, device=rows.device)

    def add(self, chunk: Chunk, logs: Tensor) -> None:
        slots = self._keys[chunk.samples] - chunk.keys.start  # (samples, V)
        is_here = self._is_key[chunk.samples] & (slots >= 0) & (slots < chunk.shape[2])
        slots = slots.clamp(0, chunk.shape[2] - 1)[:, None].expand(-1, logs.shape[1], -1)
        picked = logs.gather(2, slots).masked_fill(~is_here[:, None], HIDDEN)
        sample, row = chunk.read(self._rows).nonzero(as_tuple=True)
        ranks = chunk.read(self._ranks)[sample, row]
        self._logs[sample + chunk.samples.start, ranks] = picked[sample, row]

    def target(self) -> GivenTarget:
        top = self._logs.amax(dim=-1)
        exponents = torch.where(top > 0.5 * HIDDEN, (top / math.log(2)).floor() + 1, 0)
        exponents = exponents.clamp(-(2**15), 2**15 - 1)
        values = (self._logs - exponents[..., None] * math.log(2)).exp()
        return GivenTarget(values, exponents.to(torch.int16), None, None)
