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


@dataclass(frozen=True)
class Gradients:
    """Lists of task gradients of one model: elements of each tensor, and the number of tasks."""

    sizes: tuple[int, ...]
    tasks: int = 4

    @property
    def elements(self) -> int:
        """Of one task's gradients."""
        return sum(self.sizes)


def _decoder(layers: int, width: int, kv_width: int, inner: int, vocabulary: int) -> Gradients:
    """A decoder with biases at q, k, v and one embedding, tied to the head."""
    attention = [width * width, width, *2 * [width * kv_width, kv_width], width * width]
    layer = [*attention, *3 * [width * inner], width, width]
    return Gradients((vocabulary * width, *layers * layer, width))


# Qwen2-0.5B: 24 layers, 14 heads and 2 key heads of 64; 290 tensors, 494 M parameters.
MODEL_GRADIENTS = _decoder(24, 896, 128, 4864, 151_936)
RAGGED_GRADIENTS = Gradients(tuple(1_000 + 1_215 * (i * i % 200) for i in range(300)))
SMALL_GRADIENTS = _decoder(4, 128, 64, 512, 2_000)


@dataclass(frozen=True)
class Decoder:
    """A language model of Qwen2's kind; heads are width / heads wide."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool  # whether embedding and head are one matrix


@dataclass(frozen=True)
class Tower:
    """A vision transformer; a token of its pictures is 28 x 28 pixels."""

    layers: int
    width: int
    heads: int
    inner: int
    picture: int  # pixels a side

    @property
    def tokens(self) -> int:
        """Of one picture, as the language model sees it."""
        return (self.picture // 28) ** 2


@dataclass(frozen=True)
class Step:
    """One sample of a multi-teacher training step: pictures, then text."""

    student: Decoder
    teacher: Decoder
    tower: Tower  # of both
    views: int
    text: int
    image_token: int  # an id that both vocabularies have and text does not use

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.views * self.tower.tokens + self.text


# InternVL3-1B from 8B: Qwen2.5-0.5B and 7B, each with an InternViT of 300 M parameters.
STEP_MODELS = (
    Decoder(24, 896, 14, 2, 4864, 151_936, tied=True),
    Decoder(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    Tower(24, 1024, 16, 4096, 448),
)
GPU_STEPS = {
    f"step-{views}-views": Step(*STEP_MODELS, views, TEXT_TOKENS, image_token=151_667)
    for views in (6, 2)
}
TOY_STEP = Step(
    Decoder(4, 64, 4, 2, 96, 320, tied=True),
    Decoder(6, 96, 6, 3, 128, 352, tied=False),
    Tower(2, 32, 2, 64, 56),
    views=3,
    text=11,
    image_token=300,
)
