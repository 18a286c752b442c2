"""Launchers of the gradient kernels: delta and dq, and dk with what it needs beforehand."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from drivekd_kernels import attention_dk, attention_dq, specialize
from drivekd_kernels.operands import (
    LOG2E,
    Chunk,
    Heads,
    Tokens,
    ceil_div,
    map_strides,
    on_device,
)
from drivekd_kernels.specialize import meta_of, packed_heads
from drivekd_kernels.tuned import Tiles

MAX_PLANES = 16  # of dk
PLANES_BYTES = 64 * 2**20  # that they may take together, but for the first two


def delta(heads: Heads, tokens: Tokens, chunk: Chunk, w: Tensor, logs: Tensor | None) -> Tensor:
    """Log-sum-exp and delta (B, H, count, 2) float32 of a chunk."""
    result = _pairs(heads, chunk)
    meta, tile = _gradient_meta("delta", heads, tokens, log=logs is not None)
    with on_device(heads.query):
        attention_dq.delta_kernel[_packed_grid(heads, chunk, tile)](
            heads.query,
            heads.key,
            heads.lse2,
            w,
            logs,
            result,
            *tokens.seen,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            *heads.strides,
            *map_strides(w),
            heads.scale * LOG2E,
            **meta,
        )
    return result


def dq(
    heads: Heads,
    tokens: Tokens,
    chunk: Chunk,
    w: Tensor,
    logs: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write dq of a chunk's rows to out (B, H, N, D) float32; return what `delta` gives."""
    single = specialize.one_pass(heads.query)
    meta, tile = _gradient_meta("dq", heads, tokens, log=logs is not None)
    pairs = _pairs(heads, chunk) if single else delta(heads, tokens, chunk, w, logs)
    with on_device(heads.query):
        attention_dq.dq_kernel[_packed_grid(heads, chunk, tile)](
            heads.query,
            heads.key,
            heads.lse2,
            w,
            logs,
            pairs,
            out,
            *tokens.seen,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            *heads.strides,
            *out.stride()[:3],
            *map_strides(w),
            heads.scale * LOG2E,
            heads.scale / heads.num_heads,
            ONE_PASS=single,
            **meta,
            **_grad_dtype(heads.query),
        )
    return pairs


def dk_planes(heads: Heads, tokens: Tokens, chunk: Chunk, *, log: bool) -> int:
    """Planes of dk: how many programs may share a tile of keys."""
    _, tile = _gradient_meta("dk", heads, tokens, log=log)
    B, H_kv, N, D = heads.key.shape
    key_tiles = ceil_div(min(chunk.count, N), tile.k) * H_kv * B
    # Under a causal mask half of the first chunk's tiles are seen, from its own keys.
    wanted = 1 + ceil_div(2 * specialize.programs(heads.query), key_tiles)
    affordable = max(2, PLANES_BYTES // (4 * B * H_kv * N * D))
    return max(2, min(wanted, affordable, MAX_PLANES, 1 + ceil_div(chunk.count, tile.q)))


def dk_width(heads: Heads, tokens: Tokens, *, log: bool) -> int:
    """Keys of a tile of dk."""
    return _gradient_meta("dk", heads, tokens, log=log)[1].k


def key_spans(tokens: Tokens, width: int) -> Tensor:
    """Slots that see each tile of so many keys: (4, B, tiles) int32."""
    B, N = tokens.batch_size, tokens.num_tokens
    spans = tokens.first.new_empty((4, B, ceil_div(N, width)))
    with on_device(spans):
        attention_dk.spans_kernel[(spans.shape[2], B)](
            tokens.row_first,
            tokens.row_last,
            tokens.slots,
            tokens.tags,
            spans,
            N,
            BLOCK_K=width,
            num_warps=4,
        )
    return spans


def dk(
    heads: Heads,
    tokens: Tokens,
    chunk: Chunk,
    w: Tensor,
    logs: Tensor | None,
    pairs: Tensor,
    spans: Tensor,
    planes: Tensor,
) -> None:
    """Add a chunk's gradient in k to planes (planes, B, H_kv, N, D) float32, contiguous.

    pairs: log-sum-exp and delta (B, H, count, 2), from `dq` or `delta`. spans: from `key_spans`, of
    tiles of `dk_width` keys.
    """
    meta, tile = _gradient_meta("dk", heads, tokens, log=logs is not None)
    # A tile of keys must not be shared by more programs than there are planes.
    min_share = ceil_div(ceil_div(chunk.count, tile.q), planes.shape[0] - 1)
    with on_device(heads.query):
        attention_dk.dk_kernel[(specialize.programs(heads.query),)](
            heads.query,
            heads.key,
            w,
            logs,
            pairs,
            planes,
            tokens.first,
            tokens.last,
            spans,
            tokens.tags,
            tokens.rows,
            tokens.num_rows,
            tokens.before,
            tokens.num_tokens,
            tokens.batch_size,
            chunk.first,
            chunk.count,
            *heads.strides,
            *map_strides(w),
            heads.scale * LOG2E,
            heads.scale / heads.num_heads,
            min_share,
            **meta,
            **_grad_dtype(heads.query),
        )


def dq_tile_size(query: Tensor, key: Tensor, *, region: bool) -> tuple[int, int]:
    """Rows of a program of `dq`, and how many programs a sample has for these."""
    meta, tile = meta_of("dq", query, key, region=region, packs=True)
    return tile.q // meta["PACK"], key.shape[1] * ceil_div(meta["GROUP"], meta["PACK"])


def _gradient_meta(
    kernel: str, heads: Heads, tokens: Tokens, *, log: bool
) -> tuple[dict[str, Any], Tiles]:
    region = tokens.has_region
    packs = kernel != "dk"
    return meta_of(kernel, heads.query, heads.key, log=log, region=region, packs=packs)


def _pairs(heads: Heads, chunk: Chunk) -> Tensor:
    batch_size, num_heads = heads.lse2.shape[:2]
    return heads.lse2.new_empty((batch_size, num_heads, chunk.count, 2))


def _packed_grid(heads: Heads, chunk: Chunk, tile: Tiles) -> tuple[int, int, int]:
    batch_size, num_heads = heads.lse2.shape[:2]
    num_key_heads = heads.key.shape[1]
    group = num_heads // num_key_heads
    pack = packed_heads(group, tile)
    return num_key_heads * ceil_div(group, pack), ceil_div(chunk.count, tile.q // pack), batch_size


def _grad_dtype(query: Tensor) -> dict[str, Any]:
    """Operands of the products with dS. float16 has not its range, TF32 has, and as many bits."""
    if query.dtype == torch.bfloat16:
        return {"GRAD_DTYPE": tl.bfloat16, "GRAD_PRECISION": "ieee"}
    precision = "tf32" if query.dtype == torch.float16 else "ieee"
    return {"GRAD_DTYPE": tl.float32, "GRAD_PRECISION": precision}
