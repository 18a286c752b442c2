"""Launchers: allocate, choose tiles, pass strides, enter the device; one for each kernel.

Vectors about tokens are int32 (B, N), contiguous. Maps of a chunk of rows live in workspaces
(maps, B, slots, keys), slots and keys padded to whole tiles (`map_shape`).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drivekd_kernels import (
    attention_lse,
    attention_map,
    attention_rows,
    attention_tokens,
)
from drivekd_kernels.tuned import ONE_PASS_DIM, ROW_TILES, Tiles, tiles

LOG2E = 1 / math.log(2)
MAP_ALIGN = 16  # elements; rows of workspaces start at multiples of it
MAP_ROWS, MAP_KEYS = 128, 128  # workspaces hold whole tiles of so many slots and keys
TOKEN_BLOCK = 2048  # tokens that `tokens` looks at in one step
RESIDENT = 2  # programs that a multiprocessor holds at once
MIN_SHARE = 0.93  # of a tile's rows that hold something when query heads are packed
MAX_MAPS = 62  # bits of the two words that name the members of a group


@dataclass(frozen=True)
class Tokens:
    """What rows see, and which rows and keys a region has; see `tiles.py`.

    Attributes:
        first: first key that a token sees; N where it sees none.
        last: last key that it sees; -1 where it sees none.
        row_first: first token that sees a key; N where none does.
        row_last: last token that sees it; -1 where none does.
        tags: a token sees only keys of its own tag, -1 is padding; None: all are equal.
        rows: (B, N) tokens of the region's rows, in order; None: all tokens.
        slots: (B, N + 1) how many of `rows` come before each token; None with `rows`.
        num_rows: (B,) length of each sample's `rows`; None with `rows`.
        vision: (B, N) int8, keys of the region; None: all.
        before: (B, N + 1) how many keys of the region come before each token; None with `vision`.
        num_tokens: N.
        batch_size: B.
    """

    first: Tensor
    last: Tensor
    row_first: Tensor
    row_last: Tensor
    tags: Tensor | None
    rows: Tensor | None
    slots: Tensor | None
    num_rows: Tensor | None
    vision: Tensor | None
    before: Tensor | None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.first.shape[0]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.first.shape[1]


@dataclass(frozen=True)
class Heads:
    """Queries and keys of one layer, their softmax's scale, and the log-sum-exp in base 2."""

    query: Tensor  # (B, H, N, D), stride 1 along D
    key: Tensor  # (B, H_kv, N, D), stride 1 along D
    scale: float
    lse2: Tensor  # (B, H, N) float32

    @property
    def num_heads(self) -> int:
        """H."""
        return self.query.shape[1]


@dataclass(frozen=True)
class Chunk:
    """Slots [first, first + count) of every sample, whose rows see none but the first `keys` keys.

    Workspaces of a chunk are as wide as that.
    """

    first: int
    count: int
    keys: int


@dataclass(frozen=True)
class Group:
    """Maps whose mean is a target: their indices into a workspace."""

    maps: tuple[int, ...]

    @property
    def words(self) -> tuple[int, int]:
        """Bits of the members, 31 to a word."""
        bits = sum(1 << index for index in self.maps)
        return bits & (2**31 - 1), bits >> 31


def tokens(
    shape: tuple[int, int],
    device: torch.device,
    *,
    valid: Tensor | None,
    is_text: Tensor | None,
    is_vision: Tensor | None,
    causal: bool,
    window: int | None,
    listed: bool,
) -> Tokens:
    """What tokens see under one window, every sample being one segment.

    Args:
        shape: B and N.
        device: of the result.
        valid: (B, N) bool, tokens that are no padding; None: all.
        is_text: (B, N) bool, rows of the region; None: all.
        is_vision: (B, N) bool, keys of the region; None: all, and no list of them.
        causal: whether keys behind a token are hidden.
        window: keys less than so many tokens away are seen; None: no bound.
        listed: whether to list the region's rows.
    """
    B, N = shape

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    region = is_vision is not None
    result = Tokens(
        first=empty(B, N),
        last=empty(B, N),
        row_first=empty(B, N),
        row_last=empty(B, N),
        tags=None if valid is None else empty(B, N),
        rows=empty(B, N) if listed else None,
        slots=empty(B, N + 1) if listed else None,
        num_rows=empty(B) if listed else None,
        vision=empty(B, N, dtype=torch.int8) if region else None,
        before=empty(B, N + 1) if region else None,
    )
    masks = [
        None if mask is None else mask.contiguous().view(torch.uint8)
        for mask in (valid, is_text, is_vision)
    ]
    with on_device(result.first):
        attention_tokens.tokens_kernel[(B,)](
            *masks,
            result.first,
            result.last,
            result.row_first,
            result.row_last,
            result.tags,
            result.rows,
            result.slots,
            result.num_rows,
            result.vision,
            result.before,
            N,
            N if window is None else min(window, N),
            CAUSAL=causal,
            BLOCK=TOKEN_BLOCK,
            num_warps=8,
        )
    return result


