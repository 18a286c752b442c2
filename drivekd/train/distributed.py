"""Averaging joined gradients over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_ELEMENTS = 2**24


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every `.grad` by its mean over all processes, as DistributedDataParallel would.

    A parameter that has a gradient in some processes counts as zero in the others; one that has
    none anywhere keeps None. Reads back once which gradients exist.

    Args:
        parameters: The model's parameters, in the same order in all processes.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        return
    mine = [float(parameter.grad is not None) for parameter in trainable]
    present = torch.tensor(mine, device=trainable[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for parameter, is_present in zip(trainable, present.tolist(), strict=True):
        if not is_present:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket = buckets.setdefault(parameter.grad.dtype, [])
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= _BUCKET_ELEMENTS:
            _average(buckets.pop(parameter.grad.dtype))
    for bucket in buckets.values():
        _average(bucket)


def _average(grads: list[Tensor]) -> None:
    """One all-reduce for tensors of one dtype, in place."""
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
