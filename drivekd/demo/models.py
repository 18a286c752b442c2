"""The demo's vision-language models: Hugging Face InternVL with a Qwen2 decoder, at toy size.

Real classes, so that whatever works here works on a real checkpoint: a vision tower with a square
token grid, a projector, a decoder with grouped-query attention and rotary positions, a tokenizer
with a chat template. Only the sizes are small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from drivekd.data import Record
from drivekd.data.encode import SingleTileEncoder

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

IMAGE_SIZE = (48, 168)  # pixels, height x width: the driving world's frame
IMAGE_MEAN = (0.22, 0.22, 0.22)  # the asphalt, so that an empty patch is near 0
IMAGE_STD = (0.25, 0.25, 0.25)
GRID = (6, 6)  # vision tokens, rows x columns: one lane or shoulder by 13.3 m each
IMAGE_TOKEN, START_IMAGE, END_IMAGE = "<image>", "<img>", "</img>"
PAD, UNKNOWN, USER, ASSISTANT, END = "<pad>", "<unk>", "<user>", "<assistant>", "<end>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' <end>' }}{% endif %}{{ ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths of one toy InternVL."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_layers: int = 2


TEACHER = ModelSize(hidden=96, layers=6, heads=6, kv_heads=2, vision_hidden=64)
STUDENT = ModelSize(hidden=48, layers=4, heads=4, kv_heads=2, vision_hidden=32)


def build_tokenizer(records: Iterable[Record]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `records`, sorted, with the demo's chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNKNOWN, IMAGE_TOKEN, START_IMAGE, END_IMAGE, USER, ASSISTANT, END]
    split = pre_tokenizers.Split(Regex(r"[A-Z]\.|\w+|[^\w\s]"), behavior="isolated")
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    words = {
        word
        for record in records
        for message in record.messages
        for word, _ in splitter.pre_tokenize_str(message.content.replace(IMAGE_TOKEN, " "))
    }
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[IMAGE_TOKEN, START_IMAGE, END_IMAGE, USER, ASSISTANT],
        start_image_token=START_IMAGE,
        end_image_token=END_IMAGE,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> InternVLForConditionalGeneration:
    """A freshly initialised toy InternVL of the given size, on the CPU in float32."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    rows, columns = GRID
    config = InternVLConfig(
        vision_config={
            "hidden_size": size.vision_hidden,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * size.vision_hidden,
            "image_size": IMAGE_SIZE,
            "patch_size": (IMAGE_SIZE[0] // rows, IMAGE_SIZE[1] // columns),
            "initializer_range": 0.5 * size.vision_hidden**-0.5,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": 3 * size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 256,
            "initializer_range": 0.5 * size.hidden**-0.5,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=rows * columns,
        downsample_ratio=1.0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def save_model(
    model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Weights, tokenizer and how pictures are read: what `drivekd evaluate` and recipes take."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures) + "\n", encoding="utf-8")


class CachedEncoder:
    """The encoder that every toy model shares (one 168 x 48 tile, 36 vision tokens), remembering.

    The demo's frames fit in memory, and a frame is read in every epoch by every arm. Pixels are
    kept on `device`, so that they travel there once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, root: Path, *, device: str = "cpu"
    ) -> None:
        self._device = device
        self._encoder = SingleTileEncoder(
            tokenizer,
            image_size=IMAGE_SIZE,
            image_seq_length=GRID[0] * GRID[1],
            image_token=IMAGE_TOKEN,
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
            start_image_token=START_IMAGE,
            end_image_token=END_IMAGE,
            root=root,
        )
        self._samples: dict[str, dict[str, Tensor]] = {}
        self._prompts: dict[str, dict[str, Tensor]] = {}
        self._pixels: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """A record with its answer, as `SingleTileEncoder` gives it."""
        if record.id not in self._samples:
            self._samples[record.id] = self._shared(record, self._encoder(record))
        return dict(self._samples[record.id])

    def encode_prompt(self, record: Record) -> dict[str, Tensor]:
        """A record up to the generation prompt, as `SingleTileEncoder` gives it."""
        if record.id not in self._prompts:
            prompt = self._encoder.encode_prompt(record)
            self._prompts[record.id] = self._shared(record, prompt)
        return dict(self._prompts[record.id])

    def _shared(self, record: Record, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, with one copy of the pixels for all questions about a frame."""
        if record.images not in self._pixels:
            self._pixels[record.images] = encoded["pixel_values"].to(self._device)
        return {**encoded, "pixel_values": self._pixels[record.images]}
