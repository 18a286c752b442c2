"""Gram and combination without a GPU: what their binaries would need of a GPU's pipes.

    python -m benchmarks.offline.gradients      # the Triton kernels; the CUDA core where nvcc is

A launch's time is the largest of what its pipes need, all programs together: bytes of gradients and
outputs at the bandwidth of a copy, instructions at four a clock, float64 arithmetic, conversions
from and to float64. Every item counts as whole. Nothing here was timed on a GPU.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from drivekd_kernels import gradient_launch
from drivekd_kernels.gradient_table import CHUNK

from benchmarks.devices import DEVICES, Device
from benchmarks.offline import sass
from benchmarks.offline.compiled import LIMITS, Compiled, _tool, compile_launch
from benchmarks.offline.record import Launch, recorded
from benchmarks.shapes import MODEL_GRADIENTS

# Lanes a clock of a multiprocessor, from memory of data sheets and of CUDA's programming guide, not
# looked up again: float64 arithmetic, and conversions from and to 64 bits.
FP64_PER_CLOCK = {80: 32, 90: 64, 100: 64}
CONVERTED_PER_CLOCK = 16

PIPES = ("HBM", "issue", "float64", "conversions")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CUDA_THREADS = 256
_TORCH_DTYPES = {str(own): dtype for dtype, own in gradient_launch.DTYPES.items()}
_CUDA_DTYPES = {
    "13__nv_bfloat16": torch.bfloat16,
    "6__half": torch.float16,
    "f": torch.float32,
    "d": torch.float64,
}


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

    with recorded() as launches:
        step(sizes, num_tasks, make, "meta", accumulate=accumulate)()
    return launches


def step(
    sizes: Sequence[int],
    num_tasks: int,
    make: Callable[[int], torch.Tensor],
    device: str,
    *,
    accumulate: bool = False,
) -> Callable[[], None]:
    """A Gram and a combination of tensors that lack no gradient, as something to call."""
    grads = [make(size) for size in sizes for _ in range(num_tasks)]
    tasks = list(range(num_tasks)) * len(sizes)
    offsets = list(range(0, len(grads) + 1, num_tasks))
    rows = [0] * len(sizes)
    weights = torch.ones(1, num_tasks, dtype=torch.float64, device=device)
    out = [make(size) for size in sizes]

    def call() -> None:
        gradient_launch.gram(grads, tasks, offsets, rows, num_tasks, 1)
        gradient_launch.combine(out, grads, tasks, offsets, rows, weights, accumulate=accumulate)

    return call


@dataclass(frozen=True)
class Binary:
    """A compiled Gram or combination kernel.

    Attributes:
        name: "gram" or "combine".
        lists: gradients that it reads, and what it adds to.
        dtype: of the gradients.
        threads: of a program.
        registers: of a thread.
        loop: what a trip over whole vectors issues.
        straight: what a program issues outside of loops.
    """

    name: str
    lists: int
    dtype: torch.dtype
    threads: int
    registers: int
    loop: sass.Mix
    straight: sass.Mix

    @property
    def trip(self) -> int:
        """Elements of each gradient that a program reads in a trip."""
        return self.threads * 16 // self.dtype.itemsize * self.loop.counts["LOAD"] // self.lists


@dataclass(frozen=True)
class Prediction:
    """Milliseconds that the pipes of a launch are busy.

    Attributes:
        pipes: name -> milliseconds.
        programs: of the launch.
        resident: programs that a multiprocessor's registers hold.
        in_flight: bytes of loads that these have under way at most.
    """

    pipes: dict[str, float]
    programs: int
    resident: int
    in_flight: int

    @property
    def ms(self) -> float:
        return max(self.pipes.values())


def hot_loop(compiled: Compiled) -> sass.Loop:
    """The loop over whole steps: the one that loads."""
    (loop,) = (each for each in compiled.code.loops if each.mix.counts["LOAD"])
    return loop


def binary(launch: Launch, arch: int) -> Binary:
    """A Triton launch, compiled."""
    compiled, values = compile_launch(launch, arch), launch.values
    lists = values["COUNT"] + bool(values.get("ACCUMULATE"))
    return Binary(
        launch.name,
        lists,
        _TORCH_DTYPES[str(values["DTYPE"])],
        32 * compiled.warps,
        compiled.registers,
        hot_loop(compiled).mix,
        compiled.code.straight,
    )


def cuda_binaries(arch: int, num_tasks: int) -> Iterator[Binary]:
    """The kernels of csrc/cuda for so many gradients, compiled by nvcc; none that adds."""
    for name in ("gram", "combine"):
        for kernel, registers, code in _cuda_kernels(name, arch):
            dtype = re.search(r"_kernelI(13__nv_bfloat16|6__half|f|d)Li(\d)E", kernel)
            if dtype is None or int(dtype.group(2)) != num_tasks:
                continue
            own = sass.read(code)
            loops = [each.mix for each in own.loops if each.mix.counts["LOAD"] % num_tasks == 0]
            # Of 16-byte accesses only, hence not the loop over single elements.
            wide = [
                mix
                for mix in loops
                if 0 < mix.lsu == 4 * (mix.counts["LOAD"] + mix.counts["STORE"])
            ]
            mix = max(wide, key=lambda mix: mix.counts["LOAD"])
            own_dtype = _CUDA_DTYPES[dtype.group(1)]
            yield Binary(name, num_tasks, own_dtype, CUDA_THREADS, registers, mix, own.straight)


def _cuda_kernels(name: str, arch: int) -> list[tuple[str, int, str]]:
    """(mangled name, registers, disassembly) of the kernels of one source."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "one.cubin"
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", f"-I{CSRC}"]
        subprocess.run([*command, CSRC / "cuda" / f"{name}.cu", "-o", cubin], check=True)
        listing, usage = (
            subprocess.run([_tool(), option, cubin], capture_output=True, text=True, check=True)
            for option in ("--dump-sass", "--dump-resource-usage")
        )
    registers = dict(re.findall(r"Function (\S+):\s*\n\s*REG:(\d+)", usage.stdout))
    code = re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", listing.stdout, re.DOTALL)
    return [(kernel, int(registers[kernel]), text) for kernel, text in code]


