"""The gradient ops of `drivekd._C`, registered as backend "native".

The extension itself is imported by `drivekd.ops.dispatch` when somebody asks for it. It takes CUDA
tensors where it was built for CUDA. Its results do not depend on the number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drivekd.ops.dispatch import register
from drivekd.ops.gradient_layout import one_dtype_per_tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _devices() -> tuple[str, ...]:
    # Only a build for CUDA has this operator.
    return ("cpu", "cuda") if hasattr(torch.ops.drivekd_native, "cuda_version") else ("cpu",)


@register("gradient_gram", "native", devices=_devices, dtypes=_DTYPES)
def gradient_gram(
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    num_tasks: int,
    num_patterns: int,
) -> Tensor:
    """Gram matrices (num_patterns, num_tasks, num_tasks), float64; zero where a task is absent."""
    grads = one_dtype_per_tensor(grads, offsets)
    values: Tensor = torch.ops.drivekd_native.gram(
        grads, tasks, offsets, rows, num_tasks, num_patterns
    )
    return values


@register("combine_gradients", "native", devices=_devices, dtypes=_DTYPES)
def combine_gradients(
    out: Sequence[Tensor],
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    weights: Tensor,
    accumulate: bool,
) -> None:
    """`out[t] (+)= sum_k weights[rows[t], k] grads[t, k]`, rounded once to the dtype of `out`."""
    grads = one_dtype_per_tensor(grads, offsets)
    torch.ops.drivekd_native.combine(out, grads, tasks, offsets, rows, weights, accumulate)
