"""Every tile size that ships compiles well for GPUs that are not here (benchmarks/offline).

Nothing runs: kernels are recorded on meta tensors, compiled for an architecture, disassembled.
Each distinct kernel is compiled once an architecture. A failure names kernel, tile and amount.
"""

import functools
import json
import os
import re

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: runs without TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton's compiler; it has no package here")

from drivekd_kernels.operands import MAP_KEYS, MAP_ROWS
from drivekd_kernels.tuned import DIMS, LARGEST_TILES, ROW_TILES, TILES, tiles
from triton.runtime.jit import JITFunction

from benchmarks.offline import sass
from benchmarks.offline.compiled import LIMITS, Compiled, compile_launch, exp2_needed
from benchmarks.offline.geometry import Seen, work
from benchmarks.offline.record import Launch, record, recorded
from benchmarks.offline.report import Pass
from benchmarks.shapes import GPU_PAIRS, Pair

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = {64: (14, 2), 80: (16, 4), 96: (16, 4), 128: (16, 2), 256: (8, 2)}
COMMON = (64, 128, 256)

# (architecture, dtype, head dim, loss, region): every entry for full maps and mse; the region's
# and the logarithms' variants of the kernels where most models are.
CASES = [
    *((90, dtype, D, "mse", "full") for dtype in DTYPES for D in COMMON),
    *((80, "bf16", D, "mse", "full") for D in COMMON),
    (90, "bf16", 80, "mse", "full"),
    (90, "bf16", 64, "mse", "text_to_vision"),
    (100, "bf16", 64, "mse", "full"),
]
SLOW = [
    *((100, dtype, 64, "mse", "full") for dtype in ("fp16", "fp32")),
    *((80, dtype, D, "mse", "full") for dtype in ("fp16", "fp32") for D in COMMON),
    (90, "bf16", 128, "mse", "text_to_vision"),
    *((90, dtype, 96, "mse", "full") for dtype in DTYPES),
    *((arch, "bf16", 80, "mse", "full") for arch in (80, 100)),
    *((90, "bf16", D, "kl", "full") for D in (64, 128)),
]
# Kernels whose code hardly depends on which 16-bit type it is, and the map that mse makes as well.
SKIPPED = {"fp16": ("lse", "map", "delta"), "fp32": ("map",)}


def parametrize(chosen=lambda case: True):
    marked = [pytest.param(case, id=show(case)) for case in CASES if chosen(case)]
    marked += [
        pytest.param(case, id=show(case), marks=pytest.mark.slow) for case in SLOW if chosen(case)
    ]
    return pytest.mark.parametrize("case", marked)


def show(case) -> str:
    return "-".join(map(str, case))


def disassembled(case) -> bool:
    """Where the mix of instructions is looked at: disassembly takes half a second a kernel."""
    arch, dtype, *_ = case
    return (dtype == "bf16" and arch != 80) or (arch, dtype) == (90, "fp16")


@functools.cache
def binaries(case) -> list[tuple[Launch, Compiled]]:
    arch, dtype, D, loss, region = case
    heads = (*HEADS[D], D)
    pair = Pair(1, 512, heads, heads, num_vision=256 if region == "text_to_vision" else 0)
    launches = record(pair, loss, DTYPES[dtype], arch=arch).launches
    skipped = SKIPPED.get(dtype, ())
    distinct = {launch.key: launch for launch in launches if launch.name not in skipped}
    return [(launch, compile_launch(launch, arch)) for launch in distinct.values()]


def named(launch: Launch, compiled: Compiled) -> str:
    tile = f"{compiled.block_q}x{compiled.block_k}, {compiled.warps} warps"
    return f"{launch.name}_kernel sm_{compiled.arch} D={launch.values.get('D')} tile {tile}"


def test_every_shipped_table_entry_has_a_case():
    """A dtype or an architecture that is added to the table must be added here."""
    covered = {
        (arch, str(DTYPES[dtype]).removeprefix("torch.")) for arch, dtype, *_ in CASES + SLOW
    }
    assert set(TILES) <= covered


