"""Named shapes; a benchmark uses these and no others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A student and a teacher layer over the same tokens; vision tokens come first."""

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

# One layer of a student and one of its teacher; a group of several layers is a multiple.
GPU_MODELS = {
    "internvl3-1b-from-8b": ((14, 2, 64), (28, 4, 128)),
    "internvl3-2b-from-38b": ((12, 2, 128), (40, 8, 128)),
    "qwen2.5-vl-3b-from-7b": ((16, 2, 128), (28, 4, 128)),
}
VIEW_TOKENS, TEXT_TOKENS = 256, 512

# text_to_vision (perception, planning) by number of camera views, full (reasoning) by tokens.
GPU_PAIRS = {
    f"{model}/{name}": Pair(1, tokens, student, teacher, num_vision)
    for model, (student, teacher) in GPU_MODELS.items()
    for name, tokens, num_vision in (
        *(
            (f"t2v-{views}", views * VIEW_TOKENS + TEXT_TOKENS, views * VIEW_TOKENS)
            for views in (1, 6)
        ),
        *((f"full-{tokens}", tokens, 0) for tokens in (2048, 8192, 20480, 65536)),
    )
}

RAGGED_GRADIENTS = {"tensors": 300, "elements": 30_000_000, "tasks": 4}
RAGGED_GRADIENTS_GPU = {"tensors": 290, "elements": 494_000_000, "tasks": 4}  # InternVL3-1B's size
