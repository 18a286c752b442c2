"""Checking of records before training: everything that is wrong, found in one pass."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from drivekd.data.pictures import (
    Finding,
    ImageReport,
    check_path,
    inspect_image,
    look_for_image,
)
from drivekd.data.reading import Entry
from drivekd.data.records import Record
from drivekd.data.texts import check_texts, normalize_text
from drivekd.errors import DataError

ProblemKind = Literal[
    "file",
    "record",
    "image_path",
    "image_missing",
    "image_unreadable",
    "image_constant",
    "image_orientation",
    "image_frames",
    "image_colours",
    "image_size",
    "image_count",
    "placeholder_in_answer",
    "object_tag",
    "coordinate_range",
    "coordinate_shared",
    "no_assistant",
    "turn_order",
    "role_repeated",
    "empty_answer",
    "too_long",
    "options",
    "option_answer",
    "special_token",
    "garbled_text",
    "question_type",
    "duplicate_id",
    "duplicate_question",
    "answers_differ",
    "frame_in_two_splits",
    "question_in_two_splits",
]
PROBLEM_KINDS: tuple[str, ...] = get_args(ProblemKind)
# Encoders refuse records with these; with the others training runs, but perhaps not as meant.
UNUSABLE_KINDS = frozenset(
    {
        "file",
        "record",
        "image_missing",
        "image_unreadable",
        "image_count",
        "placeholder_in_answer",
        "no_assistant",
        "turn_order",
        "empty_answer",
    }
)
_SHOWN_PATH = 200  # characters
PUBLIC_TYPES = ("perception", "reasoning", "planning")


@dataclass(frozen=True)
class Problem:
    """Something wrong with one record.

    Args:
        index: Place of the record in its list; -1 for a problem of the whole file.
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
        if self.index < 0:
            where = self.split
        text = f"{where}{f' ({self.id})' if self.id else ''}: {self.message}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass
class SplitSummary:
    """What a split holds.

    Args:
        records: Number of records, faulty ones too.
        images: Number of different image paths.
        problems: Number of problems.
        types: Records of each question type.
    """

    records: int = 0
    images: int = 0
    problems: int = 0
    types: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Split:
    """A list of records to check.

    Args:
        name: Its name in messages.
        entries: The records, read once, in order.
        root: Folder that its image paths are relative to.
    """

    name: str
    entries: Iterable[Entry]
    root: Path


