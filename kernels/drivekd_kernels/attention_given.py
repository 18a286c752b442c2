"""Targets that are given: a chunk of them laid out as the teacher's map would lie.

`rectangle_kernel`, grid (key tiles, row tiles, samples): cells of text rows x vision keys, packed:
value (r, c) belongs to the sample's r-th row and c-th key of the region. A program owns one tile of
the workspace. What is not in the region gets some value that exists: no reader looks at it, and
loads need no masks.

`largest_kernel`, grid (row tiles, samples): the largest cells of each row of the full map, and
where they are; what the row has beside them is spread evenly over its other visible cells. A
program owns BLOCK_Q rows: it sums what is given, writes every cell of them, and then, behind a
barrier, what is given.

Both write P or log2 P in float32, values of any floating dtype and strides are read where they lie.
"""

import triton
import triton.language as tl

from drivekd_kernels.tiles import (
    count_region,
    count_rows,
    key_tags,
    row_span,
    row_tags,
    sees,
)

RUNTIME = (
    *(
        "values_ptr",
        "exponents_ptr",
        "indices_ptr",
        "rest_ptr",
    ),  # parts of tensors, of any alignment
    *("N", "first_slot", "num_slots", "num_keys", "num_given_rows", "num_given"),
    *("stride_values_b", "stride_values_r", "stride_values_c"),
    *("stride_exponents_b", "stride_exponents_r"),
    *("stride_indices_b", "stride_indices_r", "stride_indices_c"),
    *("stride_rest_b", "stride_rest_r", "stride_map_b", "stride_map_s"),
)
# A cell that was rounded to 0 is a probability too small to count, not log 0.
TINY = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=RUNTIME)
def rectangle_kernel(
    values_ptr,
    exponents_ptr,
    out_ptr,
    num_rows_ptr,
    before_ptr,
    N,
    first_slot,
    num_slots,
    num_given_rows,
    num_given,
    stride_values_b,
    stride_values_r,
    stride_values_c,
    stride_exponents_b,
    stride_exponents_r,
    stride_map_b,
    stride_map_s,
    LOG: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes values x 2^exponents, or its log2, to out (samples, slots, keys)."""
    b = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    stop = tl.minimum(count_rows(num_rows_ptr, b, N), first_slot + num_slots)
    if first_slot + tl.program_id(1) * BLOCK_Q >= stop:
        return
    n = tl.program_id(0) * BLOCK_K
    if count_region(before_ptr, b, n, BLOCK_K, N) == 0:
        return
    j = n + tl.arange(0, BLOCK_K)
    row = tl.minimum(first_slot + slot, num_given_rows - 1).to(tl.int64)
    column = tl.load(before_ptr + b * (N + 1) + tl.minimum(j, N))
    column = tl.minimum(column, num_given - 1).to(tl.int64)
    values_ptr += b * stride_values_b
    cells = row[:, None] * stride_values_r + column[None, :] * stride_values_c
    x = tl.load(values_ptr + cells).to(tl.float32)
    exponents_ptr += b * stride_exponents_b
    exponent = tl.load(exponents_ptr + row * stride_exponents_r).to(tl.float32)[:, None]
    x = tl.log2(tl.maximum(x, TINY)) + exponent if LOG else x * tl.exp2(exponent)
    out_ptr += (b * stride_map_b + slot.to(tl.int64) * stride_map_s)[:, None] * ALIGN_MAP
    tl.store(out_ptr + j[None, :], x)


@triton.jit(do_not_specialize=RUNTIME)
def largest_kernel(
    values_ptr,
    indices_ptr,
    rest_ptr,
    out_ptr,
    first_ptr,
    last_ptr,
    tags_ptr,
    N,
    first_slot,
    num_slots,
    num_keys,
    num_given,
    stride_values_b,
    stride_values_r,
    stride_values_c,
    stride_indices_b,
    stride_indices_r,
    stride_indices_c,
    stride_rest_b,
    stride_rest_r,
    stride_map_b,
    stride_map_s,
    LOG: tl.constexpr,
    ALIGN_MAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes rows that sum to 1, or their log2, to out (samples, slots, keys); slots are tokens."""
    b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = first_slot + slot
    live = i < tl.minimum(N, first_slot + num_slots)
    first, last = row_span(first_ptr, last_ptr, b, i, live, N)
    live = first <= last
    begin, end = tl.min(first) // BLOCK_K * BLOCK_K, tl.max(last) + 1
    visible = _count_visible(first, last, live, begin, end, tags_ptr, b, i, N, BLOCK_K)

    i = i.to(tl.int64)
    values_ptr += b * stride_values_b + i[:, None] * stride_values_r
    indices_ptr += b * stride_indices_b + i[:, None] * stride_indices_r
    total = tl.zeros([BLOCK_Q], tl.float32)
    count = tl.zeros([BLOCK_Q], tl.int32)
    for c in range(0, num_given, BLOCK_K):
        column = c + tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
        key, value = _given(
            values_ptr + column * stride_values_c,
            indices_ptr + column * stride_indices_c,
            live[:, None] & (column < num_given),
        )
        total += tl.sum(value, 1)
        count += tl.sum((key >= 0).to(tl.int32), 1)
    others = visible - count
    rest = tl.load(rest_ptr + b * stride_rest_b + i * stride_rest_r, mask=live, other=0.0)
    rest = tl.minimum(tl.maximum(rest.to(tl.float32), 0.0), 1.0)
    rest = tl.where(others > 0, rest, 0.0)
    share = (1.0 - rest) / tl.where(total > 0, total, 1.0)
    spread = rest / tl.maximum(others, 1)

    out_ptr += (b * stride_map_b + slot.to(tl.int64) * stride_map_s)[:, None] * ALIGN_MAP
    spread = tl.log2(tl.maximum(spread, TINY)) if LOG else spread
    for n in range(begin, end, BLOCK_K):
        cells = out_ptr + (n + tl.arange(0, BLOCK_K))[None, :]
        tl.store(cells, spread[:, None].broadcast_to((BLOCK_Q, BLOCK_K)))
    tl.debug_barrier()  # other threads write the same cells now
    for c in range(0, num_given, BLOCK_K):
        column = c + tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
        key, value = _given(
            values_ptr + column * stride_values_c,
            indices_ptr + column * stride_indices_c,
            live[:, None] & (column < num_given),
        )
        value *= share[:, None]
        value = tl.log2(tl.maximum(value, TINY)) if LOG else value
        tl.store(out_ptr + key, value, mask=(key >= 0) & (key < num_keys))


@triton.jit
def _given(values_ptr, indices_ptr, live):
    """Keys of some cells and their values in float32; -1 and 0 where there is none."""
    key = tl.load(indices_ptr, mask=live, other=-1)
    value = tl.load(values_ptr, mask=key >= 0, other=0.0)
    return key, value.to(tl.float32)


@triton.jit
def _count_visible(first, last, live, begin, end, tags_ptr, b, i, N, BLOCK_K: tl.constexpr):
    """How many keys each row sees."""
    if tags_ptr is None:
        return tl.where(live, last - first + 1, 0)
    else:
        tag = row_tags(tags_ptr, b, i, live, N)
        count = tl.zeros(first.shape, tl.int32)
        for n in range(begin, end, BLOCK_K):
            j = n + tl.arange(0, BLOCK_K)
            key_tag, _ = key_tags(tags_ptr, b, j, N)
            seen = sees(
                first[:, None], last[:, None], tag[:, None], j[None, :], key_tag[None, :], tags_ptr
            )
            count += tl.sum(seen.to(tl.int32), 1)
        return count
