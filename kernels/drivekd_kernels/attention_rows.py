"""What needs whole rows of maps: cosine, kl, and targets of text rows x vision keys to be kept.

Grid (row tiles, samples). A program owns BLOCK_Q rows of the chunk and sweeps three times (cosine)
or twice (kl) over the keys that they see. It writes each row's loss and W, from which the gradient
kernels make dS_h = R_h W - delta_h P_h: with maps P, R_h = P_h and W = dL/dP; with maps log2 P,
R_h = P_h / P and W = dL/dlog P, which exists where P underflows. The target of a row is the mean of
several maps, as in `mse_kernel`, in the log domain a log-mean-exp. Rows without a visible cell of
the region have loss 0. `pack_kernel` writes the region's cells of such a mean side by side, each
row in a unit of its own.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    count_rows,
    is_member,
    key_tags,
    row_span,
    row_tags,
    row_tokens,
    sees,
)

RUNTIME = (
    "sums_ptr",  # a part of a tensor, of any alignment
    *(
        "N",
        "first_slot",
        "num_slots",
        "stride_sums",
        "stride_map_b",
        "stride_map_s",
        "stride_map_t",
    ),
    *("members", "more_members", "share", "log2_share", "num_maps"),
    *("num_packed_rows", "num_packed"),
)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_tile(
    b,
    first_slot,
    num_slots,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    N,
    stride_map_s,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Slots of the program, what they see, their tags, and where their maps begin."""
    slot = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    live = first_slot + slot < stop
    i = row_tokens(rows_ptr, b, first_slot + slot, live, N)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    tag = row_tags(tags_ptr, b, i, live, N)
    return slot, first, last, tag, slot * (stride_map_s * ALIGN_MAP)


@triton.jit
def _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K: tl.constexpr):
    """Offsets of one tile of cells, and which are visible and in the region."""
    j = n + tl.arange(0, BLOCK_K)
    key_tag, _ = key_tags(tags_ptr, b, j, N)
    seen = sees(first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr)
    if vision_ptr is not None:
        seen = seen & (tl.load(vision_ptr + b * N + j, mask=j < N, other=0) != 0)[None, :]
    return row[:, None] + j[None, :], seen


@triton.jit
def _student(map_ptr, cells, seen, LOG: tl.constexpr):
    return tl.load(map_ptr + cells, mask=seen, other=float("-inf") if LOG else 0.0)


@triton.jit
def mean_of_maps(
    targets_ptr,
    cells,
    seen,
    stride_t,
    members,
    more_members,
    share,
    log2_share,
    num_maps,
    LOG: tl.constexpr,
):
    """Mean of the maps of one group, or its base-2 logarithm; 0 or -inf where not seen."""
    total = tl.zeros(cells.shape, tl.float32)
    if LOG:
        top = tl.full(cells.shape, -1e30, tl.float32)
        for t in range(num_maps):
            chosen = seen & is_member(t, members, more_members)
            x = tl.load(targets_ptr + t * stride_t + cells, mask=chosen, other=float("-inf"))
            new = tl.maximum(top, x)
            total = total * tl.exp2(top - new) + tl.exp2(x - new)
            top = new
        return tl.where(seen, top + tl.log2(total) + log2_share, float("-inf"))
    else:
        for t in range(num_maps):
            chosen = seen & is_member(t, members, more_members)
            total += tl.load(targets_ptr + t * stride_t + cells, mask=chosen, other=0.0)
        return total * share


@triton.jit
def _scaled(x, top, LOG: tl.constexpr):
    """Rows divided by their largest element."""
    return tl.exp2(x - top[:, None]) if LOG else x / top[:, None]


@triton.jit
def _add_square(top, square, x, LOG: tl.constexpr):
    """One step of sum (x / max x)^2 with a running maximum."""
    new = tl.maximum(top, tl.max(x, 1))
    if LOG:
        step, part = tl.exp2(top - new), tl.exp2(x - new[:, None])
    else:
        safe = tl.where(new > 0, new, 1.0)
        step, part = top / safe, x / safe[:, None]
    return new, square * step * step + tl.sum(part * part, 1)


@triton.jit
def _add_mass(top, mass, x):
    """One step of an online sum of 2^x."""
    new = tl.maximum(top, tl.max(x, 1))
    return new, mass * tl.exp2(top - new) + tl.sum(tl.exp2(x - new[:, None]), 1)


