"""Records: one question about one or more images, in the public Drive-KD layout.

A file is a JSON list of objects, a JSON object holding that list under ``data``, ``items``,
``samples``, ``dataset`` or ``records``, or JSON lines. Each object has ``messages`` (``role`` and
``content``, with an ``<image>`` placeholder per image), ``images`` (paths) and ``question_type``;
``id`` and ``meta`` are optional additions. In place of ``messages`` there may be ``question`` and
``answer``. `drivekd.data.formats` reads other layouts.

Source: layout of ``data/demo.json`` and the reading rules of ``qa_loader.py`` in the public
Drive-KD code. Unlike that code, nothing is dropped silently: every message is kept, and what cannot
be read is an error that names file and record.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivekd.data.files import is_lines_file
from drivekd.errors import DataError

ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"

_TYPE_KEYS = ("question_type", "type", "capability")
_SPELLINGS = {
    "percep": "perception",
    "perception": "perception",
    "perceptual": "perception",
    "reason": "reasoning",
    "reasoning": "reasoning",
    "plan": "planning",
    "planning": "planning",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: The text, with an ``<image>`` placeholder where an image goes.

    Raises:
        TypeError: If ``role`` or ``content`` is not a string.
        DataError: If the role is another one.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if not isinstance(self.role, str) or not isinstance(self.content, str):
            raise TypeError(
                f"role and content must be strings, got {type(self.role).__name__} and "
                f"{type(self.content).__name__}"
            )
        if self.role not in ROLES:
            raise DataError(f"role is {self.role!r}; it must be one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Record:
    """One question about images, with its answer.

    Args:
        messages: The conversation; the answers are the assistant messages.
        images: Paths, relative to the data set's root, in the order of the placeholders.
        question_type: The capability; any name is legal, the public ones are ``"perception"``,
            ``"reasoning"`` and ``"planning"``.
        id: A name that is unique in the data set, or empty.
        meta: Anything else that is known, as JSON values.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    question_type: str
    id: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Content of the first user message, or ``""``."""
        return next((m.content for m in self.messages if m.role == "user"), "")

    @property
    def answer(self) -> str:
        """Content of the last assistant message, or ``""``."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


def normalize_question_type(name: str) -> str:
    """Map an unambiguous spelling of a public capability to its name; keep any other name.

    Known are these names in any case, ``"percep"``, ``"perceptual"``, ``"reason"`` and ``"plan"``,
    a full stop behind them or not.
    What could mean several things, such as ``"p"`` or ``"decision"``, or is somebody's own, such as
    ``"planning_speed"``, stays as it is.

    Args:
        name: The name found in a file.

    Returns:
        ``"perception"``, ``"reasoning"``, ``"planning"``, or ``name`` without surrounding space.
    """
    stripped = name.strip()
    return _SPELLINGS.get(stripped.lower().removesuffix("."), stripped)


@dataclass(frozen=True)
class TypeNames:
    """How a file's names of question types become ours.

    Args:
        default: The type of records that name none; empty if there must be one.
        rename: Names found in the file, and what to call them.
    """

    default: str = ""
    rename: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, name: str) -> str:
        """The type that a name stands for."""
        normal = normalize_question_type(name)
        return self.rename.get(name.strip(), self.rename.get(normal, normal))

    def of(self, item: Mapping[str, Any]) -> tuple[str, str]:
        """The type of an item, and the key that said it (empty for the default).

        Raises:
            DataError: If there is none, it is no text, or two keys disagree.
        """
        named = [key for key in _TYPE_KEYS if item.get(key) is not None]
        if not named and self.default:
            return self.default, ""
        if not named:
            raise DataError(
                f"has no question type; one of {', '.join(_TYPE_KEYS)} is needed, or a type for "
                "all such records (--question-type)"
            )
        if "question_type" in named:
            named = ["question_type"]
        values = [item[key] for key in named]
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise DataError(f"{named[0]} must be a string that is not empty")
        names = [self.resolve(value) for value in values]
        if len(set(names)) > 1:
            raise DataError(
                f"{' and '.join(named)} disagree ({', '.join(names)}); set question_type"
            )
        return names[0], named[0]


