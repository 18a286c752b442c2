"""Greedy answers of a vision-language model to the questions of records, batched for speed.

Nothing here knows a domain: scoring the answers is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

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
            model takes: tensors of shape (N,) are per token, all others (`pixel_values`,
            `image_grid_thw`, ...) per image, stacked along their first dimension.
        tokenizer: decodes the answers; its padding token fills the batch.
        records: the questions; answers that they hold are for `encode_prompt` to drop.
        batch_size: prompts a batch, at least 1. Large batches are fastest for tiny models.
        max_new_tokens: the longest answer, in tokens, at least 1.
        blank_images: replace every image by zeros after normalisation, that is, by one flat
            picture of the normaliser's mean colour: the control that shows what pixels add.

    Returns:
        One answer a record, in the order of `records`, without special tokens and outer spaces.

    Raises:
        ValueError: `batch_size` or `max_new_tokens` below 1, or a tokenizer without padding token.
        DataError: `blank_images` for a record without `pixel_values`, or prompts in one batch
            that do not share their model inputs.
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
            order = sorted(range(len(prompts)), key=lambda i: (_signature(prompts[i]), i))
            for rows in _batches(order, prompts, batch_size):
                inputs = _left_pad([prompts[i] for i in rows], tokenizer.pad_token_id, model)
                texts = _generate(model, tokenizer, inputs, max_new_tokens)
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
            f"blank_images: record {record.id!r} has no pixel_values; "
            "score text-only records without blank_images"
        )
    prompt["pixel_values"] = torch.zeros_like(prompt["pixel_values"])


def _signature(prompt: Mapping[str, Tensor]) -> tuple[tuple[str, ...], int]:
    """Sort key: prompts with the same model inputs lie together, short ones first."""
    return tuple(sorted(prompt)), prompt["input_ids"].shape[0]


def _batches(
    order: Sequence[int], prompts: Sequence[Mapping[str, Tensor]], batch_size: int
) -> Iterator[list[int]]:
    """Cut a sorted order into batches; records with and without images are kept apart."""
    rows: list[int] = []
    for i in order:
        if rows and (len(rows) == batch_size or prompts[i].keys() != prompts[rows[0]].keys()):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def _left_pad(
    prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int, model: PreTrainedModel
) -> dict[str, Tensor]:
    """One batch on the model's device: tokens (B, N) padded on the left, images stacked."""
    lengths = [prompt["input_ids"].shape[0] for prompt in prompts]
    longest = max(lengths)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
    batch = {"attention_mask": mask}
    for name in prompts[0]:
        values = [prompt[name] for prompt in prompts]
        if name == "attention_mask":
            continue
        if all(v.shape == (n,) for v, n in zip(values, lengths, strict=True)):
            padded = values[0].new_full(mask.shape, pad_token_id if name == "input_ids" else 0)
            padded[mask.bool()] = torch.cat(values)
            batch[name] = padded
        else:
            batch[name] = _stack_images(name, values)
    return {
        name: v.to(model.device, model.dtype if v.is_floating_point() else None)
        for name, v in batch.items()
    }


def _stack_images(name: str, values: Sequence[Tensor]) -> Tensor:
    """Concatenate per-image inputs of several prompts; a mismatch names the input."""
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        raise DataError(
            f"{name} has shapes {sorted(shapes)} in one batch; "
            "prompts of a batch need images of one size"
        )
    return torch.cat(list(values))


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of one left-padded batch, decoded."""
    settings: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if model.generation_config.eos_token_id is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    tokens = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, **settings
    )
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new_tokens.cpu(), skip_special_tokens=True)
    return [text.strip() for text in texts]
