"""The encoder that fits a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from drivekd.data.encode import Encoder, ProcessorEncoder, SingleTileEncoder
from drivekd.errors import RecipeError
from drivekd.train.recipe import EncoderConfig
from drivekd.train.teachers import read_config

_TILE_SETTINGS = ("image_size", "image_mean", "image_std", "start_image_token", "end_image_token")


def build_encoder(
    settings: EncoderConfig, checkpoint: str | Path, root: str | Path | None
) -> tuple[Encoder, Any]:
    """Make the encoder of a checkpoint.

    Args:
        settings: The recipe's encoder settings.
        checkpoint: Folder or hub name of the student.
        root: Folder that relative image paths start from.

    Returns:
        The encoder, and the tokenizer or processor to save beside the student.

    Raises:
        RecipeError: A setting is missing for this checkpoint, or belongs to the other kind; or
            the checkpoint is remote code.
        OSError: The checkpoint has no tokenizer or processor.
    """
    try:
        config = read_config(checkpoint)
    except ValueError as error:  # remote code
        raise RecipeError(f"student: {error}") from error
    kind = settings.kind
    if kind == "auto":
        is_internvl = hasattr(config, "image_seq_length") and hasattr(config, "downsample_ratio")
        kind = "single_tile" if is_internvl else "processor"
    if kind == "processor":
        given = [name for name in _TILE_SETTINGS if getattr(settings, name) is not None]
        if given:
            raise RecipeError(
                f"encoder.{given[0]} belongs to kind 'single_tile', but the encoder of "
                f"{config.model_type} is its processor"
            )
        processor = transformers.AutoProcessor.from_pretrained(checkpoint)
        return ProcessorEncoder(processor, root=root), processor
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return _single_tile(settings, checkpoint, config, tokenizer, root), tokenizer


def _single_tile(
    settings: EncoderConfig,
    checkpoint: str | Path,
    config: Any,
    tokenizer: Any,
    root: str | Path | None,
) -> SingleTileEncoder:
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None or not hasattr(config, "image_seq_length"):
        raise RecipeError(
            f"{checkpoint} ({config.model_type}) has no image_token_id and image_seq_length; the "
            "single_tile encoder needs both, use encoder.kind=processor"
        )
    size = settings.image_size or config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = settings.image_mean, settings.image_std
    if mean is None or std is None:
        saved = _preprocessor(checkpoint)
        mean = saved["image_mean"] if mean is None else mean
        std = saved["image_std"] if std is None else std
    start, end = settings.start_image_token, settings.end_image_token
    return SingleTileEncoder(
        tokenizer,
        image_size=(height, width),
        image_seq_length=config.image_seq_length,
        image_token=tokenizer.convert_ids_to_tokens(image_token_id),
        image_mean=mean,
        image_std=std,
        start_image_token=start or getattr(tokenizer, "start_image_token", None),
        end_image_token=end or getattr(tokenizer, "end_image_token", None),
        root=root,
    )


def _preprocessor(checkpoint: str | Path) -> dict[str, Any]:
    """The checkpoint's saved image settings."""
    try:
        saved, _ = transformers.ImageProcessingMixin.get_image_processor_dict(checkpoint)
    except OSError as error:
        raise RecipeError(
            f"{checkpoint} has no preprocessor_config.json; give encoder.image_mean and "
            "encoder.image_std"
        ) from error
    if "image_mean" not in saved or "image_std" not in saved:
        raise RecipeError(
            f"the preprocessor_config.json of {checkpoint} has no image_mean and image_std; give "
            "them under encoder"
        )
    return dict(saved)
