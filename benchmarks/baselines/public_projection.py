"""Gradient projection the way Drive-KD's public training step does it: list by list, on the host.

Written from a description, not from the code: every inner product is a float32 sum per tensor that
is read back (`.item()`), every weighting, merge and projection makes new lists in the gradients'
dtype. For K = 4 and T tensors that is 13 T reads without a conflict and up to 22 T with them: four
norms, nine inner products, and the square of what is projected on for each conflict. An absent
gradient (None) stays absent: nothing is subtracted from it, and sums and products skip it.
"""

from collections.abc import Sequence

from torch import Tensor

Gradients = Sequence[Tensor | None]

_SMALLEST_SQUARE = 1e-20


def public_projection(
    task_grads: Sequence[Gradients],
    weights: Sequence[float],
    *,
    order: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """The update of K lists of gradients, the first of which is the anchor.

    `order` lists the others in the order of the pairwise projections; None is ascending.
    """
    [_dot(own, own) for own in task_grads]
    weighted = [
        [None if grad is None else weight * grad for grad in own]
        for weight, own in zip(weights, task_grads, strict=True)
    ]
    anchor, *followers = weighted
    merged = [_add(anchor, _project(own, anchor)) for own in followers]
    places = range(len(merged)) if order is None else [task - 1 for task in order]
    projected = list(merged)
    for i in places:
        for j in places:
            if i != j:
                projected[i] = _project(projected[i], merged[j])
    update = projected[0]
    for own in projected[1:]:
        update = _add(update, own)
    return update


def _dot(a: Gradients, b: Gradients) -> float:
    return sum(
        (x.float() * y.float()).sum().item()
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    )


def _add(a: Gradients, b: Gradients) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _project(own: Gradients, onto: Gradients) -> Gradients:
    product = _dot(own, onto)
    if product >= 0:
        return own
    coefficient = product / max(_dot(onto, onto), _SMALLEST_SQUARE)
    return [
        x if x is None or y is None else x - coefficient * y for x, y in zip(own, onto, strict=True)
    ]
