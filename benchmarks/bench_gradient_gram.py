"""Gram, combination and the whole projection, beside what else there is, on a GPU or a CPU.

Groups: `gram` (with plain reads as the yardstick), `combination` (with a plain copy), `projection`
(Gram, weights and combination together, beside the public procedure, flat vectors and TorchJD).
`extra_info` of a projection has its host reads, its extra memory, and its error against float64:
for plain gradients, and for such that nearly cancel, where a careless Gram blows the update up.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu
from benchmarks.baselines.public_projection import public_projection
from benchmarks.shapes import MODEL_GRADIENTS, RAGGED_GRADIENTS, SMALL_GRADIENTS
from drivekd.functional import combine_gradients, gradient_gram
from drivekd.functional.gradient import GradientGram
from drivekd.ops import gradient as ops
from drivekd.ops.dispatch import resolve, unavailable_reason
from drivekd.projection import agp_weights
from drivekd.reference import agp as reference
from tests.helpers.gradients import near_antiparallel, relative_error, task_gradients
from tests.helpers.memory import LiveBytes

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
WEIGHTS = (1.0, 0.5, -0.25, 2.0)
BACKENDS = ("triton", "native", "torch")
# On a CPU lists small enough for the public procedure, and long ones for what is compared with
# memory bandwidth.
LONG, WHOLE = (MODEL_GRADIENTS,) * 2 if ON_GPU else (RAGGED_GRADIENTS, SMALL_GRADIENTS)

pytestmark = [pytest.mark.benchmark(timer=gpu.PLAYBACK)] if ON_GPU else []
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"]
)


def make(shape, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    arguments = {"generator": generator, "device": DEVICE, "dtype": dtype}
    return [[torch.randn(size, **arguments) for size in shape.sizes] for _ in range(shape.tasks)]


_made = {}


def gradients(shape, dtype):
    """Those of one shape and dtype at a time: a model's fill several GB."""
    if (shape, dtype) not in _made:
        _made.clear()
        _made[shape, dtype] = make(shape, dtype)
    return _made[shape, dtype]


def need(backend):
    reason = unavailable_reason(backend)
    if reason is None:
        try:
            for op in ("gradient_gram", "combine_gradients"):
                resolve(op, backend, device=torch.device(DEVICE), dtype=torch.float32)
        except RuntimeError as refusal:
            reason = str(refusal)
    if reason is not None:
        pytest.skip(reason)


def weights_tensor():
    return torch.tensor(WEIGHTS, dtype=torch.float64, device=DEVICE)


def measure(benchmark, call, moved, *, queued=True):
    """Time a call; `moved` bytes are read and written at least."""
    if ON_GPU:
        gpu.measure(benchmark, call, queued=queued, moved_bytes=moved)
    else:
        benchmark.extra_info["moved_bytes"] = moved
        benchmark(call)


def size_of(lists):
    return sum(grad.numel() * grad.element_size() for own in lists for grad in own)


def true_gram(lists):
    return gradient_gram(lists, backend="torch").total


@pytest.mark.parametrize("backend", BACKENDS)
@dtypes
def bench_gram(benchmark, backend, dtype):
    need(backend)
    lists = gradients(LONG, dtype)
    got, want = gradient_gram(lists, backend=backend).total, true_gram(lists)
    assert float((got - want).abs().max() / want.diagonal().max()) < 1e-7
    benchmark.group = f"gram {dtype}"
    measure(benchmark, lambda: gradient_gram(lists, backend=backend), size_of(lists))


def flat_gram(lists):
    flat = torch.stack([torch.cat([grad.reshape(-1) for grad in own]) for own in lists])
    return (flat @ flat.T).double(), flat


@dtypes
def bench_gram_of_flat_vectors(benchmark, dtype):
    """One product of a (K, P) matrix with itself, and the copy into that matrix."""
    lists = gradients(LONG, dtype)
    got, want = flat_gram(lists)[0], true_gram(lists)
    error = float((got - want).abs().max() / want.diagonal().max())
    assert error < 0.05
    benchmark.extra_info["gram_error"] = error
    benchmark.group = f"gram {dtype}"
    measure(benchmark, lambda: flat_gram(lists)[0], size_of(lists))


@dtypes
def bench_gram_by_torch_dot(benchmark, dtype):
    lists = gradients(LONG, dtype)
    tasks = len(lists)

    def dots():
        return [
            torch.stack([torch.dot(a, b) for a, b in zip(lists[i], lists[j], strict=True)]).sum()
            for i in range(tasks)
            for j in range(i + 1)
        ]

    benchmark.group = f"gram {dtype}"
    measure(benchmark, dots, size_of(lists))


@dtypes
def bench_plain_read(benchmark, dtype):
    """Norms of all tensors: the best fused reduction at hand, four numbers for our ten."""
    lists = gradients(LONG, dtype)
    flat = [grad for own in lists for grad in own]
    benchmark.group = f"gram {dtype}"
    measure(benchmark, lambda: torch._foreach_norm(flat), size_of(lists))


