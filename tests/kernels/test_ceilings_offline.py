"""The kernels that measure ceilings are bound by what they measure, as compiled for sm_90."""

import functools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: runs without TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton's compiler; it has no package here")

from benchmarks.ceilings import kernels
from benchmarks.ceilings.clocks import CLOCK_WARPS
from benchmarks.offline.compiled import LIMITS, Compiled, _cuobjdump, compile_launch
from benchmarks.offline.record import recorded


@functools.cache
def compiled() -> dict[str, Compiled]:
    def data(dtype=torch.int32):
        return torch.empty(1 << 20, dtype=dtype, device="meta")

    with recorded() as launches:
        kernels.clock_kernel[(132,)](data(torch.int64), num_warps=CLOCK_WARPS)
        kernels.read_kernel[(396,)](
            data(), data(), 512, 100, BLOCK=kernels.READ_BLOCK, num_warps=kernels.READ_WARPS
        )
        kernels.exp2_kernel[(132,)](
            data(torch.float32), 4096, BLOCK=kernels.EXP2_BLOCK, STEPS=kernels.EXP2_STEPS,
            num_warps=kernels.EXP2_WARPS,
        )  # fmt: skip
        kernels.empty_kernel[(1,)](data(), num_warps=4)
        kernels.many_arguments_kernel[(1,)](
            *[data()] * 10, *range(10), BLOCK=64, STAGES=2, num_warps=4
        )
        kernels.start_kernel[(8448,)](
            data(), data(torch.int64), 20_000, ITEMS=kernels.START_ITEMS,
            num_warps=kernels.START_WARPS,
        )  # fmt: skip
    return {launch.name: compile_launch(launch, 90) for launch in launches}


def code(name: str) -> list[str]:
    lines = _cuobjdump("--dump-sass", compiled()[name].cubin).splitlines()
    return [line.split("*/", 1)[1].strip() for line in lines if line.strip().startswith("/*0")]


def inner(name: str):
    (loop,) = (each for each in compiled()[name].code.loops if each.innermost)
    return loop.mix


def test_nothing_is_kept_in_local_memory():
    assert {name: one.stack for name, one in compiled().items() if one.stack} == {}


def test_exp2_bounds_its_loop():
    """A MUFU.EX2 takes a quarter of a multiprocessor 8 clocks, whatever else is issued one."""
    mix = inner("exp2")
    wanted = kernels.EXP2_STEPS * kernels.EXP2_BLOCK // (32 * kernels.EXP2_WARPS)
    assert mix.counts["EX2"] == wanted
    assert mix.total <= 8 * mix.counts["EX2"] / 3
    assert mix.counts["LOAD"] == mix.counts["STORE"] == mix.counts["LOCAL"] == 0


def test_reads_are_16_bytes_wide_and_pass_l1_by():
    mix = inner("read")
    loads = [line for line in code("read") if "LDG" in line]
    assert len(loads) == mix.counts["LOAD"] == 8
    assert all("LDG.E.128.STRONG.GPU" in line for line in loads), loads
    assert mix.lsu == 4 * mix.counts["LOAD"]
    # Four issue slots a clock: even at 128 bytes a clock of the cache (64 are known) all fits in.
    clocks = mix.counts["LOAD"] * 512 / 128
    assert mix.total / 4 < clocks / 1.5
    assert compiled()["read"].resident >= kernels.READ_PROGRAMS


def test_many_programs_of_start_are_resident_and_read_the_clock_after_their_loads():
    one = compiled()["start"]
    assert one.resident == 16
    lines = code("start")
    clocks = [i for i, line in enumerate(lines) if "SR_CLOCKLO" in line]
    loads = [i for i, line in enumerate(lines) if "LDG" in line]
    assert clocks[0] < loads[0] and loads[-1] < clocks[1]
    # Not before what is loaded is known: the second reading hangs on a comparison.
    assert lines[clocks[1]].startswith("@") or any(
        "BRA" in line for line in lines[loads[-1] : clocks[1]]
    )


def test_the_clock_is_read_beside_the_time():
    lines = code("clock")
    (clock,) = (i for i, line in enumerate(lines) if "SR_CLOCKLO" in line)
    (timer,) = (i for i, line in enumerate(lines) if "SR_GLOBALTIMERLO" in line)
    assert abs(clock - timer) < 12
    assert LIMITS[90].warps == 2 * CLOCK_WARPS


def test_empty_kernels_are_empty():
    for name in ("empty", "many_arguments"):
        assert compiled()[name].code.mix.counts["STORE"] == 0
        assert compiled()[name].code.mix.counts["LOAD"] == 0
        assert not compiled()[name].code.loops