class Checker:
    """Finds what is wrong with records, one at a time; remembers digests, never records.

    Memory grows by some hundred bytes for every different image, id and question.

    Args:
        question_types: The types that are legal. None: the public ones where a record has one of
            them, else any, as long as no two differ in case and punctuation only.
        special_tokens: The tokenizer's special tokens; empty takes common spellings.
        count_tokens: Gives the number of tokens of a text; needed with `max_length`.
        max_length: Most tokens of a record's messages.
        decode: Read and decode every image; False only looks whether its file is there.
    """

    def __init__(
        self,
        *,
        decode: bool = True,
        question_types: Collection[str] | None = None,
        special_tokens: Collection[str] = (),
        count_tokens: Callable[[str], int] | None = None,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and count_tokens is None:
            raise ValueError(f"max_length is {max_length}, which needs count_tokens")
        self._types = None if question_types is None else frozenset(question_types)
        self._special_tokens = special_tokens
        self._count_tokens = count_tokens
        self._max_length = max_length
        self._inspect = inspect_image if decode else look_for_image
        self._images: dict[str, ImageReport] = {}
        self._frames: dict[bytes, str] = {}  # digest of a picture or path -> first split with it
        self._questions: dict[bytes, tuple[str, int, bytes]] = {}  # -> split, index, answer
        self._seen_types: dict[str, tuple[str, Entry]] = {}  # type -> where it is first
        self.summaries: dict[str, SplitSummary] = {}

    def check(self, splits: Iterable[Split]) -> Iterator[Problem]:
        """Read splits once and yield every problem, in the order of the records.

        Problems that only the whole can tell come last: question types, each once.
        """
        for split in splits:
            self.summaries[split.name] = SplitSummary()
            for problem in self._check_split(split):
                self.summaries[split.name].problems += 1
                yield problem
        for problem in self._check_types():
            self.summaries[problem.split].problems += 1
            yield problem

    def _check_split(self, split: Split) -> Iterator[Problem]:
        summary = self.summaries[split.name]
        ids: dict[str, int] = {}
        paths: set[str] = set()
        try:
            for entry in split.entries:
                summary.records += 1
                for kind, text in self._check_entry(entry, split, ids, paths):
                    yield Problem(entry.index, entry.id, kind, text, split.name)  # type: ignore[arg-type]
        except DataError as error:
            yield Problem(-1, "", "file", str(error).removeprefix(f"{split.name} "), split.name)
        summary.images = len(paths)

    def _check_entry(
        self, entry: Entry, split: Split, ids: dict[str, int], paths: set[str]
    ) -> Iterator[Finding]:
        record = entry.record
        if record is None:
            yield "record", entry.fault
            return
        self.summaries[split.name].types[record.question_type] += 1
        paths.update(record.images)
        yield from check_texts(record, self._special_tokens)
        yield from self._check_length(record)
        yield from self._check_type(record, split, entry)
        if record.id and ids.setdefault(record.id, entry.index) != entry.index:
            yield "duplicate_id", f"id {record.id!r} is already that of record {ids[record.id]}"
        keys = []
        for path in dict.fromkeys(record.images):
            full = os.path.abspath(split.root / path)
            if full not in self._images:
                self._images[full] = self._inspect(split.root / path)
            report = self._images[full]
            keys.append(report.digest or full.encode(errors="surrogatepass"))
            yield from self._check_image(path, report, keys[-1], split.name)
        yield from self._check_frame_token(record, split.name)
        yield from self._check_question(record, keys, split.name, entry.index)

    def _check_image(
        self, path: str, report: ImageReport, key: bytes, split: str
    ) -> Iterator[Finding]:
        name = path if len(path) <= _SHOWN_PATH else f"{path[:_SHOWN_PATH]}..."
        if fault := check_path(path):
            yield "image_path", f"image {name!r} {fault}"
        for kind, text in report.findings:
            yield kind, f"image {name} {text}"
        if self._frames.setdefault(key, split) != split:
            yield "frame_in_two_splits", f"image {name} is also in split {self._frames[key]!r}"

    def _check_frame_token(self, record: Record, split: str) -> Iterator[Finding]:
        """Driving records of one moment, seen by other cameras."""
        token = record.meta.get("frame_token")
        if not isinstance(token, str) or not token:
            return
        key = b"frame token " + token.encode(errors="surrogatepass")
        if self._frames.setdefault(key, split) != split:
            yield "frame_in_two_splits", f"frame {token!r} is also in split {self._frames[key]!r}"

    def _check_length(self, record: Record) -> Iterator[Finding]:
        if self._count_tokens is None or self._max_length is None:
            return
        count = sum(self._count_tokens(message.content) for message in record.messages)
        if count > self._max_length:
            yield (
                "too_long",
                f"the messages have {count:,} tokens, images not counted; the model reads "
                f"{self._max_length:,}",
            )

    def _check_question(
        self, record: Record, images: Sequence[bytes], split: str, index: int
    ) -> Iterator[Finding]:
        asked = "\0".join(normalize_text(m.content) for m in record.messages if m.role == "user")
        if not asked:
            return
        key = _digest(b"\0".join([*images, asked.encode()]))
        said = "\0".join(normalize_text(m.content) for m in record.messages)
        answer = _digest(said.encode())
        first_split, first, first_answer = self._questions.setdefault(key, (split, index, answer))
        if first_split != split:
            if not images:  # with images it is their frame that is in two splits
                yield "question_in_two_splits", f"its question is also in split {first_split!r}"
        elif first != index and first_answer != answer:
            yield "answers_differ", f"record {first} has its question and images, another answer"
        elif first != index:
            yield "duplicate_question", f"record {first} has its question, images and answer"

    def _check_type(self, record: Record, split: Split, entry: Entry) -> Iterator[Finding]:
        name = record.question_type
        if self._types is None:
            self._seen_types.setdefault(name, (split.name, entry))
        elif name not in self._types:
            yield (
                "question_type",
                f"question type {name!r} is unknown; {_known(name, sorted(self._types))}",
            )

    def _check_types(self) -> Iterator[Problem]:
        spellings: dict[str, str] = {}
        is_public = any(name in PUBLIC_TYPES for name in self._seen_types)
        for name, (split, entry) in self._seen_types.items():
            count = sum(summary.types[name] for summary in self.summaries.values())
            more = f" ({count:,} records)" if count > 1 else ""
            like = spellings.setdefault(normalize_text(name).replace(" ", ""), name)
            if like != name:
                text = f"question type {name!r}{more} is {like!r} in other letters"
            elif is_public and name not in PUBLIC_TYPES:
                text = (
                    f"question type {name!r}{more} is unknown; {_known(name, PUBLIC_TYPES)}, or "
                    "name your own (--types)"
                )
            else:
                continue
            yield Problem(entry.index, entry.id, "question_type", text, split)


def check_records(
    records: Sequence[Record] | Mapping[str, Sequence[Record]],
    root: str | os.PathLike[str],
    *,
    question_types: Collection[str] | None = None,
    decode: bool = True,
) -> list[Problem]:
    """Find everything that is wrong with records and their images.

    Looks at images (missing, unreadable, cut off, of one colour, turned by EXIF, animated, deeper
    than 8 bits, outside the root), ``<image>`` placeholders, turns, answers, multiple-choice
    options, object tags ``<c1,CAM_FRONT,x,y>``, special tokens in the text, question types, ids
    and questions that come twice, and, given several splits, a picture (by its path and its file's
    bytes) or a text-only question in two of them. Every image file is read once.

    Args:
        records: Records, or several splits by name.
        root: Folder that image paths are relative to.
        question_types: The legal types; see `Checker`.
        decode: Read and decode every image; False only looks whether its file is there.

    Returns:
        The problems in the order of the records; empty if all is well. An image used by several
        records is reported for each.
    """
    splits = records if isinstance(records, Mapping) else {"": records}
    return list(
        Checker(question_types=question_types, decode=decode).check(
            Split(name, _entries(members), Path(root)) for name, members in splits.items()
        )
    )


def _entries(records: Sequence[Record]) -> Iterator[Entry]:
    for index, record in enumerate(records):
        yield Entry(index, record, id=record.id)


def _known(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    listed = f"known are {', '.join(known)}"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
