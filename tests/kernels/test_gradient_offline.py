"""The gradient kernels compile well for GPUs that are not here: no spills, 16-byte loads."""

import functools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: runs without TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton's compiler; it has no package here")

from benchmarks.devices import DEVICES
from benchmarks.offline.compiled import compile_launch
from benchmarks.offline.gradients import binary, hot_loop, predict, record

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
OF_ARCH = {80: DEVICES["A100"], 90: DEVICES["H200"], 100: DEVICES["B200"]}
QUICK = [(arch, dtype, 4) for arch in (80, 90, 100) for dtype in ("fp32", "bf16")]
SLOW = [
    *((90, dtype, K) for dtype in ("fp32", "bf16") for K in range(1, 9)),
    *((90, dtype, K) for dtype in ("fp64", "fp16") for K in (1, 4, 8)),
    *((arch, dtype, 8) for arch in (80, 100) for dtype in DTYPES),
]
CASES = [pytest.param(*case, id="-".join(map(str, case))) for case in QUICK]
CASES += [
    pytest.param(*case, id="-".join(map(str, case)), marks=pytest.mark.slow)
    for case in SLOW
    if case not in QUICK
]
everywhere = pytest.mark.parametrize(("arch", "dtype", "num_tasks"), CASES)


@functools.cache
def launches(dtype, num_tasks, accumulate=False, offset=0):
    return record([100_003, 70_000], num_tasks, DTYPES[dtype], accumulate=accumulate, offset=offset)


def distinct(dtype, num_tasks):
    """Gram, fold, combination; the combination that adds."""
    adding = [x for x in launches(dtype, num_tasks, accumulate=True) if x.name == "combine"]
    return [*launches(dtype, num_tasks), *adding]


@everywhere
def test_no_register_spills(arch, dtype, num_tasks):
    for launch in distinct(dtype, num_tasks):
        one = compile_launch(launch, arch)
        assert one.stack == 0, f"{launch.name}: {one.stack} bytes of stack"
        assert one.resident >= 2, f"{launch.name}: {one.registers} registers"


@everywhere
def test_every_access_of_the_hot_loop_has_16_bytes(arch, dtype, num_tasks):
    for launch in distinct(dtype, num_tasks):
        if launch.name == "fold":
            continue
        mix = hot_loop(compile_launch(launch, arch)).mix
        accesses = mix.counts["LOAD"] + mix.counts["STORE"]
        assert mix.lsu == 4 * accesses, f"{launch.name}: {mix.counts}"
        # As many elements as a step has, each read once.
        values = launch.values
        lists = num_tasks + bool(values.get("ACCUMULATE"))
        assert mix.counts["LOAD"] % (values["UNROLL"] * lists) == 0, f"{launch.name}: {mix.counts}"


@everywhere
def test_memory_bounds_both_kernels(arch, dtype, num_tasks):
    """By instruction counts. The exception is 12 % over: 36 float64 products of 16-byte loads."""
    for launch in launches(dtype, num_tasks):
        if launch.name != "fold" and (arch, dtype, launch.name) != (100, "fp16", "gram"):
            pipes = predict(binary(launch, arch), OF_ARCH[arch], 494_000_000).pipes
            assert max(pipes, key=pipes.get) == "HBM", pipes


def test_unaligned_tensors_are_a_kind_of_their_own():
    names = [each.name for each in launches("bf16", 2, offset=1)]
    assert names == ["gram", "fold", "combine"]
    for launch in launches("bf16", 2, offset=1):
        assert compile_launch(launch, 90).stack == 0
        assert launch.values.get("ALIGNED") in (None, False)


def test_one_launch_a_kind_and_nothing_new_to_compile_for_other_sizes():
    few = record([5, 1, 4096, 70_000], 3, torch.bfloat16)
    many = record([17, *range(1, 290), 2**31 + 5], 3, torch.bfloat16)
    assert (
        [each.name for each in few] == [each.name for each in many] == ["gram", "fold", "combine"]
    )
    assert [each.key for each in few] == [each.key for each in many]
    assert many[0].grid[0] == 289 + 1 + (2**31 + 5 + 2**15 - 1) // 2**15
