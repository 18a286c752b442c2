"""Checking of records before training: everything that is wrong, found in one pass."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from drivekd.data.records import IMAGE_PLACEHOLDER, Record

ProblemKind = Literal[
    "image_missing",
    "image_unreadable",
    "image_constant",
    "image_count",
    "object_tag",
    "coordinate_range",
    "no_assistant",
    "empty_answer",
    "duplicate_id",
    "frame_in_two_splits",
]
PROBLEM_KINDS: tuple[str, ...] = get_args(ProblemKind)

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
# "<c" that ends the text is a tag cut off behind its first letter.
_TAG_START = re.compile(r"<c(?:\d+|$)")
_TAG = re.compile(rf"<c\d+\s*,\s*[A-Za-z]\w*\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*>")
_EMPTY_ANSWER = re.compile(r"(?:\s*final\s*(?:answer)?\s*[:=])?[\s{}().]*", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """Something wrong with one record.

    Args:
        index: Place of the record in its list.
        id: The record's id, or empty.
        kind: One of ``PROBLEM_KINDS``.
        message: What is wrong, for a person.
        split: Name of the split, or empty when one list was checked.
    """

    index: int
    id: str
    kind: ProblemKind
    message: str
    split: str = ""

    def __str__(self) -> str:
        where = f"{self.split}[{self.index}]" if self.split else f"record {self.index}"
        return f"{where}{f' ({self.id})' if self.id else ''}: {self.message}"


def check_records(
    records: Sequence[Record] | Mapping[str, Sequence[Record]], root: str | os.PathLike[str]
) -> list[Problem]:
    """Find everything that is wrong with records and their images.

    Looks for images that are missing, unreadable, truncated or of one colour; counts of images and
    ``<image>`` placeholders that differ; object tags ``<c1,CAM_FRONT,x,y>`` that are cut off or
    have coordinates outside 0..1; records without an assistant message or with an empty answer; ids
    used twice in a split; and, given several splits, a picture (by its file's bytes) in two of
    them. Every image file is read once.

    Args:
        records: Records, or several splits by name.
        root: Folder that image paths are relative to.

    Returns:
        The problems in the order of the records; empty if all is well. An image used by several
        records is reported for each.
    """
    splits = records if isinstance(records, Mapping) else {"": records}
    images: dict[str, _ImageReport] = {}
    seen_in: dict[str, str] = {}  # digest of a picture -> the first split that has it
    problems = []
    for split, members in splits.items():
        ids: dict[str, int] = {}
        for index, record in enumerate(members):
            found = [*_check_messages(record), *_check_id(record, index, ids)]
            for path in dict.fromkeys(record.images):
                if path not in images:
                    images[path] = _read_image(Path(root) / path)
                found += _check_image(path, images[path], split, seen_in)
            problems += [Problem(index, record.id, kind, text, split) for kind, text in found]
    return problems


_Finding = tuple[ProblemKind, str]


@dataclass(frozen=True)
class _ImageReport:
    """What reading an image file gave."""

    problem: _Finding | None
    digest: str = ""


def _check_messages(record: Record) -> Iterator[_Finding]:
    placeholders = sum(m.content.count(IMAGE_PLACEHOLDER) for m in record.messages)
    if placeholders != len(record.images):
        yield (
            "image_count",
            f"{placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(record.images)} images",
        )
    answers = [m.content for m in record.messages if m.role == "assistant"]
    if not answers:
        yield "no_assistant", "no assistant message; there is nothing to learn"
    for answer in answers:
        if _EMPTY_ANSWER.fullmatch(answer):
            yield "empty_answer", f"the answer {answer!r} is empty"
    for message in record.messages:
        yield from _check_tags(message.content)


def _check_tags(text: str) -> Iterator[_Finding]:
    for start in _TAG_START.finditer(text):
        tag = _TAG.match(text, start.start())
        if tag is None:
            excerpt = text[start.start() : start.start() + 40]
            yield "object_tag", f"object tag {excerpt!r} is not of the form <c1,CAMERA,x,y>"
        elif not all(0.0 <= float(value) <= 1.0 for value in tag.groups()):
            yield "coordinate_range", f"object tag {tag.group()} has a coordinate outside 0..1"


def _check_id(record: Record, index: int, ids: dict[str, int]) -> Iterator[_Finding]:
    if record.id and ids.setdefault(record.id, index) != index:
        yield "duplicate_id", f"id {record.id!r} is already that of record {ids[record.id]}"


def _check_image(
    path: str, report: _ImageReport, split: str, seen_in: dict[str, str]
) -> Iterator[_Finding]:
    if report.problem is not None:
        kind, text = report.problem
        yield kind, f"image {path} {text}"
    if report.digest and seen_in.setdefault(report.digest, split) != split:
        yield (
            "frame_in_two_splits",
            f"image {path} is also in split {seen_in[report.digest]!r}",
        )


def _read_image(path: Path) -> _ImageReport:
    """Read and decode an image file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return _ImageReport(("image_missing", "does not exist"))
    except OSError as error:
        return _ImageReport(("image_unreadable", f"cannot be read: {error.strerror}"))
    digest = hashlib.sha256(content).hexdigest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    # Pillow reports damaged files by any of these, depending on where the damage is.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return _ImageReport(("image_unreadable", f"cannot be decoded: {error}"), digest)
    if (pixels == pixels[0, 0]).all():
        return _ImageReport(("image_constant", "has one colour everywhere"), digest)
    return _ImageReport(None, digest)
