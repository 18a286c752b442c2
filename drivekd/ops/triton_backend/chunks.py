"""How the rows of a call are cut into chunks, from shapes alone.

Every launch ends with idle multiprocessors: programs of a map are equally long, so where they fill
the GPU 2.1 times the third wave is nearly empty. Of all ways to cut the rows that memory allows,
that with the least idle time is taken, found from the last row backwards.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from drivekd_kernels import launch, launch_dq_dk, specialize
from drivekd_kernels.operands import Chunk
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 288 * 2**20  # that one chunk's workspaces may take,
MIN_ROWS = 1024  # unless it had fewer rows then
STEP = 64  # rows; chunks begin at multiples of it
MAX_STEPS = 256  # beginnings that are looked at
HALVED = 4096  # tokens from which on a workspace holds little more than half of a map's cells
# What a chunk costs beside its cells, and what idle processors cost: multiply-adds at the rate of
# 16-bit products. Some 15 us of launches and of first loads.
_CHUNK_COST = 6e9
_UNEVEN = 0.25  # of a wave is idle at most where programs are uneven and the longest come first


@dataclass(frozen=True)
class Kernel:
    """Programs of a kernel: tiles of rows x keys of a map, or of rows alone, walking over keys.

    Attributes:
        rows: of a tile.
        keys: of a tile; None: a program walks over all keys that its rows see.
        programs: of a tile.
        cost: multiply-adds of a cell.
    """

    rows: int
    keys: int | None
    programs: int
    cost: int


def cut(
    models: Sequence[tuple[Tensor, Tensor]],
    *,
    learns: bool,
    num_maps: int,
    region: bool,
    grows: bool,
) -> list[Chunk]:
    """Chunks of all rows.

    Args:
        models: queries (B, H, N, D) and keys of a layer of each model whose maps are made.
        learns: whether the first of them gets gradients.
        num_maps: float32 workspaces that are needed at once, beside W.
        region: whether only some rows and keys are looked at.
        grows: whether rows see no keys behind themselves, and are all taken in order: then
            workspaces are as wide as their last row.
    """
    query = models[0][0]
    B, H, N, D = query.shape
    budget = CHUNK_BYTES // (B * (4 * num_maps + min(4, query.element_size())))
    if N >= HALVED:
        budget = min(budget, 9 * N * N // 16)
    least = min(MIN_ROWS, N // 2) if N >= HALVED else MIN_ROWS
    kernels = [
        Kernel(*launch.map_tile_size(*each, region=region), B, each[0].shape[1] * each[0].shape[3])
        for each in models
    ]
    if learns:
        rows, packs = launch_dq_dk.dq_tile_size(*models[0], region=region)
        kernels.append(Kernel(rows, None, B * packs, 3 * H * D))
    step = STEP * -(-N // (STEP * MAX_STEPS))
    ends = _ends(-(-N // step), step, budget, least, specialize.programs(query), (*kernels,), grows)
    firsts = [0, *(end for end in ends if end < N)]
    return [
        Chunk(first, end - first, end if grows else N)
        for first, end in zip(firsts, [*firsts[1:], N], strict=True)
    ]


@functools.lru_cache(maxsize=1024)
def _ends(
    num_steps: int,
    step: int,
    budget: int,
    least: int,
    resident: int,
    kernels: tuple[Kernel, ...],
    grows: bool,
) -> tuple[int, ...]:
    """Where chunks end: the cheapest way to get from the first row to the last."""
    row = step * np.arange(num_steps + 1)
    width = row if grows else np.full_like(row, row[-1])
    cells = np.concatenate([[0], np.cumsum(step * (width[1:] - step / 2 * grows))])
    before = [_programs_before(kernel, row, grows) for kernel in kernels]
    cost = np.zeros(num_steps + 1)
    following = np.zeros(num_steps + 1, dtype=int)
    for first in range(num_steps - 1, -1, -1):
        end = np.arange(first + 1, num_steps + 1)
        count = row[end] - row[first]
        affordable = (count * width[end] <= budget) | (count <= max(least, step))
        end = end[: max(1, int(affordable.sum()))]
        idle = np.full(end.shape, _CHUNK_COST)
        for kernel, programs in zip(kernels, before, strict=True):
            waves = (programs[end] - programs[first]) / resident
            lost = np.ceil(waves) - waves
            if kernel.keys is None:
                lost = np.where(waves > 2, np.minimum(lost, _UNEVEN), lost)
                wave = (cells[end] - cells[first]) / waves
            else:
                wave = resident * kernel.rows * kernel.keys
            idle += lost * wave * kernel.cost
        total = idle + cost[end]
        best = int(total.argmin())
        cost[first], following[first] = total[best], end[best]
    ends, at = [], 0
    while at < num_steps:
        at = int(following[at])
        ends.append(at * step)
    return tuple(ends)


def _programs_before(kernel: Kernel, row: NDArray[np.int64], grows: bool) -> NDArray[np.float64]:
    """How many programs the rows before each of some have."""
    if kernel.keys is None:
        return np.asarray(kernel.programs * row / kernel.rows)
    last = np.arange(kernel.rows, row[-1] + kernel.rows, kernel.rows)  # of each tile of rows
    keys = np.minimum(last, row[-1]) if grows else np.full_like(last, row[-1])
    tiles = np.concatenate([[0], np.cumsum(-(-keys // kernel.keys))])
    return np.asarray(kernel.programs * tiles[-(-row // kernel.rows)], dtype=np.float64)
