"""Head-mean maps of one chunk of rows, and the squared error between two of them.

Grid (key tiles, row tiles, samples). A program owns one (BLOCK_Q, BLOCK_K) tile of the map and
loops over all heads with a float32 accumulator in registers, key heads outside, so that a key tile
is read once for its group of query heads. With the log-sum-exp known there is no running maximum:
an element costs one multiply-add, one exp2 and one add, the mean over heads sits in the exponent.

`map_kernel` writes the map, P or log2 P, to a workspace (slots of rows x keys). `mse_kernel` does
not: it takes the target's map from workspaces and writes W = dL/dP = 2 (P - T) of the region, the
tile's sum of (P - T)^2, and each row's sum of P W in the tile, on which the gradient centres W.
Cells that nobody sees, and tiles without a cell of the region, are not written: readers mask them.
"""

import triton
import triton.language as tl

from drivekd_kernels.attention_rows import mean_of_maps
from drivekd_kernels.tiles import (
    count_rows,
    key_tags,
    load_columns,
    load_rows,
    row_span,
    row_tags,
    row_tokens,
    sees,
)

RUNTIME = (
    "sums_ptr",  # a part of a tensor, of any alignment
    *("N", "first_slot", "num_slots", "stride_q_b", "stride_q_h", "stride_q_n"),
    *("stride_k_b", "stride_k_h", "stride_k_n", "scale2", "log2_heads"),
    *(
        "stride_map_b",
        "stride_map_s",
        "stride_map_t",
        "members",
        "more_members",
        "share",
        "num_maps",
    ),
)


