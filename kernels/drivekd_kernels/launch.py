"""Launchers: allocate, choose tiles, pass strides, enter the device; one for each kernel."""

import math

import torch
from torch import Tensor

from drivekd_kernels import (
    attention_lse,
    attention_map,
    attention_rows,
    attention_tokens,
)
from drivekd_kernels.operands import (
    LOG2E,
    Chunk,
    Group,
    Heads,
    Tokens,
    ceil_div,
    map_strides,
    on_device,
    strides,
)
from drivekd_kernels.specialize import meta_of, row_meta
from drivekd_kernels.tuned import ROW_TILES

TOKEN_BLOCK = 2048  # tokens that `tokens` looks at in one step


def tokens(
    shape: tuple[int, int],
    device: torch.device,
    *,
    valid: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    causal: bool,
    window: int | None,
    listed: bool,
) -> Tokens:
    """What tokens see under one window, every sample being one segment.

    Args:
        shape: B and N.
        device: of the result.
        valid: (B, N) bool, tokens that are no padding; None: all.
        is_text: (B, N) bool, rows of the region; None: all.
        is_vision: (B, N) bool, keys of the region; None: all, and no list of them.
        causal: whether keys behind a token are hidden.
        window: keys less than so many tokens away are seen; None: no bound.
        listed: whether to list the region's rows.
    """
    B, N = shape

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    region = is_vision is not None
    result = Tokens(
        first=empty(B, N),
        last=empty(B, N),
        row_first=empty(B, N),
        row_last=empty(B, N),
        tags=None if valid is None else empty(B, N),
        rows=empty(B, N) if listed else None,
        slots=empty(B, N + 1) if listed else None,
        num_rows=empty(B) if listed else None,
        vision=empty(B, N, dtype=torch.int8) if region else None,
        before=empty(B, N + 1) if region else None,
    )
    masks = [
        None if mask is None else mask.contiguous().view(torch.uint8)
        for mask in (valid, is_text, is_vision)
    ]
    with on_device(result.first):
        attention_tokens.tokens_kernel[(B,)](
            *masks,
            result.first,
            result.last,
            result.row_first,
            result.row_last,
            result.tags,
            result.rows,
            result.slots,
            result.num_rows,
            result.vision,
            result.before,
            N,
            N if window is None else min(window, N),
            CAUSAL=causal,
            BLOCK=TOKEN_BLOCK,
            num_warps=8,
        )
    return result


def lse(query: Tensor, key: Tensor, scale: float, tokens: Tokens) -> Tensor:
    """Base-2 log-sum-exp (B, H, N) float32 of the rows of the region; other rows undefined."""
    B, H, N, _ = query.shape
    lse2 = query.new_empty((B, H, N), dtype=torch.float32)
    meta, tile = meta_of("lse", query, key, region=tokens.has_region, tags=tokens.tags is not None)
    grid = (H, ceil_div(N, tile.q), B)
    with on_device(query):
        attention_lse.lse_kernel[grid](
            query,
            key,
            lse2,
            *tokens.seen,
            N,
            *strides(query),
            *strides(key),
            scale * LOG2E,
            **meta,
        )
    return lse2


def map_tile(heads: Heads, tokens: Tokens, chunk: Chunk, out: Tensor, *, log: bool) -> None:
    """Head-mean map of a chunk, or its base-2 logarithm, into a workspace (B, slots, keys) float32.

    0 where a cell is not visible or not in the region, but tiles without a cell of it are left
    alone.
    """
    region = tokens.has_region
    meta, tile = meta_of("map", heads.query, heads.key, log=log, region=region)
    grid = (ceil_div(chunk.keys, tile.k), ceil_div(chunk.count, tile.q), tokens.batch_size)
    with on_device(heads.query):
        attention_map.map_kernel[grid](
            heads.query,
            heads.key,
            heads.lse2,
            out,
            *tokens.seen,
            tokens.vision,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            chunk.keys,
            *heads.strides,
            *map_strides(out),
            heads.scale * LOG2E,
            math.log2(heads.num_heads),
            LOG=log,
            **meta,
        )


def mse_size(heads: Heads, tokens: Tokens, chunk: Chunk) -> int:
    """Number of a sample's partial sums in `mse`."""
    _, tile = meta_of("mse", heads.query, heads.key, region=tokens.has_region)
    return ceil_div(chunk.keys, tile.k) * ceil_div(chunk.count, tile.q)


def mse(
    heads: Heads,
    tokens: Tokens,
    chunk: Chunk,
    targets: Tensor,
    group: Group,
    w: Tensor | None,
    sums: Tensor,
) -> None:
    """Squared error of a chunk's map against the mean of some maps.

    Args:
        heads: the student's layer.
        tokens: what is seen.
        chunk: which rows.
        targets: (maps, B, slots, keys) float32 workspaces.
        group: which of them.
        w: (B, slots, keys) receives dL/dP; None where no gradient is wanted.
        sums: (B, at least `mse_size`) float32, receives partial sums.
    """
    meta, tile = meta_of("mse", heads.query, heads.key, region=tokens.has_region)
    grid = (ceil_div(chunk.keys, tile.k), ceil_div(chunk.count, tile.q), tokens.batch_size)
    stride_t, stride_b, stride_s = map_strides(targets)
    with on_device(heads.query):
        attention_map.mse_kernel[grid](
            heads.query,
            heads.key,
            heads.lse2,
            targets,
            w,
            sums,
            *tokens.seen,
            tokens.vision,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            chunk.keys,
            sums.stride(0),
            *heads.strides,
            stride_b,
            stride_s,
            stride_t,
            heads.scale * LOG2E,
            math.log2(heads.num_heads),
            *group.words,
            1 / len(group.maps),
            targets.shape[0],
            **meta,
        )


def row_loss(
    loss: str,
    tokens: Tokens,
    chunk: Chunk,
    maps: Tensor,
    targets: Tensor,
    group: Group,
    w: Tensor | None,
    sums: Tensor,
    *,
    log: bool,
) -> None:
    """Cosine or kl loss of each row of a chunk.

    Args:
        loss: "cosine" or "kl".
        tokens: what is seen.
        chunk: which rows.
        maps: (B, slots, keys) float32, the student's map or its base-2 logarithm.
        targets: (maps, B, slots, keys), the teachers' in the same domain.
        group: which of them.
        w: (B, slots, keys) receives dL/dP, or dL/dlog P; None where no gradient is wanted.
        sums: (B, at least count) float32, receives the losses.
        log: whether maps are logarithms; always for kl.
    """
    kernel = {"cosine": attention_rows.cosine_kernel, "kl": attention_rows.kl_kernel}[loss]
    stride_t, stride_b, stride_s = map_strides(targets)
    share = 1 / len(group.maps)
    with on_device(maps):
        kernel[(ceil_div(chunk.count, ROW_TILES.q), tokens.batch_size)](
            maps,
            targets,
            w,
            sums,
            *tokens.seen,
            tokens.vision,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            sums.stride(0),
            stride_b,
            stride_s,
            stride_t,
            *group.words,
            share,
            math.log2(share),
            targets.shape[0],
            LOG=log,
            **row_meta(ROW_TILES),
        )


def map_tile_size(query: Tensor, key: Tensor, *, region: bool) -> tuple[int, int]:
    """Rows and keys of a program of `map_tile`."""
    _, tile = meta_of("map", query, key, region=region)
    return tile.q, tile.k
