"""Any known format to a file of our records."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from drivekd.data.files import is_lines_file
from drivekd.data.hub import image_store, is_saved_dataset, read_dataset
from drivekd.data.reading import FORMATS, Entry, entries_of, read_entries
from drivekd.data.records import Record, TypeNames, save_records
from drivekd.errors import DataError

CONVERT_FORMATS = (*FORMATS, "hf")


@dataclass
class Conversion:
    """What a conversion did.

    Args:
        root: Folder that the image paths of the records start from.
        types: Records of each question type.
        images: Different image paths.
        missing: Those that are not under the root.
        faults: Index and fault of each item that is no record.
        written: Whether the output was written.
    """

    root: Path
    types: Counter[str] = field(default_factory=Counter)
    images: set[str] = field(default_factory=set)
    missing: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)
    written: bool = False


class _FaultsFoundError(Exception):
    """Ends the writing of an output that is not wanted."""


def convert_records(
    source: str,
    output: str | os.PathLike[str],
    *,
    format: str = "auto",
    images: str | os.PathLike[str] | None = None,
    names: TypeNames | None = None,
    split: str | None = None,
    force: bool = False,
    skip_faulty: bool = False,
) -> Conversion:
    """Write the records of a source as a file of ours; the source is read once, in a stream.

    Our own JSON lines come out as they are. The output is written whole or not at all.

    Args:
        source: A file, or for ``"hf"`` what `drivekd.data.hub.read_dataset` takes.
        output: A ``.jsonl``, ``.ndjson`` or ``.json`` file.
        format: A name of ``CONVERT_FORMATS``.
        images: Folder that image paths start from: absolute paths below it are made relative, and
            images that a data set holds itself are written there. None leaves paths as they are
            (they start from the source's folder) and writes such images to ``images/`` beside
            the output.
        names: How question types are named.
        split: Split of a data set.
        force: Replace an output that exists.
        skip_faulty: Write the others where some items are no records; else nothing is written.

    Returns:
        Counts, and the faults.

    Raises:
        FileExistsError: If the output exists and `force` is not set.
        DataError: If the source cannot be read.
        ImportError: If a data set is to be read without the library `datasets`.
        ValueError: If the format or the output's suffix is unknown.
    """
    if format not in CONVERT_FORMATS:
        raise ValueError(f"format is {format!r}, wanted one of {', '.join(CONVERT_FORMATS)}")
    file = Path(output)
    if file.suffix.lower() != ".json" and (not is_lines_file(file) or file.suffix == ".gz"):
        raise DataError(f"output is {file}, wanted a name that ends in .jsonl, .ndjson or .json")
    if file.exists() and not force:
        raise FileExistsError(f"{file} exists; --force replaces it")
    is_hub = format == "hf" or (format == "auto" and is_saved_dataset(Path(source)))
    root = Path(images or (file.parent if is_hub else Path(source).parent))
    names = names or TypeNames()
    if is_hub:
        store = image_store(root / "images" if images is None else root, "images/" * (not images))
        entries = entries_of(read_dataset(source, split, store), "auto", names)
    elif split is not None:
        raise DataError(f"split is {split!r}, but {source} is a file; only data sets have splits")
    else:
        entries = read_entries(source, format, names)
    report = Conversion(root)
    try:
        save_records(_records(entries, report, relative=images is not None, skip=skip_faulty), file)
    except _FaultsFoundError:
        return report
    report.written = True
    return report


def _records(
    entries: Iterator[Entry], report: Conversion, *, relative: bool, skip: bool
) -> Iterator[Record]:
    for entry in entries:
        if entry.record is None:
            report.faults.append((entry.index, entry.fault))
            continue
        record = entry.record
        if relative:
            paths = tuple(_relative(path, report.root) for path in record.images)
            record = replace(record, images=paths)
        report.types[record.question_type] += 1
        for path in set(record.images) - report.images:
            report.images.add(path)
            report.missing += not _exists(report.root / path)
        yield record
    if report.faults and not skip:
        raise _FaultsFoundError


def _relative(path: str, root: Path) -> str:
    if not Path(path).is_absolute():
        return path
    full, base = os.path.abspath(path), os.path.abspath(root)
    return Path(full).relative_to(base).as_posix() if Path(full).is_relative_to(base) else path


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
