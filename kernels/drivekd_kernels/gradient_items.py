"""What the gradient kernels share: the table of a ragged list, and reading K gradients at once.

The table is one vector of int64. A *record* describes one tensor: its number of elements, the
number of its first item, then what the kernel wants (addresses above all). An *item* is CHUNK
elements of one tensor, the work of one program; the item's entry says where its record begins.
Addresses become pointers here, so tensors need no arguments of their own and any number of them, of
any size, runs in one launch of one compiled kernel.
"""

import triton
import triton.language as tl


@triton.jit
def item_record(table_ptr, first_entry, CHUNK: tl.constexpr):
    """The program's record, its first element (int64), and how many elements it has (int32)."""
    item = tl.program_id(0)
    record = table_ptr + tl.load(table_ptr + first_entry + item)
    size = tl.load(record)
    start = (item - tl.load(record + 1)) * CHUNK
    return record, item, start, tl.minimum(size - start, CHUNK).to(tl.int32)


@triton.jit
def pointer_at(entry, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor whose address stands at `entry`."""
    pointer = tl.load(entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def load_part(pointer, offs, length, WHOLE: tl.constexpr):
    """Elements at offs; zero from `length` on, unless the part is known to be whole."""
    if WHOLE:
        return tl.load(pointer + offs)
    return tl.load(pointer + offs, mask=offs < length, other=0.0)
