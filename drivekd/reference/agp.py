"""Gram matrices and gradient projection on plain vectors: the twin that the fused ops are held to.

Everything is done as the equations say, on lists of K gradients, one list of tensors per task, in
float64: no Gram matrix, no coefficients.

The two rules for a tensor at which a task has no gradient:

- "zero": an absent gradient is a zero vector.
- "official": an absent gradient stays absent. Nothing is subtracted from it, and sums and inner
  products skip it.

Source: Drive-KD (arXiv 2601.21288), asymmetric gradient projection; the public code's train step.
"""

import torch
from torch import Tensor

Gradient = list[Tensor | None]

_SMALLEST_SQUARE = 1e-20


def gram(task_grads: list[Gradient]) -> Tensor:
    """(K, K) float64 inner products, absent gradients counted as zero."""
    grads = [_double(own) for own in task_grads]
    return torch.stack([torch.stack([_dot(a, b) for b in grads]) for a in grads])


def agp(
    task_grads: list[Gradient],
    *,
    anchor: int = 0,
    order: list[int] | None = None,
    missing: str = "zero",
    ce_multiplicity: str = "official",
    stages: tuple[int, ...] = (1, 2),
) -> Gradient:
    """Asymmetric gradient projection of K task gradients.

    Stage 1, for each task c but the anchor: g_c' = g_c - min(0, <g_c, g_a>) / |g_a|^2 g_a and
    m_c = g_a + g_c'. Stage 2: t_i = m_i, then for each j != i in `order`, where <t_i, m_j> < 0:
    t_i -= <t_i, m_j> / |m_j|^2 m_j. The result is the sum of the t_i.

    Args:
        task_grads: K lists of tensors and None.
        anchor: Index of the anchor task.
        order: The other tasks in the order of stage 2; None is ascending.
        missing: "zero" or "official", see the module.
        ce_multiplicity: "official" takes m_c = g_a + g_c', "once" m_c = g_a / n + g_c' for the n
            other tasks.
        stages: Which stages to run; without stage 1, g_c' = g_c.
    """
    grads = _apply_missing(task_grads, missing)
    if order is None:
        order = [task for task in range(len(grads)) if task != anchor]
    if not order:
        return grads[anchor]
    share = 1.0 if ce_multiplicity == "official" else 1.0 / len(order)
    merged = {}
    for task in order:
        follower = grads[task]
        if 1 in stages:
            follower = _project(follower, grads[anchor])
        merged[task] = _add(_scale(grads[anchor], share), follower)
    projected = dict(merged)
    if 2 in stages:
        for i in order:
            for j in order:
                if i != j:
                    projected[i] = _project(projected[i], merged[j])
    return _sum([projected[task] for task in order])


def pcgrad(task_grads: list[Gradient], *, order: list[int] | None = None) -> Gradient:
    """Every task projected against the others' original gradients in `order`, then summed."""
    grads = _apply_missing(task_grads, "zero")
    if order is None:
        order = list(range(len(grads)))
    projected = list(grads)
    for i in order:
        for j in order:
            if i != j:
                projected[i] = _project(projected[i], grads[j])
    return _sum(projected)


def combine(task_grads: list[Gradient], weights: list[float]) -> Gradient:
    """sum_k w_k g_k, absent gradients left out; absent everywhere stays absent."""
    grads = [_double(own) for own in task_grads]
    return _sum([_scale(own, weight) for own, weight in zip(grads, weights, strict=True)])


def _apply_missing(task_grads: list[Gradient], missing: str) -> list[Gradient]:
    grads = [_double(own) for own in task_grads]
    if missing == "official":
        return grads
    if missing != "zero":
        raise ValueError(f"missing is {missing!r}; wanted 'zero' or 'official'")
    shapes = [
        next((g for g in entries if g is not None), None) for entries in zip(*grads, strict=True)
    ]
    return [
        [
            torch.zeros_like(shape) if grad is None and shape is not None else grad
            for grad, shape in zip(own, shapes, strict=True)
        ]
        for own in grads
    ]


def _project(follower: Gradient, onto: Gradient) -> Gradient:
    """Take the component along `onto` away if it points against it."""
    product = _dot(follower, onto)
    if product >= 0:
        return follower
    coefficient = product / _dot(onto, onto).clamp_min(_SMALLEST_SQUARE)
    return [
        f if f is None or o is None else f - coefficient * o
        for f, o in zip(follower, onto, strict=True)
    ]


def _dot(a: Gradient, b: Gradient) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            total = total + (x * y).sum()
    return total


def _add(a: Gradient, b: Gradient) -> Gradient:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def _sum(gradients: list[Gradient]) -> Gradient:
    total = gradients[0]
    for gradient in gradients[1:]:
        total = _add(total, gradient)
    return total


def _scale(a: Gradient, factor: float) -> Gradient:
    return [None if x is None else x * factor for x in a]


def _double(a: Gradient) -> Gradient:
    return [None if x is None else x.detach().double() for x in a]