def lse(query: Tensor, key: Tensor, scale: float, tokens: Tokens) -> Tensor:
    """Base-2 log-sum-exp (B, H, N) float32 of the rows of the region; other rows undefined."""
    B, H, N, _ = query.shape
    lse2 = query.new_empty((B, H, N), dtype=torch.float32)
    meta, tile = meta_of(
        "lse", query, key, region=tokens.vision is not None, tags=tokens.tags is not None
    )
    grid = (H, ceil_div(N, tile.q), B)
    with on_device(query):
        attention_lse.lse_kernel[grid](
            query,
            key,
            lse2,
            tokens.first,
            tokens.last,
            tokens.tags,
            tokens.rows,
            tokens.num_rows,
            N,
            *strides(query),
            *strides(key),
            scale * LOG2E,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **meta,
        )
    return lse2


def map_tile(heads: Heads, tokens: Tokens, chunk: Chunk, out: Tensor, *, log: bool) -> None:
    """Head-mean map of a chunk, or its base-2 logarithm, into a workspace (B, slots, keys) float32.

    0 where a cell is not visible or not in the region, but tiles without a cell of it are left
    alone.
    """
    region = tokens.vision is not None
    meta, tile = meta_of("map", heads.query, heads.key, log=log, region=region)
    grid = (ceil_div(chunk.keys, tile.k), ceil_div(chunk.count, tile.q), tokens.batch_size)
    with on_device(heads.query):
        attention_map.map_kernel[grid](
            heads.query,
            heads.key,
            heads.lse2,
            out,
            tokens.first,
            tokens.last,
            tokens.tags,
            tokens.rows,
            tokens.num_rows,
            tokens.vision,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            chunk.keys,
            *strides(heads.query),
            *strides(heads.key),
            *(each // MAP_ALIGN for each in out.stride()[:2]),
            heads.scale * LOG2E,
            math.log2(heads.num_heads),
            LOG=log,
            ALIGN_MAP=MAP_ALIGN,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **meta,
        )


def mse_size(heads: Heads, tokens: Tokens, chunk: Chunk) -> int:
    """Number of a sample's partial sums in `mse`."""
    _, tile = meta_of("mse", heads.query, heads.key, region=tokens.vision is not None)
    return ceil_div(chunk.keys, tile.k) * ceil_div(chunk.count, tile.q)


def mse(
    heads: Heads,
    tokens: Tokens,
    chunk: Chunk,
    targets: Tensor,
    group: Group,
    w: Tensor | None,
    sums: Tensor,
) -> None:
    """Squared error of a chunk's map against the mean of some maps.

    Args:
        heads: the student's layer.
        tokens: what is seen.
        chunk: which rows.
        targets: (maps, B, slots, keys) float32 workspaces.
        group: which of them.
        w: (B, slots, keys) receives dL/dP; None where no gradient is wanted.
        sums: (B, at least `mse_size`) float32, receives partial sums.
    """
    meta, tile = meta_of("mse", heads.query, heads.key, region=tokens.vision is not None)
    grid = (ceil_div(chunk.keys, tile.k), ceil_div(chunk.count, tile.q), tokens.batch_size)
    stride_t, stride_b, stride_s = (each // MAP_ALIGN for each in targets.stride()[:3])
    with on_device(heads.query):
        attention_map.mse_kernel[grid](
            heads.query,
            heads.key,
            heads.lse2,
            targets,
            w,
            sums,
            tokens.first,
            tokens.last,
            tokens.tags,
            tokens.rows,
            tokens.num_rows,
            tokens.vision,
            tokens.before,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            chunk.keys,
            sums.stride(0),
            *strides(heads.query),
            *strides(heads.key),
            stride_b,
            stride_s,
            stride_t,
            heads.scale * LOG2E,
            math.log2(heads.num_heads),
            *group.words,
            1 / len(group.maps),
            targets.shape[0],
            ALIGN_MAP=MAP_ALIGN,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **meta,
        )


def row_loss(
    loss: str,
    tokens: Tokens,
    chunk: Chunk,
    maps: Tensor,
    targets: Tensor,
    group: Group,
    w: Tensor | None,
    sums: Tensor,
    *,
    log: bool,
) -> None:
    """Cosine or kl loss of each row of a chunk.

    Args:
        loss: "cosine" or "kl".
        tokens: what is seen.
        chunk: which rows.
        maps: (B, slots, keys) float32, the student's map or its base-2 logarithm.
        targets: (maps, B, slots, keys), the teachers' in the same domain.
        group: which of them.
        w: (B, slots, keys) receives dL/dP, or dL/dlog P; None where no gradient is wanted.
        sums: (B, at least count) float32, receives the losses.
        log: whether maps are logarithms; always for kl.
    """
    kernel = {"cosine": attention_rows.cosine_kernel, "kl": attention_rows.kl_kernel}[loss]
    stride_t, stride_b, stride_s = (each // MAP_ALIGN for each in targets.stride()[:3])
    share = 1 / len(group.maps)
    with on_device(maps):
        kernel[(ceil_div(chunk.count, ROW_TILES.q), tokens.batch_size)](
            maps,
            targets,
            w,
            sums,
            tokens.first,
            tokens.last,
            tokens.tags,
            tokens.rows,
            tokens.num_rows,
            tokens.vision,
            tokens.num_tokens,
            chunk.first,
            chunk.count,
            sums.stride(0),
            stride_b,
            stride_s,
            stride_t,
            *group.words,
            share,
            math.log2(share),
            targets.shape[0],
            LOG=log,
            ALIGN_MAP=MAP_ALIGN,
            BLOCK_Q=ROW_TILES.q,
            BLOCK_K=ROW_TILES.k,
            num_warps=ROW_TILES.warps,
        )


def map_tile_size(query: Tensor, key: Tensor, *, region: bool) -> tuple[int, int]:
    """Rows and keys of a program of `map_tile`."""
    _, tile = meta_of("map", query, key, region=region)
    return tile.q, tile.k


def map_shape(num_rows: int, num_tokens: int) -> tuple[int, int]:
    """Slots and keys of a workspace."""
    return ceil_div(num_rows, MAP_ROWS) * MAP_ROWS, ceil_div(num_tokens, MAP_KEYS) * MAP_KEYS


def architecture(tensor: Tensor) -> int:
    """Compute capability of a tensor's GPU, 90 for 9.0; that of an H200 where there is none."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return int(10 * major + minor)


def programs(tensor: Tensor) -> int:
    """How many a tensor's GPU holds at once."""
    return RESIDENT * _multiprocessors(tensor)


def _multiprocessors(tensor: Tensor) -> int:
    """How many a tensor's GPU has; an H200 where there is none."""
    if tensor.device.type != "cuda":
        return 132
    count: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return count


def one_pass(query: Tensor) -> bool:
    """Whether dq makes delta on the way."""
    return padded_dims(query.shape[-1]) <= ONE_PASS_DIM


def meta_of(
    kernel: str,
    query: Tensor,
    key: Tensor,
    *,
    log: bool = False,
    region: bool = False,
    tags: bool = False,
    packs: bool = False,
) -> tuple[dict[str, Any], Tiles]:
    """What the kernels of one model must know when they are compiled, and the tile sizes."""
    H, D = query.shape[1], query.shape[3]
    block_d, tail = _dims(D)
    group = H // key.shape[1]
    dtype = str(query.dtype).removeprefix("torch.")
    tile = tiles(
        kernel, architecture(query), dtype, block_d + tail, log=log, region=region, tags=tags
    )
    meta: dict[str, Any] = {
        "H": H,
        "GROUP": group,
        "D": D,
        "BLOCK_D": block_d,
        "TAIL": tail,
        "ALIGN_Q": _align(query),
        "ALIGN_K": _align(key),
        "BLOCK_Q": tile.q,
        "BLOCK_K": tile.k,
        "PRECISION": "ieee",
    }
    if kernel in ("map", "mse", "dk"):
        meta |= {"PART": tile.k // tile.parts, "PARTS": tile.parts}
    if packs:
        meta["PACK"] = packed_heads(group, tile)
    return meta, tile


def packed_heads(group: int, tile: Tiles) -> int:
    """Query heads of a group that share a tile of rows: many, but few rows may stay empty."""

    def share(pack: int) -> float:
        return group / (ceil_div(group, pack) * pack) * (tile.q // pack * pack) / tile.q

    return max(pack for pack in range(1, min(group, tile.pack) + 1) if share(pack) >= MIN_SHARE)


def ceil_div(value: int, step: int) -> int:
    """How many steps reach the value."""
    return -(-value // step)


def _power_of_2(value: int) -> int:
    """The smallest power of two that is not below the value."""
    return 1 << (value - 1).bit_length()


def padded_dims(head_dim: int) -> int:
    """Head dims of a tile, those behind the last one too."""
    return sum(_dims(head_dim))


def _dims(head_dim: int) -> tuple[int, int]:
    """Head dims of a tile, and of a second one behind it, powers of two; 0: there is none."""
    whole = max(16, _power_of_2(head_dim))
    tail = max(16, _power_of_2(head_dim - whole // 2))
    return (whole, 0) if head_dim <= 64 or tail > whole // 4 else (whole // 2, tail)


def _align(tensor: Tensor) -> int:
    """Elements of 16 bytes if rows start at multiples of that, else 1."""
    elements = 16 // tensor.element_size()
    aligned = all(stride % elements == 0 for stride in tensor.stride()[:3])
    return elements if aligned else 1


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of samples, heads and tokens in units of `_align`."""
    align = _align(tensor)
    b, h, n = (stride // align for stride in tensor.stride()[:3])
    return b, h, n


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, whatever the current one is."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield
