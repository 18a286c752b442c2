"""The gradient ops through Triton kernels, for CUDA tensors (kernels/README.md)."""

import os
from collections.abc import Sequence

import torch
from drivekd_kernels import gradient_launch
from torch import Tensor

from drivekd.ops.dispatch import register
from drivekd.ops.gradient_layout import one_dtype_per_tensor

_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@register("gradient_gram", "triton", devices=_DEVICES, dtypes=_DTYPES)
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
    return gradient_launch.gram(grads, tasks, offsets, rows, num_tasks, num_patterns)


@register("combine_gradients", "triton", devices=_DEVICES, dtypes=_DTYPES)
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
    gradient_launch.combine(out, grads, tasks, offsets, rows, weights, accumulate=accumulate)