@triton.jit(do_not_specialize=RUNTIME)
def cosine_kernel(
    map_ptr,
    targets_ptr,
    w_ptr,
    sums_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    vision_ptr,
    N,
    first_slot,
    num_slots,
    stride_sums,
    stride_map_b,
    stride_map_s,
    stride_map_t,
    members,
    more_members,
    share,
    log2_share,
    num_maps,
    LOG: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """1 - cos of rows: sweeps for the norms, for |a - b|^2 / 2 of the unit rows, and for W."""
    b = tl.program_id(1).to(tl.int64)
    slot, first, last, tag, row = _row_tile(
        b, first_slot, num_slots, first_ptr, last_ptr, tags_ptr, rows_ptr, num_rows_ptr, N,
        stride_map_s, ALIGN_MAP, BLOCK_Q,
    )  # fmt: skip
    map_ptr += b * stride_map_b * ALIGN_MAP
    targets_ptr += b * stride_map_b * ALIGN_MAP
    if w_ptr is not None:
        w_ptr += b * stride_map_b * ALIGN_MAP
    stride_t = tl.cast(stride_map_t, tl.int64) * ALIGN_MAP
    begin, end = tl.min(first) // BLOCK_K * BLOCK_K, tl.max(last) + 1

    top_s = tl.full([BLOCK_Q], -1e30 if LOG else 0.0, tl.float32)
    top_t = top_s
    square_s = tl.zeros([BLOCK_Q], tl.float32)
    square_t = square_s
    for n in range(begin, end, BLOCK_K):
        cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
        x_s = _student(map_ptr, cells, seen, LOG)
        x_t = mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share, num_maps,
            LOG,
        )  # fmt: skip
        top_s, square_s = _add_square(top_s, square_s, x_s, LOG)
        top_t, square_t = _add_square(top_t, square_t, x_t, LOG)
    counts = square_s > 0
    norm_s = tl.where(counts, tl.sqrt(square_s), 1.0)[:, None]
    norm_t = tl.where(counts, tl.sqrt(square_t), 1.0)[:, None]
    scale_s = tl.where(counts, top_s, 0.0 if LOG else 1.0)
    scale_t = tl.where(counts, top_t, 0.0 if LOG else 1.0)

    half = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(begin, end, BLOCK_K):
        cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
        x_s = _student(map_ptr, cells, seen, LOG)
        x_t = mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share, num_maps,
            LOG,
        )  # fmt: skip
        gap = _scaled(x_t, scale_t, LOG) / norm_t - _scaled(x_s, scale_s, LOG) / norm_s
        half += tl.sum(gap * gap, 1)
    loss = 0.5 * half
    tl.store(sums_ptr + b * stride_sums + slot, tl.where(counts, loss, 0.0), mask=slot < num_slots)

    if w_ptr is not None:
        for n in range(begin, end, BLOCK_K):
            cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
            x_s = _student(map_ptr, cells, seen, LOG)
            x_t = mean_of_maps(
                targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share,
                num_maps, LOG,
            )  # fmt: skip
            p = _scaled(x_s, scale_s, LOG)
            gap = _scaled(x_t, scale_t, LOG) / norm_t - p / norm_s
            w = -(gap + loss[:, None] * (p / norm_s)) / norm_s
            w = w * p if LOG else w / scale_s[:, None]
            tl.store(w_ptr + cells, tl.where(seen, w, 0.0).to(w_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=RUNTIME)
def kl_kernel(
    map_ptr,
    targets_ptr,
    w_ptr,
    sums_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    rows_ptr,
    num_rows_ptr,
    vision_ptr,
    N,
    first_slot,
    num_slots,
    stride_sums,
    stride_map_b,
    stride_map_s,
    stride_map_t,
    members,
    more_members,
    share,
    log2_share,
    num_maps,
    LOG: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """KL(P_t || P_s) of rows in nats, both renormalised over their cells; maps are logarithms."""
    b = tl.program_id(1).to(tl.int64)
    slot, first, last, tag, row = _row_tile(
        b, first_slot, num_slots, first_ptr, last_ptr, tags_ptr, rows_ptr, num_rows_ptr, N,
        stride_map_s, ALIGN_MAP, BLOCK_Q,
    )  # fmt: skip
    map_ptr += b * stride_map_b * ALIGN_MAP
    targets_ptr += b * stride_map_b * ALIGN_MAP
    if w_ptr is not None:
        w_ptr += b * stride_map_b * ALIGN_MAP
    stride_t = tl.cast(stride_map_t, tl.int64) * ALIGN_MAP
    begin, end = tl.min(first) // BLOCK_K * BLOCK_K, tl.max(last) + 1

    top_s = tl.full([BLOCK_Q], -1e30, tl.float32)
    top_t = top_s
    mass_s = tl.zeros([BLOCK_Q], tl.float32)
    mass_t = mass_s
    for n in range(begin, end, BLOCK_K):
        cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
        x_s = _student(map_ptr, cells, seen, LOG)
        x_t = mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share, num_maps,
            LOG,
        )  # fmt: skip
        top_s, mass_s = _add_mass(top_s, mass_s, x_s)
        top_t, mass_t = _add_mass(top_t, mass_t, x_t)
    counts = mass_s > 0
    z_s = tl.where(counts, top_s + tl.log2(mass_s), 0.0)[:, None]
    z_t = tl.where(counts, top_t + tl.log2(mass_t), 0.0)[:, None]

    loss = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(begin, end, BLOCK_K):
        cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
        x_s = _student(map_ptr, cells, seen, LOG) - z_s
        x_t = mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share, num_maps,
            LOG,
        )  # fmt: skip
        x_t = x_t - z_t
        p_s, p_t = tl.exp2(x_s), tl.exp2(x_t)
        # Both sum to 1: with P_s - P_t added every term is >= 0, and errors enter squared.
        gap = tl.where(seen, (x_t - x_s) * LN2, 0.0)
        loss += tl.sum(p_t * gap + (p_s - p_t), 1)
        if w_ptr is not None:
            w = tl.where(seen, p_s - p_t, 0.0)
            tl.store(w_ptr + cells, w.to(w_ptr.dtype.element_ty))
    tl.store(sums_ptr + b * stride_sums + slot, tl.where(counts, loss, 0.0), mask=slot < num_slots)


