"""Tile sizes: data only, one table by pass, width of the operands and padded head dim.

`q` rows and `k` keys of a tile, `warps` of a program, `stages` of its pipelined loop, `pack` query
heads that a tile of rows holds. How the entries were chosen: README.md.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel."""

    q: int
    k: int
    warps: int
    stages: int
    pack: int = 1


ROW_TILES = Tiles(8, 256, 4, 1)

# (pass, bytes of an element) -> padded head dim -> tiles; a head dim takes the next larger entry.
TILES: dict[tuple[str, int], dict[int, Tiles]] = {
    ("lse", 2): {64: Tiles(128, 128, 8, 2), 128: Tiles(128, 64, 4, 3), 256: Tiles(64, 64, 4, 2)},
    ("map", 2): {64: Tiles(64, 128, 4, 2), 128: Tiles(64, 128, 4, 2), 256: Tiles(64, 32, 4, 2)},
    ("mse", 2): {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
    ("delta", 2): {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
    ("dq", 2): {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(128, 32, 8, 2)},
    ("dk", 2): {64: Tiles(16, 64, 4, 2), 128: Tiles(32, 64, 4, 2), 256: Tiles(16, 64, 4, 2)},
    ("lse", 4): {64: Tiles(16, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 32, 4, 1)},
    ("map", 4): {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(16, 32, 4, 1)},
    ("mse", 4): {64: Tiles(16, 32, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(16, 32, 4, 1)},
    ("delta", 4): {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 32, 4, 1), 256: Tiles(16, 32, 4, 1)},
    ("dq", 4): {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 32, 4, 1)},
    ("dk", 4): {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(32, 16, 4, 1)},
}


def tiles(kernel: str, itemsize: int, block_d: int) -> Tiles:
    """Tile sizes of a pass for operands of `itemsize` bytes and a padded head dim."""
    table = TILES[kernel, itemsize]
    return table[min(width for width in table if width >= block_d)]


def one_pass(itemsize: int, block_d: int) -> bool:
    """Whether dq makes delta on the way: where exp2, not the products, bounds the pass."""
    return itemsize == 2 and block_d <= 64
