"""Gradient in k of a chunk of rows, from W and recomputed probabilities; see `attention_dq`.

Grid (key tiles, key heads, samples x splits). A program owns BLOCK_K keys and walks over its
split's rows, the tile of W held over the query heads of the group; it adds to its own plane, and
planes are summed in order: no atomics, bitwise repeatable.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    count_masked,
    count_region,
    count_rows,
    key_tags,
    load_cells,
    load_rows,
    load_vector,
    masked_tile,
    row_span,
    row_tags,
    row_tokens,
    sees,
)

RUNTIME = (
    *("N", "first_slot", "num_slots", "stride_q_b", "stride_q_h", "stride_q_n"),
    *("stride_k_b", "stride_k_h", "stride_k_n", "stride_map_b", "stride_map_s"),
    *("scale2", "factor", "num_splits", "split_slots"),
)


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
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """Adds the chunk's part of dk to planes (splits, samples, key heads, N, D)."""
    kv, split = tl.program_id(1), tl.program_id(2) % num_splits
    b = (tl.program_id(2) // num_splits).to(tl.int64)
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
    k_ptr += (b * stride_k_b + kv.to(tl.int64) * stride_k_h) * ALIGN_K
    keys, accs = (), ()
    for part in tl.static_range(PARTS):
        j = n + part * PART + tl.arange(0, PART)
        _, key_live = key_tags(tags_ptr, b, j, N)
        keys = keys + (load_rows(k_ptr, stride_k_n * ALIGN_K, j, key_live, D, BLOCK_D),)
        accs = accs + (tl.zeros([PART, BLOCK_D], tl.float32),)
    q_ptr += (b * stride_q_b + (kv * GROUP).to(tl.int64) * stride_q_h) * ALIGN_Q
    lse2_ptr += (b * H + kv * GROUP) * N
    delta_ptr += (b * H + kv * GROUP) * num_slots
    stride_s = stride_map_s * ALIGN_MAP
    w_ptr += b * stride_map_b * ALIGN_MAP
    if log_ptr is not None:
        log_ptr += b * stride_map_b * ALIGN_MAP

    for m in range(full_begin, full_end, BLOCK_Q):
        slot = m + tl.arange(0, BLOCK_Q)
        i = row_tokens(rows_ptr, b, first_slot + slot, None, N)
        accs = _add_rows(
            accs, keys, q_ptr, lse2_ptr, w_ptr, log_ptr, delta_ptr, None, None, None, tags_ptr,
            before_ptr, b, n, i, slot, None, N, num_slots, stride_q_h, stride_q_n, stride_s, scale2,
            GROUP, D, BLOCK_D, ALIGN_Q, PART, PARTS, STAGES, PRECISION, GRAD_DTYPE, GRAD_PRECISION,
        )  # fmt: skip
    for t in range(count_masked(begin, full_begin, full_end, end, BLOCK_Q)):
        slot = masked_tile(t, begin, full_begin, full_end, BLOCK_Q) + tl.arange(0, BLOCK_Q)
        live = (slot >= split_begin) & (slot < split_end)
        i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
        first, last = row_span(first_ptr, last_ptr, b, i, live, N)
        tag = row_tags(tags_ptr, b, i, live, N)
        masked = ()
        for part in tl.static_range(PARTS):  # one by one: masks take registers too
            one = _add_rows(
                (accs[part],), (keys[part],), q_ptr, lse2_ptr, w_ptr, log_ptr, delta_ptr, first,
                last, tag, tags_ptr, before_ptr, b, n + part * PART, i, slot, live, N, num_slots,
                stride_q_h, stride_q_n, stride_s, scale2, GROUP, D, BLOCK_D, ALIGN_Q, PART, 1,
                STAGES, PRECISION, GRAD_DTYPE, GRAD_PRECISION,
            )  # fmt: skip
            masked = masked + one
        accs = masked
    d = tl.arange(0, BLOCK_D)
    samples = tl.num_programs(2) // num_splits
    plane = ((split * samples + b) * (H // GROUP) + kv) * N
    planes_ptr += plane * D
    for part in tl.static_range(PARTS):
        j = n + part * PART + tl.arange(0, PART)
        _, key_live = key_tags(tags_ptr, b, j, N)
        ptrs = planes_ptr + (j[:, None] * D + d[None, :])
        mask = key_live[:, None] & (d < D)[None, :]
        before = tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, before + accs[part] * factor, mask=mask)


@triton.jit
def _add_rows(
    accs,
    keys,
    q_ptr,
    lse2_ptr,
    w_ptr,
    log_ptr,
    delta_ptr,
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
    ALIGN_Q: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):
    """One tile of rows, all query heads of the group; rows see all keys if live is None."""
    ws, logs, seens = (), (), ()
    for part in tl.static_range(PARTS):
        j = n + part * PART + tl.arange(0, PART)
        seen = None
        if live is not None:
            key_tag, _ = key_tags(tags_ptr, b, j, N)
            seen = sees(
                first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
            )
            seens = seens + (seen,)
        some = None
        if before_ptr is not None:
            some = count_region(before_ptr, b, tl.minimum(n + part * PART, N), PART, N) > 0
        cells = slot[:, None] * stride_s + j[None, :]
        ws = ws + (load_cells(w_ptr, cells, seen, some),)
        if log_ptr is not None:
            logs = logs + (load_cells(log_ptr, cells, seen, some),)
    stride_h = tl.cast(stride_q_h, tl.int64) * ALIGN_Q
    stride_n = stride_q_n * ALIGN_Q
    for g in tl.range(0, GROUP, num_stages=STAGES):
        q = load_rows(q_ptr + g * stride_h, stride_n, i, live, D, BLOCK_D)
        lse2 = load_vector(lse2_ptr + g * N + i, live, float("inf"))
        delta = load_vector(delta_ptr + g * num_slots + slot, live, 0.0)
        new = ()
        for part in tl.static_range(PARTS):
            x = tl.dot(q, tl.trans(keys[part]), input_precision=PRECISION) * scale2 - lse2[:, None]
            if live is not None:
                x = tl.where(seens[part], x, float("-inf"))
            if log_ptr is not None:
                ds = tl.exp2(x - logs[part])
                ds = ds * (ws[part] - delta[:, None] * tl.exp2(logs[part]))
            else:
                ds = tl.exp2(x) * (ws[part] - delta[:, None])
            ds = tl.trans(ds.to(GRAD_DTYPE))
            acc = tl.dot(ds, q.to(GRAD_DTYPE), accs[part], input_precision=GRAD_PRECISION)
            new = new + (acc,)
        accs = new
    return accs


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
