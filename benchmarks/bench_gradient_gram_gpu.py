"""Projection of four bfloat16 gradients of a model of 494 M parameters on a GPU.

Ways: `gram` and `combination`, each beside a copy that moves as much; `projection`, both with the
weights between them, all that `GradientProjector` does with gradients that are there; and the
`public` procedure on the same gradients, in the same rounds as `projection`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.baselines.public_projection import public_projection
from benchmarks.gpu import DEVICE, DRY, PLAYBACK, measure
from benchmarks.shapes import MODEL_GRADIENTS
from drivekd.functional import combine_gradients, gradient_gram
from drivekd.ops.dispatch import resolve
from drivekd.projection import agp_weights
from tests.helpers.gradients import relative_error
from tests.helpers.host_reads import NoHostRead

pytestmark = [
    pytest.mark.benchmark(timer=PLAYBACK),
    pytest.mark.filterwarnings("default"),
    *([] if DRY else [pytest.mark.gpu]),
]

TASKS = MODEL_GRADIENTS.tasks
DTYPE = torch.bfloat16
WEIGHTS = (1.0, 0.5, -0.25, 2.0)
# Words a parameter.
MOVED = {"gram": TASKS, "combination": TASKS + 1, "projection": 2 * TASKS + 1}


@functools.cache
def gradients():
    sizes = [1_000, 7, 4_097] if DRY else MODEL_GRADIENTS.sizes
    generator = torch.Generator(DEVICE).manual_seed(0)
    grads = [
        [torch.randn(size, generator=generator, device=DEVICE, dtype=DTYPE) for size in sizes]
        for _ in range(TASKS)
    ]
    for own in grads[1:]:  # some of what the first says against each, for projections to take off
        torch._foreach_add_(own, grads[0], alpha=-0.3)
    return grads


def facts(way):
    elements = sum(tensor.numel() for tensor in gradients()[0])
    backend = resolve("gradient_gram", "auto", device=torch.device(DEVICE), dtype=DTYPE)
    noted = {
        "shape": "gradients-494m", "way": way, "backend": backend, "tasks": TASKS,
        "elements": elements, "gradient_bytes": elements * DTYPE.itemsize,
    }  # fmt: skip
    if way in MOVED:
        noted["moved_bytes"] = MOVED[way] * noted["gradient_bytes"]
    return noted


def copy_of(moved_bytes):
    """Reads half of so many bytes and writes the other half."""
    source = torch.ones(moved_bytes // 2, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bench_gram(benchmark):
    grads, noted = gradients(), facts("gram")
    gram = gradient_gram(grads).total
    for i in range(TASKS):
        for j in range(i + 1):
            pairs = zip(grads[i], grads[j], strict=True)
            want = sum((a.double() * b.double()).sum() for a, b in pairs)
            size = (gram[i, i] * gram[j, j]).sqrt()
            assert abs(gram[i, j] - want) <= 1e-6 * size
    benchmark.group = "gram on a GPU"
    measure(
        benchmark,
        lambda: gradient_gram(grads).values,
        beside=copy_of(noted["moved_bytes"]),
        **noted,
    )


def bench_combination(benchmark):
    grads, noted = gradients(), facts("combination")
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=DEVICE)
    out = combine_gradients(grads, weights)
    for n in (0, len(out) - 1):
        want = sum(w * task[n].double() for w, task in zip(WEIGHTS, grads, strict=True))
        assert (out[n].double() - want).norm() <= 4e-3 * want.norm()  # rounded to bfloat16
    benchmark.group = "combination on a GPU"
    measure(
        benchmark,
        lambda: combine_gradients(grads, weights, out=out),
        beside=copy_of(noted["moved_bytes"]),
        **noted,
    )


def projection():
    """The update, and nothing read back."""
    grads = gradients()
    return combine_gradients(grads, agp_weights(gradient_gram(grads)))


def publicly():
    return public_projection(gradients(), [1.0] * TASKS)


def host_sync(call):
    """What waits for the device in a call, or on a CPU what would; empty if nothing does."""
    try:
        if DRY:
            with NoHostRead():
                call()
            return ""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0] or "a host read"
    return ""


def bench_projection(benchmark):
    projection()  # what is loaded and compiled once may wait
    waited = host_sync(projection)
    benchmark.group = "projection on a GPU"
    noted = facts("projection")
    beside = copy_of(noted["moved_bytes"])
    measure(benchmark, projection, beside=beside, host_sync=waited, **noted)
    assert not waited, waited


def bench_public_projection(benchmark):
    error = relative_error(projection(), publicly())
    benchmark.group = "projection on a GPU"
    measure(benchmark, publicly, beside=projection, update_error=error, **facts("public"))
    assert error <= 2e-2  # every step of the public procedure is rounded to bfloat16
