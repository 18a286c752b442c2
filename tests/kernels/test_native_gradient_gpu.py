"""The CUDA kernels of csrc at sizes small enough for compute-sanitizer (benchmarks/on_gpu.sh)."""

import pytest
import torch

from drivekd.functional import combine_gradients, gradient_gram
from tests.helpers.gradients import RAGGED_SHAPES, native_on_gpu, task_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native_on_gpu(), reason="the extension is built without CUDA"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PRESENCE = ("1111", "0111", "1010", "1011")


def on_gpu(lists):
    return [[None if grad is None else grad.cuda() for grad in own] for own in lists]


def assert_like_torch(lists, own):
    """Gram; combination, also into tensors that hold something."""
    want = gradient_gram(lists, backend="torch")
    got = gradient_gram(own, backend="native")
    norms = want.total.diagonal().sqrt()
    size = torch.outer(norms, norms).clamp_min(1e-300)
    assert got.patterns == want.patterns
    assert float(((got.values.cpu() - want.values).abs() / size).max()) < 1e-6
    weights = torch.randn(len(want.patterns), len(lists), dtype=torch.float64)
    for accumulate in (False, True):
        before = combine_gradients(lists, torch.ones_like(weights), backend="torch")
        out = [None if x is None else x.cuda() for x in before]
        combine_gradients(own, weights.cuda(), out=out, accumulate=accumulate, backend="native")
        combine_gradients(lists, weights, out=before, accumulate=accumulate, backend="torch")
        for x, y in zip(out, before, strict=True):
            if x is not None:
                rtol = 2e-2 if x.itemsize == 2 else 1e-6
                torch.testing.assert_close(x.cpu(), y, rtol=rtol, atol=1e-2 * rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [1, 4])
def test_small_ragged_lists_are_combined_as_torch_does(dtype, num_tasks):
    presence = [mask[:num_tasks] for mask in PRESENCE] if num_tasks > 1 else "1"
    lists = task_gradients(num_tasks, shapes=RAGGED_SHAPES, dtype=dtype, presence=presence)
    assert_like_torch(lists, on_gpu(lists))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_ragged_lists_at_addresses_that_16_does_not_divide(dtype):
    lists = task_gradients(3, shapes=[(4_099,), (33, 5)], dtype=dtype)
    own = on_gpu(lists)
    for each in own:
        each[0] = torch.cat([each[0][:1], each[0]])[1:]
        assert each[0].data_ptr() % 16
    assert_like_torch(lists, own)


def test_small_ragged_lists_of_more_tensors_than_one_table_holds():
    lists = task_gradients(2, shapes=[(size % 5 + 1,) for size in range(1500)], dtype=torch.float32)
    assert_like_torch(lists, on_gpu(lists))
