"""Safetensors checkpoints whose tensors, and whose files, are read only when they are asked for."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class TensorHeader:
    """What a file's header says of one tensor.

    Attributes:
        dtype: safetensors' name, such as "BF16".
        shape: Sizes.
        num_bytes: Size of its data in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class DeferredTensor:
    """Stands for a tensor of a checkpoint; `[...]` reads it.

    Has what transformers' loader asks of a safetensors slice.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, index: Any) -> Tensor:
        """Read the tensor, or a part of it."""
        return self._checkpoint.read(self._name, index)

    def get_shape(self) -> list[int]:
        """Sizes, from the file's header."""
        return list(self._checkpoint.header(self._name).shape)

    def get_dtype(self) -> str:
        """Name in safetensors of the dtype, from the file's header."""
        return self._checkpoint.header(self._name).dtype


class Checkpoint:
    """The safetensors files of a checkpoint, opened (and fetched) one by one as they are needed.

    Args:
        path: Folder or hub name.
        revision: Branch, tag or commit of a hub name.
        local_files_only: Never fetch anything.

    Attributes:
        path: Folder or hub name.
        bytes_read: Bytes of tensor data read so far, by tensor name.

    Raises:
        FileNotFoundError: There are no safetensors weights.
    """

    def __init__(
        self, path: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> None:
        self.path = str(path)
        self._options = {"revision": revision, "local_files_only": local_files_only}
        self._headers: dict[str, dict[str, TensorHeader]] = {}
        self._open: dict[str, Any] = {}
        self._lock = threading.RLock()
        self.bytes_read: dict[str, int] = {}
        index = self._locate(INDEX_FILE, must_exist=False)
        if index is not None:
            table = json.loads(Path(index).read_text(encoding="utf-8"))
            self._files: dict[str, str] = table["weight_map"]
            self._total: int | None = table.get("metadata", {}).get("total_size")
            return
        self._total = None
        if self._locate(SINGLE_FILE, must_exist=False) is None:
            raise FileNotFoundError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        self._files = dict.fromkeys(self._file_headers(SINGLE_FILE), SINGLE_FILE)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open = {}

    def state_dict(self) -> dict[str, DeferredTensor]:
        """All tensors by name, none read yet."""
        return {name: DeferredTensor(self, name) for name in self._files}

    @property
    def files(self) -> set[str]:
        """Names of all files."""
        return set(self._files.values())

    @property
    def total_bytes(self) -> int:
        """Tensor data of all files: as the index says, else from the headers of all files."""
        if self._total is None:
            self._total = sum(self.header(name).num_bytes for name in self._files)
        return self._total

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._files[name]

    def header(self, name: str) -> TensorHeader:
        """Header of one tensor; opens its file.

        Raises:
            ValueError: The index names a tensor that its file does not have.
            OSError: The file is not there.
        """
        headers = self._file_headers(self._files[name])
        if name not in headers:
            raise ValueError(
                f"{self.path}: {INDEX_FILE} says that {name} is in {self._files[name]}, which "
                "does not have it"
            )
        return headers[name]

    def read(self, name: str, index: Any = ...) -> Tensor:
        """Read one tensor.

        Raises:
            OSError: Its file is not there or damaged.
        """
        with self._lock:
            file = self._opened(self._files[name])
        tensor: Tensor = file.get_slice(name)[index]
        self.bytes_read[name] = tensor.numel() * tensor.element_size()
        return tensor

    def local_path(self, file: str) -> Path:
        """Where a file of the checkpoint lies; fetches it if need be.

        Raises:
            OSError: It is not there.
        """
        return Path(str(self._locate(file)))

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self._locate(file), framework="pt")
            except SafetensorError as error:
                raise OSError(f"{file} of {self.path} is damaged: {error}") from error
        return self._open[file]

    def _file_headers(self, file: str) -> dict[str, TensorHeader]:
        if file not in self._headers:
            self._headers[file] = dict(_read_headers(Path(str(self._locate(file)))))
        return self._headers[file]

    def _locate(self, file: str, *, must_exist: bool = True) -> str | None:
        found: str | None = cached_file(
            self.path,
            file,
            _raise_exceptions_for_missing_entries=must_exist,
            _raise_exceptions_for_connection_errors=must_exist,
            **self._options,
        )
        return found


def _read_headers(path: Path) -> Iterator[tuple[str, TensorHeader]]:
    """Headers of one file: 8 bytes of length, then JSON.

    Source: https://github.com/huggingface/safetensors, README, "Format".
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file: its header is damaged")
        table = json.loads(stream.read(length))
    for name, entry in table.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, TensorHeader(entry["dtype"], tuple(entry["shape"]), end - begin)
