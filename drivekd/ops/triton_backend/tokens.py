"""A layout as the kernels want it: int32 vectors about tokens, made without a sync."""

import os

import torch
from drivekd_kernels import launch
from drivekd_kernels.operands import Tokens
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionLayout, visible_span


def kernel_tokens(layout: AttentionLayout, window: int | None, *, compact: bool) -> Tokens:
    """What tokens see under one window.

    Args:
        layout: padding, segments and the region.
        window: keys less than so many tokens away are seen; None: no bound.
        compact: list the region's rows and count them, where it has some only. Padding needs no
            list: it sees nothing, and rows in their own places see none but the keys before them.
    """
    B, N = layout.batch_size, layout.num_tokens
    if layout.segment_ids is None and _can_launch(layout.device):
        return launch.tokens(
            (B, N),
            layout.device,
            valid=layout.valid,
            is_text=layout.is_text,
            is_vision=layout.is_vision,
            causal=layout.causal,
            window=window,
            listed=compact and layout.is_text is not None,
        )
    position = torch.arange(N, device=layout.device).expand(B, N)
    ranks, valid = layout.segment_ranks(), layout.valid
    begin, end, tags = torch.zeros_like(position), torch.full_like(position, N - 1), None
    if ranks is not None or valid is not None:
        begin, end, tags = _segments(position, ranks, valid)
    low, high = visible_span(position, window, causal=layout.causal, last=end)
    first, last = torch.maximum(low, begin), torch.minimum(high, end)
    low, high = visible_span(position, window, causal=False, last=end)
    row_first = torch.maximum(position if layout.causal else low, begin)
    row_last = torch.minimum(high, end)
    if valid is not None:
        first, row_first = first.masked_fill(~valid, N), row_first.masked_fill(~valid, N)
        last, row_last = last.masked_fill(~valid, -1), row_last.masked_fill(~valid, -1)
    rows = slots = num_rows = None
    if compact and layout.is_text is not None and layout.region_rows is not None:
        rows, slots, num_rows = _listed(layout.region_rows, position)
    vision = before = None
    if layout.is_vision is not None and layout.region_keys is not None:
        vision = layout.region_keys.to(torch.int8).contiguous()
        before = _before(layout.region_keys)
    return Tokens(
        first=_int32(first),
        last=_int32(last),
        row_first=_int32(row_first),
        row_last=_int32(row_last),
        tags=None if tags is None else _int32(tags),
        rows=rows,
        slots=slots,
        num_rows=num_rows,
        vision=vision,
        before=before,
    )


def _can_launch(device: torch.device) -> bool:
    """Whether kernels run there; on other devices the kernels' work is only counted."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def _segments(
    position: Tensor, ranks: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """First and last valid token of each token's segment, and its tag (see the kernels)."""
    N = position.shape[1]
    own = torch.zeros_like(position) if ranks is None else ranks
    present = torch.ones_like(position) if valid is None else valid.long()
    first = position if valid is None else position.masked_fill(~valid, N)
    last = position if valid is None else position.masked_fill(~valid, -1)
    begin = torch.full_like(own, N).scatter_reduce(1, own, first, "amin").gather(1, own)
    end = torch.full_like(own, -1).scatter_reduce(1, own, last, "amax").gather(1, own)
    count = torch.zeros_like(own).scatter_add(1, own, present).gather(1, own)
    tags = 2 * own + (end - begin + 1 > count)
    return begin, end, tags if valid is None else tags.masked_fill(~valid, -1)


def _listed(chosen: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen tokens in order (B, N), how many come before each token (B, N + 1), and all (B,)."""
    B, N = chosen.shape
    slots = _before(chosen)
    places = slots[:, :-1].long().masked_fill(~chosen, N)  # the others into one more, cut off
    rows = position.new_zeros(B, N + 1).scatter(1, places, position)[:, :-1]
    return _int32(rows), slots, slots[:, -1].clone()


def _before(chosen: Tensor) -> Tensor:
    """How many chosen tokens come before each token, and after the last (B, N + 1)."""
    return torch.nn.functional.pad(chosen.cumsum(dim=-1, dtype=torch.int32), (1, 0))


def _int32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()
