"""Linear combinations of K gradients: one read, one write, one rounding.

`combine_kernel`, grid (items): out = sum_k w_k g_k for CHUNK elements of one tensor, plus what was
in out if ACCUMULATE. Weights are float64 and are read here, from the device; sums run in float64
and are rounded to the tensor's dtype once (16 bits through float32). `out` may be one of the
gradients: a thread writes the elements that it has read.
"""

import triton
import triton.language as tl

from drivekd_kernels.gradient_items import item_record, load_part, pointer_at


@triton.jit
def _rounded(total, DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 16:
        total = total.to(tl.float32)
    return total.to(DTYPE)


@triton.jit
def _write_step(
    out,
    pointers,
    weights,
    base,
    length,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write LANES * VEC * UNROLL elements; everything is read before anything is written."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    x = ()
    old = ()
    for part in tl.static_range(UNROLL):
        offs = base + part * LANES * VEC + lane
        for k in tl.static_range(COUNT):
            x = x + (load_part(pointers[k], offs, length, WHOLE),)
        if ACCUMULATE:
            old = old + (load_part(out, offs, length, WHOLE),)
    for part in tl.static_range(UNROLL):
        total = x[part * COUNT].to(tl.float64) * weights[0]
        for k in tl.static_range(1, COUNT):
            total += x[part * COUNT + k].to(tl.float64) * weights[k]
        if ACCUMULATE:
            total += old[part].to(tl.float64)
        offs = base + part * LANES * VEC + lane
        if WHOLE:
            tl.store(out + offs, _rounded(total, DTYPE))
        else:
            tl.store(out + offs, _rounded(total, DTYPE), mask=offs < length)


@triton.jit(do_not_specialize=["first_entry"])
def combine_kernel(
    table_ptr,  # record: size, first item, address of out, COUNT addresses, COUNT places of weights
    weights_ptr,
    first_entry,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The combination of one item."""
    record, _, start, length = item_record(table_ptr, first_entry, CHUNK)
    out = pointer_at(record + 2, start, DTYPE, ALIGNED)
    pointers = ()
    weights = ()
    for k in tl.static_range(COUNT):
        pointers = pointers + (pointer_at(record + 3 + k, start, DTYPE, ALIGNED),)
        weights = weights + (tl.load(weights_ptr + tl.load(record + 3 + COUNT + k)),)
    STEP: tl.constexpr = LANES * VEC * UNROLL
    whole = length // STEP * STEP
    for base in range(0, whole, STEP):
        _write_step(
            out, pointers, weights, base, length,
            COUNT, DTYPE, ACCUMULATE, LANES, VEC, UNROLL, WHOLE=True,
        )  # fmt: skip
    if whole < length:
        _write_step(
            out, pointers, weights, whole, length,
            COUNT, DTYPE, ACCUMULATE, LANES, VEC, UNROLL, WHOLE=False,
        )  # fmt: skip
