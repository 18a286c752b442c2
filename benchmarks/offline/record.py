"""Which kernels a call launches: drivekd's own backend, run on tensors without data.

`JITFunction.run` is replaced while the backend runs on meta tensors, so kernel names, counts,
chunks, arguments, tiles and grids are the real ones.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from drivekd_kernels import specialize
from drivekd_kernels.operands import Tokens
from drivekd_kernels.tuned import Tiles
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.shapes import Pair
from drivekd.ops.attention_inputs import (
    AttentionLayer,
    AttentionLayout,
    AttentionMapLossInputs,
    GivenTarget,
)
from drivekd.ops.triton_backend import attention_map as backend
from drivekd.ops.triton_backend.tokens import kernel_tokens

ABOUT_TOKENS = ("tokens", "spans")
KEPT = 64  # cells of each row of a full map, as `drivekd cache` keeps them
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its arguments by name (meta tensors), options and grid."""

    kernel: JITFunction
    values: Mapping[str, Any]
    options: Mapping[str, Any]  # num_warps, num_stages, ...
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Name of the pass: the kernel's without `_kernel`."""
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def warps(self) -> int:
        return self.options["num_warps"]

    @cached_property
    def signature(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
        """Types, constants and attributes, specialised as Triton's launcher does it.

        Pointers are known to be divisible by 16 if the tensor starts there (allocations do), and
        so are integers, unless the kernel says `do_not_specialize`; then 1 is no constant either.
        """
        types, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.values[parameter.name]
            divisible = False
            if parameter.is_constexpr or value is None:
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
                divisible = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if not parameter.do_not_specialize:
                    divisible = value % 16 == 0
                    if value == 1:
                        types[name], constants[name] = "constexpr", 1
            else:
                types[name] = "fp32"
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return types, constants, attributes

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that share one binary."""
        types, constants, attributes = self.signature
        return (
            self.name,
            tuple(types.items()),
            tuple((name, str(value)) for name, value in constants.items()),
            tuple(attributes),
            tuple(sorted(self.options.items())),
        )


def launch_of(
    kernel: JITFunction, args: tuple[Any, ...], grid: Any, options: Mapping[str, Any]
) -> Launch:
    """What `JITFunction.run` was called with; options: keyword arguments and settings together."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options[name] for name in kernel.arg_names if name in options}
    for parameter in kernel.params:
        if parameter.name not in values:
            values[parameter.name] = parameter.default
    settings = {name: value for name, value in options.items() if name not in values}
    x, y, z = (*(grid(values) if callable(grid) else grid), 1, 1)[:3]
    return Launch(kernel, values, settings, (int(x), int(y), int(z)))


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of the kernels that are called inside, in order; none runs."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        launches.append(launch_of(self, args, grid, options))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


@dataclass(frozen=True)
class Call:
    """A recorded call, and what its tokens see (on the CPU, with data)."""

    launches: list[Launch]
    tokens: Tokens
    pair: Pair
    about_tokens: list[Launch]  # the kernels that make the vectors about tokens
    other_ops: int  # those, and torch operations, that run something on the device


def record(
    pair: Pair,
    loss: str = "mse",
    dtype: torch.dtype = torch.bfloat16,
    *,
    arch: int = 90,
    lse: bool = False,
    padded: bool = False,
    given: bool = False,
) -> Call:
    """Loss and both gradients of one student layer against one teacher layer, causal.

    Args:
        pair: the shape; with vision tokens the region is text rows x vision keys.
        loss: "mse", "cosine" or "kl".
        dtype: of q and k of both models.
        arch: whose tiles are launched.
        lse: whether flash forwards left their log-sum-exp.
        padded: whether there may be padding, as in a batch of records; the result's tokens have
            none.
        given: whether a target of `drivekd cache` stands for the teacher.
    """
    inputs = loss_inputs(
        pair, loss, dtype, torch.empty, "meta", lse=lse, padded=padded, given=given
    )
    with architecture(arch), recorded() as launches, _Counter() as counter:
        backend.attention_map_loss(inputs)
    tokens = kernel_tokens(_layout(pair, torch.device("cpu")), None, compact=True)
    about_tokens = [launch for launch in launches if launch.name in ABOUT_TOKENS]
    passes = [launch for launch in launches if launch.name not in ABOUT_TOKENS]
    return Call(passes, tokens, pair, about_tokens, counter.count + len(about_tokens))


def loss_inputs(
    pair: Pair,
    loss: str,
    dtype: torch.dtype,
    make: Callable[..., torch.Tensor],
    device: str,
    *,
    lse: bool = False,
    padded: bool = False,
    given: bool = False,
) -> AttentionMapLossInputs:
    """What the backend is called with; q and k come from `make(*shape, dtype=, device=)`."""
    return AttentionMapLossInputs(
        student=(_layer(pair, pair.student, dtype, make, device, lse=lse),),
        teacher=() if given else (_layer(pair, pair.teacher, dtype, make, device, lse=lse),),
        groups=((),) if given else ((0,),),
        windows=(None,),
        layout=_layout(pair, torch.device(device), padded=padded),
        loss=loss,
        needs_dq=(True,),
        needs_dk=(True,),
        dtype=torch.float32,
        given=(_target(pair),) if given else (),
    )


class _Counter(TorchDispatchMode):
    """Counts torch operations that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += runs_something(func)
        return func(*args, **(kwargs or {}))


def runs_something(func: Any) -> bool:
    """Whether a torch operation is more than a view or a bare allocation."""
    name = func._schema.name
    return not func.is_view and "empty" not in name and not name.endswith("detach")


@contextlib.contextmanager
def tiles_replaced(
    choose: Callable[[str, int], Tiles | None], *, one_pass: bool | None = None
) -> Iterator[None]:
    """Other tile sizes than those that ship.

    Args:
        choose: (pass, padded head dim) -> tiles; None: those that ship.
        one_pass: whether dq makes delta on the way; None: as shipped.
    """
    shipped, shipped_one_pass = specialize.tiles, specialize.one_pass

    def tiles(kernel: str, arch: int, dtype: str, block_d: int, **variant: bool) -> Tiles:
        chosen = choose(kernel, block_d)
        return shipped(kernel, arch, dtype, block_d, **variant) if chosen is None else chosen

    specialize.tiles = tiles
    if one_pass is not None:
        specialize.one_pass = lambda query: one_pass
    try:
        yield
    finally:
        specialize.tiles, specialize.one_pass = shipped, shipped_one_pass


@contextlib.contextmanager
def architecture(arch: int) -> Iterator[None]:
    """Launchers that choose tiles for a GPU that is not there."""
    original = specialize.architecture
    specialize.architecture = lambda tensor: arch
    try:
        yield
    finally:
        specialize.architecture = original


def _layer(
    pair: Pair,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    make: Callable[..., torch.Tensor],
    device: str,
    *,
    lse: bool,
) -> AttentionLayer:
    H, H_kv, D = heads
    B, N = pair.num_samples, pair.num_tokens
    query, key = (  # as transformers hands them over
        make(B, N, count, D, dtype=dtype, device=device).transpose(1, 2) for count in (H, H_kv)
    )
    known = make(B, H, N, dtype=torch.float32, device=device) if lse else None
    return AttentionLayer(query, key, D**-0.5, known)


def _target(pair: Pair) -> GivenTarget:
    """As the cache's settings are by default, on meta."""
    B, N, V = pair.num_samples, pair.num_tokens, pair.num_vision

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape = (B, N - V, V) if V else (B, N, KEPT)
    values, exponents = make(shape, torch.float16), make(shape[:2], torch.int16)
    if V:
        return GivenTarget(values, exponents, None, None)
    return GivenTarget(values, exponents, make(shape, torch.int32), make((B, N), torch.float16))


def _layout(pair: Pair, device: torch.device, *, padded: bool = False) -> AttentionLayout:
    B, N = pair.num_samples, pair.num_tokens
    valid = torch.ones(B, N, dtype=torch.bool, device=device) if padded else None
    is_vision = is_text = None
    if pair.num_vision:
        is_vision = torch.zeros(B, N, dtype=torch.bool)
        is_vision[:, : pair.num_vision] = True
        is_vision = is_vision.to(device)
        is_text = ~is_vision
    return AttentionLayout(B, N, device, True, valid, None, is_text, is_vision)
