"""Drive-KD's attention losses from maps in memory, as its public training step has them.

Written from a description of the public code (Colamentos2023/Drive-KD, intern/trainer.py), one
sample at a time: maps are (1, H, N, N), one of each layer, and keep their dtype throughout.
"""

from collections.abc import Sequence

from torch import Tensor

Maps = Sequence[Tensor]


def masked_difference(student_map: Tensor, teacher_map: Tensor, is_image: Tensor) -> Tensor:
    """Text rows x image columns; causally dead cells count in the denominator."""
    cells = (~is_image)[:, None] & is_image[None, :]
    squares = (student_map - teacher_map).square() * cells
    return squares.sum() / max(int(cells.sum()), 1)


def perception(student: Maps, teacher: Maps, is_image: Tensor) -> Tensor:
    """First layers."""
    return masked_difference(student[0].mean(1)[0], teacher[0].mean(1)[0], is_image)


def planning(student: Maps, teacher: Maps, is_image: Tensor) -> Tensor:
    """Layers before the last."""
    return masked_difference(student[-2].mean(1)[0], teacher[-2].mean(1)[0], is_image)


def reasoning(student: Maps, teacher: Maps, is_image: Tensor) -> Tensor:
    """Layers 0 .. -2, both ends; a student layer against the mean of consecutive teacher layers."""
    k, m = len(student) - 1, len(teacher) - 1
    size = max(1, m - k + 1)
    total = 0.0
    for i in range(k):
        start = min(i, m - size)
        target = sum(teacher[j].mean(1) for j in range(start, start + size)) / size
        total = total + (student[i].mean(1) - target).square().mean(-1).mean()
    return total / k


PUBLIC_LOSSES = {"perception": perception, "reasoning": reasoning, "planning": planning}
