"""The kernels that measure ceilings do what is counted; on a GPU, else in the interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="its kernels need triton")

from benchmarks.ceilings import kernels
from benchmarks.ceilings.measure import start_clocks

# The interpreter of triton 3.6 does what newer versions of numpy warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no clocks")


@pytest.mark.parametrize(("num_tiles", "trips"), [(8, 5), (5, 3)])
def test_programs_go_round_all_tiles(num_tiles, trips):
    programs, block = 5, 1024
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(-(2**31), 2**31, (num_tiles, block), generator=generator)
    out = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
    kernels.read_kernel[(programs,)](
        tiles.to(torch.int32).to(DEVICE), out, num_tiles, trips, BLOCK=block
    )
    for program in range(programs):
        wanted = 0
        for trip in range(trips):
            for value in tiles[(program + trip * programs) % num_tiles].tolist():
                wanted ^= value & 0xFFFFFFFF
        assert int(out[program]) & 0xFFFFFFFF == wanted


def test_chains_of_exp2_are_as_long_as_is_counted():
    out = torch.zeros(2, 64, device=DEVICE)
    kernels.exp2_kernel[(2,)](out, 3, BLOCK=64, STEPS=2)
    wanted = torch.arange(64, dtype=torch.float64) / 64
    for _ in range(6):
        wanted = torch.exp2(-wanted)
    for row in out.cpu().double():
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=0)


@on_gpu
def test_the_clock_is_one_of_a_gpu():
    from benchmarks.ceilings.clocks import Clock

    clock = Clock(torch.cuda.get_device_properties(0).multi_processor_count)
    clock.begin()
    torch.cuda._sleep(20_000_000)
    clock.end()
    assert 200 < clock.mhz() < 3000


@on_gpu
def test_programs_of_start_note_what_comes_after_what():
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    zeros = torch.zeros(65 * kernels.START_ITEMS, dtype=torch.int32, device="cuda")
    out = torch.full((64 * sms, 4), -1, dtype=torch.int64, device="cuda")
    kernels.start_kernel[(64 * sms,)](
        zeros, out, 20_000, ITEMS=kernels.START_ITEMS, num_warps=kernels.START_WARPS
    )
    sm, begin, loaded, end = out.cpu().unbind(1)
    assert int(sm.min()) >= 0 and sm.unique().numel() > sms // 2
    assert bool((begin < loaded).all()) and bool((end - begin >= 20_000).all())
    gap, load = start_clocks(out.cpu())
    assert 0 < gap < 20_000 and 100 < load < 20_000
