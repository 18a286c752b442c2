"""Gradient in q of a chunk of rows, from W and recomputed probabilities.

The gradient kernels make, per head and cell, R = 2^(scale2 q.k - lse2 - L) with L = log2 P (kl,
cosine of a rectangle; README.md derives it) or L = 0, and R 2^L = P_h, and use

    dS_h = R W - delta_h P_h,   dq_h = c dS_h k,   dk = c sum_h dS_h^T q_h,
    delta_h = sum_j R W / sum_j P_h,

with c = scale / H; P_h sums to 1 only as well as lse2 is rounded. These run over all visible keys;
W and L are 0 outside the region.

Grid (packs of query heads, row tiles, samples), the last rows first: they see the most keys. The
BLOCK_Q rows of a program are BLOCK_Q // PACK tokens times PACK query heads of one key head, heads
fastest, which share the tile of W; a remainder stays empty.

`delta_kernel`: one product a cell. `dq_kernel`: two, with delta known; ONE_PASS makes delta on the
way with three, from one exp2. Both are equally exact, since rows are centred online (README.md).
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    add_product,
    add_scaled,
    count_masked,
    count_region,
    count_rows,
    key_tags,
    load_cells,
    load_rows,
    masked_tile,
    multiply,
    row_span,
    row_tags,
    row_tokens,
    sees,
    tile_span,
    turned,
    zero_rows,
)

RUNTIME = (
    *("N", "first_slot", "num_slots", "stride_q_b", "stride_q_h", "stride_q_n"),
    *("stride_k_b", "stride_k_h", "stride_k_n", "stride_dq_b", "stride_dq_h", "stride_dq_n"),
    *("stride_map_b", "stride_map_s", "scale2", "factor"),
)


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
    kv, pack = tl.program_id(0) // PACKS, tl.program_id(0) % PACKS
    member = pack * PACK + r % PACK
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    slot = tile * TOKENS + r // PACK
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = (first_slot + slot < stop) & (r < TOKENS * PACK) & (member < GROUP)
    return kv, kv * GROUP + tl.minimum(member, GROUP - 1), tl.minimum(slot, num_slots - 1), live


@triton.jit
def _ratio(x, row, n, seen, w_ptr, log_ptr, before_ptr, b, N, BLOCK_K: tl.constexpr):
    """R, P_h and W of a tile whose exponents without L are x; W and L are 0 where not seen."""
    cells = row[:, None] + (n + tl.arange(0, BLOCK_K))[None, :]
    some = None
    if before_ptr is not None:
        some = count_region(before_ptr, b, n, BLOCK_K, N) > 0
    w = load_cells(w_ptr, cells, seen, some)
    if log_ptr is not None:
        log = load_cells(log_ptr, cells, seen, some)
        r = tl.exp2(x - log)
        return r, r * tl.exp2(log), w
    else:
        r = tl.exp2(x)
        return r, r, w


@triton.jit(do_not_specialize=RUNTIME)
def delta_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    pairs_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    before_ptr,
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
    TAIL: tl.constexpr,
    PACK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes log-sum-exp and delta (samples, heads, slots, 2) of the chunk."""
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
    q = load_rows(q_ptr, (h * stride_q_h + i * stride_q_n) * ALIGN_Q, None, None, D, BLOCK_D, TAIL)
    lse2 = tl.load(lse2_ptr + b * H * N + (h * N + i), mask=live, other=float("inf"))
    row = slot * (stride_map_s * ALIGN_MAP)
    w_ptr += b * stride_map_b * ALIGN_MAP
    if log_ptr is not None:
        log_ptr += b * stride_map_b * ALIGN_MAP

    moment, mass = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    begin, full_begin, full_end, end = tile_span(first, last, live, tag, N, tags_ptr, BLOCK_K)
    for n in tl.range(full_begin, full_end, BLOCK_K, num_stages=STAGES):
        j = n + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, stride_k, j, None, D, BLOCK_D, TAIL)
        x = multiply(q, turned(k), PRECISION) * scale2 - lse2[:, None]
        r, p, w = _ratio(x, row, n, None, w_ptr, log_ptr, before_ptr, b, N, BLOCK_K)
        moment, mass = moment + tl.sum(r * w, 1), mass + tl.sum(p, 1)
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_K)):
        n = masked_tile(t, begin, full_begin, full_end, BLOCK_K)
        j = n + tl.arange(0, BLOCK_K)
        key_tag, key_live = key_tags(tags_ptr, b, j, N)
        k = load_rows(k_ptr, stride_k, j, key_live, D, BLOCK_D, TAIL)
        x = multiply(q, turned(k), PRECISION) * scale2 - lse2[:, None]
        seen = sees(
            first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
        )
        x = tl.where(seen, x, float("-inf"))
        r, p, w = _ratio(x, row, n, seen, w_ptr, log_ptr, before_ptr, b, N, BLOCK_K)
        moment, mass = moment + tl.sum(r * w, 1), mass + tl.sum(p, 1)
    delta = moment / tl.maximum(mass, 1e-30)
    pairs_ptr += (b * H * num_slots + (h * num_slots + slot)) * 2
    tl.store(pairs_ptr, lse2, mask=live)
    tl.store(pairs_ptr + 1, delta, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q_ptr,
    k_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    pairs_ptr,
    dq_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    before_ptr,
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
    ONE_PASS: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
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
    """Writes dq of the chunk's rows; reads delta from pairs, or writes them if ONE_PASS."""
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
    q = load_rows(q_ptr, (h * stride_q_h + i * stride_q_n) * ALIGN_Q, None, None, D, BLOCK_D, TAIL)
    lse2 = tl.load(lse2_ptr + b * H * N + (h * N + i), mask=live, other=float("inf"))
    row = slot * (stride_map_s * ALIGN_MAP)
    w_ptr += b * stride_map_b * ALIGN_MAP
    if log_ptr is not None:
        log_ptr += b * stride_map_b * ALIGN_MAP
    pairs_ptr += (b * H * num_slots + (h * num_slots + slot)) * 2

    delta = tl.zeros([BLOCK_Q], tl.float32)
    if not ONE_PASS:
        delta = tl.load(pairs_ptr + 1, mask=live, other=0.0)
    moment, mass = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    a = zero_rows(BLOCK_Q, BLOCK_D, TAIL)
    o = a if ONE_PASS else ()
    begin, full_begin, full_end, end = tile_span(first, last, live, tag, N, tags_ptr, BLOCK_K)
    for n in tl.range(full_begin, full_end, BLOCK_K, num_stages=STAGES):
        j = n + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, stride_k, j, None, D, BLOCK_D, TAIL)
        x = multiply(q, turned(k), PRECISION) * scale2 - lse2[:, None]
        r, p, w = _ratio(x, row, n, None, w_ptr, log_ptr, before_ptr, b, N, BLOCK_K)
        a, o, moment, mass, delta = _add_tile(
            a, o, moment, mass, delta, r, p, w, k, ONE_PASS, GRAD_DTYPE, GRAD_PRECISION
        )
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_K)):
        n = masked_tile(t, begin, full_begin, full_end, BLOCK_K)
        j = n + tl.arange(0, BLOCK_K)
        key_tag, key_live = key_tags(tags_ptr, b, j, N)
        k = load_rows(k_ptr, stride_k, j, key_live, D, BLOCK_D, TAIL)
        x = multiply(q, turned(k), PRECISION) * scale2 - lse2[:, None]
        seen = sees(
            first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
        )
        x = tl.where(seen, x, float("-inf"))
        r, p, w = _ratio(x, row, n, seen, w_ptr, log_ptr, before_ptr, b, N, BLOCK_K)
        a, o, moment, mass, delta = _add_tile(
            a, o, moment, mass, delta, r, p, w, k, ONE_PASS, GRAD_DTYPE, GRAD_PRECISION
        )
    if ONE_PASS:
        tl.store(pairs_ptr, lse2, mask=live)
        tl.store(pairs_ptr + 1, delta, mask=live)
    dq_ptr += b * stride_dq_b + (h * stride_dq_h + i * stride_dq_n)[:, None]
    d = tl.arange(0, BLOCK_D)
    tl.store(dq_ptr + d[None, :], a[0] * factor, mask=live[:, None] & (d < D)[None, :])
    if TAIL:
        d = BLOCK_D + tl.arange(0, TAIL)
        tl.store(dq_ptr + d[None, :], a[1] * factor, mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _add_tile(
    a,
    o,
    moment,
    mass,
    delta,
    r,
    p,
    w,
    k,
    ONE_PASS: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """One tile more in dq; if ONE_PASS, delta is what it is so far, and a follows it."""
    rw = r * w
    if ONE_PASS:
        moment, mass = moment + tl.sum(rw, 1), mass + tl.sum(p, 1)
        before, delta = delta, moment / tl.maximum(mass, 1e-30)
        a = add_scaled(a, (before - delta)[:, None], o)
        o = add_product(o, p, k, GRAD_DTYPE, GRAD_PRECISION)
    a = add_product(a, rw - p * delta[:, None], k, GRAD_DTYPE, GRAD_PRECISION)
    return a, o, moment, mass, delta
