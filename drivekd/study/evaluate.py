"""Greedy answers of a vision-language model to the questions of records, batched for speed.

Nothing here knows a domain: scoring the answers is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from drivekd.data.collate import collate_features
from drivekd.data.conversation import describe_record
from drivekd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from drivekd.data import Record

# Records are encoded this many batches at a time: enough to sort by length, bounded in memory.
WINDOW_BATCHES = 8


class PromptEncoder(Protocol):
    """What `generate_answers` needs of an encoder."""

    def encode_prompt(self, record: Record) -> Mapping[str, Tensor]:
        """Model inputs of the conversation up to and including the generation prompt."""


def generate_answers(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int,
    max_new_tokens: int,
    blank_images: bool = False,
) -> list[str]:
    """Answer every record's question by greedy decoding.

    Prompts of similar length share a batch and are padded on the left; a record's answer does not
    depend on its companions (up to floating-point rounding). The model is in evaluation mode for
    the call, and its mode is restored afterwards.

    Args:
        model: a model with `generate`; inputs go to its device, floating ones in its dtype.
        encoder: gives, by `encode_prompt(record)`, `input_ids` (N,) int64, and whatever else the
            model takes (`drivekd.data.encode`).
        tokenizer: decodes the answers; its padding token fills the batch.
        records: the questions; answers that they hold are for `encode_prompt` to drop.
        batch_size: prompts a batch, at least 1. Large batches are fastest for tiny models.
        max_new_tokens: the longest answer, in tokens, at least 1.
        blank_images: replace every image by zeros after normalisation, that is, by one flat
            picture of the normaliser's mean colour: the control that shows what pixels add.

    Returns:
        One answer a record, in the order of `records`, without special tokens and outer spaces.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` below 1, a tokenizer without padding token,
            or prompts that do not fit into one batch.
        DataError: a record that cannot be encoded, or `blank_images` for one without pixels.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no padding token; set tokenizer.pad_token")
    answers = [""] * len(records)
    with _evaluation_mode(model):
        for start in range(0, len(records), WINDOW_BATCHES * batch_size):
            window = records[start : start + WINDOW_BATCHES * batch_size]
            prompts = [dict(encoder.encode_prompt(record)) for record in window]
            if blank_images:
                for record, prompt in zip(window, prompts, strict=True):
                    _blank_images(prompt, record)
            order = sorted(range(len(prompts)), key=lambda i: prompts[i]["input_ids"].shape[0])
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                batch = collate_features(
                    [prompts[i] for i in rows],
                    pad_token_id=tokenizer.pad_token_id,
                    padding_side="left",
                )
                texts = _generate(model, tokenizer, batch, max_new_tokens)
                for i, text in zip(rows, texts, strict=True):
                    answers[start + i] = text
    return answers


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """`model.eval()` inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _blank_images(prompt: dict[str, Tensor], record: Record) -> None:
    """Put zeros in the place of the prompt's pixels."""
    if "pixel_values" not in prompt:
        raise DataError(
            f"blank_images: {describe_record(record)} has no pixel_values; "
            "score text-only records without blank_images"
        )
    prompt["pixel_values"] = torch.zeros_like(prompt["pixel_values"])


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of one left-padded batch, decoded."""
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }
    settings: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if model.generation_config.eos_token_id is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    tokens = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, **settings
    )
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new_tokens.cpu(), skip_special_tokens=True)
    return [text.strip() for text in texts]
