"""Gram and combination of four ragged gradients, beside torch.dot per tensor and a plain read."""

import pytest
import torch

from benchmarks.shapes import RAGGED_GRADIENTS
from drivekd.functional import combine_gradients, gradient_gram
from drivekd.ops.dispatch import unavailable_reason


def make():
    count, elements = RAGGED_GRADIENTS["tensors"], RAGGED_GRADIENTS["elements"]
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(count, generator=generator) + 0.05
    sizes = (parts / parts.sum() * elements).long().tolist()
    return [
        [torch.randn(size, generator=generator) for size in sizes]
        for _ in range(RAGGED_GRADIENTS["tasks"])
    ]


@pytest.fixture(scope="module")
def gradients():
    return make()


def dots(gradients):
    tasks = len(gradients)
    gram = torch.zeros(tasks, tasks, dtype=torch.float64)
    for i in range(tasks):
        for j in range(i + 1):
            pairs = zip(gradients[i], gradients[j], strict=True)
            gram[i, j] = gram[j, i] = sum(torch.dot(a, b).double() for a, b in pairs)
    return gram


def read(gradients):
    return [tensor.sum() for task in gradients for tensor in task]


def skip_without(backend):
    reason = unavailable_reason(backend)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("backend", ["native", "torch"])
def bench_gram(benchmark, gradients, backend):
    skip_without(backend)
    gram = gradient_gram(gradients, backend=backend).total
    torch.testing.assert_close(gram, dots(gradients), rtol=1e-4, atol=1.0)
    benchmark.group = "gram"
    benchmark(lambda: gradient_gram(gradients, backend=backend))


def bench_gram_by_torch_dot(benchmark, gradients):
    benchmark.group = "gram"
    benchmark(dots, gradients)


def bench_plain_read(benchmark, gradients):
    benchmark.group = "gram"
    benchmark(read, gradients)


@pytest.mark.parametrize("backend", ["native", "torch"])
def bench_combine(benchmark, gradients, backend):
    skip_without(backend)
    weights = torch.tensor([1.0, 0.5, -0.25, 2.0], dtype=torch.float64)
    combined = combine_gradients(gradients, weights, backend=backend)
    wanted = sum(w * task[0].double() for w, task in zip(weights, gradients, strict=True))
    torch.testing.assert_close(combined[0].double(), wanted, rtol=1e-5, atol=1e-5)
    benchmark.group = "combination"
    benchmark(lambda: combine_gradients(gradients, weights, backend=backend, out=combined))


def bench_combine_by_foreach(benchmark, gradients):
    def combine():
        out = torch._foreach_mul(gradients[0], 1.0)
        for task, weight in zip(gradients[1:], (0.5, -0.25, 2.0), strict=True):
            torch._foreach_add_(out, task, alpha=weight)
        return out

    benchmark.group = "combination"
    benchmark(combine)
