"""What the attention kernels share: which tokens a tile is about, what they see, how to load them.

Rows stand in slots: slot s of a sample is token `rows[s]`, or token s where there is no list. Every
row sees keys of one range `first..last`, and of these only the ones with its own tag, where there
are tags: twice the number of its segment, plus 1 if the segment has gaps; -1 is padding. The
visible part of a strip of key tiles is therefore: some tiles to be masked, some that are seen
whole, some to be masked.
"""

import triton
import triton.language as tl


@triton.jit
def count_rows(num_rows_ptr, b, N):
    """Number of slots of sample b."""
    if num_rows_ptr is not None:
        return tl.load(num_rows_ptr + b)
    else:
        return N


@triton.jit
def row_tokens(rows_ptr, b, slot, live, N):
    """Token of each slot; 0 where there is none. `live` may be None: all are."""
    if live is None:
        return slot if rows_ptr is None else tl.load(rows_ptr + b * N + slot)
    elif rows_ptr is not None:
        return tl.load(rows_ptr + b * N + slot, mask=live, other=0)
    else:
        return tl.where(live, slot, 0)


@triton.jit
def load_rows(ptr, stride_n, i, live, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """Rows of one head: (rows, BLOCK_D), and behind it (rows, TAIL) if TAIL > 0.

    stride_n: of rows, or each row's own offset if i is None. live: rows of others are zeros; it may
    be None: all are.
    """
    rows = stride_n if i is None else i * stride_n
    head = _load_dims(ptr + rows[:, None], 0, live, D, BLOCK_D)
    if TAIL:
        return (head, _load_dims(ptr + rows[:, None], BLOCK_D, live, D, TAIL))
    else:
        return (head,)


@triton.jit
def _load_dims(ptrs, begin: tl.constexpr, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) of some rows' dims from one on; zeros where not live and behind D."""
    d = begin + tl.arange(0, WIDTH)
    if live is None and begin + WIDTH <= D:
        return tl.load(ptrs + d[None, :])
    elif live is None:
        return tl.load(ptrs + d[None, :], mask=(d < D)[None, :], other=0.0)
    elif begin + WIDTH <= D:
        return tl.load(ptrs + d[None, :], mask=live[:, None], other=0.0)
    else:
        return tl.load(ptrs + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_columns(
    ptr, stride_n, j, live, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr
):
    """As `load_rows`, turned around: (BLOCK_D, columns), and (TAIL, columns)."""
    columns = j * stride_n
    head = _load_turned(ptr + columns[None, :], 0, live, D, BLOCK_D)
    if TAIL:
        return (head, _load_turned(ptr + columns[None, :], BLOCK_D, live, D, TAIL))
    else:
        return (head,)


@triton.jit
def _load_turned(ptrs, begin: tl.constexpr, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """(WIDTH, columns), as `_load_dims`."""
    d = begin + tl.arange(0, WIDTH)
    if live is None and begin + WIDTH <= D:
        return tl.load(ptrs + d[:, None])
    elif live is None:
        return tl.load(ptrs + d[:, None], mask=(d < D)[:, None], other=0.0)
    elif begin + WIDTH <= D:
        return tl.load(ptrs + d[:, None], mask=live[None, :], other=0.0)
    else:
        return tl.load(ptrs + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """(m, n) product of rows (m, dims) and columns (dims, n), each in one or two pieces of dims."""
    x = tl.dot(a[0], b[0], input_precision=PRECISION)
    if len(a) == 2:
        x = tl.dot(a[1], b[1], x, input_precision=PRECISION)
    return x


@triton.jit
def turned(rows):
    """Columns of rows."""
    if len(rows) == 2:
        return (tl.trans(rows[0]), tl.trans(rows[1]))
    else:
        return (tl.trans(rows[0]),)


@triton.jit
def add_product(accs, a, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Adds a @ rows to accs, (m, dims) in the pieces of rows; operands in DTYPE."""
    a = a.to(DTYPE)
    head = tl.dot(a, rows[0].to(DTYPE), accs[0], input_precision=PRECISION)
    if len(rows) == 2:
        return (head, tl.dot(a, rows[1].to(DTYPE), accs[1], input_precision=PRECISION))
    else:
        return (head,)


@triton.jit
def zero_rows(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """Zeros in the pieces of `load_rows`, float32."""
    if TAIL:
        return (tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS, TAIL], tl.float32))
    else:
        return (tl.zeros([ROWS, BLOCK_D], tl.float32),)


@triton.jit
def load_cells(ptr, cells, seen, some, AS_IS: tl.constexpr = False):
    """Cells of a workspace in float32 (or its own dtype), 0 where not seen.

    seen: which cells; None: all. some: whether the tile holds a cell of the region, else nothing
    was written there; None: every tile does. A mask of each cell would be a load of each cell.
    """
    x = tl.load(ptr + cells) if some is None else tl.load(ptr + cells, mask=some, other=0.0)
    if not AS_IS:
        x = x.to(tl.float32)
    if seen is not None:
        x = tl.where(seen, x, 0.0)
    return x


@triton.jit
def key_tags(tags_ptr, b, j, N):
    """Tag of each key (-1 for padding), and whether the key exists and is no padding."""
    inside = j < N
    if tags_ptr is not None:
        tag = tl.load(tags_ptr + b * N + j, mask=inside, other=-1)
        return tag, tag >= 0
    else:
        return j, inside


@triton.jit
def row_tags(tags_ptr, b, i, live, N):
    """Tag of each row, one that no key has where the row is dead."""
    if tags_ptr is not None:
        return tl.load(tags_ptr + b * N + i, mask=live, other=-2)
    else:
        return i


@triton.jit
def row_span(first_ptr, last_ptr, b, i, live, N):
    """First and last key that each row may see; nothing where the row is dead."""
    first = tl.load(first_ptr + b * N + i, mask=live, other=N)
    last = tl.load(last_ptr + b * N + i, mask=live, other=-1)
    return first, last


@triton.jit
def sees(first, last, tag, j, key_tag, tags_ptr):
    """Whether rows see keys; the arguments are spread along their own dimension."""
    seen = (first <= j) & (j <= last)
    if tags_ptr is not None:
        seen = seen & (tag == key_tag)
    return seen


@triton.jit
def tile_span(first, last, live, tag, limit, tags_ptr, BLOCK: tl.constexpr):
    """Cut what some rows see into tiles of BLOCK, aligned to 0.

    A row whose segment has gaps (the last bit of its tag) sees no tile whole.

    Returns:
        begin: first position of the first tile.
        full_begin, full_end: tiles in between are seen whole by every live row.
        end: end of the last tile.
    """
    sighted = live & (first <= last)
    begin = tl.min(tl.where(sighted, first, limit)) // BLOCK * BLOCK
    end = tl.cdiv(tl.max(tl.where(sighted, last, -1)) + 1, BLOCK) * BLOCK
    end = tl.maximum(begin, end)
    full_begin = tl.cdiv(tl.max(tl.where(live, first, 0)), BLOCK) * BLOCK
    full_end = (tl.min(tl.where(live, last, limit)) + 1) // BLOCK * BLOCK
    if tags_ptr is not None:
        full_end = tl.where(tl.max(tl.where(live, tag & 1, 0)) == 0, full_end, 0)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def masked_tile(t, begin, full_begin, full_end, BLOCK: tl.constexpr):
    """Position of masked tile t: those before the whole ones, then those behind."""
    before = (full_begin - begin) // BLOCK
    return tl.where(t < before, begin + t * BLOCK, full_end + (t - before) * BLOCK)


@triton.jit
def count_masked(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Number of masked tiles."""
    return (full_begin - begin + end - full_end) // BLOCK


@triton.jit
def count_region(before_ptr, b, n, BLOCK: tl.constexpr, N):
    """Keys of the region among n .. n + BLOCK, from how many come before each key."""
    before_ptr += b * (N + 1)
    return tl.load(before_ptr + tl.minimum(n + BLOCK, N)) - tl.load(before_ptr + n)


@triton.jit
def is_member(t, members, more_members):
    """Whether bit t is set in two words of 31 bits."""
    return ((tl.where(t < 31, members, more_members) >> (t % 31)) & 1) != 0


@triton.jit
def load_vector(ptrs, live, other: tl.constexpr):
    """A value for each row; `live` may be None: all are."""
    if live is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=live, other=other)


@triton.jit
def add_scaled(a, scale, b):
    """Adds scale * b to a, both in the pieces of `load_rows`."""
    if len(a) == 2:
        return (a[0] + scale * b[0], a[1] + scale * b[1])
    else:
        return (a[0] + scale * b[0],)
