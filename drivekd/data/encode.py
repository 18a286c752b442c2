"""Records to model inputs: chat template, image tokens, pixels, and labels on answers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drivekd.data.conversation import (
    Template,
    Turn,
    apply_template,
    check_record,
    check_reserved,
    count_placeholders,
    describe_record,
    load_image,
    split_answers,
    turns_of,
)
from drivekd.data.records import IMAGE_PLACEHOLDER
from drivekd.errors import DataError

if TYPE_CHECKING:
    from drivekd.data.records import Record

IGNORE_INDEX = -100
# Model inputs with one entry per token; everything else an encoder returns counts images.
TOKEN_KEYS = frozenset({"attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids"})


class Encoder(Protocol):
    """Turns one record into unbatched model inputs on the CPU."""

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """Encode a record with its answers: `input_ids`, `labels` and model inputs."""
        ...

    def encode_prompt(self, record: Record) -> dict[str, Tensor]:
        """Encode a record up to and including the generation prompt, without labels."""
        ...


class SingleTileEncoder:
    """Encoder for models that see every image as one tile of a fixed size (InternVL and kin).

    Every image is squashed to one tile (bicubic, aspect ratio lost, as in the public Drive-KD
    code) and each `<image>` becomes `start_image_token`, `image_seq_length` times `image_token`
    and `end_image_token`. The text goes through the tokenizer's own chat template, any number
    of turns. Prompt and answer are tokenized apart, so that a training prompt has exactly the
    ids of the prompt at generation. Text-only records are legal and give no `pixel_values`.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        image_size: (height, width) of the tile in pixels.
        image_seq_length: Tokens per image, at least 1.
        image_token: The placeholder token of the model, one id of the vocabulary.
        image_mean: Mean per RGB channel, subtracted after division by 255.
        image_std: Standard deviation per RGB channel.
        start_image_token: Token written before an image's tokens; None for none.
        end_image_token: Token written after them; None for none.
        root: Folder that relative image paths start from; None is the working directory.

    Raises:
        ValueError: A size, mean or standard deviation is out of range, the tokenizer has no chat
            template, or one of the image tokens is not a single id of its vocabulary.

    Source: Colamentos2023/Drive-KD `intern/image_loader.py` (one tile an image).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_size: tuple[int, int],
        image_seq_length: int,
        image_token: str,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        start_image_token: str | None = None,
        end_image_token: str | None = None,
        root: str | Path | None = None,
    ) -> None:
        if len(image_size) != 2 or min(image_size) < 1:
            raise ValueError(f"image_size is {image_size}, wanted (height, width) in pixels")
        if image_seq_length < 1:
            raise ValueError(f"image_seq_length is {image_seq_length}, wanted at least 1")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(
                f"image_mean is {image_mean} and image_std {image_std}; wanted three numbers "
                "each, standard deviations above 0"
            )
        if not tokenizer.chat_template:
            raise ValueError("tokenizer has no chat template; set tokenizer.chat_template")
        for token in (image_token, start_image_token, end_image_token):
            if token is not None and not _is_one_token(tokenizer, token):
                raise ValueError(
                    f"{token!r} is not one token of the tokenizer; add it with "
                    "tokenizer.add_special_tokens or name the model's own image token"
                )
        self.tokenizer = tokenizer
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = _token_ids(tokenizer, image_token)[0]
        self.root = None if root is None else Path(root)
        self._mean = torch.tensor(tuple(image_mean), dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(tuple(image_std), dtype=torch.float32).view(3, 1, 1)
        self._image_text = (
            (start_image_token or "") + image_token * image_seq_length + (end_image_token or "")
        )
        self.reserved_tokens = tuple(
            token
            for token in (image_token, start_image_token, end_image_token)
            if token is not None and token != IMAGE_PLACEHOLDER
        )

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """Encode a record with its answers.

        Args:
            record: Messages, images and question type; the last message is the assistant's.

        Returns:
            `input_ids` (N,) int64; `labels` (N,) int64, -100 outside the assistant's answers,
            each answer with its end token; `pixel_values` (num_images, 3, H, W) float32 unless
            the record has no image.

        Raises:
            DataError: Placeholders and images do not match, an image is missing or unreadable,
                a message holds a reserved image token, or the template cannot be split.
        """
        ids, labels = self._encode(record, needs_answer=True)
        return self._pack(record, ids) | {"labels": torch.tensor(labels, dtype=torch.int64)}

    def encode_prompt(self, record: Record) -> dict[str, Tensor]:
        """Encode a record up to and including the generation prompt of its last answer.

        Args:
            record: As for `__call__`; a closing assistant message is left out.

        Returns:
            The dict of `__call__` without `labels`.

        Raises:
            DataError: As in `__call__`.
        """
        ids, _ = self._encode(record, needs_answer=False)
        return self._pack(record, ids)

    def _encode(self, record: Record, *, needs_answer: bool) -> tuple[list[int], list[int]]:
        """Ids and labels; earlier answers are cut out in prompts too, so that both agree."""
        check_record(record, needs_answer=needs_answer)
        check_reserved(record, self.reserved_tokens)
        turns = turns_of(record, drop_answer=not needs_answer)
        ids: list[int] = []
        labels: list[int] = []
        for piece in split_answers(record, turns, self._template(turns)):
            text = piece.text.replace(IMAGE_PLACEHOLDER, self._image_text)
            piece_ids = _token_ids(self.tokenizer, text)
            ids += piece_ids
            labels += piece_ids if piece.is_answer else [IGNORE_INDEX] * len(piece_ids)
        return ids, labels

    def _template(self, turns: Sequence[Turn]) -> Template:
        messages = [{"role": role, "content": content} for role, content in turns]

        def render(count: int, add_generation_prompt: bool) -> str:
            return apply_template(self.tokenizer, messages[:count], add_generation_prompt)

        return render

    def _pack(self, record: Record, ids: list[int]) -> dict[str, Tensor]:
        """Check the number of image tokens and add the pixels."""
        wanted = len(record.images) * self.image_seq_length
        found = ids.count(self.image_token_id)
        if found != wanted:
            raise DataError(
                f"{describe_record(record)}: the templated text has {found} image tokens, "
                f"{len(record.images)} images need {wanted}; the chat template drops or repeats "
                f"{IMAGE_PLACEHOLDER}"
            )
        encoded = {"input_ids": torch.tensor(ids, dtype=torch.int64)}
        if record.images:
            encoded["pixel_values"] = torch.stack(
                [self._pixels(load_image(record, path, self.root)) for path in record.images]
            )
        return encoded

    def _pixels(self, image: Image.Image) -> Tensor:
        """One image to a normalised (3, H, W) float32 tile."""
        height, width = self.image_size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
        return (pixels.to(torch.float32) / 255.0 - self._mean) / self._std


class ProcessorEncoder:
    """Encoder over a Hugging Face multi-modal processor (Qwen-VL, LLaVA, InternVL tiling, ...).

    The processor templates, tokenizes and prepares the images; labels come from comparing the
    ids of the templated prompt with those of the whole conversation, which costs one further
    call of the processor, images included, for every answer.

    Args:
        processor: A processor with `apply_chat_template` and a chat template; called as
            `processor(text=[...], images=[...] or None, add_special_tokens=False,
            return_tensors="pt")`.
        root: Folder that relative image paths start from; None is the working directory.

    Raises:
        ValueError: The processor has no chat template.
    """

    def __init__(
        self,
        processor: Any,
        *,
        root: str | Path | None = None,
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError("processor has no chat template; set processor.chat_template")
        self.processor = processor
        self.root = None if root is None else Path(root)
        named = [getattr(processor, name, None) for name in ("image_token", "video_token")]
        self.reserved_tokens = tuple(
            token for token in named if isinstance(token, str) and token != IMAGE_PLACEHOLDER
        )

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """Encode a record with its answers.

        Args:
            record: Messages, images and question type; the last message is the assistant's.

        Returns:
            `input_ids` (N,) int64, `labels` (N,) int64 (-100 outside the assistant's answers,
            each answer with its end token), and whatever the processor gives for the images.

        Raises:
            DataError: Placeholders and images do not match, an image is missing or unreadable,
                a message holds the processor's own image token, or prompt and whole conversation
                do not share their first tokens.
        """
        check_record(record, needs_answer=True)
        check_reserved(record, self.reserved_tokens)
        turns = turns_of(record, drop_answer=False)
        pieces = split_answers(record, turns, self._template(turns))
        images = [load_image(record, path, self.root) for path in record.images]
        encoded = self._process_of(record, "".join(piece.text for piece in pieces), images)
        ids = encoded["input_ids"]
        labels = torch.full_like(ids, IGNORE_INDEX)
        text, start = "", 0
        for piece in pieces:
            text += piece.text
            end = len(ids)
            if piece is not pieces[-1]:
                count = count_placeholders(turns[: piece.num_messages])
                end = self._prefix_length(record, text, images[:count], ids)
            if piece.is_answer:
                labels[start:end] = ids[start:end]
            start = end
        return encoded | {"labels": labels}

    def encode_prompt(self, record: Record) -> dict[str, Tensor]:
        """Encode a record up to and including the generation prompt of its last answer.

        Args:
            record: As for `__call__`; a closing assistant message is left out.

        Returns:
            The dict of `__call__` without `labels`.

        Raises:
            DataError: As in `__call__`.
        """
        check_record(record, needs_answer=False)
        check_reserved(record, self.reserved_tokens)
        turns = turns_of(record, drop_answer=True)
        images = [load_image(record, path, self.root) for path in record.images]
        pieces = split_answers(record, turns, self._template(turns))
        return self._process_of(record, "".join(piece.text for piece in pieces), images)

    def _template(self, turns: Sequence[Turn]) -> Template:
        conversation = [{"role": role, "content": _content(content)} for role, content in turns]

        def render(count: int, add_generation_prompt: bool) -> str:
            return apply_template(self.processor, conversation[:count], add_generation_prompt)

        return render

    def _process_of(
        self, record: Record, text: str, images: list[Image.Image]
    ) -> dict[str, Tensor]:
        """Call the processor; what it refuses, such as a picture's shape, is the record's fault."""
        try:
            return self._process(text, images)
        except ValueError as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise DataError(
                f"{describe_record(record)}: the processor refuses it ({error}); its images are "
                f"{sizes or 'none'}"
            ) from error

    def _process(self, text: str, images: list[Image.Image]) -> dict[str, Tensor]:
        """Call the processor on one text and take its batch dimension off the token inputs."""
        output: Mapping[str, Tensor] = self.processor(
            text=[text], images=images or None, add_special_tokens=False, return_tensors="pt"
        )
        encoded = {
            key: value[0] if key in TOKEN_KEYS or key == "input_ids" else value
            for key, value in output.items()
            if key != "attention_mask"
        }
        encoded["input_ids"] = encoded["input_ids"].to(torch.int64)
        return encoded

    def _prefix_length(
        self, record: Record, text: str, images: list[Image.Image], ids: Tensor
    ) -> int:
        """Number of tokens of a prefix of the text, checked against the ids of the whole."""
        prefix = self._process(text, images)["input_ids"]
        if len(prefix) > len(ids) or not torch.equal(prefix, ids[: len(prefix)]):
            raise DataError(
                f"{describe_record(record)}: the tokens of the prompt are not the first tokens "
                "of the whole conversation, so the answer cannot be told from the prompt"
            )
        return len(prefix)


def _content(text: str) -> list[dict[str, str]]:
    """Split a message at its placeholders into the typed parts that processors expect."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index > 0:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without added special tokens."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _is_one_token(tokenizer: Any, token: str) -> bool:
    ids = _token_ids(tokenizer, token)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id
