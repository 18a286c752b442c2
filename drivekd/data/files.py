"""JSON files to items: documents and JSON lines, plain or gzipped, told apart by their content.

A fault of one item (a line that is no JSON, a key given twice, NaN) is told with that item and
reading goes on; a fault of the whole file is a DataError. JSON lines are read one at a time; of a
document the text is held, and of a list in it one item.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from drivekd.errors import DataError

LIST_KEYS = ("data", "items", "samples", "dataset", "records")
LINE_SUFFIXES = (".jsonl", ".ndjson")

_RECORD_KEYS = {"messages", "conversations", "question"}
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Item:
    """One item of a file.

    Args:
        index: Its place, from 0.
        value: The JSON value; None where there is a fault.
        fault: Why there is no value, or empty.
        key: The key that it stands under, where the file is an object of objects.
    """

    index: int
    value: Any = None
    fault: str = ""
    key: str = ""


class _Fault(str):
    """Stands in a parsed value for something that JSON does not allow."""

    __slots__ = ()


def is_lines_file(path: Path) -> bool:
    """Whether the name says JSON lines, gzipped or not, in any case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in LINE_SUFFIXES


def read_items(path: Path) -> Iterator[Item]:
    """Read the items of a JSON document or of JSON lines.

    A document is a list of items, an object that holds such a list under one of ``LIST_KEYS``, an
    object of objects (an item each, with its key), or a single record. The content decides which;
    the suffix only where one line could be either.

    Args:
        path: The file; a gzipped one is known by its first bytes.

    Yields:
        The items in file order.

    Raises:
        DataError: If the file cannot be read, or is not JSON from some place on.
    """
    try:
        with _open(path) as stream:
            head, rest = _first_lines(stream)
            if _holds_lines(head, bool(rest), is_lines_file(path)):
                stream.seek(0)
                yield from _line_items(stream)
            else:
                stream.seek(0)
                yield from _document_items(stream.read().removeprefix(_BOM), path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} cannot be read: it is not UTF-8 ({error}); save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        magic = stream.read(2)
    if magic in _UTF16_BOMS:
        raise DataError(f"{path} cannot be read: it looks like UTF-16, save it as UTF-8")
    return gzip.open(path) if magic == _GZIP_MAGIC else path.open("rb")  # type: ignore[return-value]


def _first_lines(stream: BinaryIO) -> tuple[bytes, bytes]:
    """The first line that is not blank, and the next one; empty where there is none."""
    lines = (line.removeprefix(_BOM).strip() for line in stream)
    filled = (line for line in lines if line)
    return next(filled, b""), next(filled, b"")


def _holds_lines(head: bytes, goes_on: bool, named_lines: bool) -> bool:
    if not head or not goes_on:
        # One line: a record, or a whole document on one line.
        return named_lines and not head.startswith(b"[")
    if head in (b"[", b"{"):
        return False
    if named_lines:
        return not head.startswith(b"[") or not head.endswith(b",")
    try:
        return isinstance(json.loads(head), dict)
    except (ValueError, RecursionError):
        return False


def _line_items(stream: BinaryIO) -> Iterator[Item]:
    index = 0
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(_BOM) if number == 1 else line
        if not content.strip():
            continue
        try:
            value = _DECODER.decode(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Item(index, fault=f"line {number} is not UTF-8: {error}")
        except (ValueError, RecursionError) as error:
            fault = f"line {number} is not valid JSON: {error}{_json_hint(content, error)}"
            yield Item(index, fault=fault)
        else:
            yield _checked(Item(index, value))
        index += 1


def _document_items(content: bytes, path: Path) -> Iterator[Item]:
    text = content.decode("utf-8")
    start = _skip_space(text, 0)
    if text.startswith("[", start):
        yield from _list_items(text, start + 1, path)
        return
    try:
        root = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}{_json_hint(content, error)}") from error
    for index, (key, value) in enumerate(_members(root, path)):
        yield _checked(Item(index, value, key=key))


def _list_items(text: str, position: int, path: Path) -> Iterator[Item]:
    """Items of a list whose bracket is behind us, one by one, up to where it is no JSON."""
    index = 0
    position = _skip_space(text, position)
    try:
        while not (index == 0 and text.startswith("]", position)):
            value, position = _DECODER.raw_decode(text, position)
            yield _checked(Item(index, value))
            index += 1
            position = _skip_space(text, position)
            if text.startswith("]", position):
                break
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = _skip_space(text, position + 1)
        position = _skip_space(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        hint = _json_hint(text.encode(), error)
        raise DataError(
            f"{path} is not valid JSON: {error}{hint}; {index} records were read before that"
        ) from error


def _json_hint(content: bytes, error: Exception) -> str:
    """What is most often behind a parser's error, for its message."""
    if not content.strip():
        return "; the file is empty"
    if b"\0" in content:
        return "; it holds zero bytes, as files do that a crash or a copy cut short"
    if not isinstance(error, json.JSONDecodeError):
        return ""
    before, at = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
    if at in ("]", "}") and before.endswith(","):
        return "; the comma before it is one too many"
    if at == "," and error.msg == "Extra data":
        return "; records stand in one list, or one a line without commas between them"
    if at == "'" or error.doc[error.pos : error.pos + 4] in ("None", "True", "Fals"):
        return "; this is Python's notation, write it by json.dumps"
    if at in ("/", "#"):
        return "; JSON has no comments"
    if not error.doc[error.pos :].strip() or "Unterminated" in error.msg:
        return "; its end is missing"
    return ""


def _members(root: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(root, dict):
        raise DataError(f"{path} holds a {type(root).__name__}; a list of records is needed")
    lists = [key for key in LIST_KEYS if isinstance(root.get(key), list)]
    if len(lists) == 1:
        yield from (("", value) for value in root[lists[0]])
    elif not lists and root.keys() & _RECORD_KEYS:
        yield "", root
    elif not lists and root and (_holds_scenes(root) or all(map(_is_object, root.values()))):
        yield from root.items()
    else:
        raise DataError(
            f"{path} is a JSON object with {len(lists)} lists of records; exactly one of the "
            f"keys {', '.join(LIST_KEYS)} must hold a list"
        )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _holds_scenes(root: dict[str, Any]) -> bool:
    """Whether it is DriveLM's object of scenes, damaged ones among them."""
    return any(_is_object(value) and "key_frames" in value for value in root.values())


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()


def _checked(item: Item) -> Item:
    try:
        fault = find_fault(item.value)
    except RecursionError:
        fault = "is nested too deeply"
    return Item(item.index, fault=fault, key=item.key) if fault else item


def find_fault(value: Any) -> str:
    """Name the first thing in a parsed value that JSON or UTF-8 does not allow.

    Args:
        value: What a JSON parser gave.

    Returns:
        The fault, or an empty string.
    """
    if isinstance(value, _Fault):
        return str(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"holds half of a surrogate pair in {value[:40]!r}, which is no text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds the number {value}, which JSON does not have"
    if isinstance(value, dict):
        return next((f for pair in value.items() for f in map(find_fault, pair) if f), "")
    if isinstance(value, list):
        return next((fault for fault in map(find_fault, value) if fault), "")
    return ""


def _constant(name: str) -> _Fault:
    return _Fault(f"holds the number {name}, which JSON does not have")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        item[key] = _Fault(f"holds the key {key!r} {count} times in one object")
    return item


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
