"""Reading records of any known format, with every fault told by file and record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from drivekd.data.files import Item, read_items
from drivekd.data.formats import READERS, detect_format
from drivekd.data.records import Record, TypeNames
from drivekd.errors import DataError

FORMATS = ("auto", *READERS)


@dataclass(frozen=True)
class Entry:
    """One record of a file, or why it is none.

    Args:
        index: Its place, from 0, faulty ones counted.
        record: The record, or None.
        fault: Why there is no record, or empty.
        id: The id, also of a faulty item where it has one.
    """

    index: int
    record: Record | None
    fault: str = ""
    id: str = ""


def load_records(
    path: str | os.PathLike[str],
    format: str = "auto",
    *,
    question_type: str = "",
    rename_types: Mapping[str, str] | None = None,
) -> list[Record]:
    """Read the records of a file.

    Args:
        path: A JSON document or JSON lines, plain or gzipped; the content says which.
        format: A name of ``FORMATS``; ``"auto"`` looks at the keys of the first usable item.
        question_type: The type of records that name none; empty if there must be one.
        rename_types: Question types found in the file, and what to call them.

    Returns:
        The records in file order. Keys that a record does not know go into ``meta``.

    Raises:
        DataError: If the file is missing, is not JSON, holds no list of records, or a record is
            not usable; the message names the file and the record's index.
        ValueError: If the format is unknown.
    """
    names = TypeNames(question_type, dict(rename_types or {}))
    records = []
    for entry in read_entries(path, format, names):
        if entry.record is None:
            raise DataError(f"{path}, record {entry.index}: {entry.fault}")
        records.append(entry.record)
    return records


def read_entries(
    path: str | os.PathLike[str], format: str = "auto", names: TypeNames | None = None
) -> Iterator[Entry]:
    """Read the records of a file one by one; a faulty one does not end the reading.

    Args:
        path: As for `load_records`.
        format: As for `load_records`.
        names: How question types are named.

    Yields:
        A record or a fault, in file order.

    Raises:
        DataError: If the file cannot be read, or is not JSON from some place on.
        ValueError: If the format is unknown.
    """
    return entries_of(read_items(Path(path)), format, names or TypeNames())


def entries_of(items: Iterable[Item], format: str, names: TypeNames) -> Iterator[Entry]:
    """Make records of items; for the arguments see `read_entries`."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, wanted one of {', '.join(FORMATS)}")
    return _entries(items, format, names)


def _entries(items: Iterable[Item], format: str, names: TypeNames) -> Iterator[Entry]:
    index = 0
    for item in items:
        if format == "auto":
            format = detect_format(item)
        for parsed in _parse(item, format, names):
            if isinstance(parsed, Record):
                yield Entry(index, parsed, id=parsed.id)
            else:
                yield Entry(index, None, str(parsed), _id_of(item))
            index += 1


def _parse(item: Item, format: str, names: TypeNames) -> Iterator[Record | DataError]:
    if item.fault:
        yield DataError(item.fault)
        return
    reader = READERS["drivekd" if format == "auto" else format]
    try:
        yield from reader(item, names)
    except (DataError, TypeError) as error:
        yield DataError(str(error))


def _id_of(item: Item) -> str:
    name = item.value.get("id", "") if isinstance(item.value, dict) else ""
    return str(name) if isinstance(name, str | int) else ""
