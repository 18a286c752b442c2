"""A word-level tokenizer, records with small pictures, and an encoder for `toy_models.internvl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from drivekd.data import Message, Record, SingleTileEncoder
from tests.helpers.toy_models import IMAGE, IMAGE_TOKENS

PAD, BEGIN, END, UNKNOWN, USER, ASSISTANT = 0, 1, 2, 3, 4, 5
IMAGE_TOKEN = "<IMG>"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPECIAL = {
    "<pad>": PAD,
    "<begin>": BEGIN,
    "<end>": END,
    "<unk>": UNKNOWN,
    "<user>": USER,
    "<assistant>": ASSISTANT,
    IMAGE_TOKEN: IMAGE,
}


def tokenizer():
    """Words w6 .. w299, and the ids that `toy_models` gives its special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(6, 300)} | _SPECIAL
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", IMAGE_TOKEN],
        chat_template=TEMPLATE,
    )


def encoder(root: Path) -> SingleTileEncoder:
    """One 56 x 56 tile, four tokens an image, as `toy_models.internvl` wants it."""
    return SingleTileEncoder(
        tokenizer(),
        image_size=(56, 56),
        image_seq_length=IMAGE_TOKENS,
        image_token=IMAGE_TOKEN,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
        root=root,
    )


def records(root: Path, question_types: Sequence[str], *, seed: int = 0) -> list[Record]:
    """One record with one picture per question type, of different lengths."""
    generator = np.random.default_rng(seed)
    made = []
    for index, question_type in enumerate(question_types):
        name = f"{seed}-{index}.png"
        pixels = generator.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        words = [f"w{i}" for i in generator.integers(6, 300, 12)]
        question = "<image> " + " ".join(words[: 4 + index % 4])
        answer = " ".join(words[8 : 9 + index % 3])
        messages = (Message("user", question), Message("assistant", answer))
        made.append(Record(messages, (name,), question_type, f"{question_type}-{index}"))
    return made
