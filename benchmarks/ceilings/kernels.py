"""Kernels that do one thing only, so that it bounds them; and one that reads clocks.

What matters of their binaries is asserted in tests/kernels/test_ceilings_offline.py.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer, smid

READ_WARPS = 8
READ_PROGRAMS = 3  # a multiprocessor: 60 KB under way
READ_BLOCK = 8 * 4 * 32 * READ_WARPS  # int32: eight loads of 16 bytes a thread
EXP2_WARPS = 16
EXP2_BLOCK = 16 * 32 * EXP2_WARPS  # 16 chains a thread
EXP2_STEPS = 8  # of each chain a trip
START_WARPS = 4
START_ITEMS = 512  # that a program looks at in each of its two loads


@triton.jit
def clock():
    """Clocks of the multiprocessor that this program is on."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def clock_kernel(out_ptr):
    """(programs, 3) int64: each one's multiprocessor, its clocks, and nanoseconds."""
    out = out_ptr + 3 * tl.program_id(0)
    tl.store(out, smid().to(tl.int64))
    tl.store(out + 1, clock())
    tl.store(out + 2, globaltimer())


@triton.jit(do_not_specialize=["num_tiles", "trips"])
def read_kernel(ptr, out_ptr, num_tiles, trips, BLOCK: tl.constexpr):
    """Every program reads a tile of BLOCK int32 a trip, past L1; together they go round all tiles.

    num_tiles must not be less than the number of programs.
    """
    program = tl.program_id(0)
    step = tl.num_programs(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    tile = program
    for _ in range(trips):
        base = ptr + tile.to(tl.int64) * BLOCK
        total ^= tl.load(base + offsets, cache_modifier=".cg")
        tile += step
        tile = tl.where(tile >= num_tiles, tile - num_tiles, tile)
    tl.store(out_ptr + program, tl.xor_sum(total))


@triton.jit(do_not_specialize=["trips"])
def exp2_kernel(out_ptr, trips, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Independent chains x = 2^-x, which stay between 1/2 and 1."""
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) / BLOCK
    for _ in range(trips):
        for _ in tl.static_range(STEPS):
            x = tl.exp2(-x)
    tl.store(out_ptr + program * BLOCK + offsets, x)


@triton.jit
def empty_kernel(a_ptr):
    """Nothing, with next to no arguments."""


@triton.jit(do_not_specialize=["n", "o", "p", "q", "r", "s", "t", "u", "v", "w"])
def many_arguments_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, h_ptr, i_ptr, j_ptr, n, o, p, q, r, s, t, u, v,
    w, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Nothing, with as many arguments as a pass over maps has."""


@triton.jit(do_not_specialize=["busy_clocks"])
def start_kernel(ptr, out_ptr, busy_clocks, ITEMS: tl.constexpr):
    """What a pass does before its first product, then idle clocks: places become free one by one.

    ptr: int32 zeros. out_ptr: (programs, 4) int64: multiprocessor, clocks at the beginning, after
    two loads of which the second waits for the first, and at the end.
    """
    program = tl.program_id(0).to(tl.int64)
    begin = clock()
    offsets = tl.arange(0, ITEMS)
    first = tl.max(tl.load(ptr + (program % 64) * ITEMS + offsets))
    second = tl.max(tl.load(ptr + first + (program % 64) * ITEMS + offsets))
    loaded = begin
    if second == 0:  # which it is: the clock is read when that is known
        loaded = clock()
    now = loaded
    until = begin + busy_clocks + (program % 16) * (busy_clocks // 16)
    while now < until:
        now = clock()
    tl.store(out_ptr + 4 * program, smid().to(tl.int64))
    tl.store(out_ptr + 4 * program + 1, begin)
    tl.store(out_ptr + 4 * program + 2, loaded)
    tl.store(out_ptr + 4 * program + 3, now)
