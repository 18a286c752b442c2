"""Items of Hugging Face data sets; needs the library `datasets`, imported on use."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from drivekd.data.files import Item, find_fault
from drivekd.errors import DataError

StoreImage = Callable[[bytes], str]  # an image file's bytes -> the path that a record gives it

_TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_SAVED_FILES = ("state.json", "dataset_dict.json")


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is what `Dataset.save_to_disk` wrote, or a table file."""
    if path.is_dir():
        return any((path / name).is_file() for name in _SAVED_FILES)
    return path.suffix.lower() in _TABLE_SUFFIXES


def read_dataset(source: str, split: str | None, store_image: StoreImage) -> Iterator[Item]:
    """Read the rows of a Hugging Face data set as items.

    Columns without a value in a row are left out of its item. Images are not decoded.

    Args:
        source: A folder of `save_to_disk`, a .parquet, .arrow or .csv file, or what
            `datasets.load_dataset` takes: a hub name or a folder of data files.
        split: The split; None if there is only one.
        store_image: Keeps an image that the data set holds itself.

    Yields:
        An item per row.

    Raises:
        ImportError: If `datasets` is not installed.
        DataError: If it cannot be loaded, or the split is missing or unknown.
    """
    dataset = _load(source, split)
    labels = {
        name: feature.names
        for name, feature in dataset.features.items()
        if hasattr(feature, "int2str")
    }
    index = 0
    for table in dataset.with_format("arrow").iter(batch_size=16):
        for row in table.to_pylist():
            try:
                item = {
                    key: labels[key][value] if key in labels else _json_value(value, store_image)
                    for key, value in row.items()
                    if value is not None
                }
                fault = find_fault(item)
            except DataError as error:
                item, fault = {}, str(error)
            yield Item(index, None if fault else item, fault)
            index += 1


def image_store(folder: Path, prefix: str) -> StoreImage:
    """Keep image files in a folder, each content once.

    Args:
        folder: The folder; it is made when the first image comes.
        prefix: What stands before the file's name in a record's path, such as ``"images/"``.

    Returns:
        A function that writes a file, named by its content, and gives its path.
    """

    def store(content: bytes) -> str:
        try:
            with Image.open(io.BytesIO(content)) as image:
                suffix = f".{(image.format or 'png').lower()}"
        except OSError as error:
            raise DataError(f"holds an image that cannot be decoded: {error}") from error
        name = hashlib.sha256(content).hexdigest()[:24] + suffix
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / f"{name}.tmp").write_bytes(content)
            (folder / f"{name}.tmp").replace(folder / name)
        return prefix + name

    return store


def _load(source: str, split: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a Hugging Face data set needs the library datasets: "
            "pip install 'drivekd[datasets]'"
        ) from error
    path = Path(source)
    try:
        if path.is_dir() and is_saved_dataset(path):
            loaded = datasets.load_from_disk(source)
        elif path.suffix.lower() in _TABLE_SUFFIXES:
            kind = _TABLE_SUFFIXES[path.suffix.lower()]
            loaded = datasets.load_dataset(kind, data_files=source)
        else:
            loaded = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source} cannot be loaded as a data set: {error}") from error
    if not isinstance(loaded, dict):
        if split is not None:
            raise DataError(f"{source} has no splits; leave --split out")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        what = "has several splits" if split is None else f"has no split {split!r}"
        raise DataError(f"{source} {what}; name one of {', '.join(loaded)} with --split")
    return loaded[split]


def _json_value(value: Any, store_image: StoreImage) -> Any:
    """A cell as a JSON value, with paths in the place of images."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return store_image(value["bytes"]) if value["bytes"] else value["path"]
    if isinstance(value, dict):
        return {key: _json_value(member, store_image) for key, member in value.items()}
    if isinstance(value, list):
        return [_json_value(member, store_image) for member in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise DataError(f"holds a {type(value).__name__}, which is no JSON value")
