"""Head-mean maps of one chunk of rows, and the squared error between two of them.

Grid (key tiles, row tiles, samples). A program owns one (BLOCK_Q, BLOCK_K) tile of the map and
loops over all heads with a float32 accumulator in registers, key heads outside, so that a key tile
is read once for its group of query heads. Keys come in PARTS of PART: a tile is as wide as its
accumulators allow, so that few bytes of q are read per cell, a product as its registers do. With
the log-sum-exp known there is no running maximum: an element costs one multiply-add, one exp2 and
one add, the mean over heads sits in the exponent.

`map_kernel` writes the map, P or log2 P, to a workspace (slots of rows x keys). `mse_kernel` does
not: it takes the target's map from workspaces and writes W = dL/dP = 2 (P - T) of the region, the
tile's sum of (P - T)^2.
Workspaces are padded to whole tiles: a tile that holds a cell of the region is written whole, 0
where a cell is not visible or not in the region, the others are not written at all.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    count_region,
    count_rows,
    is_member,
    key_tags,
    load_columns,
    load_rows,
    multiply,
    row_span,
    row_tags,
    row_tokens,
    sees,
)

RUNTIME = (
    "sums_ptr",  # a part of a tensor, of any alignment
    *("N", "first_slot", "num_slots", "num_keys", "stride_sums"),
    *("stride_q_b", "stride_q_h", "stride_q_n"),
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
def _head_means(
    totals,
    q_ptr,
    k_ptr,
    lse2_ptr,
    i,
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
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to totals the mean over heads of 2^(scale2 q.k - lse2), or to 0 and gives its log2.

    Rows and keys that do not exist read ones that do: what comes of them is masked where it is
    stored, and a mask here would cost registers and predicates.
    """
    tops = ()
    for _ in tl.static_range(PARTS):
        tops = tops + (tl.full([BLOCK_Q, PART] if LOG else [1, 1], -1e30, tl.float32),)
    for kv in range(H // GROUP):
        keys = ()
        for part in tl.static_range(PARTS):
            # The minimum is always BLOCK_K's place; written so, addresses depend on the head and
            # are not kept in registers from one to the next.
            n = tl.minimum(tl.program_id(0) * (PART * PARTS), N + kv) + part * PART
            j = tl.minimum(n + tl.arange(0, PART), N - 1)
            k = load_columns(k_ptr + kv * stride_k_h, stride_k_n, j, None, D, BLOCK_D, TAIL)
            keys = keys + (k,)
        for g in tl.range(0, GROUP, num_stages=STAGES):
            h = kv * GROUP + g
            q = load_rows(q_ptr + h * stride_q_h, stride_q_n, i, None, D, BLOCK_D, TAIL)
            lse2 = tl.load(lse2_ptr + (h * N + i)) + log2_heads
            totals, tops = _add_head(totals, tops, q, keys, lse2, scale2, LOG, PARTS, PRECISION)
    if LOG:
        logs = ()
        for part in tl.static_range(PARTS):
            logs = logs + (tops[part] + tl.log2(totals[part]),)
        totals = logs
    return totals


@triton.jit
def _add_head(
    totals, tops, q, keys, lse2, scale2, LOG: tl.constexpr, PARTS: tl.constexpr, PRECISION
):
    """One head more in every part."""
    new_totals, new_tops = (), ()
    for part in tl.static_range(PARTS):
        x = multiply(q, keys[part], PRECISION) * scale2 - lse2[:, None]
        total, top = totals[part], tops[part]
        if LOG:
            new = tl.maximum(top, x)
            term = tl.exp2(tl.minimum(top, x) - new)  # of the smaller one, beside the larger
            total = tl.where(x > top, total * term + 1.0, total + term)
            top = new
        else:
            total += tl.exp2(x)
        new_totals, new_tops = new_totals + (total,), new_tops + (top,)
    return new_totals, new_tops


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
    before_ptr,
    N,
    first_slot,
    num_slots,
    num_keys,
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
    TAIL: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes P (or log2 P) to out (samples, slots, keys)."""
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = first_slot + slot < stop
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    if _nothing_to_see(first, last, before_ptr, b, N, BLOCK_K):
        return
    tag = row_tags(tags_ptr, b, i, live, N)
    maps = ()
    for _ in tl.static_range(PARTS):
        maps = maps + (tl.zeros([BLOCK_Q, PART], tl.float32),)
    maps = _head_means(
        maps,
        q_ptr + b * stride_q_b * ALIGN_Q,
        k_ptr + b * stride_k_b * ALIGN_K,
        lse2_ptr + b * H * N,
        i,
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
        TAIL,
        BLOCK_Q,
        PART,
        PARTS,
        STAGES,
        PRECISION,
    )
    out_ptr += b * stride_map_b * ALIGN_MAP
    row = slot * (stride_map_s * ALIGN_MAP)
    for part in tl.static_range(PARTS):
        if tl.program_id(0) * BLOCK_K + part * PART < num_keys:
            j, seen = _cells(part, first, last, tag, tags_ptr, vision_ptr, b, N, PART, PARTS)
            tl.store(out_ptr + (row[:, None] + j[None, :]), tl.where(seen, maps[part], 0.0))


@triton.jit(do_not_specialize=RUNTIME)
def mse_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    targets_ptr,
    w_ptr,
    sums_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    vision_ptr,
    before_ptr,
    N,
    first_slot,
    num_slots,
    num_keys,
    stride_sums,
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
    TAIL: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes W (samples, slots, keys) and sums (samples, row tiles x key tiles).

    The target is `share` times the sum of the workspaces whose bit is set in `members`.
    """
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = first_slot + slot < stop
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    if _nothing_to_see(first, last, before_ptr, b, N, BLOCK_K):
        tl.store(sums_ptr + _tile(b, stride_sums), 0.0)
        return
    tag = row_tags(tags_ptr, b, i, live, N)
    row = slot * (stride_map_s * ALIGN_MAP)
    targets_ptr += b * stride_map_b * ALIGN_MAP
    stride_t = tl.cast(stride_map_t, tl.int64) * ALIGN_MAP
    maps = ()
    for _ in tl.static_range(PARTS):
        maps = maps + (tl.zeros([BLOCK_Q, PART], tl.float32),)
    maps = _head_means(
        maps,
        q_ptr + b * stride_q_b * ALIGN_Q,
        k_ptr + b * stride_k_b * ALIGN_K,
        lse2_ptr + b * H * N,
        i,
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
        TAIL,
        BLOCK_Q,
        PART,
        PARTS,
        STAGES,
        PRECISION,
    )
    square = tl.zeros([BLOCK_Q], tl.float32)
    for part in tl.static_range(PARTS):
        if tl.program_id(0) * BLOCK_K + part * PART < num_keys:
            j, seen = _cells(part, first, last, tag, tags_ptr, vision_ptr, b, N, PART, PARTS)
            cells = row[:, None] + j[None, :]
            target = _target(targets_ptr, cells, stride_t, members, more_members, share, num_maps)
            gap = tl.where(seen, maps[part] - target, 0.0)
            square += tl.sum(gap * gap, 1)
            if w_ptr is not None:
                w = (2.0 * gap).to(w_ptr.dtype.element_ty)
                tl.store(w_ptr + b * stride_map_b * ALIGN_MAP + cells, w)
    tl.store(sums_ptr + _tile(b, stride_sums), tl.sum(square))


@triton.jit
def _tile(b, stride_sums):
    """Place of the program's sum."""
    return b * stride_sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _target(targets_ptr, cells, stride_t, members, more_members, share, num_maps):
    """`share` times the sum of a group's maps."""
    total = tl.zeros(cells.shape, tl.float32)
    for t in range(num_maps):
        if is_member(t, members, more_members):
            total += tl.load(targets_ptr + t * stride_t + cells)
    return total * share


@triton.jit
def _cells(
    part,
    first,
    last,
    tag,
    tags_ptr,
    vision_ptr,
    b,
    N,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Keys of one part of the tile, and which cells are visible and in the region."""
    j = tl.program_id(0) * (PART * PARTS) + part * PART + tl.arange(0, PART)
    key_tag, _ = key_tags(tags_ptr, b, j, N)
    seen = sees(first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr)
    if vision_ptr is not None:
        seen = seen & (tl.load(vision_ptr + b * N + j, mask=j < N, other=0) != 0)[None, :]
    return j, seen


@triton.jit
def _nothing_to_see(first, last, before_ptr, b, N, BLOCK_K: tl.constexpr):
    """Whether no row of the tile can see a key of it that belongs to the region."""
    n = tl.program_id(0) * BLOCK_K
    blind = (tl.min(first) >= n + BLOCK_K) | (tl.max(last) < n)
    if before_ptr is not None:
        blind = blind | (count_region(before_ptr, b, n, BLOCK_K, N) == 0)
    return blind
