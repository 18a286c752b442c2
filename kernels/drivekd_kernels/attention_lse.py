"""Log-sum-exp of every row of every head.

Grid (heads, row tiles, samples), the last rows first: they see the most keys. A program owns
BLOCK_Q rows of one head and walks over the keys that they see, with an online softmax in base 2.
Reads q once and k once per row tile, writes one float32 for each row:
`lse2 = log2 sum_j 2^(scale2 q.k_j)`, +inf for a row that sees nothing.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    count_masked,
    count_rows,
    key_tags,
    load_columns,
    load_rows,
    masked_tile,
    multiply,
    row_span,
    row_tags,
    row_tokens,
    sees,
    tile_span,
)

RUNTIME = (
    *("N", "stride_q_b", "stride_q_h", "stride_q_n"),
    *("stride_k_b", "stride_k_h", "stride_k_n", "scale2"),
)


@triton.jit(do_not_specialize=RUNTIME)
def lse_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    N,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    scale2,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module."""
    h, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    stop = count_rows(num_rows_ptr, b, N)
    if tile * BLOCK_Q >= stop:
        return
    slot = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = slot < stop
    i = row_tokens(rows_ptr, b, slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    tag = row_tags(tags_ptr, b, i, live, N)
    q_ptr += (b * stride_q_b + h.to(tl.int64) * stride_q_h) * ALIGN_Q
    k_ptr += (b * stride_k_b + (h // GROUP).to(tl.int64) * stride_k_h) * ALIGN_K
    stride_k = stride_k_n * ALIGN_K
    q = load_rows(q_ptr, stride_q_n * ALIGN_Q, i, None, D, BLOCK_D, TAIL)

    top = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    begin, full_begin, full_end, end = tile_span(first, last, live, tag, N, tags_ptr, BLOCK_K)
    for n in tl.range(full_begin, full_end, BLOCK_K, num_stages=STAGES):
        j = n + tl.arange(0, BLOCK_K)
        k = load_columns(k_ptr, stride_k, j, None, D, BLOCK_D, TAIL)
        s = multiply(q, k, PRECISION) * scale2
        top, total = _add(top, total, s)
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_K)):
        j = masked_tile(t, begin, full_begin, full_end, BLOCK_K) + tl.arange(0, BLOCK_K)
        key_tag, key_live = key_tags(tags_ptr, b, j, N)
        k = load_columns(k_ptr, stride_k, j, key_live, D, BLOCK_D, TAIL)
        s = multiply(q, k, PRECISION) * scale2
        seen = sees(
            first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
        )
        top, total = _add(top, total, tl.where(seen, s, float("-inf")))
    lse2 = tl.where(total > 0, top + tl.log2(total), float("inf"))
    tl.store(lse2_ptr + (b * H + h) * N + i, lse2, mask=live)


@triton.jit
def _add(top, total, s):
    """One step of the online softmax."""
    new = tl.maximum(top, tl.max(s, 1))
    return new, total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
