"""Candidate tile sizes of one pass, compiled and ranked by predicted time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from drivekd_kernels.specialize import padded_dims
from drivekd_kernels.tuned import Tiles

from benchmarks.devices import DEVICES, Device
from benchmarks.offline import model
from benchmarks.offline.compiled import Compiled, compile_launch
from benchmarks.offline.geometry import Seen, work
from benchmarks.offline.record import record, tiles_replaced
from benchmarks.shapes import Pair

PASSES = ("lse", "map", "mse", "delta", "dq", "dk")
# A model's query heads and key heads by head dim: those of the named shapes, the larger group last.
HEADS = {32: (8, 2), 64: (14, 2), 80: (16, 4), 96: (16, 4), 128: (16, 2), 256: (8, 2)}
TEACHER_HEADS = {**HEADS, 128: (28, 4)}


@dataclass(frozen=True)
class Candidate:
    """One row of a sweep; `error` instead of the rest if it did not compile."""

    tiles: Tiles
    one_pass: bool | None
    compiled: Compiled | None = None
    ms: float = float("inf")
    floor_ms: float = float("nan")
    bound: str = ""
    l2_per_element: float = float("nan")
    error: str = ""


def parse_tiles(text: str) -> list[Tiles]:
    """Comma-separated entries in the notation of the table."""
    return [Tiles.parse(each) for each in text.split(",")]


def default_tiles(name: str, block_d: int, itemsize: int) -> list[Tiles]:
    """Tiles worth a try: 16 to 30."""
    if itemsize == 4:
        sizes = ((16, 32, 4), (32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8))
        return [Tiles(q, k, w, s) for q, k, w in sizes for s in (1, 2)]
    if name in ("lse", "map", "mse"):
        sizes = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))
        sizes += ((64, 256, 8),) if name == "map" or block_d <= 64 else ((64, 32, 4),)
        return [Tiles(q, k, w, s) for q, k, w in sizes for s in (2, 3)]
    sizes = ((64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 64, 8), (128, 64, 8), (128, 32, 4))
    sizes += ((32, 64, 4),) if name == "dk" else ()
    packs = (1, 2) if name != "dk" else (1,)
    return [Tiles(q, k, w, s, p) for q, k, w in sizes for s in (2, 3) for p in packs]


def sweep(
    name: str,
    head_dim: int,
    *,
    tiles: list[Tiles] | None = None,
    device: Device = DEVICES["H200"],
    num_tokens: int = 8192,
    num_vision: int = 0,
    loss: str = "mse",
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] | None = None,
) -> Iterator[Candidate]:
    """Candidates in the order in which they were compiled.

    Args:
        name: pass.
        head_dim: of the model whose pass it is.
        tiles: candidates; None: `default_tiles`.
        device: which GPU.
        num_tokens: of the (one) sample, causal.
        num_vision: of these, the keys of a text_to_vision region; 0: full.
        loss: "mse", "cosine" or "kl"; decides whether maps are logarithms.
        dtype: of q and k.
        heads: query and key heads; None: a named model's.
    """
    if name not in PASSES:
        raise ValueError(f"pass {name!r}: want one of {', '.join(PASSES)}")
    table = TEACHER_HEADS if name in ("lse", "map") else HEADS
    H, H_kv = heads or table.get(head_dim, (8, 2))
    pair = Pair(1, num_tokens, (H, H_kv, head_dim), (H, H_kv, head_dim), num_vision)
    block_d = padded_dims(head_dim)
    wanted = ("map", "mse") if name in ("map", "mse") else (name,)
    modes: tuple[bool | None, ...] = {"dq": (False, True), "delta": (False,)}.get(name, (None,))
    for one_pass in modes:
        for each in tiles or default_tiles(name, block_d, dtype.itemsize):

            def choose(kernel: str, width: int, each: Tiles = each) -> Tiles | None:
                return each if kernel in wanted and width == block_d else None

            with tiles_replaced(choose, one_pass=one_pass):
                call = record(pair, loss, dtype, arch=device.arch)
            launches = [launch for launch in call.launches if launch.name == name]
            if name == "lse":
                launches = launches[:1]
            try:
                yield _candidate(each, one_pass, launches, Seen(call.tokens), device)
            except (
                Exception
            ) as error:  # of any compiler stage: the candidate is out, the rest go on
                text = str(error).strip() or type(error).__name__
                yield Candidate(each, one_pass, error=text.splitlines()[0][:100])


def _candidate(tiles, one_pass, launches, seen, device) -> Candidate:
    ms = floor = l2 = cells = 0.0
    region = float(seen.region.mean())
    bounds: dict[str, float] = {}
    for launch in launches:
        compiled = compile_launch(launch, device.arch)
        # Rank by what the tiles decide: the chunk's maps are taken to stay in L2.
        predicted = model.predict(
            launch, compiled, work(launch, seen), device, workspace_in_l2=True, region=region
        )
        ms, floor = ms + predicted.ms, floor + predicted.floor_ms
        l2, cells = l2 + predicted.l2_bytes, cells + predicted.cells
        bounds[predicted.bound] = bounds.get(predicted.bound, 0.0) + predicted.ms
    bound = max(bounds, key=lambda each: bounds[each])
    return Candidate(tiles, one_pass, compiled, ms, floor, bound, l2 / max(cells, 1))


def sweep_header() -> str:
    return (
        f"{'tiles':>16} {'regs':>4} {'spill':>5} {'shared':>7} {'CTA/SM':>6} {'instr/el':>8} "
        f"{'masked':>6} {'EX2/el':>6} "
        f"{'MMA':>4} {'L2 B/el':>7} {'ms':>8} {'floor':>7} {'x':>5}  bound"
    )


def sweep_row(each: Candidate) -> str:
    name = str(each.tiles) + {True: "/1pass", False: "/2pass", None: ""}[each.one_pass]
    if each.compiled is None:
        return f"{name:>16} {each.error}"
    one = each.compiled
    return (
        f"{name:>16} {one.registers:>4} {one.stack:>5} {one.shared:>7} {one.resident:>6} "
        f"{one.per_element('total'):>8.2f} {one.per_element('total', one.masked):>6.2f} "
        f"{one.per_element('EX2'):>6.2f} {one.main.mix.matrix:>4} "
        f"{each.l2_per_element:>7.2f} {each.ms:>8.4f} {each.floor_ms:>7.4f} "
        f"{each.ms / each.floor_ms:>5.2f}  {each.bound}"
    )
