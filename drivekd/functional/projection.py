"""Gradient projection as arithmetic on a Gram matrix: from inner products to K coefficients.

Every vector that a projection makes is a combination of the K raw gradients, so a vector is K
coefficients (one set per pattern of present tasks, where absent gradients must stay absent), and
its inner products are quadratic forms of the Gram matrix. Nothing here is larger than (K, S, K),
and nothing is read back to the host.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from drivekd.functional.gradient import GradientGram

Missing = Literal["zero", "official"]
Multiplicity = Literal["official", "once"]
Method = Literal["agp", "stage1", "stage2", "pcgrad", "none"]

METHODS: tuple[Method, ...] = ("agp", "stage1", "stage2", "pcgrad", "none")
ANCHORED_METHODS: tuple[Method, ...] = ("agp", "stage1", "stage2")

# The public code clamps every squared norm that it divides by at this value.
_SMALLEST_SQUARE = 1e-20


def agp_weights(
    gram: GradientGram,
    *,
    anchor: int = 0,
    order: Sequence[int] | None = None,
    missing: Missing = "zero",
    ce_multiplicity: Multiplicity = "official",
) -> Tensor:
    """Coefficients of asymmetric gradient projection (AGP): the update is sum_k weights_k g_k.

    Stage 1, for each task c but the anchor a: `g_c' = g_c - min(0, <g_c, g_a>) / |g_a|^2 g_a` and
    `m_c = g_a + g_c'`. Stage 2: `t_i = m_i`, then for each j != i in `order`, where
    `<t_i, m_j> < 0`: `t_i -= <t_i, m_j> / |m_j|^2 m_j`, with the original m_j. The update is the
    sum of the t_i; without another task it is g_a.

    Args:
        gram: Inner products of the K task gradients. Loss weights enter by `gram.scaled(w)`; the
            update is then sum_k weights_k w_k g_k.
        anchor: Index of the anchor task (cross-entropy).
        order: The other tasks' indices in the order of stage 2; None is ascending.
        missing: What an absent gradient is. "zero": a zero vector, as in the equations.
            "official": absent, as in the public code; nothing is subtracted from it, which leaves
            part of a conflict in place.
        ce_multiplicity: "official" counts the anchor once per other task, as the public code
            does: without conflicts the weights are (n, 1, ..., 1) for n other tasks, a silent
            division of theirs by n under an optimiser that ignores scale. "once" takes
            `m_c = g_a / n + g_c'`, which gives (1, 1, ..., 1).

    Returns:
        float64 on the device of the Gram: (K,) for "zero", (S, K) for "official", rows in the
        order of `gram.patterns`. Both are what `combine_gradients` takes.

    Raises:
        TypeError: `gram` is no GradientGram; `anchor` or an entry of `order` is no int.
        ValueError: `anchor` is out of range, `order` is no permutation of the other tasks, or
            `missing` or `ce_multiplicity` is unknown.

    Note:
        Every denominator is at least 1e-20, as in the public code. Under "zero", |m_j|^2 is also
        at least the anchor's share of it, which stage 1 guarantees. A non-finite gradient gives
        non-finite weights. A task whose gradients are all absent still counts as present; leave
        its list out if it should not.

    Source:
        Drive-KD (arXiv 2601.21288); Colamentos2023/Drive-KD, intern/trainer.py, `train_step`.

    Example:
        >>> import torch
        >>> from drivekd import agp_weights
        >>> from drivekd.functional import gradient_gram
        >>> ce, perception = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
        >>> agp_weights(gradient_gram([ce, perception]))
        tensor([2., 1.], dtype=torch.float64)
    """
    return projection_weights(
        gram,
        method="agp",
        anchor=anchor,
        order=order,
        missing=missing,
        ce_multiplicity=ce_multiplicity,
    )


def pcgrad_weights(gram: GradientGram, *, order: Sequence[int] | None = None) -> Tensor:
    """Coefficients of PCGrad: every task projected against the others' original gradients.

    `t_i = g_i`, then for each j != i in `order`, where `<t_i, g_j> < 0`:
    `t_i -= <t_i, g_j> / |g_j|^2 g_j`; the update is the sum of the t_i. Absent gradients are zero.

    Args:
        gram: Inner products of the K task gradients.
        order: All task indices in the order of the projections, the same for every task; None is
            ascending.

    Returns:
        (K,) float64 on the device of the Gram.

    Raises:
        TypeError: `gram` is no GradientGram; an entry of `order` is no int.
        ValueError: `order` is no permutation of the tasks.

    Source:
        Yu et al., "Gradient surgery for multi-task learning" (arXiv 2001.06782), which draws an
        order per task; here one order serves all.
    """
    _require_gram(gram)
    tasks = list(range(gram.num_tasks))
    order = _check_order(order, tasks)
    values = gram.total.unsqueeze(0)
    unit = torch.eye(gram.num_tasks, dtype=torch.float64, device=values.device).unsqueeze(1)
    return _project_pairwise(values, unit, torch.ones_like(unit), order, floor=None).sum(0)[0]


def projection_weights(
    gram: GradientGram,
    *,
    method: Method,
    anchor: int = 0,
    order: Sequence[int] | None = None,
    missing: Missing = "zero",
    ce_multiplicity: Multiplicity = "official",
) -> Tensor:
    """Coefficients of one of the methods of `GradientProjector`.

    "agp" and "pcgrad" are `agp_weights` and `pcgrad_weights`; "stage1" and "stage2" run one stage
    of AGP alone ("stage2" on m_c = g_a + g_c); "none" is the plain sum. Arguments, shapes and
    errors are those of `agp_weights`; "pcgrad" reads `order` only, "none" nothing.
    """
    _require_gram(gram)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; wanted one of {', '.join(METHODS)}")
    if method == "pcgrad":
        return pcgrad_weights(gram, order=order)
    if method == "none":
        return torch.ones(gram.num_tasks, dtype=torch.float64, device=gram.values.device)
    check_choice("missing", missing, ("zero", "official"))
    check_choice("ce_multiplicity", ce_multiplicity, ("official", "once"))
    anchor = _check_anchor(anchor, gram.num_tasks)
    order = _check_order(order, [task for task in range(gram.num_tasks) if task != anchor])
    weights = _asymmetric(gram, method, anchor, order, missing, ce_multiplicity)
    return weights[0] if missing == "zero" else weights


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError that lists `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(map(repr, choices))}")


def _asymmetric(
    gram: GradientGram,
    method: Method,
    anchor: int,
    order: list[int],
    missing: Missing,
    ce_multiplicity: Multiplicity,
) -> Tensor:
    """(S, K) weights of AGP or of one of its stages; S = 1 where absent gradients are zero."""
    total = gram.total
    values, patterns = gram.values, gram.patterns
    if missing == "zero":
        values, patterns = total.unsqueeze(0), (tuple(range(gram.num_tasks)),)
    share = 1.0 / len(order) if ce_multiplicity == "once" and order else 1.0
    constants = _asymmetric_constants(gram.num_tasks, anchor, patterns, share)
    merged, anchor_part, support = on_device(constants, values.device).unbind(0)
    if not order:
        return anchor_part[anchor]

    floor = None
    if method != "stage2":
        conflicts = total[anchor].clamp(max=0)
        square = total[anchor, anchor]
        removed = conflicts / square.clamp(min=_SMALLEST_SQUARE)
        merged = torch.addcmul(merged, removed.view(-1, 1, 1), anchor_part, value=-1)
        if missing == "zero":
            floor = square * share**2
    if method != "stage1":
        merged = _project_pairwise(values, merged, support, order, floor)
    return merged.sum(0)


@functools.lru_cache(maxsize=64)
def _asymmetric_constants(
    num_tasks: int, anchor: int, patterns: tuple[tuple[int, ...], ...], share: float
) -> Tensor:
    """(3, K, S, K): m_i before projection, what stage 1 takes off it, where t_i is not absent.

    The second dimension is the task i; the anchor has no m, so its first and last row are zero.
    """
    merged = torch.zeros(num_tasks, len(patterns), num_tasks, dtype=torch.float64)
    anchor_part = torch.zeros_like(merged)
    support = torch.zeros_like(merged)
    for row, tasks in enumerate(patterns):
        if anchor in tasks:
            merged[:, row, anchor] = share
            support[:, row] = 1.0
            anchor_part[tasks, row, anchor] = 1.0
        for task in tasks:
            merged[task, row, task] = 1.0
            support[task, row] = 1.0
    merged[anchor] = 0.0
    support[anchor] = 0.0
    return torch.stack([merged, anchor_part, support])


def _project_pairwise(
    values: Tensor, vectors: Tensor, support: Tensor, order: Sequence[int], floor: Tensor | None
) -> Tensor:
    """Project every vector, in `order`, off the original vectors that it points against.

    Args:
        values: (S, K, K) Gram matrices.
        vectors: (K, S, K) coefficients of one vector per task.
        support: (K, S, K) one where a vector is not absent; nothing is subtracted elsewhere.
        order: Tasks to project against.
        floor: 0-d lower bound of the squared norms, or None.
    """
    num_tasks = len(vectors)
    images = torch.matmul(vectors.transpose(0, 1), values).transpose(0, 1).reshape(num_tasks, -1)
    projected = vectors.reshape(num_tasks, -1)
    squares = (projected * images).sum(1, keepdim=True)
    if floor is not None:
        squares = torch.maximum(squares, floor)
    images = images / squares.clamp(min=_SMALLEST_SQUARE)
    # subtrahends[j, i] is m_j where t_i is not absent, and zero for i = j.
    subtrahends = projected.unsqueeze(1) * support.reshape(num_tasks, -1)
    subtrahends.diagonal().zero_()
    for j in order:
        conflicts = (projected @ images[j]).clamp(max=0)
        projected = torch.addcmul(projected, conflicts.unsqueeze(1), subtrahends[j], value=-1)
    return projected.view_as(vectors)


def on_device(constants: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on `device`, without a host sync."""
    if device.type == "cuda":
        return constants.pin_memory().to(device, non_blocking=True)
    return constants.to(device)


def _require_gram(gram: object) -> None:
    if not isinstance(gram, GradientGram):
        raise TypeError(
            f"gram must be a GradientGram (see gradient_gram), got {type(gram).__name__}"
        )


def _check_anchor(anchor: int, num_tasks: int) -> int:
    if not isinstance(anchor, int) or isinstance(anchor, bool):
        raise TypeError(f"anchor must be an int, got {type(anchor).__name__}")
    if not 0 <= anchor < num_tasks:
        raise ValueError(f"anchor is {anchor}; wanted a task index in [0, {num_tasks})")
    return anchor


def _check_order(order: Sequence[int] | None, tasks: list[int]) -> list[int]:
    if order is None:
        return tasks
    if not isinstance(order, Sequence) or isinstance(order, str):
        raise TypeError(f"order must be a sequence of ints, got {type(order).__name__}")
    if not all(isinstance(task, int) and not isinstance(task, bool) for task in order):
        raise TypeError(f"order must hold ints, got {order!r}")
    if sorted(order) != tasks:
        raise ValueError(f"order is {list(order)}; wanted the tasks {tasks}, each once")
    return list(order)
