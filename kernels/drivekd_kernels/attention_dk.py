"""Gradient in k of a chunk of rows, from W and recomputed probabilities; see `attention_dq`.

A tile of keys is BLOCK_K keys of one key head of one sample, in PARTS of PART; its work is the row
tiles that see it. Work is laid end to end, key tile by key tile, and every program takes one equal
share of it, so all of them end together whatever the tokens see. A share may begin and end
within a key tile; the pieces of a key tile are added to planes of their own, which are summed in
order: no atomics, bitwise repeatable.

`spans_kernel` says which slots see a tile of keys, once a call; `dk_kernel` cuts them to its chunk.
Products are (keys x rows): dS^T goes from registers into the second one, and what belongs to rows,
the log-sum-exp and delta, comes in pairs through shared memory.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    add_product,
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
    turned,
    zero_rows,
)

RUNTIME = (
    *("N", "num_samples", "first_slot", "num_slots", "stride_q_b", "stride_q_h", "stride_q_n"),
    *("stride_k_b", "stride_k_h", "stride_k_n", "stride_map_b", "stride_map_s"),
    *("scale2", "factor", "min_share"),
)


@triton.jit(do_not_specialize=("N",))
def spans_kernel(
    row_first_ptr,
    row_last_ptr,
    slots_ptr,
    tags_ptr,
    spans_ptr,
    N,
    BLOCK_K: tl.constexpr,
):
    """Writes spans (4, samples, key tiles): slots low .. high see a key, full_low .. full_high all.

    Grid (key tiles, samples). A tile with a segment that has gaps is seen whole by no slot.
    """
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    tag, live = key_tags(tags_ptr, b, j, N)
    first = tl.load(row_first_ptr + b * N + j, mask=live, other=N)
    last = tl.load(row_last_ptr + b * N + j, mask=live, other=-1)
    low, high = tl.min(first), tl.max(last) + 1
    full_low = tl.max(tl.where(live, first, 0))
    full_high = tl.min(tl.where(live, last, N)) + 1
    full_high = tl.minimum(full_high, N)
    if slots_ptr is not None:
        slots_ptr += b * (N + 1)
        low, high = tl.load(slots_ptr + tl.minimum(low, N)), tl.load(slots_ptr + high)
        full_low = tl.load(slots_ptr + tl.minimum(full_low, N))
        full_high = tl.load(slots_ptr + full_high)
    if tags_ptr is not None:
        full_high = tl.where(tl.max(tl.where(live, tag & 1, 0)) == 0, full_high, 0)
    step = tl.num_programs(0) * tl.num_programs(1)
    spans_ptr += b * tl.num_programs(0) + tl.program_id(0)
    tl.store(spans_ptr, low)
    tl.store(spans_ptr + step, high)
    tl.store(spans_ptr + 2 * step, full_low)
    tl.store(spans_ptr + 3 * step, full_high)


@triton.jit(do_not_specialize=RUNTIME)
def dk_kernel(
    q_ptr,
    k_ptr,
    w_ptr,
    log_ptr,
    pairs_ptr,
    planes_ptr,
    first_ptr,
    last_ptr,
    spans_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    before_ptr,
    N,
    num_samples,
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
    min_share,
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
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """Adds the chunk's part of dk to planes (planes, samples, key heads, N, D)."""
    KV: tl.constexpr = H // GROUP
    num_tiles = tl.cdiv(N, BLOCK_K)
    total = 0
    for e in range(0, num_samples * num_tiles, SCAN):
        total += tl.sum(
            _count_tiles(
                spans_ptr,
                num_rows_ptr,
                e,
                N,
                num_samples,
                num_tiles,
                first_slot,
                num_slots,
                BLOCK_Q,
            )
        )
    total *= KV
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), min_share)
    begin_unit = tl.program_id(0) * share
    if begin_unit >= total:
        return
    end_unit = tl.minimum(begin_unit + share, total)
    # Key tiles of all samples that end before the share begins, and that end before it ends.
    first_tile, last_tile, passed, base = 0, 0, 0, 0
    for e in range(0, num_samples * num_tiles, SCAN):
        counts = KV * _count_tiles(
            spans_ptr, num_rows_ptr, e, N, num_samples, num_tiles, first_slot, num_slots, BLOCK_Q
        )
        ends = base + tl.cumsum(counts, 0)
        first_tile += tl.sum((ends <= begin_unit).to(tl.int32))
        last_tile += tl.sum((ends < end_unit).to(tl.int32))
        passed = tl.maximum(passed, tl.max(tl.where(ends <= begin_unit, ends, 0)))
        base += tl.sum(counts)

    for run in range(first_tile * KV, last_tile * KV + KV):
        tile, kv = run // KV, run % KV
        b = (tile // num_tiles).to(tl.int64)
        n = tile % num_tiles * BLOCK_K
        stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots) - first_slot
        begin, full_begin, full_end, end = _load_span(
            spans_ptr + tile, num_samples * num_tiles, first_slot, stop, BLOCK_Q
        )
        count = (end - begin) // BLOCK_Q
        piece = tl.program_id(0) - passed // share
        end = begin + tl.minimum(end_unit - passed, count) * BLOCK_Q
        begin += tl.maximum(begin_unit - passed, 0) * BLOCK_Q
        passed += count
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
        if begin < end:
            _add_keys(
                q_ptr + (b * stride_q_b + kv * GROUP * tl.cast(stride_q_h, tl.int64)) * ALIGN_Q,
                k_ptr + (b * stride_k_b + kv * tl.cast(stride_k_h, tl.int64)) * ALIGN_K,
                w_ptr + b * stride_map_b * ALIGN_MAP,
                None if log_ptr is None else log_ptr + b * stride_map_b * ALIGN_MAP,
                pairs_ptr + (b * H + kv * GROUP) * num_slots * 2,
                planes_ptr + ((piece * num_samples + b) * KV + kv) * N * D,
                first_ptr, last_ptr, tags_ptr, rows_ptr, before_ptr, b, n, N,
                begin, full_begin, full_end, end, stop, first_slot, num_slots,
                stride_q_h, stride_q_n, stride_k_n, stride_map_s, scale2, factor,
                GROUP, D, BLOCK_D, TAIL, ALIGN_Q, ALIGN_K, ALIGN_MAP, BLOCK_Q, PART, PARTS, STAGES,
                PRECISION, GRAD_DTYPE, GRAD_PRECISION,
            )  # fmt: skip


