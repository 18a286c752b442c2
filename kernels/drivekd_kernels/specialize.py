"""What attention kernels are compiled for: head counts, head dims, alignment, tile sizes."""

from typing import Any

import torch
from torch import Tensor

from drivekd_kernels.operands import MAP_ALIGN, align_of, ceil_div
from drivekd_kernels.tuned import ONE_PASS_DIM, Tiles, tiles

RESIDENT = 2  # programs that a multiprocessor holds at once
MIN_SHARE = 0.93  # of a tile's rows that hold something when query heads are packed


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
    """What a kernel of one model is compiled for, with Triton's options, and its tile sizes."""
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
        "ALIGN_Q": align_of(query),
        "ALIGN_K": align_of(key),
        "BLOCK_Q": tile.q,
        "BLOCK_K": tile.k,
        "PRECISION": "ieee",
        "STAGES": tile.stages,
        "num_stages": tile.stages,
        "num_warps": tile.warps,
    }
    if kernel != "lse":
        meta["ALIGN_MAP"] = MAP_ALIGN
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


def row_meta(tile: Tiles) -> dict[str, Any]:
    """The same of a kernel that reads or writes whole rows of maps, and no head."""
    return {
        "ALIGN_MAP": MAP_ALIGN,
        "BLOCK_Q": tile.q,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
    }