@pytest.mark.parametrize("backend", BACKENDS)
@dtypes
def bench_combine(benchmark, backend, dtype):
    need(backend)
    lists, weights = gradients(LONG, dtype), weights_tensor()
    out = combine_gradients(lists, weights, backend=backend)
    for i in (0, len(out) // 2, -1):
        wanted = sum(w * own[i].double() for w, own in zip(weights, lists, strict=True))
        torch.testing.assert_close(out[i], wanted.to(dtype), rtol=1e-2, atol=1e-6)
    benchmark.group = f"combination {dtype}"

    def call():
        combine_gradients(lists, weights, backend=backend, out=out)

    measure(benchmark, call, size_of(lists) * 5 // 4)


@dtypes
def bench_combine_by_foreach(benchmark, dtype):
    lists = gradients(LONG, dtype)

    def call():
        out = torch._foreach_mul(lists[0], WEIGHTS[0])
        for own, weight in zip(lists[1:], WEIGHTS[1:], strict=True):
            torch._foreach_add_(out, own, alpha=weight)
        return out

    benchmark.group = f"combination {dtype}"
    measure(benchmark, call, size_of(lists) * 5 // 4)


@dtypes
def bench_plain_copy(benchmark, dtype):
    """As many bytes as the combination moves, half of them read and half written."""
    elements = LONG.elements * 5 // 2
    source = torch.randn(1, device=DEVICE).to(dtype).expand(elements).contiguous()
    target = torch.empty_like(source)
    benchmark.group = f"combination {dtype}"
    measure(benchmark, lambda: target.copy_(source), 2 * elements * dtype.itemsize)


def ours(backend):
    def update(lists):
        gram = gradient_gram(lists, backend=backend).scaled(weights_tensor().abs())
        weights = weights_tensor().abs() * agp_weights(gram)
        return combine_gradients(lists, weights, backend=backend)

    return update


def with_flat_vectors(lists):
    """The same algebra on a flat matrix, its Gram in the gradients' dtype."""
    values, flat = flat_gram(lists)
    scale = weights_tensor().abs()
    gram = GradientGram((tuple(range(len(lists))),), values[None]).scaled(scale)
    total = (scale * agp_weights(gram)).to(flat.dtype) @ flat
    pieces = total.split([grad.numel() for grad in lists[0]])
    return [piece.view_as(grad) for piece, grad in zip(pieces, lists[0], strict=True)]


def publicly(lists):
    return public_projection(lists, [abs(weight) for weight in WEIGHTS[: len(lists)]])


def with_torchjd(lists):
    """PCGrad only, without the first stage: what its users have."""
    from torchjd.aggregation import PCGrad

    flat = torch.stack([torch.cat([grad.reshape(-1) for grad in own]) for own in lists])
    return PCGrad()(flat).split([grad.numel() for grad in lists[0]])


def with_torchjd_on_a_gram(lists):
    """Its weighting of a Gram matrix that is ours, in its dtype; the combination is ours again."""
    from torchjd.aggregation import PCGradWeighting

    weights = PCGradWeighting()(gradient_gram(lists).total)
    return combine_gradients(lists, weights.to(DEVICE, torch.float64))


METHODS = {
    **{f"drivekd-{backend}": ours(backend) for backend in BACKENDS},
    "public procedure": publicly,
    "flat vectors": with_flat_vectors,
    "torchjd": with_torchjd,
    "torchjd on a Gram": with_torchjd_on_a_gram,
}
# Of the update, relative: bf16 lists are rounded at every step there, and not at all here.
BOUNDS = {
    ("drivekd", torch.float32): 1e-6,
    ("drivekd", torch.bfloat16): 3e-3,
    ("public procedure", torch.float32): 1e-5,
    ("public procedure", torch.bfloat16): 2e-2,
}


# A dispatch mode does not see into custom ops; these are their bodies.
BODIES = {
    torch.ops.drivekd.gradient_gram.default: ops._gradient_gram,
    torch.ops.drivekd.combine_gradients.default: ops._combine_gradients,
}


class HostReads(TorchDispatchMode):
    """Counts what waits for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name == "aten::_local_scalar_dense"
        if function in BODIES:
            with self:
                return BODIES[function](*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def host_reads(call, lists):
    with HostReads() as reads:
        call(lists)
    return reads.count


def error_of(call, lists):
    """Relative error of the update against plain float64 vectors of the weighted gradients."""
    scaled = [
        [abs(weight) * grad.double() for grad in own]
        for weight, own in zip(WEIGHTS, lists, strict=False)
    ]
    with torch.no_grad():
        update = call([[grad.to(DEVICE) for grad in own] for own in lists])
    return relative_error([grad.cpu() for grad in update], reference.agp(scaled))


def small_case(dtype):
    return task_gradients(shapes=[(7,), (4097,), (70_001,)], dtype=dtype, correlation=-0.3)


def cancelling_case(dtype):
    """Followers of 1e4 times CE's size, of which what is left is CE's size again."""
    anchor, first, second = near_antiparallel(1e4, 1e-3, dtype)
    return [anchor, first, second, [torch.zeros_like(anchor[0])]]


@pytest.mark.parametrize("method", METHODS)
@dtypes
def bench_projection(benchmark, method, dtype):
    call = METHODS[method]
    if method.startswith("drivekd"):
        need(method.removeprefix("drivekd-"))
    if method.startswith("torchjd"):
        pytest.importorskip("torchjd", reason="pip install 'drivekd[bench]'")
    errors = {}
    if not method.startswith("torchjd"):  # another algorithm
        errors = {
            "error_of_the_update": error_of(call, small_case(dtype)),
            "error_where_gradients_cancel": error_of(call, cancelling_case(dtype)),
        }
        bound = BOUNDS.get((method.split("-")[0], dtype))
        assert bound is None or errors["error_of_the_update"] < bound, errors
    lists = gradients(WHOLE, dtype)
    benchmark.extra_info.update(errors, host_reads=host_reads(call, lists))
    if not ON_GPU:
        with LiveBytes(BODIES) as memory:
            call(lists)
        benchmark.extra_info["extra_peak_bytes"] = memory.peak
    benchmark.extra_info["gradient_bytes"] = size_of(lists)
    benchmark.group = f"projection {dtype}"
    # On an idle GPU: the public procedure waits for it at every step.
    measure(benchmark, lambda: call(lists), size_of(lists) * 9 // 4, queued=False)
