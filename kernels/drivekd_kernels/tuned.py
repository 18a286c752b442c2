"""Tile sizes: data only. How the entries were chosen: README.md, `python -m benchmarks.offline`.

An entry reads `64x256w4s2p1x4`: rows x keys of a tile, warps of a program, stages of its pipelined
loop, query heads that a tile of rows holds at most (p, default 1), and parts of the keys that are
multiplied one after the other (x, default 1).
"""

import functools
import re
from dataclasses import dataclass

_ENTRY = re.compile(r"(\d+)x(\d+)w(\d+)s(\d+)(?:p(\d+))?(?:x(\d+))?")


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel."""

    q: int
    k: int
    warps: int
    stages: int
    pack: int = 1
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> "Tiles":
        """Tiles from the notation of the table.

        Raises:
            ValueError: The text is none.
        """
        found = _ENTRY.fullmatch(text.strip())
        if not found:
            raise ValueError(f"tiles {text!r}: want e.g. 64x128w4s3, 64x64w4s2p2 or 64x256w4s2p1x4")
        q, k, warps, stages, pack, parts = (int(each or 1) for each in found.groups())
        return cls(q, k, warps, stages, pack, parts)

    def __str__(self) -> str:
        return f"{self.q}x{self.k}w{self.warps}s{self.stages}p{self.pack}x{self.parts}"


ROW_TILES = Tiles(16, 128, 4, 1)
LARGEST_TILES = Tiles(4, 128, 4, 1)  # a store of four cells for each thread

# (architecture, dtype) -> pass -> entries for padded head dims of up to 64, 96, 128 and 256. A pass
# may have entries of its own where there is padding (`_tags`), where maps are logarithms (`_log`),
# and where the region is text rows x vision keys (`_region`), which leaves fewer programs.
DIMS = (64, 96, 128, 256)
_Table = dict[str, tuple[str, str, str, str]]
_BF16_90: _Table = {
    "lse": ("128x128w8s2", "128x64w4s2", "128x128w8s2", "128x64w4s2"),
    "lse_region": ("64x128w4s2", "128x64w4s2", "128x128w8s2", "128x64w4s2"),
    "lse_tags": ("128x64w4s2", "128x64w4s2", "128x64w4s2", "128x64w4s2"),
    "map": ("64x256w4s2p1x2", "64x256w4s2p1x2", "64x256w4s2p1x2", "64x64w4s2"),
    "map_log": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "64x64w4s2"),
    "map_region": ("64x128w4s2p1x2", "64x128w4s2p1x2", "64x128w4s2p1x2", "64x64w4s2"),
    "mse": ("64x192w4s2p1x3", "64x256w4s2p1x2", "64x256w4s2p1x2", "64x64w4s2"),
    "mse_region": ("64x128w4s2p1x2", "64x128w4s2p1x2", "64x128w4s2p1x2", "64x64w4s2"),
    "delta": ("64x64w4s3p16", "128x64w4s2p16", "128x64w4s2p16", "64x64w4s3p16"),
    "dq": ("64x64w4s2p16", "64x64w4s2p16", "64x64w4s2p16", "64x64w8s2p16"),
    "dk": ("64x128w4s2p1x2", "64x128w4s2p1x2", "64x128w4s2p1x2", "64x64w4s2"),
    "dk_log": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "64x64w8s2"),
    "dk_region": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "64x64w4s2"),
}
_BF16_80: _Table = {
    "lse": ("64x128w4s2", "64x64w4s2", "64x64w4s2", "64x64w4s2"),
    "map": ("64x128w4s2p1x2", "64x128w4s2p1x2", "64x128w4s2p1x2", "64x64w4s2p1x2"),
    "map_log": ("64x64w4s2p1x2", "64x64w4s2p1x2", "64x64w4s2p1x2", "64x64w4s2p1x2"),
    "mse": ("64x128w4s2p1x2", "64x128w4s2p1x2", "64x128w4s2p1x2", "64x64w4s2"),
    "delta": ("64x64w4s2p16", "64x64w4s2p16", "64x64w4s2p16", "64x64w4s2p16"),
    "dq": ("64x32w4s2p16", "64x32w4s2p16", "32x64w4s2p16", "32x64w4s2p16"),
    "dk": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "64x32w4s2"),
    "dk_log": ("64x32w4s2", "32x64w4s2", "32x64w4s2", "32x32w4s2"),
}
_FP16_80: _Table = {
    **_BF16_80,
    "dq": ("64x32w4s2p16", "32x32w4s2p16", "32x32w4s2p16", "32x32w4s2p16"),
    "dk": ("32x64w4s2", "64x32w4s2", "64x32w4s2", "32x32w4s2"),
}
_FP16_90: _Table = {
    **_BF16_90,
    "dq": ("64x64w4s2p16", "64x32w4s2p16", "64x32w4s2p16", "64x32w8s2p16"),
    "dk": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "32x64w4s2"),
    "dk_log": ("64x64w4s2", "32x64w4s2", "32x64w4s2", "32x32w4s2"),
    "dk_region": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "32x64w4s2"),
}
_FP32: _Table = {
    "lse": ("16x32w4s2", "16x16w4s1", "16x16w4s1", "16x32w4s1"),
    "map": ("32x64w4s2", "32x32w4s2", "32x32w4s2", "16x32w4s1"),
    "mse": ("16x32w4s2", "32x32w4s2", "32x32w4s2", "16x32w4s1"),
    "delta": ("32x32w4s2", "16x32w4s1", "16x32w4s1", "16x32w4s1"),
    "dq": ("32x32w4s2", "16x16w4s1", "16x16w4s1", "16x32w4s1"),
    "dk": ("32x32w4s2", "16x32w4s1", "16x32w4s1", "16x32w4s1"),
}
_BF16_100: _Table = {
    **_BF16_90,
    "map": ("64x128w4s2", "64x128w4s2", "64x128w4s2", "64x64w4s2"),
    "mse": ("64x128w4s2", "64x128w4s2", "64x128w4s2", "64x64w4s2"),
    "dk": ("64x64w4s2", "64x64w4s2", "64x64w4s2", "64x64w4s2"),
}
TILES: dict[tuple[int, str], _Table] = {
    (80, "bfloat16"): _BF16_80,
    (80, "float16"): _FP16_80,
    (80, "float32"): _FP32,
    (90, "bfloat16"): _BF16_90,
    (90, "float16"): _FP16_90,
    (90, "float32"): _FP32,
    (100, "bfloat16"): _BF16_100,
    (100, "float16"): {**_FP16_90, "map": _BF16_100["map"], "mse": _BF16_100["mse"]},
    (100, "float32"): _FP32,
}
ONE_PASS_DIM = 128  # of dq: wider heads leave no registers for its second sum


@functools.cache
def tiles(
    kernel: str,
    arch: int,
    dtype: str,
    block_d: int,
    *,
    log: bool = False,
    region: bool = False,
    tags: bool = False,
) -> Tiles:
    """Tile sizes of a pass.

    Args:
        kernel: "lse", "map", "mse", "delta", "dq" or "dk".
        arch: compute capability, 90 for 9.0; the next lower one that the table has.
        dtype: of q and k, as torch names it.
        block_d: padded head dim; the next larger one that the table has.
        log: whether maps are logarithms.
        region: whether the region is text rows x vision keys.
        tags: whether there is padding or segments, which takes registers.
    """
    known = max((each for each, _ in TILES if each <= arch), default=min(TILES)[0])
    table = TILES[known, dtype]
    column = next(i for i, width in enumerate(DIMS) if width >= block_d)
    variants = {"tags": tags, "log": log, "region": region}
    names = [f"{kernel}_{name}" for name, holds in variants.items() if holds] + [kernel]
    return Tiles.parse(next(table[name] for name in names if name in table)[column])
