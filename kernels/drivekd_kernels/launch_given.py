"""Launchers of the kernels about targets that are given, or to be kept; see `launch.py`."""

import math

from torch import Tensor

from drivekd_kernels import attention_given, attention_rows
from drivekd_kernels.operands import Chunk, Group, Tokens, ceil_div, map_strides, on_device
from drivekd_kernels.specialize import row_meta
from drivekd_kernels.tuned import LARGEST_TILES, ROW_TILES


def rectangle(
    values: Tensor, exponents: Tensor, tokens: Tokens, chunk: Chunk, out: Tensor, *, log: bool
) -> None:
    """Lay the region's cells out in a workspace, as `launch.map_tile` does.

    Args:
        values: (B, T, V) floating, of any strides: of the region's rows and keys in order.
        exponents: (B, T) integers: a row's values are in units of 2^exponent.
        tokens: what is seen; its rows and keys of the region are listed.
        chunk: which rows.
        out: (B, slots, keys) float32.
        log: whether to write base-2 logarithms.
    """
    _, num_rows, num_keys = values.shape
    grid = (
        ceil_div(chunk.keys, ROW_TILES.k),
        ceil_div(chunk.count, ROW_TILES.q),
        tokens.batch_size,
    )
    with on_device(out):
        attention_given.rectangle_kernel[grid](
            values,
            exponents,
            out,
            tokens.num_rows,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            num_rows,
            num_keys,
            *values.stride(),
            *exponents.stride(),
            *map_strides(out),
            LOG=log,
            **row_meta(ROW_TILES),
        )


def largest(
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    tokens: Tokens,
    chunk: Chunk,
    out: Tensor,
    *,
    log: bool,
) -> None:
    """Lay rows of the full map, of which the largest cells are given, out in a workspace.

    Args:
        values: (B, N, K) floating, of any strides; a row's unit does not matter.
        indices: (B, N, K) integers, their keys; negative: none.
        rest: (B, N) floating, what a row holds beside them.
        tokens: what is seen; it lists no rows.
        chunk: which rows.
        out: (B, slots, keys) float32; cells that no row of a tile sees are left alone.
        log: whether to write base-2 logarithms.
    """
    grid = (ceil_div(chunk.count, LARGEST_TILES.q), tokens.batch_size)
    with on_device(out):
        attention_given.largest_kernel[grid](
            values,
            indices,
            rest,
            out,
            tokens.first,
            tokens.last,
            tokens.tags,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            chunk.keys,
            values.shape[2],
            *values.stride(),
            *indices.stride(),
            *rest.stride(),
            *map_strides(out),
            LOG=log,
            **row_meta(LARGEST_TILES),
        )


def pack(
    targets: Tensor, group: Group, tokens: Tokens, chunk: Chunk, values: Tensor, exponents: Tensor
) -> None:
    """Write the region's cells of the mean of some maps side by side.

    Args:
        targets: (maps, B, slots, keys) float32 workspaces, base-2 logarithms.
        group: which of them.
        tokens: what is seen; its rows and keys of the region are listed.
        chunk: which rows.
        values: (B, T, V) float32, contiguous, receives P / 2^exponent where cells are visible.
        exponents: (B, T) int16, contiguous, receives the exponents of rows that see something.
    """
    stride_t, stride_b, stride_s = map_strides(targets)
    share = 1 / len(group.maps)
    with on_device(targets):
        attention_rows.pack_kernel[(ceil_div(chunk.count, ROW_TILES.q), tokens.batch_size)](
            targets,
            values,
            exponents,
            *tokens.seen,
            tokens.vision,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            *values.shape[1:],
            stride_b,
            stride_s,
            stride_t,
            *group.words,
            share,
            math.log2(share),
            targets.shape[0],
            **row_meta(ROW_TILES),
        )
