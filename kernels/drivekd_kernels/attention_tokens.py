"""What every token sees and which tokens a region has, where a sample is one segment.

Grid (samples). A program walks over its tokens, once for the first, the last and the number of
valid ones, once to write the vectors of `operands.Tokens`, with running counts of rows and keys.
"""

import triton
import triton.language as tl


@triton.jit
def _among(ptr, b, i, N):
    """Which of the tokens i a mask holds; it may be None: all that exist."""
    if ptr is not None:
        return tl.load(ptr + b * N + i, mask=i < N, other=0) != 0
    else:
        return i < N


@triton.jit(do_not_specialize=("N", "window"))
def tokens_kernel(
    valid_ptr,
    is_text_ptr,
    is_vision_ptr,
    first_ptr,
    last_ptr,
    row_first_ptr,
    row_last_ptr,
    tags_ptr,
    rows_ptr,
    slots_ptr,
    num_rows_ptr,
    vision_ptr,
    before_ptr,
    N,
    window,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Masks are uint8 (samples, tokens) or None; so are tags, rows and vision where not wanted."""
    b = tl.program_id(0).to(tl.int64)
    begin, end, gaps = 0, N - 1, 0
    if valid_ptr is not None:
        begin, end, count = N, -1, 0
        for n in range(0, N, BLOCK):
            i = n + tl.arange(0, BLOCK)
            valid = _among(valid_ptr, b, i, N)
            begin = tl.minimum(begin, tl.min(tl.where(valid, i, N)))
            end = tl.maximum(end, tl.max(tl.where(valid, i, -1)))
            count += tl.sum(valid.to(tl.int32))
        gaps = (end - begin + 1 > count).to(tl.int32)
    num_rows, num_keys = 0, 0
    for n in range(0, N, BLOCK):
        i = n + tl.arange(0, BLOCK)
        inside = i < N
        valid = _among(valid_ptr, b, i, N)
        low, high = tl.maximum(i - window + 1, begin), tl.minimum(i + window - 1, end)
        last = tl.minimum(i, end) if CAUSAL else high
        row_first = tl.maximum(i, begin) if CAUSAL else low
        at = b * N + i
        tl.store(first_ptr + at, tl.where(valid, low, N), mask=inside)
        tl.store(last_ptr + at, tl.where(valid, last, -1), mask=inside)
        tl.store(row_first_ptr + at, tl.where(valid, row_first, N), mask=inside)
        tl.store(row_last_ptr + at, tl.where(valid, high, -1), mask=inside)
        if tags_ptr is not None:
            tl.store(tags_ptr + at, tl.where(valid, gaps, -1), mask=inside)
        if rows_ptr is not None:
            chosen = valid & _among(is_text_ptr, b, i, N)
            one = chosen.to(tl.int32)
            place = num_rows + tl.cumsum(one, 0) - one
            tl.store(slots_ptr + b * (N + 1) + i, place, mask=inside)
            tl.store(rows_ptr + b * N + place, i, mask=chosen)
            num_rows += tl.sum(one)
        if vision_ptr is not None:
            one = (valid & _among(is_vision_ptr, b, i, N)).to(tl.int32)
            tl.store(vision_ptr + at, one.to(tl.int8), mask=inside)
            place = num_keys + tl.cumsum(one, 0) - one
            tl.store(before_ptr + b * (N + 1) + i, place, mask=inside)
            num_keys += tl.sum(one)
    if rows_ptr is not None:
        tl.store(slots_ptr + b * (N + 1) + N, num_rows)
        tl.store(num_rows_ptr + b, num_rows)
    if vision_ptr is not None:
        tl.store(before_ptr + b * (N + 1) + N, num_keys)
