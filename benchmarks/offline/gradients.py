"""Gram and combination: their launches on tensors without data, and how long they would take.

A launch's time is the largest of what its pipes need, all programs together: bytes of gradients and
outputs at the bandwidth of a copy, instructions at four a clock, float64 arithmetic, conversions
from and to float64. Every item counts as whole. Nothing here was timed on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from drivekd_kernels import gradient_launch
from drivekd_kernels.gradient_table import CHUNK

from benchmarks.offline.compiled import Compiled, compile_launch
from benchmarks.offline.model import CLOCK_GHZ, DEVICES
from benchmarks.offline.record import Launch, recorded

# Lanes a clock of a multiprocessor: float64 arithmetic, and conversions from and to 64 bits, by the
# tables of CUDA's programming guide.
FP64_PER_CLOCK = {80: 32, 90: 64, 100: 64}
CONVERTED_PER_CLOCK = 16


def record(
    sizes: Sequence[int],
    num_tasks: int,
    dtype: torch.dtype,
    *,
    accumulate: bool = False,
    offset: int = 0,
) -> list[Launch]:
    """Launches of a Gram and a combination of tensors that lack no gradient.

    Args:
        sizes: elements of each tensor.
        num_tasks: K.
        dtype: of all gradients.
        accumulate: whether the combination is added.
        offset: elements by which the tensors miss an address that 16 divides.
    """

    def make(size: int) -> torch.Tensor:
        return torch.empty(size + offset, dtype=dtype, device="meta")[offset:]

    grads = [make(size) for size in sizes for _ in range(num_tasks)]
    tasks = list(range(num_tasks)) * len(sizes)
    offsets = list(range(0, len(grads) + 1, num_tasks))
    rows = [0] * len(sizes)
    weights = torch.empty(1, num_tasks, dtype=torch.float64, device="meta")
    out = [make(size) for size in sizes]
    with recorded() as launches:
        gradient_launch.gram(grads, tasks, offsets, rows, num_tasks, 1)
        gradient_launch.combine(out, grads, tasks, offsets, rows, weights, accumulate=accumulate)
    return launches


@dataclass(frozen=True)
class Prediction:
    """Milliseconds that the pipes of a launch are busy, and programs on a multiprocessor."""

    name: str
    pipes: dict[str, float]
    programs: int
    resident: int
    registers: int

    @property
    def ms(self) -> float:
        return max(self.pipes.values())


def hot_loop(compiled: Compiled):
    """The loop over whole steps: the one that loads."""
    (loop,) = (each for each in compiled.code.loops if each.mix.counts["LOAD"])
    return loop


def predict(launch: Launch, arch: int, elements: int) -> Prediction:
    """Time of a Gram or combination launch over so many elements of each gradient."""
    compiled, device, values = compile_launch(launch, arch), DEVICES[arch], launch.values
    mix, straight = hot_loop(compiled).mix, compiled.code.straight
    lists = values["COUNT"] + bool(values.get("ACCUMULATE"))
    # 16-byte loads of a trip; the assembler may have unrolled the loop further.
    step = values["LANES"] * values["VEC"] * mix.counts["LOAD"] // lists
    programs = -(-elements // CHUNK)
    per_second = CLOCK_GHZ * 1e9 * device.sms

    def ms(kind: str, lanes: float) -> float:
        issued = mix.counts[kind] * CHUNK / step + straight.counts[kind]
        return 1e3 * programs * issued * 32 * compiled.warps / (lanes * per_second)

    total = mix.total * CHUNK / step + straight.total
    lists += launch.name == "combine"
    moved = elements * lists * 16 // values["VEC"]
    return Prediction(
        launch.name,
        {
            "HBM": moved / device.hbm_tbps / 1e9,
            "issue": 1e3 * programs * total * 32 * compiled.warps / (128 * per_second),
            "float64": ms("FP64", FP64_PER_CLOCK[arch]),
            "conversions": ms("CONVERT64", CONVERTED_PER_CLOCK),
        },
        programs,
        compiled.resident,
        compiled.registers,
    )