def predict(own: Binary, device: Device, elements: int) -> Prediction:
    """Time of a launch over so many elements of each gradient."""
    limits = LIMITS[device.arch]
    programs = -(-elements // CHUNK)
    threads_a_second = device.clock_ghz * 1e9 * device.sms / (programs * own.threads)
    trips = CHUNK / own.trip

    def ms(kind: str, lanes: float) -> float:
        issued = own.loop.counts[kind] * trips + own.straight.counts[kind]
        return 1e3 * issued / (lanes * threads_a_second)

    total = own.loop.total * trips + own.straight.total
    moved = elements * own.dtype.itemsize * (own.lists + (own.name == "combine"))
    per_warp = -(-own.registers * 32 // 256) * 256
    resident = min(limits.registers // per_warp, limits.warps) // (own.threads // 32)
    return Prediction(
        {
            "HBM": moved / device.hbm_tbps / 1e9,
            "issue": 1e3 * total / (128 * threads_a_second),
            "float64": ms("FP64", FP64_PER_CLOCK[device.arch]),
            "conversions": ms("CONVERT64", CONVERTED_PER_CLOCK),
        },
        programs,
        resident,
        resident * own.threads * 16 * own.loop.counts["LOAD"],
    )


def _rows(arch: int, num_tasks: int) -> Iterator[tuple[str, Binary]]:
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for dtype in dtypes:
        for launch in record([MODEL_GRADIENTS.elements], num_tasks, dtype):
            if launch.name != "fold":
                yield "triton", binary(launch, arch)
    if shutil.which("nvcc"):
        for own in cuda_binaries(arch, num_tasks):
            yield "cuda", own


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.gradients")
    parser.add_argument("--device", nargs="*", default=["H200"], choices=sorted(DEVICES))
    parser.add_argument("--tasks", type=int, default=MODEL_GRADIENTS.tasks)
    chosen = parser.parse_args()
    print("Predicted from instruction counts, not measured. Milliseconds a pipe is busy.")
    for device in (DEVICES[name] for name in chosen.device):
        print(
            f"\n{device.name}, K = {chosen.tasks}, {MODEL_GRADIENTS.elements / 1e6:.0f} M elements"
        )
        columns = ("kernel", "dtype", "registers", "programs/SM", "KB in flight", *PIPES)
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for source, own in _rows(device.arch, chosen.tasks):
            one = predict(own, device, MODEL_GRADIENTS.elements)
            pipes = " | ".join(f"{each:.2f}" for each in one.pipes.values())
            dtype = str(own.dtype).removeprefix("torch.")
            print(
                f"| {source} {own.name} | {dtype} | {own.registers} | {one.resident} | "
                f"{one.in_flight / 1024:.0f} | {pipes} |"
            )


if __name__ == "__main__":
    main()