@pytest.mark.parametrize("key", TILES, ids=str)
@pytest.mark.parametrize("column", range(len(DIMS)))
def test_tiles_of_gradients_lie_within_tiles_of_maps(key, column):
    """Where a region is, a tile of a map without a key of it is not written, and must not be read.

    Workspaces hold whole tiles of rows and of parts of keys.
    """
    for log in (False, True):
        sizes = {
            name: tiles(name, *key, DIMS[column], log=log, region=True)
            for name in ("map", "mse", "delta", "dq", "dk")
        }
        for name in ("delta", "dq", "dk"):
            part = sizes[name].k // sizes[name].parts
            for written in ("map",) if log else ("mse",):
                assert sizes[written].k % part == 0, (name, written)
        for name in ("map", "mse", "dk"):
            assert MAP_ROWS % sizes[name].q == 0, name
        for each in sizes.values():
            assert MAP_KEYS % (each.k // each.parts) == 0
    for each in (ROW_TILES, LARGEST_TILES):  # written without masks, too
        assert MAP_ROWS % each.q == 0 and MAP_KEYS % each.k == 0


# Of the instructions around the loops over tiles so many may park a value or fetch it: dk's loop
# over key tiles holds much that inner loops have no registers for (0.062 at D = 96, the largest).
PARKED = 0.07
# What is not good yet: accesses of local memory in the loops over tiles, by case and pass.
KNOWN_SPILLS = {
    "90-bf16-128-mse-full": {
        "map": 2,  # one reload a head, of these head counts only
        "dk": 30,  # half of W is read again for each head: less than q for half as many keys
    },
    "90-bf16-256-mse-full": {"dk": 25},  # 64 rows with 8 warps spill nothing, and do all twice
    "90-fp16-256-mse-full": {"dk": 100},
    "80-bf16-80-mse-full": {"map": 15, "mse": 13},  # tiles without take 1.3x as long
    "90-bf16-128-kl-full": {"dk": 55},  # W, log P and P in registers; 32 rows take 1.2x as long
    "100-fp32-64-mse-full": {"dq": 4},
}
# Eight warps on 64 rows: two make the same scores. Of dk, masks of logarithms.
KNOWN_EXP2 = {
    "90-bf16-64-kl-full": {"dk": 1.34},
    "90-bf16-256-mse-full": {"dq": 2.0},
    "90-fp16-256-mse-full": {"dq": 2.0},
}


@parametrize()
def test_no_register_spills_in_loops_over_tiles(case):
    known = KNOWN_SPILLS.get(show(case), {})
    spills = [
        f"{named(launch, one)}: {one.spills} accesses"
        for launch, one in binaries(case)
        if one.stack and one.spills > known.get(launch.name, 0)
    ]
    assert not spills, "\n" + "\n".join(spills)


@parametrize()
def test_few_registers_are_parked_around_the_loops_over_tiles(case):
    parked = [
        f"{named(launch, one)}: {one.parked(launch.values['GROUP']):.3f} of instructions"
        for launch, one in binaries(case)
        if one.stack and one.main and one.parked(launch.values["GROUP"]) > PARKED
    ]
    assert not parked, "\n" + "\n".join(parked)


@parametrize()
def test_a_program_fits_on_a_multiprocessor(case):
    for launch, one in binaries(case):
        limit = LIMITS[one.arch].shared_per_program
        assert one.shared <= limit, f"{named(launch, one)}: {one.shared} of {limit} bytes shared"
        assert one.resident >= 1, f"{named(launch, one)}: not one program is resident"


@parametrize(lambda case: case[0] == 90 and case[1] != "fp32")
def test_products_of_16_bit_inputs_use_warpgroup_instructions(case):
    for launch, one in binaries(case):
        if one.main is not None:
            counts = one.main.mix.counts
            assert counts["HGMMA"] > 0, f"{named(launch, one)}: no HGMMA in the main loop"
            assert counts["HMMA"] == 0, f"{named(launch, one)}: {counts['HMMA']} HMMA"


@parametrize(disassembled)
def test_exp2_is_not_evaluated_more_often_than_the_source_asks(case):
    """Of 16-bit inputs: fp32 is bound by its products, 2 D instructions an element.

    More than in the source means that a tile is too small for its warps: each does it all.
    """
    excess = []
    for launch, one in binaries(case):
        most, found = exp2_needed(launch)[1], one.per_element("EX2")
        most = max(most, KNOWN_EXP2.get(show(case), {}).get(launch.name, 0))
        if one.main is not None and not 0 < found <= most:
            excess.append(f"{named(launch, one)}: {found:.2f} EX2 an element, not {most}")
    assert not excess, "\n" + "\n".join(excess)


@pytest.mark.parametrize("num_vision", [0, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_padding_leaves_two_programs_on_a_multiprocessor(head_dim, num_vision):
    """What tokens see takes registers: with the tiles of whole rows only one lse program fitted."""
    heads = (*HEADS[head_dim], head_dim)
    call = record(Pair(2, 512, heads, heads, num_vision), padded=True)
    alone = {
        f"{launch.name}: {one.registers} registers"
        for launch in call.launches
        if (one := compile_launch(launch, 90)).resident < 2
    }
    assert not alone


def test_a_pass_can_be_written_as_json():
    launch, one = binaries(CASES[0])[0]
    row = json.loads(json.dumps(Pass(launch.name, "tile", one, [launch.grid]).to_json()))
    assert row["loops"]["main"]["counts"]["EX2"] == one.main.mix.counts["EX2"]
    assert row["registers"] == one.registers


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_kernels_about_tokens_compile_without_spills(arch):
    launches = record(GPU_PAIRS["internvl3-1b-from-8b/t2v-1"]).about_tokens
    assert [launch.name for launch in launches] == ["tokens", "spans"]
    assert all(compile_launch(launch, arch).stack == 0 for launch in launches)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("num_vision", [0, 256])
def test_given_targets_are_laid_out_without_spills_by_many_programs(arch, loss, num_vision):
    """Bound by memory: half of a multiprocessor's threads are there, and stores are 16 bytes wide.

    The barrier lies between the stores of all cells and those of the largest ones.
    """
    pair = Pair(1, 512, (14, 2, 64), (28, 4, 128), num_vision)
    for padded in (False, True):
        launches = record(pair, loss, arch=arch, given=True, padded=padded).launches
        (launch,) = (each for each in launches if each.name in ("largest", "rectangle"))
        assert "map" not in {each.name for each in launches} or loss == "kl"
        one = compile_launch(launch, arch)
        assert one.stack == 0
        assert one.resident * one.warps >= LIMITS[arch].warps // 2
        if launch.name == "largest" and not padded:
            wide, barriers, narrow = (
                [found.start() for found in re.finditer(name, one.listing)]
                for name in (r"STG\.E\.128", r"BAR\.SYNC", r"STG\.E ")
            )
            assert wide and narrow
            assert any(max(wide) < barrier < min(narrow) for barrier in barriers)


def test_recording_restores_the_launcher():
    original = JITFunction.run
    with pytest.raises(RuntimeError), recorded():
        assert JITFunction.run is not original
        raise RuntimeError
    assert JITFunction.run is original


def test_loops_are_told_from_jumps_out_of_line():
    """Two nested loops, the inner one with a block that the assembler moved behind EXIT."""
    listing = """
        /*0000*/                   MOV R0, R1 ;
        /*0010*/                   FADD R0, R0, R1 ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/               @P1 BRA 0x0080 ;
        /*0040*/               @P0 BRA 0x0020 ;
        /*0050*/               @P2 BRA 0x0010 ;
        /*0060*/                   STG.E [R2], R0 ;
        /*0070*/                   EXIT ;
        /*0080*/                   FMUL R2, R2, R2 ;
        /*0090*/                   BRA 0x0040 ;
        /*00a0*/                   BRA 0xa0;
    """
    code = sass.read(listing)
    inner, outer = sorted(code.loops, key=lambda loop: len(loop.blocks))
    assert inner.header == 0x20
    assert outer.header == 0x10
    assert inner.parent == outer.header
    assert inner.mix.counts == {"EX2": 1, "FMUL": 1, "other": 3}
    assert outer.own.counts == {"FADD": 1, "other": 1}
    assert code.straight.counts["STORE"] == 1


@pytest.mark.parametrize("num_vision", [0, 150])
@pytest.mark.parametrize("num_tokens", [63, 300, 511])
def test_geometry_counts_what_a_brute_force_over_cells_counts(num_tokens, num_vision):
    if num_vision >= num_tokens:
        num_vision = num_tokens // 2
    call = record(Pair(1, num_tokens, (6, 2, 64), (4, 2, 128), num_vision))
    sees = np.tril(np.ones((num_tokens, num_tokens), dtype=bool))
    sees = sees[num_vision:]  # the rows; vision tokens come first
    seen = Seen(call.tokens)
    for launch in call.launches:
        values, done = launch.values, work(launch, seen)
        q, k = values["BLOCK_Q"] // values.get("PACK", 1), values["BLOCK_K"]
        first, count = values.get("first_slot", 0), values.get("num_slots", num_tokens)
        cells = sees[first : first + count].copy()
        if num_vision and launch.name in ("map", "mse"):
            cells[:, num_vision:] = False
        assert done.visible == cells.sum() * values["H"], launch.name
        tiles = tiles_of(cells, q, k)
        any_seen = sum(bool(tile.any()) for tile in tiles)
        heads = values["H"] / values.get("PACK", 1)
        assert (done.whole + done.masked).sum() == pytest.approx(any_seen * heads), launch.name
        if launch.name not in ("map", "mse"):
            # Rows and keys that do not exist restrict nothing along the side that is held.
            full = [
                tile.shape[0] == q if launch.name == "dk" else tile.shape[1] == k for tile in tiles
            ]
            whole = sum(bool(tile.all()) and fits for tile, fits in zip(tiles, full, strict=True))
            assert done.whole.sum() <= whole * heads, launch.name


def tiles_of(cells, q, k):
    """Tiles of a chunk; those at the edge are smaller."""
    rows, keys = cells.shape
    return [cells[i : i + q, j : j + k] for i in range(0, rows, q) for j in range(0, keys, k)]


def test_named_shapes_launch_the_documented_passes():
    call = record(GPU_PAIRS["internvl3-1b-from-8b/t2v-1"])
    assert [each.name for each in call.launches[:2]] == ["lse", "lse"]
    assert {each.name for each in call.launches} >= {"lse", "map", "mse", "dq", "dk"}
    known = record(GPU_PAIRS["internvl3-1b-from-8b/t2v-1"], lse=True)
    assert "lse" not in {each.name for each in known.launches}