@triton.jit
def _head_mean(
    total,
    q_ptr,
    k_ptr,
    lse2_ptr,
    b,
    i,
    live,
    j,
    key_live,
    N,
    stride_q_h,
    stride_q_n,
    stride_k_h,
    stride_k_n,
    scale2,
    log2_heads,
    LOG: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to total (0 if LOG) the mean over heads of 2^(scale2 q.k - lse2), or gives its log2."""
    top = tl.full([BLOCK_Q, BLOCK_K] if LOG else [1, 1], -1e30, tl.float32)
    for kv in range(H // GROUP):
        k = load_columns(k_ptr + kv * stride_k_h, stride_k_n, j, key_live, D, BLOCK_D)
        for g in tl.range(0, GROUP, num_stages=STAGES):
            h = kv * GROUP + g
            q = load_rows(q_ptr + h * stride_q_h, stride_q_n, i, live, D, BLOCK_D)
            lse2 = tl.load(lse2_ptr + (b * H + h) * N + i, mask=live, other=float("inf"))
            x = tl.dot(q, k, input_precision=PRECISION) * scale2 - (lse2 + log2_heads)[:, None]
            if LOG:
                new = tl.maximum(top, x)
                term = tl.exp2(tl.minimum(top, x) - new)  # of the smaller one, beside the larger
                total = tl.where(x > top, total * term + 1.0, total + term)
                top = new
            else:
                total += tl.exp2(x)
    return top + tl.log2(total) if LOG else total


@triton.jit(do_not_specialize=RUNTIME)
def map_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    out_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    vision_ptr,
    N,
    first_slot,
    num_slots,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_map_b,
    stride_map_s,
    scale2,
    log2_heads,
    LOG: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes P (or log2 P) of the visible cells to out (samples, slots, keys)."""
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = first_slot + slot < stop
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    if _nothing_to_see(first, last, j, vision_ptr, b, N):
        return
    key_tag, key_live = key_tags(tags_ptr, b, j, N)
    tag = row_tags(tags_ptr, b, i, live, N)
    p = _head_mean(
        tl.zeros([BLOCK_Q, BLOCK_K], tl.float32),
        q_ptr + b * stride_q_b * ALIGN_Q,
        k_ptr + b * stride_k_b * ALIGN_K,
        lse2_ptr,
        b,
        i,
        live,
        j,
        key_live,
        N,
        tl.cast(stride_q_h, tl.int64) * ALIGN_Q,
        stride_q_n * ALIGN_Q,
        tl.cast(stride_k_h, tl.int64) * ALIGN_K,
        stride_k_n * ALIGN_K,
        scale2,
        log2_heads,
        LOG,
        H,
        GROUP,
        D,
        BLOCK_D,
        BLOCK_Q,
        BLOCK_K,
        STAGES,
        PRECISION,
    )
    seen = sees(first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr)
    out_ptr += b * stride_map_b * ALIGN_MAP
    tl.store(out_ptr + slot[:, None] * (stride_map_s * ALIGN_MAP) + j[None, :], p, mask=seen)


@triton.jit(do_not_specialize=RUNTIME)
def mse_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    targets_ptr,
    w_ptr,
    sums_ptr,
    centres_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    vision_ptr,
    N,
    first_slot,
    num_slots,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_map_b,
    stride_map_s,
    stride_map_t,
    scale2,
    log2_heads,
    members,
    more_members,
    share,
    num_maps,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes W (samples, slots, keys), sums (samples, row and key tiles), centres (.., slots, ..).

    The target is `share` times the sum of the workspaces whose bit is set in `members`.
    """
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = first_slot + slot < stop
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    sums_ptr += (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    if centres_ptr is not None:
        centres_ptr += b * num_slots * tl.num_programs(0) + tl.program_id(0)
        centres_ptr += slot * tl.num_programs(0)
    if _nothing_to_see(first, last, j, vision_ptr, b, N):
        tl.store(sums_ptr, 0.0)
        if centres_ptr is not None:
            tl.store(centres_ptr, tl.zeros([BLOCK_Q], tl.float32), mask=slot < num_slots)
        return
    key_tag, key_live = key_tags(tags_ptr, b, j, N)
    tag = row_tags(tags_ptr, b, i, live, N)
    seen = sees(first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr)
    if vision_ptr is not None:
        seen = seen & (tl.load(vision_ptr + b * N + j, mask=j < N, other=0) != 0)[None, :]
    cells = slot[:, None] * (stride_map_s * ALIGN_MAP) + j[None, :]
    targets_ptr += b * stride_map_b * ALIGN_MAP
    stride_t = tl.cast(stride_map_t, tl.int64) * ALIGN_MAP
    target = mean_of_maps(
        targets_ptr, cells, seen, stride_t, members, more_members, share, 0.0, num_maps, False
    )
    gap = _head_mean(
        -target,
        q_ptr + b * stride_q_b * ALIGN_Q,
        k_ptr + b * stride_k_b * ALIGN_K,
        lse2_ptr,
        b,
        i,
        live,
        j,
        key_live,
        N,
        tl.cast(stride_q_h, tl.int64) * ALIGN_Q,
        stride_q_n * ALIGN_Q,
        tl.cast(stride_k_h, tl.int64) * ALIGN_K,
        stride_k_n * ALIGN_K,
        scale2,
        log2_heads,
        False,
        H,
        GROUP,
        D,
        BLOCK_D,
        BLOCK_Q,
        BLOCK_K,
        STAGES,
        PRECISION,
    )
    gap = tl.where(seen, gap, 0.0)
    tl.store(sums_ptr, tl.sum(gap * gap))
    if w_ptr is not None:
        w = (2.0 * gap).to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + b * stride_map_b * ALIGN_MAP + cells, w, mask=seen)
    if centres_ptr is not None:
        # The target is read again rather than held in registers over all heads.
        p = gap + mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, 0.0, num_maps, False
        )
        tl.store(centres_ptr, tl.sum(p * w.to(tl.float32), 1), mask=slot < num_slots)


@triton.jit
def _nothing_to_see(first, last, j, vision_ptr, b, N):
    """Whether no row of the tile can see a key of it that belongs to the region."""
    blind = (tl.min(first) > tl.max(j)) | (tl.max(last) < tl.min(j))
    if vision_ptr is not None:
        vision = tl.load(vision_ptr + b * N + j, mask=j < N, other=0)
        blind = blind | (tl.max(vision.to(tl.int32)) == 0)
    return blind
