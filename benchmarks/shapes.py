"""Named shapes; a benchmark uses these and no others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A student and a teacher layer over the same tokens."""

    num_samples: int
    num_tokens: int
    student: tuple[int, int, int]  # query heads, key heads, head dim
    teacher: tuple[int, int, int]
    num_vision: int = 0


SMALL = Pair(1, 1024, (4, 4, 32), (8, 8, 64))
INTERNVL_1B_FROM_8B = Pair(1, 512, (14, 2, 64), (28, 4, 128), num_vision=256)
MANY_SHORT = Pair(64, 72, (4, 2, 12), (6, 2, 16), num_vision=36)

CPU_PAIRS = {
    "small-1024": SMALL,
    "internvl-1b-from-8b-512": INTERNVL_1B_FROM_8B,
    "64x72": MANY_SHORT,
}

RAGGED_GRADIENTS = {"tensors": 300, "elements": 30_000_000, "tasks": 4}