SCAN = tl.constexpr(1024)  # key tiles that are counted at once


@triton.jit
def _count_tiles(
    spans_ptr,
    num_rows_ptr,
    e,
    N,
    num_samples,
    num_tiles,
    first_slot,
    num_slots,
    BLOCK_Q: tl.constexpr,
):
    """Row tiles of the chunk that see each of SCAN key tiles from e on."""
    e += tl.arange(0, SCAN)
    exists = e < num_samples * num_tiles
    low = tl.load(spans_ptr + e, mask=exists, other=0)
    high = tl.load(spans_ptr + num_samples * num_tiles + e, mask=exists, other=0)
    stop = first_slot + num_slots
    if num_rows_ptr is not None:
        stop = tl.minimum(stop, tl.load(num_rows_ptr + e // num_tiles, mask=exists, other=0))
    else:
        stop = tl.minimum(stop, N)
    low = tl.maximum(low - first_slot, 0)
    high = tl.minimum(high, stop) - first_slot
    return tl.maximum(tl.cdiv(high, BLOCK_Q) - low // BLOCK_Q, 0)


@triton.jit
def _load_span(spans_ptr, step, first_slot, stop, BLOCK_Q: tl.constexpr):
    """As `tile_span`, of the chunk's slots whose rows see a tile of keys."""
    low = tl.maximum(tl.load(spans_ptr) - first_slot, 0)
    high = tl.minimum(tl.load(spans_ptr + step) - first_slot, stop)
    full_low = tl.load(spans_ptr + 2 * step) - first_slot
    full_high = tl.load(spans_ptr + 3 * step) - first_slot
    begin = low // BLOCK_Q * BLOCK_Q
    end = tl.maximum(tl.cdiv(high, BLOCK_Q) * BLOCK_Q, begin)
    full_begin = tl.cdiv(tl.maximum(full_low, low), BLOCK_Q) * BLOCK_Q
    full_end = tl.minimum(full_high, high) // BLOCK_Q * BLOCK_Q
    return begin, full_begin, full_end, end


@triton.jit
def _add_keys(
    q_ptr, k_ptr, w_ptr, log_ptr, pairs_ptr, plane_ptr, first_ptr, last_ptr, tags_ptr, rows_ptr,
    before_ptr, b, n, N, begin, full_begin, full_end, end, stop, first_slot, num_slots,
    stride_q_h, stride_q_n, stride_k_n, stride_map_s, scale2, factor,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    ALIGN_Q: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, GRAD_DTYPE: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what rows begin .. end give to a tile of keys to its plane (N, D)."""
    keys, accs = (), ()
    for part in tl.static_range(PARTS):
        j = n + part * PART + tl.arange(0, PART)
        _, key_live = key_tags(tags_ptr, b, j, N)
        keys = keys + (load_rows(k_ptr, stride_k_n * ALIGN_K, j, key_live, D, BLOCK_D, TAIL),)
        accs = accs + (zero_rows(PART, BLOCK_D, TAIL),)
    stride_s = stride_map_s * ALIGN_MAP
    for m in range(full_begin, full_end, BLOCK_Q):
        slot = m + tl.arange(0, BLOCK_Q)
        i = row_tokens(rows_ptr, b, first_slot + slot, None, N)
        accs = _add_rows(
            accs, keys, q_ptr, w_ptr, log_ptr, pairs_ptr, None, None, None, tags_ptr,
            before_ptr, b, n, i, slot, None, N, num_slots, stride_q_h, stride_q_n, stride_s, scale2,
            GROUP, D, BLOCK_D, TAIL, ALIGN_Q, PART, PARTS, STAGES, PRECISION, GRAD_DTYPE,
            GRAD_PRECISION,
        )  # fmt: skip
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_Q)):
        slot = masked_tile(t, begin, full_begin, full_end, BLOCK_Q) + tl.arange(0, BLOCK_Q)
        live = slot < stop
        i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
        first, last = row_span(first_ptr, last_ptr, b, i, live, N)
        tag = row_tags(tags_ptr, b, i, live, N)
        live = live & (first <= last)  # what stands at padding must not meet a 0 of dS
        masked = ()
        for part in tl.static_range(PARTS):  # one by one: masks take registers too
            one = _add_rows(
                (accs[part],), (keys[part],), q_ptr, w_ptr, log_ptr, pairs_ptr, first,
                last, tag, tags_ptr, before_ptr, b, n + part * PART, i, slot, live, N, num_slots,
                stride_q_h, stride_q_n, stride_s, scale2, GROUP, D, BLOCK_D, TAIL, ALIGN_Q, PART, 1,
                STAGES, PRECISION, GRAD_DTYPE, GRAD_PRECISION,
            )  # fmt: skip
            masked = masked + one
        accs = masked
    for part in tl.static_range(PARTS):
        j = n + part * PART + tl.arange(0, PART)
        _, key_live = key_tags(tags_ptr, b, j, N)
        _add_to_plane(plane_ptr, j, key_live, accs[part][0] * factor, 0, D, BLOCK_D)
        if TAIL:
            _add_to_plane(plane_ptr, j, key_live, accs[part][1] * factor, BLOCK_D, D, TAIL)


@triton.jit
def _add_to_plane(
    plane_ptr, j, live, values, begin: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    d = begin + tl.arange(0, WIDTH)
    ptrs = plane_ptr + (j[:, None] * D + d[None, :])
    mask = live[:, None] & (d < D)[None, :]
    before = tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, before + values, mask=mask)


@triton.jit
def _add_rows(
    accs,
    keys,
    q_ptr,
    w_ptr,
    log_ptr,
    pairs_ptr,
    first,
    last,
    tag,
    tags_ptr,
    before_ptr,
    b,
    n,
    i,
    slot,
    live,
    N,
    num_slots,
    stride_q_h,
    stride_q_n,
    stride_s,
    scale2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """One tile of rows, all query heads of the group; rows see all keys if live is None."""
    PACKED: tl.constexpr = BLOCK_D + TAIL > 64 and w_ptr.dtype.element_ty == tl.bfloat16
    ws, logs, seens = (), (), ()
    for part in tl.static_range(PARTS):
        j = n + part * PART + tl.arange(0, PART)
        seen, seen_here = None, None
        if live is not None:
            key_tag, _ = key_tags(tags_ptr, b, j, N)
            seen = sees(
                first[None, :], last[None, :], tag[None, :], j[:, None], key_tag[:, None], tags_ptr
            )
            seens = seens + (seen,)
            seen_here = tl.trans(seen)
        some = None
        if before_ptr is not None:
            some = count_region(before_ptr, b, tl.minimum(n + part * PART, N), PART, N) > 0
        cells = slot[:, None] * stride_s + j[None, :]
        w = tl.trans(load_cells(w_ptr, cells, seen_here, some, PACKED))
        if PACKED:
            w = _pack(w)
        ws = ws + (w,)
        if log_ptr is not None:
            logs = logs + (tl.trans(load_cells(log_ptr, cells, seen_here, some, False)),)
    stride_h = tl.cast(stride_q_h, tl.int64) * ALIGN_Q
    stride_n = stride_q_n * ALIGN_Q
    two = tl.arange(0, 2)
    for g in tl.range(0, GROUP, num_stages=STAGES):
        step = stride_n + tl.minimum(N + g, 0) * ALIGN_Q if PACKED else stride_n
        q = load_rows(q_ptr + g * stride_h, step, i, live, D, BLOCK_D, TAIL)
        pairs = pairs_ptr + g * num_slots * 2 + (slot[:, None] * 2 + two[None, :])
        new = ()
        for part in tl.static_range(PARTS):
            x = multiply(keys[part], turned(q), PRECISION)
            if live is None:
                pair = tl.load(pairs, eviction_policy="evict_last" if PACKED and part == 1 else "")
            else:
                pair = tl.load(pairs, mask=live[:, None], other=0.0)
            lse2, delta = tl.split(pair)
            x = x * scale2 - lse2[None, :]
            if live is not None:
                x = tl.where(seens[part], x, float("-inf"))
            cell = _unpack(ws[part], N + g) if PACKED else ws[part]
            if log_ptr is not None:
                ds = tl.exp2(x - logs[part])
                ds = ds * (cell - delta[None, :] * tl.exp2(logs[part]))
            else:
                ds = tl.exp2(x) * (cell - delta[None, :])
            new = new + (add_product(accs[part], ds, q, GRAD_DTYPE, GRAD_PRECISION),)
        accs = new
    return accs


@triton.jit
def _pack(w):
    """Pairs of neighbouring bfloat16 as one word."""
    low, high = tl.split(w.to(tl.int16, bitcast=True).reshape(w.shape[0], w.shape[1] // 2, 2))
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _unpack(packed, positive):
    """float32 of each pair. What is not negative keeps the compiler from doing it before a loop."""
    zero = tl.minimum(positive, 0)
    low = (packed << (16 + zero)).to(tl.float32, bitcast=True)
    high = (packed & (-65536 + zero)).to(tl.float32, bitcast=True)
    return tl.join(low, high).reshape(packed.shape[0], 2 * packed.shape[1])
