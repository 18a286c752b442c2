"""Targets that are to be kept: the largest cells of rows of full maps, for all backends."""

import torch
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionMapLossInputs, GivenTarget


class LargestCells:
    """The largest cells of each row of the full map, and the mass of all the others."""

    def __init__(self, inputs: AttentionMapLossInputs, top_k: int | None) -> None:
        layout = inputs.layout
        shape = (layout.batch_size, layout.num_tokens)
        count = layout.num_tokens if top_k is None else min(top_k, layout.num_tokens)
        self._values = torch.zeros(*shape, count, dtype=inputs.dtype, device=layout.device)
        self._indices = torch.full((*shape, count), -1, dtype=torch.int32, device=layout.device)
        self._rest = torch.zeros(shape, dtype=inputs.dtype, device=layout.device)

    def add(self, samples: slice, rows: slice, first_key: int, mean: Tensor) -> None:
        """Rows of some samples: (samples, rows, keys from one on), 0 where not visible."""
        count = min(self._values.shape[2], mean.shape[2])
        values, slots = mean.topk(count, dim=-1)
        others = mean.scatter(2, slots, 0)
        indices = (slots + first_key).masked_fill(values <= 0, -1).to(torch.int32)
        self._values[samples, rows, :count] = values
        self._indices[samples, rows, :count] = indices
        self._rest[samples, rows] = others.sum(dim=-1)

    def target(self) -> GivenTarget:
        """What was added; values of each row in a unit of their own."""
        _, exponents = torch.frexp(self._values[..., 0])  # the largest is in [0.5, 1) of it
        values = torch.ldexp(self._values, -exponents[..., None])
        return GivenTarget(values, exponents.to(torch.int16), self._indices, self._rest)


def rectangle_shape(rows: Tensor, keys: Tensor) -> tuple[int, int, int]:
    """Samples, rows and keys of a target of chosen rows and keys (B, N); reads their numbers."""
    num_rows, num_keys = (max(1, int(each.sum(dim=-1).max())) for each in (rows, keys))
    return rows.shape[0], num_rows, num_keys
