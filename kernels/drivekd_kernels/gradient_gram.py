"""Inner products of K gradients: one read, one partial result per item, a fold in fixed order.

`gram_kernel`, grid (items): reads CHUNK elements of each of the COUNT gradients of one tensor and
writes the inner products of its pairs (a, b), b <= a, to partials[pair, slot]. Slots of one pattern
follow each other. `fold_kernel`, grid (cells of the lower triangles): sums a range of slots and
writes a cell and its mirror image. No atomics: results are bitwise repeatable, on any GPU.

Accumulation: bfloat16 products are exact in float32 and are summed there, VEC * UNROLL <= 16 of
them; everything above, and every other dtype from the product on, is float64.
"""

import triton
import triton.language as tl

from drivekd_kernels.gradient_items import item_record, load_part, pointer_at


@triton.jit
def _add_step(
    sums,
    pointers,
    base,
    length,
    COUNT: tl.constexpr,
    EXACT: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add the products of LANES * VEC * UNROLL elements; `sums` is a tuple, one (LANES,) a pair."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    x = ()
    for part in tl.static_range(UNROLL):
        offs = base + part * LANES * VEC + lane
        for k in tl.static_range(COUNT):
            x = x + (load_part(pointers[k], offs, length, WHOLE),)
    total = ()
    for a in tl.static_range(COUNT):
        for b in tl.static_range(a + 1):
            products = tl.sum(x[a].to(EXACT) * x[b].to(EXACT), axis=1)
            for part in tl.static_range(1, UNROLL):
                left, right = x[part * COUNT + a].to(EXACT), x[part * COUNT + b].to(EXACT)
                products += tl.sum(left * right, axis=1)
            total = total + (sums[a * (a + 1) // 2 + b] + products.to(tl.float64),)
    return total


@triton.jit(do_not_specialize=["first_entry", "num_slots"])
def gram_kernel(
    table_ptr,  # record: size, first item, first slot, COUNT addresses
    partials_ptr,
    first_entry,
    num_slots,
    COUNT: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Partial inner products of one item."""
    record, item, start, length = item_record(table_ptr, first_entry, CHUNK)
    slot = tl.load(record + 2) + item - tl.load(record + 1)
    pointers = ()
    for k in tl.static_range(COUNT):
        pointers = pointers + (pointer_at(record + 3 + k, start, DTYPE, ALIGNED),)
    sums = ()
    for _ in tl.static_range(COUNT * (COUNT + 1) // 2):
        sums = sums + (tl.zeros((LANES,), tl.float64),)
    STEP: tl.constexpr = LANES * VEC * UNROLL
    whole = length // STEP * STEP
    for base in range(0, whole, STEP):
        sums = _add_step(sums, pointers, base, length, COUNT, EXACT, LANES, VEC, UNROLL, WHOLE=True)
    if whole < length:
        sums = _add_step(
            sums, pointers, whole, length, COUNT, EXACT, LANES, VEC, UNROLL, WHOLE=False
        )
    for pair in tl.static_range(COUNT * (COUNT + 1) // 2):
        tl.store(partials_ptr + pair * num_slots + slot, tl.sum(sums[pair]))


@triton.jit(do_not_specialize=["first_cell"])
def fold_kernel(table_ptr, partials_ptr, values_ptr, first_cell, BLOCK: tl.constexpr):
    """One cell: the sum of partials[begin:end], to two places of `values`."""
    cell = table_ptr + first_cell + 4 * tl.program_id(0).to(tl.int64)
    begin, end = tl.load(cell), tl.load(cell + 1)
    sums = tl.zeros((BLOCK,), tl.float64)
    for base in range(0, (end - begin).to(tl.int32), BLOCK):
        offs = begin + base + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + offs, mask=offs < end, other=0.0)
    total = tl.sum(sums)
    tl.store(values_ptr + tl.load(cell + 2), total)
    tl.store(values_ptr + tl.load(cell + 3), total)
