"""Records: one question about one or more images, in the public Drive-KD layout.

A file is a JSON list of objects, a JSON object holding that list under ``data``, ``items``,
``samples``, ``dataset`` or ``records``, or JSON lines. Each object has ``messages`` (``role`` and
``content``, with an ``<image>`` placeholder per image), ``images`` (paths) and ``question_type``;
``id`` and ``meta`` are optional additions.

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

from drivekd.errors import DataError

ROLES = ("system", "user", "assistant")
IMAGE_PLACEHOLDER = "<image>"

_LIST_KEYS = ("data", "items", "samples", "dataset", "records")
_TYPE_KEYS = ("question_type", "type", "capability")
_CAPABILITY_PREFIXES = {"percep": "perception", "reason": "reasoning", "plan": "planning"}
_LINE_SUFFIXES = (".jsonl", ".ndjson")


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

    Case and surrounding space are ignored for ``percep...``, ``reason...`` and ``plan...``. Short
    or shared names such as ``"p"`` or ``"decision"`` could mean several things and stay as they
    are.

    Args:
        name: The name found in a file.

    Returns:
        ``"perception"``, ``"reasoning"``, ``"planning"``, or ``name`` without surrounding space.
    """
    stripped = name.strip()
    for prefix, capability in _CAPABILITY_PREFIXES.items():
        if stripped.lower().startswith(prefix):
            return capability
    return stripped


def load_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read records from a ``.json``, ``.jsonl`` or ``.ndjson`` file.

    Args:
        path: The file.

    Returns:
        The records in file order. Keys that a record does not know go into ``meta``.

    Raises:
        DataError: If the file is missing, is not JSON, holds no list of records, or a record is
            not usable; the message names the file and the record's index.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    items = _parse_lines(text, file) if file.suffix in _LINE_SUFFIXES else _parse_json(text, file)
    records = []
    for index, item in enumerate(items):
        try:
            records.append(_record_from_json(item))
        except (DataError, TypeError) as error:
            raise DataError(f"{file}, record {index}: {error}") from error
    return records


def save_records(records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Write records, one a line, so that the file is either the old one or the whole new one.

    Args:
        records: The records.
        path: A ``.json`` file (a list) or a ``.jsonl`` / ``.ndjson`` file; its folder is made.

    Raises:
        TypeError: If a ``meta`` holds something that is not a JSON value.
    """
    file = Path(path)
    lines = [json.dumps(_record_to_json(record), ensure_ascii=False) for record in records]
    if file.suffix in _LINE_SUFFIXES:
        text = "".join(line + "\n" for line in lines)
    else:
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _parse_json(text: str, file: Path) -> list[Any]:
    try:
        root = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if isinstance(root, dict):
        lists = [key for key in _LIST_KEYS if isinstance(root.get(key), list)]
        if len(lists) != 1:
            raise DataError(
                f"{file} is a JSON object with {len(lists)} lists of records; exactly one of the "
                f"keys {', '.join(_LIST_KEYS)} must hold a list"
            )
        root = root[lists[0]]
    if not isinstance(root, list):
        raise DataError(f"{file} holds a {type(root).__name__}; a list of records is needed")
    return root


def _parse_lines(text: str, file: Path) -> list[Any]:
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number} is not valid JSON: {error}") from error
    return items


def _record_from_json(item: Any) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"is a {type(item).__name__}; a JSON object is needed")
    messages = item.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is missing or empty; a list of role and content is needed")
    parsed = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"messages[{index}] must be an object with role and content")
        parsed.append(Message(message["role"], message["content"]))
    images = item.get("images", [])
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise DataError("images must be a path or a list of paths")
    identifier = item.get("id", "")
    if not isinstance(identifier, str | int):
        raise DataError(f"id is a {type(identifier).__name__}; a string or an int is needed")
    question_type, type_key = _question_type(item)
    return Record(
        messages=tuple(parsed),
        images=tuple(images),
        question_type=question_type,
        id=str(identifier),
        meta=_meta(item, {"messages", "images", "id", "meta", type_key}),
    )


def _question_type(item: dict[str, Any]) -> tuple[str, str]:
    """Name the capability and the key that said it."""
    named = [key for key in _TYPE_KEYS if key in item]
    if not named:
        raise DataError(f"has no question type; one of {', '.join(_TYPE_KEYS)} is needed")
    if "question_type" in named:
        named = ["question_type"]
    values = [item[key] for key in named]
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{named[0]} must be a string that is not empty")
    names = [normalize_question_type(value) for value in values]
    if len(set(names)) > 1:
        raise DataError(f"{' and '.join(named)} disagree ({', '.join(names)}); set question_type")
    return names[0], named[0]


def _meta(item: dict[str, Any], known: set[str]) -> dict[str, object]:
    meta = item.get("meta", {})
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
