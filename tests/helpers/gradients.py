"""Seeded lists of task gradients: ragged, with absent entries, strided, near-antiparallel."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from drivekd.ops.dispatch import unavailable_reason

# Odd sizes around vector widths and chunk borders, an empty tensor, a scalar.
RAGGED_SHAPES = ((5,), (), (63, 3), (0, 4), (129,), (17, 33), (1,), (2, 3, 7), (4097,))

# Which of four tasks have a gradient, tensor by tensor; cycled over the tensors.
PRESENCE = {
    "all present": ("1111",),
    "shallow follower": ("1111", "1011", "1011"),
    "nested followers": ("1111", "1011", "1001", "1000"),
    "anchor absent in places": ("1111", "0111", "0100", "1001"),
    "follower absent everywhere": ("1011",),
    "anchor absent everywhere": ("0111",),
    "absent in all tasks": ("0000", "1111", "0000", "1010"),
}


def task_gradients(
    num_tasks: int = 4,
    *,
    shapes: Sequence[tuple[int, ...]] = RAGGED_SHAPES,
    presence: Sequence[str] = ("1" * 8,),
    dtype: torch.dtype = torch.float64,
    correlation: float = 0.0,
    seed: int = 0,
) -> list[list[torch.Tensor | None]]:
    """K lists of gradients; every task but the first has about that cosine with the first."""
    generator = torch.Generator().manual_seed(seed)
    lists: list[list[torch.Tensor | None]] = [[] for _ in range(num_tasks)]
    for position, shape in enumerate(shapes):
        shared = torch.randn(shape, generator=generator, dtype=torch.float64)
        mask = presence[position % len(presence)]
        for task, own in enumerate(lists):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            grad = (
                shared if task == 0 else correlation * shared + (1 - correlation**2) ** 0.5 * noise
            )
            own.append(grad.to(dtype) if mask[task] == "1" else None)
    return lists


def near_antiparallel(
    scale: float, epsilon: float, dtype: torch.dtype, *, size: int = 100_003, seed: int = 0
) -> list[list[torch.Tensor | None]]:
    """CE s and two followers of that scale that almost cancel: R (-s + eps n) and -R n + noise."""
    generator = torch.Generator().manual_seed(seed)
    anchor, noise, other = torch.randn(3, size, generator=generator, dtype=torch.float64)
    first = scale * (-anchor + epsilon * noise)
    second = -scale * noise + other
    return [[grad.to(dtype)] for grad in (anchor, first, second)]


def patterns_of(lists: Sequence[Sequence[torch.Tensor | None]]) -> list[tuple[int, ...]]:
    """Sets of tasks with a gradient, in the order of first appearance."""
    found: list[tuple[int, ...]] = []
    for entries in zip(*lists, strict=True):
        present = tuple(task for task, grad in enumerate(entries) if grad is not None)
        if present and present not in found:
            found.append(present)
    return found


def relative_error(
    result: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]
) -> float:
    """|result - expected| / |expected| over the whole lists; None must match None."""
    difference = norm = 0.0
    for x, y in zip(result, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.shape == y.shape
            difference += float((x.double() - y.double()).square().sum())
            norm += float(y.double().square().sum())
    return (difference / norm) ** 0.5 if norm else difference**0.5


def every_presence_of(num_tasks: int, num_tensors: int) -> Iterator[tuple[str, ...]]:
    """Every way in which tasks can have or lack gradients at so many tensors."""
    masks = ["".join(bits) for bits in product("01", repeat=num_tasks)]
    return product(masks, repeat=num_tensors)


def native_on_gpu() -> bool:
    """Whether the extension is there and built with CUDA."""
    return unavailable_reason("native") is None and hasattr(
        torch.ops.drivekd_native, "cuda_version"
    )
