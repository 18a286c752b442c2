"""Gradient projection the way Drive-KD's public training step does it: list by list, on the host.

Written from a description, not from the code: every inner product is a float32 sum per tensor that
is read back (`.item()`), every weighting, merge and projection makes new lists in the gradients'
dtype. For K = 4 and T tensors that is 13 T reads without a conflict and up to 22 T with them: four
norms, nine inner products, and the square of what is projected on for each conflict.
"""

from collections.abc import Sequence

from torch import Tensor

_SMALLEST_SQUARE = 1e-20


def public_projection(
    task_grads: Sequence[Sequence[Tensor]], weights: Sequence[float]
) -> list[Tensor]:
    """The update of K lists of gradients, the first of which is the anchor; none may lack one."""
    [_dot(own, own) for own in task_grads]
    anchor, *followers = (
        [weight * grad for grad in own] for weight, own in zip(weights, task_grads, strict=True)
    )
    merged = [_add(anchor, _project(own, anchor)) for own in followers]
    projected = []
    for i, own in enumerate(merged):
        for j, other in enumerate(merged):
            if i != j:
                own = _project(own, other)
        projected.append(own)
    update = projected[0]
    for own in projected[1:]:
        update = _add(update, own)
    return update


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((x.float() * y.float()).sum().item() for x, y in zip(a, b, strict=True))


def _add(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _project(own: list[Tensor], onto: Sequence[Tensor]) -> list[Tensor]:
    product = _dot(own, onto)
    if product >= 0:
        return own
    coefficient = product / max(_dot(onto, onto), _SMALLEST_SQUARE)
    return [x - coefficient * y for x, y in zip(own, onto, strict=True)]
