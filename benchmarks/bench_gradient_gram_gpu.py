"""Gram and combination of four bfloat16 gradients on a GPU, beside a copy that moves as much."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.gpu import DEVICE, DRY, PLAYBACK, measure
from benchmarks.shapes import MODEL_GRADIENTS
from drivekd.functional import combine_gradients, gradient_gram
from drivekd.ops.dispatch import resolve

pytestmark = [
    pytest.mark.benchmark(timer=PLAYBACK),
    pytest.mark.filterwarnings("default"),
    *([] if DRY else [pytest.mark.gpu]),
]

TASKS = MODEL_GRADIENTS.tasks
DTYPE = torch.bfloat16
WEIGHTS = (1.0, 0.5, -0.25, 2.0)
MOVED = {"gram": TASKS, "combination": TASKS + 1}  # words a parameter


@functools.cache
def gradients():
    sizes = [1_000, 7, 4_097] if DRY else MODEL_GRADIENTS.sizes
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        [torch.randn(size, generator=generator, device=DEVICE, dtype=DTYPE) for size in sizes]
        for _ in range(TASKS)
    ]


def facts(way):
    elements = sum(tensor.numel() for tensor in gradients()[0])
    backend = resolve("gradient_gram", "auto", device=torch.device(DEVICE), dtype=DTYPE)
    return {
        "shape": "gradients-494m", "way": way, "backend": backend, "tasks": TASKS,
        "elements": elements, "moved_bytes": MOVED[way] * elements * DTYPE.itemsize,
    }  # fmt: skip


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
