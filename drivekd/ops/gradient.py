"""The ops `drivekd::gradient_gram` and `drivekd::combine_gradients`: schemas, fakes, dispatch.

Lists travel flat with offsets (`drivekd.ops.gradient_layout`), because an op schema knows neither
lists of lists nor optional results. The bodies bring gradients into one memory order and hand over
to a backend; they are not differentiable.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from drivekd.ops import dispatch
from drivekd.ops.gradient_layout import aligned
from drivekd.ops.native_backend import gradient as _native_backend  # noqa: F401  (registers)
from drivekd.ops.torch_backend import gradient as _torch_backend  # noqa: F401  (registers)

torch.library.define(
    "drivekd::gradient_gram",
    "(Tensor[] grads, int[] tasks, int[] offsets, int[] rows, int num_tasks, int num_patterns, "
    "str backend) -> Tensor",
)
torch.library.define(
    "drivekd::combine_gradients",
    "(Tensor(a!)[] out, Tensor[] grads, int[] tasks, int[] offsets, int[] rows, Tensor weights, "
    "bool accumulate, str backend) -> ()",
)


def gradient_gram(
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    num_tasks: int,
    num_patterns: int,
    backend: str,
) -> Tensor:
    """Gram matrices (num_patterns, num_tasks, num_tasks), float64, of a flat gradient list.

    Args:
        grads: At least one dense or strided gradient; all on one device.
        tasks: Task of each gradient.
        offsets: Tensor t owns `grads[offsets[t] : offsets[t + 1]]`, which share a shape.
        rows: Row of the result for each tensor.
        num_tasks: K.
        num_patterns: S.
        backend: A concrete backend name.
    """
    result: Tensor = torch.ops.drivekd.gradient_gram(
        grads, tasks, offsets, rows, num_tasks, num_patterns, backend
    )
    return result


def combine_gradients(
    out: Sequence[Tensor],
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    weights: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    """Write (or add) to `out[t]` the combination of tensor t's gradients.

    Args:
        out: One tensor per gradient tensor, of its shape; may be one of the gradients of t.
        grads: As in `gradient_gram`.
        tasks: As in `gradient_gram`.
        offsets: As in `gradient_gram`.
        rows: Row of `weights` for each tensor.
        weights: (S, K) float64 on the device of the gradients.
        accumulate: Add to `out` instead of overwriting it.
        backend: A concrete backend name.
    """
    torch.ops.drivekd.combine_gradients(
        out, grads, tasks, offsets, rows, weights, accumulate, backend
    )


def _gradient_gram(
    grads: list[Tensor],
    tasks: list[int],
    offsets: list[int],
    rows: list[int],
    num_tasks: int,
    num_patterns: int,
    backend: str,
) -> Tensor:
    dense = list(grads)
    strided = not all(grad.is_contiguous() for grad in grads)
    for begin, end in pairwise(offsets) if strided else ():
        if not aligned(grads[begin:end]):
            dense[begin:end] = [grad.contiguous() for grad in grads[begin:end]]
    implementation = dispatch.get("gradient_gram", backend)
    result: Tensor = implementation(dense, tasks, offsets, rows, num_tasks, num_patterns)
    return result


def _combine_gradients(
    out: list[Tensor],
    grads: list[Tensor],
    tasks: list[int],
    offsets: list[int],
    rows: list[int],
    weights: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    dense, dense_out, staged = list(grads), list(out), []
    strided = not all(tensor.is_contiguous() for tensor in (*grads, *out))
    for tensor, (begin, end) in enumerate(pairwise(offsets) if strided else ()):
        if aligned([out[tensor], *grads[begin:end]]):
            continue
        dense[begin:end] = [grad.contiguous() for grad in grads[begin:end]]
        if not out[tensor].is_contiguous():
            dense_out[tensor] = out[tensor].contiguous()
            staged.append(tensor)
    implementation = dispatch.get("combine_gradients", backend)
    implementation(dense_out, dense, tasks, offsets, rows, weights, accumulate)
    for tensor in staged:
        out[tensor].copy_(dense_out[tensor])


def _gradient_gram_fake(
    grads: list[Tensor],
    tasks: list[int],
    offsets: list[int],
    rows: list[int],
    num_tasks: int,
    num_patterns: int,
    backend: str,
) -> Tensor:
    return grads[0].new_empty((num_patterns, num_tasks, num_tasks), dtype=torch.float64)


def _combine_gradients_fake(
    out: list[Tensor],
    grads: list[Tensor],
    tasks: list[int],
    offsets: list[int],
    rows: list[int],
    weights: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    return None


torch.library.impl("drivekd::gradient_gram", "default", _gradient_gram)
torch.library.impl("drivekd::combine_gradients", "default", _combine_gradients)
torch.library.register_fake("drivekd::gradient_gram", _gradient_gram_fake)
torch.library.register_fake("drivekd::combine_gradients", _combine_gradients_fake)
