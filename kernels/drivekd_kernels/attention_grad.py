"""Gradients of a chunk of rows in q and k, from W and recomputed probabilities.

Every kernel makes, per head and cell, R = 2^(scale2 q.k - lse2 - L) with L = log2 P (kl, cosine of
a rectangle; README.md derives it) or L = 0, and mass = R 2^L = P_h, and uses

    dS_h = R W - delta_h P_h,   delta_h = sum_j R W,   dq_h = c dS_h k,   dk = c sum_h dS_h^T q_h,

with c = scale / H. These run over all visible keys; W is 0 outside the region.

`delta_kernel`: grid (row tiles, heads, samples), one product a cell.
`dq_kernel`: grid (row tiles, key heads x packs, samples). BLOCK_Q rows of a program are BLOCK_Q /
PACK tokens times PACK query heads of one group, which share the tile of W. Two products a cell with
delta known; ONE_PASS makes delta on the way with three, dq = c (A - delta B), A = sum R (W - m) k,
B = sum P_h k, m the row's centre (sum_j P W): it costs one exp2 less and cancels more.
`dk_kernel`: grid (key tiles, key heads, samples x splits). A program owns BLOCK_K keys and walks
over its split's rows, the tile of W held over the query heads of the group; it adds to its own
plane, and planes are summed in order: no atomics, bitwise repeatable.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    count_masked,
    count_rows,
    key_tags,
    load_rows,
    load_vector,
    masked_tile,
    row_span,
    row_tags,
    row_tokens,
    sees,
    tile_span,
)

RUNTIME = (
    *("N", "first_slot", "num_slots", "stride_q_b", "stride_q_h", "stride_q_n"),
    *("stride_k_b", "stride_k_h", "stride_k_n", "stride_dq_b", "stride_dq_h", "stride_dq_n"),
    *("stride_map_b", "stride_map_s", "scale2", "factor", "num_tiles", "num_splits", "split_slots"),
)


@triton.jit
def _ratio(x, cells, inside, w_ptr, log_ptr):
    """R and W of one tile whose exponents without L are x; R = P_h, W = 0 outside the region."""
    w = tl.load(w_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    if log_ptr is not None:
        x = x - tl.load(log_ptr + cells, mask=inside, other=0.0)
    return tl.exp2(x), w


@triton.jit
def _mass(r, cells, inside, log_ptr):
    """P_h from R."""
    if log_ptr is not None:
        return r * tl.exp2(tl.load(log_ptr + cells, mask=inside, other=0.0))
    else:
        return r


@triton.jit
def _of_region(j, inside, vision_ptr, b, N):
    """Keys of the region; `inside` are those that exist."""
    if vision_ptr is not None:
        return tl.load(vision_ptr + b * N + j, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit(do_not_specialize=RUNTIME)
def delta_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    delta_ptr,
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
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes delta (samples, heads, slots) of the chunk."""
    b = tl.program_id(2).to(tl.int64)
    kv, h, slot, live = _packed_rows(
        b, num_rows_ptr, N, first_slot, num_slots, GROUP, PACK, BLOCK_Q
    )
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    tag = row_tags(tags_ptr, b, i, live, N)
    stride_k = stride_k_n * ALIGN_K
    q_ptr += b * stride_q_b * ALIGN_Q
    k_ptr += (b * stride_k_b + kv.to(tl.int64) * stride_k_h) * ALIGN_K
    q = _load_packed(q_ptr, h, i, live, stride_q_h, stride_q_n, ALIGN_Q, D, BLOCK_D)
    lse2 = tl.load(lse2_ptr + b * H * N + (h * N + i), mask=live, other=float("inf"))
    row = slot * (stride_map_s * ALIGN_MAP)
    w_ptr += b * stride_map_b * ALIGN_MAP
    if log_ptr is not None:
        log_ptr += b * stride_map_b * ALIGN_MAP

    delta = tl.zeros([BLOCK_Q], tl.float32)
    begin, full_begin, full_end, end = tile_span(first, last, live, tag, N, tags_ptr, BLOCK_K)
    for n in tl.range(full_begin, full_end, BLOCK_K, num_stages=STAGES):
        j = n + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, stride_k, j, None, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse2[:, None]
        inside = live[:, None]
        if vision_ptr is not None:
            inside = inside & (tl.load(vision_ptr + b * N + j) != 0)[None, :]
        r, w = _ratio(x, row[:, None] + j[None, :], inside, w_ptr, log_ptr)
        delta += tl.sum(r * w, 1)
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_K)):
        j = masked_tile(t, begin, full_begin, full_end, BLOCK_K) + tl.arange(0, BLOCK_K)
        key_tag, key_live = key_tags(tags_ptr, b, j, N)
        k = load_rows(k_ptr, stride_k, j, key_live, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse2[:, None]
        seen = sees(
            first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
        )
        inside = seen & _of_region(j, j < N, vision_ptr, b, N)[None, :]
        r, w = _ratio(x, row[:, None] + j[None, :], inside, w_ptr, log_ptr)
        delta += tl.sum(tl.where(inside, r * w, 0.0), 1)
    tl.store(delta_ptr + b * H * num_slots + (h * num_slots + slot), delta, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    centres_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_dq_b,
    stride_dq_h,
    stride_dq_n,
    stride_map_b,
    stride_map_s,
    scale2,
    factor,
    num_tiles,
    ONE_PASS: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """Writes dq of the chunk's rows; reads delta, or writes it if ONE_PASS."""
    b = tl.program_id(2).to(tl.int64)
    kv, h, slot, live = _packed_rows(
        b, num_rows_ptr, N, first_slot, num_slots, GROUP, PACK, BLOCK_Q
    )
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    tag = row_tags(tags_ptr, b, i, live, N)
    stride_k = stride_k_n * ALIGN_K
    q_ptr += b * stride_q_b * ALIGN_Q
    k_ptr += (b * stride_k_b + kv.to(tl.int64) * stride_k_h) * ALIGN_K
    q = _load_packed(q_ptr, h, i, live, stride_q_h, stride_q_n, ALIGN_Q, D, BLOCK_D)
    lse2 = tl.load(lse2_ptr + b * H * N + (h * N + i), mask=live, other=float("inf"))
    row = slot * (stride_map_s * ALIGN_MAP)
    w_ptr += b * stride_map_b * ALIGN_MAP
    if log_ptr is not None:
        log_ptr += b * stride_map_b * ALIGN_MAP
    delta_ptr += b * H * num_slots + (h * num_slots + slot)

    centre = tl.zeros([BLOCK_Q], tl.float32)
    if ONE_PASS:
        delta = tl.zeros([BLOCK_Q], tl.float32)
        if centres_ptr is not None:
            centre_ptr = centres_ptr + b * num_slots * num_tiles + slot * num_tiles
            for t in range(num_tiles):
                centre += tl.load(centre_ptr + t, mask=live, other=0.0)
    else:
        delta = tl.load(delta_ptr, mask=live, other=0.0)

    a = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    o = tl.zeros([BLOCK_Q, BLOCK_D] if ONE_PASS else [1, 1], tl.float32)
    begin, full_begin, full_end, end = tile_span(first, last, live, tag, N, tags_ptr, BLOCK_K)
    for n in tl.range(full_begin, full_end, BLOCK_K, num_stages=STAGES):
        j = n + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, stride_k, j, None, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse2[:, None]
        inside = live[:, None]
        if vision_ptr is not None:
            inside = inside & (tl.load(vision_ptr + b * N + j) != 0)[None, :]
        cells = row[:, None] + j[None, :]
        r, w = _ratio(x, cells, inside, w_ptr, log_ptr)
        p = _mass(r, cells, inside, log_ptr)
        if ONE_PASS:
            g = r * w - p * centre[:, None]
            delta += tl.sum(g, 1)
            o = tl.dot(p.to(GRAD_DTYPE), k.to(GRAD_DTYPE), o, input_precision=GRAD_PRECISION)
        else:
            g = r * w - p * delta[:, None]
        a = tl.dot(g.to(GRAD_DTYPE), k.to(GRAD_DTYPE), a, input_precision=GRAD_PRECISION)
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_K)):
        j = masked_tile(t, begin, full_begin, full_end, BLOCK_K) + tl.arange(0, BLOCK_K)
        key_tag, key_live = key_tags(tags_ptr, b, j, N)
        k = load_rows(k_ptr, stride_k, j, key_live, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse2[:, None]
        seen = sees(
            first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
        )
        x = tl.where(seen, x, float("-inf"))
        inside = seen & _of_region(j, j < N, vision_ptr, b, N)[None, :]
        cells = row[:, None] + j[None, :]
        r, w = _ratio(x, cells, inside, w_ptr, log_ptr)
        p = _mass(r, cells, inside, log_ptr)
        if ONE_PASS:
            g = r * w - p * centre[:, None]
            delta += tl.sum(g, 1)
            o = tl.dot(p.to(GRAD_DTYPE), k.to(GRAD_DTYPE), o, input_precision=GRAD_PRECISION)
        else:
            g = r * w - p * delta[:, None]
        a = tl.dot(g.to(GRAD_DTYPE), k.to(GRAD_DTYPE), a, input_precision=GRAD_PRECISION)
    if ONE_PASS:
        a = a - delta[:, None] * o
        tl.store(delta_ptr, delta + centre, mask=live)
    d = tl.arange(0, BLOCK_D)
    dq_ptr += b * stride_dq_b + (h * stride_dq_h + i * stride_dq_n)[:, None] + d[None, :]
    tl.store(dq_ptr, a * factor, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _packed_rows(
    b,
    num_rows_ptr,
    N,
    first_slot,
    num_slots,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Key head of the program; head and slot of each of its rows, and whether it exists."""
    TOKENS: tl.constexpr = BLOCK_Q // PACK
    PACKS: tl.constexpr = (GROUP + PACK - 1) // PACK
    r = tl.arange(0, BLOCK_Q)
    kv, pack = tl.program_id(1) // PACKS, tl.program_id(1) % PACKS
    member = pack * PACK + r // TOKENS
    slot = tl.program_id(0) * TOKENS + r % TOKENS
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = (first_slot + slot < stop) & (member < GROUP)
    return kv, kv * GROUP + tl.minimum(member, GROUP - 1), slot, live


@triton.jit
def _load_packed(
    q_ptr,
    h,
    i,
    live,
    stride_q_h,
    stride_q_n,
    ALIGN_Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(rows, BLOCK_D), every row of its own head."""
    d = tl.arange(0, BLOCK_D)
    rows = (h * stride_q_h + i * stride_q_n) * ALIGN_Q
    mask = live[:, None] & (d < D)[None, :]
    return tl.load(q_ptr + rows[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=RUNTIME)
def dk_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    delta_ptr,
    planes_ptr,
    first_ptr,
    last_ptr,
    row_first_ptr,
    row_last_ptr,
    tags_ptr,
    rows_ptr,
    slots_ptr,
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
    factor,
    num_splits,
    split_slots,
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
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """Adds the chunk's part of dk to planes (splits, samples, key heads, N, D)."""
    kv = tl.program_id(1).to(tl.int64)
    split, b = tl.program_id(2) % num_splits, (tl.program_id(2) // num_splits).to(tl.int64)
    n = tl.program_id(0) * BLOCK_K
    j = n + tl.arange(0, BLOCK_K)
    key_tag, key_live = key_tags(tags_ptr, b, j, N)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots) - first_slot
    split_begin = split * split_slots
    split_end = tl.minimum(split_begin + split_slots, stop)
    begin, full_begin, full_end, end = _slot_span(
        row_first_ptr,
        row_last_ptr,
        slots_ptr,
        tags_ptr,
        b,
        j,
        key_tag,
        key_live,
        N,
        first_slot,
        split_begin,
        split_end,
        BLOCK_Q,
    )
    if begin >= end:
        return
    k_ptr += (b * stride_k_b + kv * stride_k_h) * ALIGN_K
    k = load_rows(k_ptr, stride_k_n * ALIGN_K, j, key_live, D, BLOCK_D)
    region = _of_region(j, j < N, vision_ptr, b, N)
    q_ptr += (b * stride_q_b + kv * GROUP * stride_q_h) * ALIGN_Q
    lse2_ptr += (b * H + kv * GROUP) * N
    delta_ptr += (b * H + kv * GROUP) * num_slots
    stride_s = stride_map_s * ALIGN_MAP
    w_ptr += b * stride_map_b * ALIGN_MAP
    if log_ptr is not None:
        log_ptr += b * stride_map_b * ALIGN_MAP

    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for m in range(full_begin, full_end, BLOCK_Q):
        slot = m + tl.arange(0, BLOCK_Q)
        i = row_tokens(rows_ptr, b, first_slot + slot, slot < split_end, N)
        cells = slot[None, :] * stride_s + j[:, None]
        inside = region[:, None]
        acc = _dk_rows(
            acc, k, q_ptr, lse2_ptr, w_ptr, log_ptr, delta_ptr, cells, inside, inside, i, slot,
            None, N, num_slots, stride_q_h, stride_q_n, scale2, False, GROUP, D, BLOCK_D, ALIGN_Q,
            STAGES, PRECISION, GRAD_DTYPE, GRAD_PRECISION,
        )  # fmt: skip
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_Q)):
        slot = masked_tile(t, begin, full_begin, full_end, BLOCK_Q) + tl.arange(0, BLOCK_Q)
        live = (slot >= split_begin) & (slot < split_end)
        i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
        first, last = row_span(first_ptr, last_ptr, b, i, live, N)
        tag = row_tags(tags_ptr, b, i, live, N)
        seen = sees(
            first[None, :], last[None, :], tag[None, :], j[:, None], key_tag[:, None], tags_ptr
        )
        cells = slot[None, :] * stride_s + j[:, None]
        acc = _dk_rows(
            acc, k, q_ptr, lse2_ptr, w_ptr, log_ptr, delta_ptr, cells, seen & region[:, None], seen,
            i, slot, live, N, num_slots, stride_q_h, stride_q_n, scale2, True, GROUP, D, BLOCK_D,
            ALIGN_Q, STAGES, PRECISION, GRAD_DTYPE, GRAD_PRECISION,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    plane = ((split * (tl.num_programs(2) // num_splits) + b) * (H // GROUP) + kv) * N
    planes_ptr += plane * D + (j[:, None] * D + d[None, :])
    mask = key_live[:, None] & (d < D)[None, :]
    tl.store(planes_ptr, tl.load(planes_ptr, mask=mask, other=0.0) + acc * factor, mask=mask)


@triton.jit
def _dk_rows(
    acc,
    k,
    q_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    delta_ptr,
    cells,
    inside,
    seen,
    i,
    slot,
    live,
    N,
    num_slots,
    stride_q_h,
    stride_q_n,
    scale2,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """One tile of rows, all query heads of the group; cells are (keys, rows)."""
    w = tl.load(w_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    if log_ptr is not None:
        logs = tl.load(log_ptr + cells, mask=inside, other=0.0)
        p_mean = tl.exp2(logs)
    stride_h = tl.cast(stride_q_h, tl.int64) * ALIGN_Q
    stride_n = stride_q_n * ALIGN_Q
    for g in tl.range(0, GROUP, num_stages=STAGES):
        q = load_rows(q_ptr + g * stride_h, stride_n, i, live, D, BLOCK_D)
        lse2 = load_vector(lse2_ptr + g * N + i, live, float("inf"))
        delta = load_vector(delta_ptr + g * num_slots + slot, live, 0.0)
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse2[None, :]
        if MASKED:
            x = tl.where(seen, x, float("-inf"))
        if log_ptr is not None:
            ds = tl.exp2(x - logs) * (w - delta[None, :] * p_mean)
        else:
            ds = tl.exp2(x) * (w - delta[None, :])
        acc = tl.dot(ds.to(GRAD_DTYPE), q.to(GRAD_DTYPE), acc, input_precision=GRAD_PRECISION)
    return acc


@triton.jit
def _slot_span(
    row_first_ptr,
    row_last_ptr,
    slots_ptr,
    tags_ptr,
    b,
    j,
    key_tag,
    key_live,
    N,
    first_slot,
    split_begin,
    split_end,
    BLOCK_Q: tl.constexpr,
):
    """As `tile_span`, of the chunk's slots whose rows see a tile of keys."""
    first = tl.load(row_first_ptr + b * N + j, mask=key_live, other=N)
    last = tl.load(row_last_ptr + b * N + j, mask=key_live, other=-1)
    low, high = tl.min(first), tl.max(last) + 1
    full_low = tl.max(tl.where(key_live, first, 0))
    full_high = tl.min(tl.where(key_live, last, N)) + 1
    if slots_ptr is not None:
        slots_ptr += b * (N + 1)
        low, high = tl.load(slots_ptr + tl.minimum(low, N)), tl.load(slots_ptr + high)
        full_low = tl.load(slots_ptr + tl.minimum(full_low, N))
        full_high = tl.load(slots_ptr + tl.minimum(full_high, N))
    low = tl.maximum(low - first_slot, split_begin)
    high = tl.minimum(high - first_slot, split_end)
    begin = low // BLOCK_Q * BLOCK_Q
    end = tl.maximum(tl.cdiv(high, BLOCK_Q) * BLOCK_Q, begin)
    full_begin = tl.cdiv(tl.maximum(full_low - first_slot, low), BLOCK_Q) * BLOCK_Q
    full_end = tl.minimum(full_high - first_slot, high) // BLOCK_Q * BLOCK_Q
    if tags_ptr is not None:
        full_end = tl.where(tl.max(tl.where(key_live, key_tag & 1, 0)) == 0, full_end, 0)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return begin, full_begin, full_end, end
