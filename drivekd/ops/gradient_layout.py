"""How lists of gradients travel through the ops: flat, present ones only, grouped by tensor.

Tensor t owns `grads[offsets[t] : offsets[t + 1]]`; `tasks` names the task of each of them, in
ascending order within a tensor, and `rows[t]` is the tensor's row in the list of patterns (a
pattern is a set of tasks that have a gradient there). A tensor without any gradient does not
travel at all. Backends get *aligned* gradients: the elements of each fill one block of memory, and
equal positions in these blocks belong together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """The tensors that share one set of present tasks."""

    row: int
    tasks: tuple[int, ...]
    tensors: tuple[int, ...]


def patterns(tasks: Sequence[int], offsets: Sequence[int], rows: Sequence[int]) -> list[Pattern]:
    """The patterns in ascending row order, each with its tensors in ascending order."""
    members: dict[int, list[int]] = {}
    for tensor, row in enumerate(rows):
        members.setdefault(row, []).append(tensor)
    return [
        Pattern(row, tuple(tasks[offsets[own[0]] : offsets[own[0] + 1]]), tuple(own))
        for row, own in sorted(members.items())
    ]


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape lie in memory densely and in the same order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    stride = tensors[0].stride()
    return is_dense(tensors[0]) and all(tensor.stride() == stride for tensor in tensors)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in some order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def as_flat(tensor: Tensor) -> Tensor:
    """The block of memory that a dense tensor fills, as a 1-D view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that all of `tensors` promote to."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def one_dtype_per_tensor(grads: Sequence[Tensor], offsets: Sequence[int]) -> Sequence[Tensor]:
    """The gradients, promoted where tasks disagree about a tensor's dtype."""
    if len({grad.dtype for grad in grads}) == 1:
        return grads
    same = list(grads)
    for tensor in range(len(offsets) - 1):
        own = slice(offsets[tensor], offsets[tensor + 1])
        dtype = promoted_dtype(same[own])
        same[own] = [grad.to(dtype) for grad in same[own]]
    return same
