"""How many tiles every program of a launch visits, computed from the tokens as the kernels do it.

The arithmetic is that of `drivekd_kernels.tiles.tile_span`, `attention_dk.spans_kernel` and
`attention_map._nothing_to_see`, in numpy, for all programs at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from drivekd_kernels.operands import Tokens
from numpy.typing import NDArray

from benchmarks.offline.record import Launch

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """Of each program, in the order in which they start.

    Attributes:
        whole, masked: products of tiles (one head each) in the main and in the masked loop; of
            kernels without products trips of loops over what is given and over tiles of cells.
        whole_outer, masked_outer: trips of the loops around those (key heads of map and mse, row
            tiles of dk; else 0).
        live: whether the program does anything.
        cells: rows x keys x heads in the visited tiles of the launch.
        visible: of these, what must be visited.
        runs: tiles of keys that a program of dk begins; else 1.
    """

    whole: Ints
    masked: Ints
    whole_outer: Ints
    masked_outer: Ints
    live: NDArray[np.bool_]
    cells: int
    visible: int
    runs: Ints | None = None


class Seen:
    """Tokens as numpy arrays, and what follows from them."""

    def __init__(self, tokens: Tokens) -> None:
        self.batch_size, self.num_tokens = tokens.batch_size, tokens.num_tokens
        self.first, self.last = _numpy(tokens.first), _numpy(tokens.last)
        self.row_first, self.row_last = _numpy(tokens.row_first), _numpy(tokens.row_last)
        position = np.broadcast_to(np.arange(self.num_tokens), self.first.shape)
        listed = tokens.rows is not None
        self.rows = _numpy(tokens.rows) if listed else position
        self.slots = _numpy(tokens.slots) if listed else None
        full = np.full(self.batch_size, self.num_tokens)
        self.num_rows = _numpy(tokens.num_rows) if listed else full
        whole = np.ones(self.first.shape, dtype=bool)
        self.region = whole if tokens.vision is None else _numpy(tokens.vision) != 0
        if tokens.tags is not None:
            raise NotImplementedError("shapes with padding or segments are not modelled")

    def row_tiles(self, first_slot: int, count: int, size: int) -> "RowTiles":
        """Chunk of rows cut into tiles of `size` slots."""
        tiles = -(-count // size)
        slot = np.arange(tiles * size)
        stop = np.minimum(self.num_rows, first_slot + count)
        live = first_slot + slot < stop[:, None]
        token = np.take_along_axis(
            self.rows, np.minimum(first_slot + slot, self.num_tokens - 1)[None].repeat(
                self.batch_size, axis=0), axis=1,
        )  # fmt: skip
        token = np.where(live, token, 0)
        first = np.where(live, np.take_along_axis(self.first, token, axis=1), self.num_tokens)
        last = np.where(live, np.take_along_axis(self.last, token, axis=1), -1)
        shape = (self.batch_size, tiles, size)
        return RowTiles(
            live.reshape(shape), first.reshape(shape), last.reshape(shape), self.num_tokens
        )


@dataclass(frozen=True)
class RowTiles:
    """(samples, tiles, rows of a tile)."""

    live: NDArray[np.bool_]
    first: Ints
    last: Ints
    num_tokens: int

    def span(self, block: int) -> tuple[Ints, Ints]:
        """Key tiles of `block` that a row tile sees whole, and those that it masks."""
        sighted = self.live & (self.first <= self.last)
        begin = np.where(sighted, self.first, self.num_tokens).min(-1) // block * block
        end = _up(np.where(sighted, self.last, -1).max(-1) + 1, block)
        end = np.maximum(begin, end)
        full_begin = _up(np.where(self.live, self.first, 0).max(-1), block)
        full_end = (np.where(self.live, self.last, self.num_tokens).min(-1) + 1) // block * block
        full_begin = np.clip(full_begin, begin, end)
        full_end = np.clip(full_end, full_begin, end)
        return (full_end - full_begin) // block, (full_begin - begin + end - full_end) // block

    def visible(self) -> int:
        """Cells that the rows see."""
        return int(np.where(self.live, np.maximum(self.last - self.first + 1, 0), 0).sum())


def work(launch: Launch, seen: Seen) -> Work:
    """Tiles of every program of a launch.

    Raises:
        NotImplementedError: a kernel that this page does not know.
    """
    if launch.name in ("map", "mse"):
        return _map(launch, seen)
    if launch.name in ("lse", "delta", "dq"):
        return _rows(launch, seen)
    if launch.name == "dk":
        return _dk(launch, seen)
    if launch.name in ("cosine", "kl"):
        return _row_loss(launch, seen)
    if launch.name == "rectangle":
        return _rectangle(launch, seen)
    if launch.name == "largest":
        return _largest(launch, seen)
    raise NotImplementedError(f"no geometry is known for {launch.name}_kernel")


def _rows(launch: Launch, seen: Seen) -> Work:
    values = launch.values
    pack = values.get("PACK", 1)
    first = values.get("first_slot", 0)
    count = values.get("num_slots", seen.num_tokens)
    tiles = seen.row_tiles(first, count, values["BLOCK_Q"] // pack)
    whole, masked = tiles.span(values["BLOCK_K"])
    heads = launch.grid[0]  # fastest; the last rows first
    whole, masked = (np.repeat(each[:, ::-1].reshape(-1), heads) for each in (whole, masked))
    _check(launch, whole)
    cells = int((whole + masked).sum()) * values["BLOCK_Q"] * values["BLOCK_K"]
    none = np.zeros_like(whole)
    live = (whole + masked) > 0
    return Work(whole, masked, none, none, live, cells, tiles.visible() * values["H"])


def _map(launch: Launch, seen: Seen) -> Work:
    values = launch.values
    block_q, block_k, H = values["BLOCK_Q"], values["BLOCK_K"], values["H"]
    x, _, z = launch.grid
    tiles = seen.row_tiles(values["first_slot"], values["num_slots"], block_q)
    keys = np.arange(x * block_k).reshape(x, block_k)
    low, high = tiles.first.min(-1), tiles.last.max(-1)  # (B, y)
    blind = (low[:, :, None] > keys.max(-1)) | (high[:, :, None] < keys.min(-1))
    region = _pad(seen.region[:, : x * block_k], x * block_k).reshape(z, 1, x, block_k).any(-1)
    live = (~blind & region).reshape(-1)
    _check(launch, live)
    heads = np.where(live, H, 0)
    none = np.zeros_like(heads)
    kv = np.where(live, H // values["GROUP"], 0)
    before = np.pad(seen.region.cumsum(-1), ((0, 0), (1, 0)))
    visible = 0
    for b in range(z):
        rows = tiles.live[b] & (tiles.first[b] <= tiles.last[b])
        first, last = tiles.first[b][rows], tiles.last[b][rows]
        visible += int((before[b][last + 1] - before[b][first]).sum())
    return Work(heads, none, kv, none, live, int(live.sum()) * block_q * block_k * H, visible * H)


def _dk(launch: Launch, seen: Seen) -> Work:
    values = launch.values
    block_q, block_k, group = values["BLOCK_Q"], values["BLOCK_K"], values["GROUP"]
    begin, full_begin, full_end, end = _key_spans(values, seen)
    counts = np.repeat((end - begin) // block_q, values["H"] // group)  # of runs: tiles, key heads
    (programs, _, _) = launch.grid
    total = int(counts.sum())
    share = max(-(-total // programs), values["min_share"])
    whole, masked, outer = (np.zeros(programs, dtype=np.int64) for _ in range(3))
    passed = 0
    for run in np.flatnonzero(counts):
        count = counts[run]
        tile = run // (values["H"] // group)
        for program in range(passed // share, -(-(passed + count) // share)):
            low = begin[tile] + max(program * share - passed, 0) * block_q
            high = begin[tile] + min((program + 1) * share - passed, count) * block_q
            seen_whole = np.clip(full_end[tile], low, high) - np.clip(full_begin[tile], low, high)
            whole[program] += max(seen_whole, 0) // block_q
            masked[program] += (high - low - max(seen_whole, 0)) // block_q
            outer[program] += 1
        passed += count
    _check(launch, whole)
    cells = total * block_q * block_k * group
    tiles = seen.row_tiles(values["first_slot"], values["num_slots"], block_q)
    live = outer > 0
    return Work(
        whole * group,
        masked * group,
        whole,
        masked,
        live,
        cells,
        tiles.visible() * values["H"],
        runs=outer,
    )


def _key_spans(values: Mapping[str, Any], seen: Seen) -> tuple[Ints, Ints, Ints, Ints]:
    """Of each tile of keys of all samples: the chunk's row tiles that see it, and it whole."""
    block_q, block_k, N = values["BLOCK_Q"], values["BLOCK_K"], seen.num_tokens
    first_slot = values["first_slot"]
    x = -(-N // block_k)
    key = np.arange(x * block_k)
    inside = (key < N).reshape(1, x, block_k)
    at = np.minimum(key, N - 1)
    first = np.where(inside, seen.row_first[:, at].reshape(-1, x, block_k), N)
    last = np.where(inside, seen.row_last[:, at].reshape(-1, x, block_k), -1)
    low, high = first.min(-1), last.max(-1) + 1
    full_low = np.where(inside, first, 0).max(-1)
    full_high = np.where(inside, last, N - 1).min(-1) + 1
    if seen.slots is not None:
        low, high, full_low, full_high = (
            np.take_along_axis(seen.slots, np.clip(each, 0, N), axis=1)
            for each in (low, high, full_low, full_high)
        )
    stop = np.minimum(seen.num_rows, first_slot + values["num_slots"])[:, None]
    low = np.maximum(low - first_slot, 0)
    high = np.minimum(high, stop) - first_slot
    begin = low // block_q * block_q
    end = np.maximum(_up(high, block_q), begin)
    full_begin = np.clip(_up(np.maximum(full_low - first_slot, low), block_q), begin, end)
    full_end = np.minimum(full_high - first_slot, high) // block_q * block_q
    full_end = np.clip(full_end, full_begin, end)
    return begin.reshape(-1), full_begin.reshape(-1), full_end.reshape(-1), end.reshape(-1)


def _row_loss(launch: Launch, seen: Seen) -> Work:
    values = launch.values
    tiles = seen.row_tiles(values["first_slot"], values["num_slots"], values["BLOCK_Q"])
    block = values["BLOCK_K"]
    begin = tiles.first.min(-1) // block * block
    sweeps = np.maximum(-(-(tiles.last.max(-1) + 1 - begin) // block), 0).reshape(-1)
    _check(launch, sweeps)
    none = np.zeros_like(sweeps)
    cells = int(sweeps.sum()) * values["BLOCK_Q"] * block
    return Work(none, sweeps, none, none, sweeps > 0, cells, tiles.visible())


def _rectangle(launch: Launch, seen: Seen) -> Work:
    values = launch.values
    block_q, block_k = values["BLOCK_Q"], values["BLOCK_K"]
    x, y, z = launch.grid
    begins = values["first_slot"] + np.arange(y) * block_q
    stop = np.minimum(seen.num_rows, values["first_slot"] + values["num_slots"])
    region = _pad(seen.region, x * block_k).reshape(z, 1, x, block_k).any(-1)
    live = ((begins[None, :] < stop[:, None])[:, :, None] & region).reshape(-1)
    _check(launch, live)
    none = np.zeros(live.size, dtype=np.int64)
    rows = seen.row_tiles(values["first_slot"], values["num_slots"], block_q)
    cells = int(live.sum()) * block_q * block_k
    visible = int(rows.live.sum(axis=(1, 2)) @ seen.region.sum(-1))
    return Work(none, none, none, none, live, cells, visible)


def _largest(launch: Launch, seen: Seen) -> Work:
    values = launch.values
    tiles = seen.row_tiles(values["first_slot"], values["num_slots"], values["BLOCK_Q"])
    block = values["BLOCK_K"]
    begin = tiles.first.min(-1) // block * block
    filled = np.maximum(-(-(tiles.last.max(-1) + 1 - begin) // block), 0).reshape(-1)
    _check(launch, filled)
    none = np.zeros_like(filled)
    given = np.full_like(filled, -(-values["num_given"] // block))
    cells = int(filled.sum()) * values["BLOCK_Q"] * block
    return Work(given, filled, none, none, filled > 0, cells, tiles.visible())


def _check(launch: Launch, programs: Ints) -> None:
    x, y, z = launch.grid
    if programs.size != x * y * z:
        raise NotImplementedError(
            f"{launch.name}_kernel has a grid of {launch.grid}, which is not the one modelled here"
        )


def _up(value: Ints, block: int) -> Ints:
    return -(-value // block) * block


def _pad(region: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    return np.pad(region, ((0, 0), (0, width - region.shape[1])))


def _numpy(tensor) -> Ints:
    return tensor.numpy().astype(np.int64)
