"""Records as templated conversations: checks, pictures, and prompts told from answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from drivekd.data.pictures import is_deep
from drivekd.data.records import IMAGE_PLACEHOLDER
from drivekd.errors import DataError

if TYPE_CHECKING:
    from drivekd.data.records import Record

Template = Callable[[int, bool], str]  # (number of messages, add_generation_prompt) -> text
Turn = tuple[str, str]  # (role, content)


def describe_record(record: Record) -> str:
    """Name a record in an error message: by its id, else by the start of its first message."""
    if record.id:
        return f"record {record.id!r}"
    start = record.messages[0].content[:60] if record.messages else ""
    return f"record without id (it starts with {start!r})"


def load_image(record: Record, path: str, root: Path | None) -> Image.Image:
    """Open one image of a record as 8-bit RGB.

    Args:
        record: The record, for the error message.
        path: The image's path as the record gives it.
        root: Folder that relative paths start from; None is the working directory.

    Returns:
        The image, fully read, in mode "RGB". EXIF orientation is not applied.

    Raises:
        DataError: The file is missing, unreadable, damaged, or has more than 8 bits a channel.
    """
    full = Path(path) if root is None else root / path
    try:
        with Image.open(full) as image:
            if is_deep(image.mode):
                raise DataError(
                    f"{describe_record(record)}: image {full} has mode {image.mode!r}; images "
                    "need 8 bits a channel, convert it first"
                )
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(
            f"{describe_record(record)}: image {full} does not exist; check the path and root"
        ) from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{describe_record(record)}: image {full} cannot be read ({error})"
        ) from error


def check_record(record: Record, *, needs_answer: bool) -> None:
    """Check turns, answers and the number of image placeholders of one record."""
    name = describe_record(record)
    roles = [message.role for message in record.messages]
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken[0] != "user":
        raise DataError(f"{name}: the first message after the system prompt must be the user's")
    if needs_answer and roles[-1] != "assistant":
        raise DataError(f"{name}: the last message is by {roles[-1]!r}, training needs an answer")
    for message in record.messages:
        if message.role != "assistant":
            continue
        if not message.content.strip():
            raise DataError(f"{name}: an assistant message is empty, there is nothing to learn")
        if IMAGE_PLACEHOLDER in message.content:
            raise DataError(f"{name}: {IMAGE_PLACEHOLDER} stands in an assistant message")
    placeholders = count_placeholders(turns_of(record, drop_answer=False))
    if placeholders != len(record.images):
        raise DataError(
            f"{name}: {placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(record.images)} "
            f"images {list(record.images)}; each image needs exactly one placeholder"
        )


def check_reserved(record: Record, tokens: Sequence[str]) -> None:
    """Check that no message holds a token that stands for an image's place in the model."""
    for message in record.messages:
        for token in tokens:
            if token in message.content:
                raise DataError(
                    f"{describe_record(record)}: a message holds the reserved token "
                    f"{token!r}; write {IMAGE_PLACEHOLDER} where an image goes"
                )


def apply_template(owner: Any, messages: Sequence[Any], add_generation_prompt: bool) -> str:
    """The text of messages by a tokenizer's or processor's chat template.

    Raises:
        DataError: The template refuses the messages, as many do where roles do not alternate.
    """
    from jinja2 import TemplateError

    try:
        text = owner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses turns by {roles}: {error}") from error
    return str(text)


class Piece(NamedTuple):
    """A stretch of the templated conversation and the number of messages that it completes."""

    text: str
    is_answer: bool
    num_messages: int


def turns_of(record: Record, *, drop_answer: bool) -> list[Turn]:
    """The record's turns, on request without a closing answer."""
    turns = [(message.role, message.content) for message in record.messages]
    return turns[:-1] if drop_answer and turns[-1][0] == "assistant" else turns


def split_answers(record: Record, turns: Sequence[Turn], template: Template) -> list[Piece]:
    """Cut the templated turns into prompts and answers, in order.

    An answer is what the template appends to the generation prompt, end token included and
    the white space after it excluded. Turns that end with the user's end in a generation prompt;
    otherwise the text ends with the last answer.
    """
    is_open = turns[-1][0] != "assistant"
    template = _naming(record, template)
    whole = template(len(turns), is_open)
    pieces: list[Piece] = []
    position = 0
    for index, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        prompt, answered = template(index, True), template(index + 1, False)
        if not (whole.startswith(answered) and answered.startswith(prompt)):
            raise DataError(
                f"{describe_record(record)}: the chat template does not continue its own "
                f"generation prompt at message {index}, so the answer cannot be told from the "
                "prompt; split the record into single questions or use another template"
            )
        end = max(len(answered.rstrip()), len(prompt))
        pieces.append(Piece(whole[position : len(prompt)], False, index))
        pieces.append(Piece(whole[len(prompt) : end], True, index + 1))
        position = end
    if is_open:
        pieces.append(Piece(whole[position:], False, len(turns)))
    return pieces


def _naming(record: Record, template: Template) -> Template:
    """The template, whose errors name the record."""

    def render(count: int, add_generation_prompt: bool) -> str:
        try:
            return template(count, add_generation_prompt)
        except DataError as error:
            raise DataError(f"{describe_record(record)}: {error}") from error

    return render


def count_placeholders(turns: Sequence[Turn]) -> int:
    """Number of image placeholders in some turns."""
    return sum(content.count(IMAGE_PLACEHOLDER) for _, content in turns)
