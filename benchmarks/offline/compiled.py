"""Launches compiled for an architecture that is not here: resources and instruction mix.

The *main* loop is the one that walks over tiles seen whole, the *masked* one over those on the
diagonal or the edge. Both are innermost loops with matrix products (fp32: with exp2). The kernels'
source gives them the same products and the same exp2 and only the masked one compares positions and
selects, so: of the candidates, main has the fewest compares and selects per exp2, masked the most.
map and mse mask once, behind the loop over heads: they have one such loop, which is both.
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.offline import sass
from benchmarks.offline.record import Launch

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds; the same on sm_80, sm_90 and sm_100 but for shared memory."""

    shared_per_sm: int
    shared_per_program: int
    reserved: int = 1024  # bytes of shared memory that the driver takes per program
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    tensor_columns: int = 512  # of sm_100's tensor memory


LIMITS = {
    80: Limits(164 * 1024, 163 * 1024),
    90: Limits(228 * 1024, 227 * 1024),
    100: Limits(228 * 1024, 227 * 1024),
}

PRODUCTS = {"lse": 1, "map": 1, "mse": 1, "delta": 1, "dq": 2, "dk": 2}


@dataclass(frozen=True)
class Compiled:
    """One binary of one kernel.

    Attributes:
        name: pass.
        arch: 80, 90 or 100.
        block_q, block_k, block_d: of its tile, with both pieces of head dims.
        warps: of a program.
        registers: of a thread.
        stack: bytes of a thread in local memory: spills, of loops or of what is outside of them.
        shared: bytes of a program.
        tensor_columns: of tensor memory (sm_100).
        products: matrix products per tile in the kernel's source.
        exp2: exp2 per element and head in the kernel's source.
        cubin: the binary; disassembled when loops are asked for, which takes half a second.
    """

    name: str
    arch: int
    block_q: int
    block_k: int
    block_d: int
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_columns: int
    products: int
    exp2: float
    cubin: bytes

    @cached_property
    def listing(self) -> str:
        """Its instructions as text."""
        return _cuobjdump("--dump-sass", self.cubin)

    @cached_property
    def code(self) -> sass.Code:
        """All of its loops."""
        return sass.read(self.listing)

    @cached_property
    def _loops(self) -> tuple[sass.Loop | None, sass.Loop | None]:
        return _find_loops(self.code) if self.name in PRODUCTS else (None, None)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory inside the loops over tiles."""
        loops = {loop.header: loop for loop in self._loops if loop is not None}
        return sum(loop.mix.counts["LOCAL"] for loop in loops.values())

    def parked(self, group: int) -> float:
        """Accesses of local memory outside the loops over tiles, per instruction.

        Of the loop around a loop over tiles, if there is one, with all trips of the inner one (as
        many as query heads of a group), else of what no loop holds with one trip.
        """
        shares = []
        for loop in self._loops:
            if loop is not None:
                outer = self.code.parent(loop)
                mix, trips = (self.code.straight, 1) if outer is None else (outer.own, group)
                shares.append(mix.counts["LOCAL"] / (mix.total + trips * loop.mix.total))
        return max(shares, default=0.0)

    @property
    def main(self) -> sass.Loop | None:
        """Loop over tiles seen whole, None for kernels without one (row losses)."""
        return self._loops[0]

    @property
    def masked(self) -> sass.Loop | None:
        """Loop over the other tiles; may be `main`."""
        return self._loops[1]

    @property
    def resident(self) -> int:
        """Programs that one multiprocessor holds at once; 0 if not even one fits."""
        limits = LIMITS[self.arch]
        per_warp = -(-self.registers * 32 // 256) * 256
        warps = 4 * (limits.registers // 4 // per_warp)  # each quarter has registers of its own
        shared = self.shared + limits.reserved
        fits = [warps // self.warps, limits.warps // self.warps, limits.programs]
        fits.append(limits.shared_per_sm // shared)
        if self.tensor_columns:
            fits.append(limits.tensor_columns // self.tensor_columns)
        return min(fits)

    @property
    def elements(self) -> float:
        """Elements of a tile per thread."""
        return self.block_q * self.block_k / (32 * self.warps)

    def tiles_in(self, loop: sass.Loop) -> float:
        """Tiles (of one head) that one trip of a loop works on, from its matrix products.

        Where a tile is too small for its warps, the first product and the exp2 are done several
        times: with u tiles done r times each, products count u (r + products - 1), exp2 u r.
        tcgen05 tells only the number of products: one for 16 of the contracted dimension. fp32 has
        FFMA.
        """
        if loop.mix.macs:
            one = self.block_q * self.block_k * self.block_d
            macs = loop.mix.macs * self.warps / one
            if self.products == 1:
                return macs
            repeated = loop.mix.counts["EX2"] / (self.elements * self.exp2)
            return max(1, round((macs - repeated) / (self.products - 1)))
        if loop.mix.matrix:
            contracted = self.block_q if self.name == "dk" else self.block_k
            wanted = self.block_d // 16 + (self.products - 1) * contracted // 16
            return max(1, round(loop.mix.matrix / wanted))
        wanted = self.products * self.block_d * self.elements
        return max(1, round(loop.mix.counts["FFMA"] / wanted))

    def per_element(self, kind: str, loop: sass.Loop | None = None) -> float:
        """Instructions of a kind (or "total") per element and head in a loop, by default main."""
        loop = loop or self.main
        if loop is None:
            return float("nan")
        count = loop.mix.total if kind == "total" else loop.mix.counts[kind]
        return count / (self.tiles_in(loop) * self.elements)


def exp2_needed(launch: Launch) -> tuple[float, float]:
    """exp2 per element and head in the main loop as the source has it: at least, at most.

    One everywhere but: lse rescales each row once a tile (in the layout of 16-bit products at most
    two rows of 32 or more columns a thread, or eight of 64: 1/8 more); dq of logarithms makes P_h
    beside R. Logarithmic maps have one (of the smaller beside the larger), dk of logarithms makes P
    once a tile outside the loop over heads.
    """
    if launch.name == "lse":
        return 1.0, 1.125
    if launch.name == "dq" and launch.values["log_ptr"] is not None:
        return 2.0, 2.0
    return 1.0, 1.0


def products(launch: Launch) -> int:
    """Matrix products per tile in the source."""
    return PRODUCTS.get(launch.name, 0) + bool(launch.values.get("ONE_PASS"))


_compiled: dict[tuple, Compiled] = {}


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """The binary that a launch would run on an architecture; each is compiled once."""
    key = (launch.key, arch)
    if key not in _compiled:
        _compiled[key] = _compile(launch, arch)
    return _compiled[key]


def _compile(launch: Launch, arch: int) -> Compiled:
    types, constants, attributes = launch.signature
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options=dict(launch.options))
    cubin = binary.asm["cubin"]
    usage = _cuobjdump("--dump-resource-usage", cubin)
    values = launch.values
    return Compiled(
        name=launch.name,
        arch=arch,
        block_q=values.get("BLOCK_Q", 0),
        block_k=values.get("BLOCK_K", 0),
        block_d=values.get("BLOCK_D", 0) + values.get("TAIL", 0),
        warps=launch.warps,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        stack=int(re.search(r"STACK:(\d+)", usage).group(1)),
        shared=binary.metadata.shared,
        tensor_columns=getattr(binary.metadata, "tmem_size", None) or 0,
        products=products(launch),
        exp2=exp2_needed(launch)[0],
        cubin=cubin,
    )


def _find_loops(code: sass.Code) -> tuple[sass.Loop | None, sass.Loop | None]:
    able = [each for each in code.loops if each.mix.counts["EX2"]]
    able = [each for each in able if each.mix.matrix] or able
    # Loops that wait for a barrier (sm_100) may be inside and are none of these.
    inner = [each for each in able if not any(other.blocks < each.blocks for other in able)]

    def selects(loop: sass.Loop) -> float:
        return loop.mix.counts["SELECT"] / loop.mix.counts["EX2"]

    if not inner:
        return None, None
    return min(inner, key=selects), max(inner, key=selects)


@functools.cache
def _tool() -> str:
    path = _BIN / "cuobjdump"
    if not path.exists():
        raise FileNotFoundError(f"this triton package has no {path.name}; install triton from PyPI")
    return str(path)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool(), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
