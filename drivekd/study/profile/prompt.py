"""One prompt, always the same, for models whose speed is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drivekd.data import Record
from drivekd.data.collate import collate_features
from drivekd.errors import RecipeError
from drivekd.tokens import TokenLayout, reads_text_alone
from drivekd.train.encoders import build_encoder
from drivekd.train.recipe import EncoderConfig

_SEED = 0
# Ids of tokens that stand for something else than text, in the configs of the families.
_SPECIAL = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
IMAGE_SIZE = (448, 448)


@dataclass(frozen=True)
class Prompt:
    """Model inputs of one conversation that waits for its answer.

    Attributes:
        inputs: As encoders give them: `input_ids` (N,) int64, and what belongs to the images.
        images: Number of images.
        source: Where it comes from, in words.
    """

    inputs: Mapping[str, Tensor]
    images: int
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens, those of images among them."""
        return len(self.inputs["input_ids"])

    def image_tokens(self, config: Any) -> int:
        """Number of tokens that images take, as a model of this config reads the prompt."""
        if reads_text_alone(config) or not self.images:
            return 0
        return int(TokenLayout.from_batch(self.batch(1), config).is_vision.sum())

    def batch(self, size: int) -> dict[str, Tensor]:
        """Model inputs of so many copies; there is no padding."""
        return collate_features([self.inputs] * size, pad_token_id=0)


def record_prompt(
    record: Record, checkpoint: str | Path, root: Path, encoding: EncoderConfig
) -> Prompt:
    """The prompt of a record, encoded as a checkpoint wants it.

    Raises:
        DataError: The record cannot be encoded.
        RecipeError: A setting of the encoder is missing or does not belong to this checkpoint.
        OSError: The checkpoint has no tokenizer or processor, or an image does not exist.
    """
    encoder: Any
    encoder, _ = build_encoder(encoding, checkpoint, root)
    inputs = encoder.encode_prompt(record)
    return Prompt(inputs, len(record.images), f"record {record.id or 0!r}")


def synthetic_prompt(
    config: Any, *, text_tokens: int, images: int, image_size: tuple[int, int] | None = None
) -> Prompt:
    """Random text and pictures of noise, from a config alone.

    Args:
        config: Of InternVL and its kin, Qwen-VL (2, 2.5, 3) or a text model.
        text_tokens: Tokens beside those of the images and the marks around them.
        images: Number of images.
        image_size: (height, width) in pixels; None is the vision tower's own, for Qwen-VL 448 x
            448. For Qwen-VL it is rounded to what its patches make.

    Raises:
        RecipeError: A text model is to see images, or pictures cannot be made for this family.
    """
    generator = torch.Generator().manual_seed(_SEED)
    text_config = config.get_text_config(decoder=True)
    special = {getattr(own, name, None) for own in (config, text_config) for name in _SPECIAL}
    ordinary = [i for i in range(min(text_config.vocab_size, 10_000)) if i not in special]
    words = torch.tensor(ordinary)
    text = words[torch.randint(len(words), (text_tokens,), generator=generator)]
    inputs: dict[str, Tensor] = {}
    marked = torch.empty(0, dtype=torch.int64)
    if images:
        marked, inputs = _pictures(config, images, image_size, generator)
    ids = torch.cat([marked.repeat(images), text])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    source = f"synthetic, {text_tokens} text tokens and {images} images"
    return Prompt({"input_ids": ids, **inputs}, images, source)


def _pictures(
    config: Any, images: int, size: tuple[int, int] | None, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens of one image with the marks around them, and the inputs of all images."""
    vision = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None)
    if vision is None or token is None:
        raise RecipeError(f"{config.model_type} reads no images; give --images 0")
    if hasattr(config, "image_seq_length") and hasattr(config, "downsample_ratio"):
        own = vision.image_size
        own = (own, own) if isinstance(own, int) else tuple(own)
        if size is not None and size != own:
            raise RecipeError(
                f"--image-size is {size[0]} x {size[1]}, but the vision tower of "
                f"{config.model_type} takes {own[0]} x {own[1]} only"
            )
        pixels = torch.randn(images, 3, *own, generator=generator)
        return torch.full((config.image_seq_length,), token), {"pixel_values": pixels}
    if hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        merge, patch = vision.spatial_merge_size, vision.patch_size
        cells = [max(1, round(edge / (patch * merge))) for edge in size or IMAGE_SIZE]
        grid = [1, cells[0] * merge, cells[1] * merge]
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        values = channels * vision.temporal_patch_size * patch * patch
        pixels = torch.randn(images * grid[1] * grid[2], values, generator=generator)
        marks = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        start, end = ([] if mark is None else [mark] for mark in marks)
        ids = torch.tensor([*start, *[token] * (cells[0] * cells[1]), *end])
        return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid] * images)}
    raise RecipeError(
        f"no pictures can be made for {config.model_type} from its config; give --records with a "
        "record that has images, or --images 0"
    )