def save_records(records: Iterable[Record], path: str | os.PathLike[str]) -> int:
    """Write records, one a line, so that the file is either the old one or the whole new one.

    Args:
        records: The records; an iterator is written as it comes.
        path: A ``.jsonl`` / ``.ndjson`` file, or a ``.json`` file (a list); its folder is made.

    Returns:
        The number of records.

    Raises:
        TypeError: If a ``meta`` holds something that is not a JSON value.
        ValueError: If a ``meta`` holds NaN or an infinity.
    """
    file = Path(path)
    start, between, end = ("", "\n", "\n") if is_lines_file(file) else ("[\n", ",\n", "\n]\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    count = 0
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(start)
            for record in records:
                line = json.dumps(_record_to_json(record), ensure_ascii=False, allow_nan=False)
                stream.write(between + line if count else line)
                count += 1
            stream.write(end if count or start else "")
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return count


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def record_from_json(item: Any, names: TypeNames) -> Record:
    """Make a record of an item in our layout.

    Args:
        item: The JSON value.
        names: How its question type is named.

    Returns:
        The record; keys that it does not know are in ``meta``.

    Raises:
        DataError: If the item is not usable.
    """
    item = require_object(item)
    images = image_paths(item, ("images", "image"))
    question_type, type_key = names.of(item)
    known = {"messages", "images", "image", "id", "meta", type_key}
    if "messages" not in item and isinstance(item.get("question"), str):
        messages = _question_and_answer(item, len(images))
        known |= {"question", "answer"}
    else:
        messages = _messages(item)
    return Record(messages, images, question_type, identifier(item), _meta(item, known))


def require_object(item: Any) -> dict[str, Any]:
    """The item, if it is an object; else a DataError."""
    if not isinstance(item, dict):
        raise DataError(f"is a {type(item).__name__}; a JSON object is needed")
    return item


def image_paths(item: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The image paths under the one of some keys that is there."""
    given = [key for key in keys if item.get(key) is not None]
    if len(given) > 1:
        raise DataError(f"has both {' and '.join(given)}; keep one")
    images = item[given[0]] if given else []
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise DataError(f"{given[0]} must be a path or a list of paths")
    return tuple(images)


def identifier(item: Mapping[str, Any]) -> str:
    """The item's id as text, or empty."""
    value = "" if item.get("id") is None else item["id"]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"id is a {type(value).__name__}; a string or an int is needed")
    return str(value)


def with_placeholders(question: str, count: int) -> str:
    """A question with a placeholder per image in front, unless it has any already."""
    if IMAGE_PLACEHOLDER in question:
        return question
    return f"{IMAGE_PLACEHOLDER}\n" * count + question


def _messages(item: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = item.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is missing or empty; a list of role and content is needed")
    parsed = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"messages[{index}] must be an object with role and content")
        parsed.append(
            make_message(message["role"], _text(message["content"]), f"messages[{index}]")
        )
    return tuple(parsed)


def make_message(role: Any, content: Any, where: str) -> Message:
    """A message; errors say where it stands."""
    try:
        return Message(role, content)
    except (DataError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error


def _text(content: Any) -> Any:
    """A content's text; typed parts become text with placeholders."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if kind == "image" and any(part.get(key) for key in ("image", "path", "url")):
            raise DataError("content has a part that names its own image; list it under images")
        if kind == "image":
            texts.append(IMAGE_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise DataError(f"content has a part of type {kind!r}; text and image are known")
    return "".join(texts)


def _question_and_answer(item: Mapping[str, Any], num_images: int) -> tuple[Message, ...]:
    question, answer = item["question"], item.get("answer")
    if not isinstance(answer, str):
        raise DataError(f"answer is a {type(answer).__name__}; a string is needed")
    user = Message("user", with_placeholders(question, num_images))
    return user, Message("assistant", answer)


def _meta(item: Mapping[str, Any], known: set[str]) -> dict[str, object]:
    meta = {} if item.get("meta") is None else item["meta"]
    if not isinstance(meta, dict):
        raise DataError(f"meta is a {type(meta).__name__}; a JSON object is needed")
    extra = {key: value for key, value in item.items() if key not in known}
    if clash := sorted(meta.keys() & extra.keys()):
        raise DataError(f"{', '.join(clash)} appears both in meta and beside it; keep one")
    return {**extra, **meta}


def _record_to_json(record: Record) -> dict[str, object]:
    item: dict[str, object] = {
        "messages": [{"role": m.role, "content": m.content} for m in record.messages],
        "images": list(record.images),
        "question_type": record.question_type,
    }
    if record.id:
        item["id"] = record.id
    if record.meta:
        item["meta"] = dict(record.meta)
    return item