@triton.jit(do_not_specialize=RUNTIME)
def pack_kernel(
    targets_ptr,
    values_ptr,
    exponents_ptr,
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
    num_packed_rows,
    num_packed,
    stride_map_b,
    stride_map_s,
    stride_map_t,
    members,
    more_members,
    share,
    log2_share,
    num_maps,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes P / 2^exponent, the largest of a row in [0.5, 1], and exponents; maps are logarithms.

    values (samples, rows, keys) and exponents (samples, rows) are contiguous; what is not visible
    is left alone.
    """
    b = tl.program_id(1).to(tl.int64)
    slot, first, last, tag, row = _row_tile(
        b, first_slot, num_slots, first_ptr, last_ptr, tags_ptr, rows_ptr, num_rows_ptr, N,
        stride_map_s, ALIGN_MAP, BLOCK_Q,
    )  # fmt: skip
    targets_ptr += b * stride_map_b * ALIGN_MAP
    stride_t = tl.cast(stride_map_t, tl.int64) * ALIGN_MAP
    begin, end = tl.min(first) // BLOCK_K * BLOCK_K, tl.max(last) + 1

    top = tl.full([BLOCK_Q], -1e30, tl.float32)
    for n in range(begin, end, BLOCK_K):
        cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
        x = mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share, num_maps,
            True,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(x, 1))
    exponent = tl.where(top > -1e30, tl.floor(top) + 1, 0.0)
    exponent = tl.minimum(tl.maximum(exponent, -32768.0), 32767.0)
    place = b * num_packed_rows + first_slot + slot
    sighted = first <= last
    tl.store(exponents_ptr + place, exponent.to(tl.int16), mask=sighted)
    values_ptr += (place * num_packed)[:, None]
    for n in range(begin, end, BLOCK_K):
        cells, seen = _cells(n, first, last, tag, row, tags_ptr, vision_ptr, b, N, BLOCK_K)
        x = mean_of_maps(
            targets_ptr, cells, seen, stride_t, members, more_members, share, log2_share, num_maps,
            True,
        )  # fmt: skip
        j = tl.minimum(n + tl.arange(0, BLOCK_K), N)
        column = tl.load(before_ptr + b * (N + 1) + j)
        tl.store(values_ptr + column[None, :], tl.exp2(x - exponent[:, None]), mask=seen)
