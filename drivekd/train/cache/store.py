"""Cached targets on the disk: shards that are whole or absent, entries with checksums.

`<cache>/shards-1/*.safetensors` (1 is the format's number) hold entries, several tensors each,
named `<key>.<part>`; a shard's metadata has the checksum of each entry. A shard is written under
`<cache>/incomplete/`, synced and renamed, and never changed again. What a key stands for never
changes either, so shards of several recipes may lie side by side, and none is ever out of date:
what nobody asks for is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from drivekd.errors import CacheError
from drivekd.functional import AttentionMapTarget
from drivekd.train.cache.keys import FORMAT
from drivekd.train.checkpoints import STAGING, replace_file

SHARDS = f"shards-{FORMAT}"
LOCK = "lock"
# What files hold beside tensors, at most: names, shapes and checksums of one entry, and the rest.
ENTRY_OVERHEAD, SHARD_OVERHEAD = 1024, 1024
_OPEN_SHARDS = 64
_FLUSH_SECONDS = 300.0
_SHORT = 2**15 - 1


class TargetStore:
    """The entries of a cache, read one by one; may be handed to loader workers.

    Args:
        folder: The cache.
        skip_damaged: Leave shards that cannot be opened out and list them in `damaged`.

    Attributes:
        damaged: Shards that cannot be opened.

    Raises:
        CacheError: A shard cannot be opened.
    """

    def __init__(self, folder: Path, *, skip_damaged: bool = False) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: OrderedDict[Path, Any] = OrderedDict()
        for file in sorted((folder / SHARDS).glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as shard:
                    checks: dict[str, int] = json.loads(shard.metadata()["crc32"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                if not skip_damaged:
                    raise CacheError(f"{file} is damaged: {error}. {_REMEDY}") from error
                self.damaged.append(file)
                continue
            self._places.update((key, (file, check)) for key, check in checks.items())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def count(self, prefix: str) -> int:
        """How many keys start so."""
        return sum(key.startswith(prefix) for key in self._places)

    def drop_shard_of(self, key: str) -> None:
        """Take a shard for damaged: none of its entries is there any more."""
        damaged, _ = self._places[key]
        self.damaged.append(damaged)
        self._places = {k: place for k, place in self._places.items() if place[0] != damaged}

    def files(self) -> dict[Path, set[str]]:
        """The keys of each shard."""
        files: dict[Path, set[str]] = {}
        for key, (file, _) in self._places.items():
            files.setdefault(file, set()).add(key)
        return files

    def read(self, key: str) -> list[AttentionMapTarget]:
        """The targets of one entry, B = 1 each.

        Raises:
            KeyError: There is no such entry.
            CacheError: Its shard is damaged or gone.
        """
        file, check = self._places[key]
        try:
            shard = self._shard(file)
            names = [name for name in _PARTS if f"{key}.{name}" in shard.keys()]  # noqa: SIM118
            parts = {name: shard.get_tensor(f"{key}.{name}") for name in names}
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{file} is damaged or gone: {error}. {_REMEDY}") from error
        if _checksum(parts) != check:
            raise CacheError(f"{file} is damaged: the contents of {key} have changed. {_REMEDY}")
        return _unpack(parts)

    def _shard(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]


_REMEDY = (
    "Delete this file and run `drivekd cache` with the recipe again: it makes what is missing, and "
    "with --check it finds all damage"
)


class TargetWriter:
    """Adds entries to a cache; one writer at a time (`writing`).

    Args:
        folder: The cache.
        shard_bytes: A shard is finished when it holds so much, or after five minutes.

    Attributes:
        taken: Entries that were taken, on the disk or not yet.
        entries: Entries that are on the disk.
        bytes: Size of their shards.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self.folder = folder
        self.taken = 0
        self.entries = 0
        self.bytes = 0
        self._shard_bytes = shard_bytes
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._size = 0
        self._since = time.monotonic()

    def add(self, key: str, targets: Sequence[AttentionMapTarget]) -> None:
        """Take one entry.

        Raises:
            CacheError: A shard could not be written; those before it are there.
        """
        parts = _pack(targets)
        self._pending[key] = parts
        self.taken += 1
        self._size += sum(part.nbytes for part in parts.values())
        is_late = time.monotonic() - self._since > _FLUSH_SECONDS
        if self._size >= self._shard_bytes or is_late:
            self.flush()

    def flush(self) -> None:
        """Finish a shard of the entries taken since the last one.

        Raises:
            CacheError: It could not be written; those before it are there.
        """
        pending, self._pending, self._size = self._pending, {}, 0
        self._since = time.monotonic()
        if not pending:
            return
        tensors = {f"{key}.{name}": p for key in pending for name, p in pending[key].items()}
        checks = {key: _checksum(parts) for key, parts in pending.items()}
        data = save(tensors, metadata={"crc32": json.dumps(checks, separators=(",", ":"))})
        name = hashlib.sha256("\n".join(sorted(pending)).encode()).hexdigest()[:32] + ".safetensors"
        draft, final = self.folder / STAGING / name, self.folder / SHARDS / name
        try:
            draft.parent.mkdir(exist_ok=True)
            draft.write_bytes(data)
            replace_file(draft, final)
        except OSError as error:
            draft.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise CacheError(
                f"{final} could not be written ({error}); {self.folder} has {free:,} bytes free. "
                f"The {self.entries:,} entries written before are kept: make room and run the same "
                "command again, it goes on from there"
            ) from error
        self.entries += len(pending)
        self.bytes += len(data)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make the folder of a cache, keep other writers out, and throw away what a kill left.

    Raises:
        CacheError: Another process is filling it.
        OSError: The folder cannot be made.
    """
    import fcntl  # not everywhere; reading a cache does without

    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(
                f"another process is filling {folder}; wait for it, or take another cache.path"
            ) from error
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(folder / STAGING, ignore_errors=True)


def write_json(file: Path, content: Any) -> None:
    """Write a small file that is whole or absent."""
    draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    replace_file(draft, file)


_PARTS = ("values", "exponents", "indices", "rest", "windows")


def _pack(targets: Sequence[AttentionMapTarget]) -> dict[str, Tensor]:
    """The parts of an entry: its targets, all of one shape, one after the other."""
    parts = {
        "values": torch.cat([each.values for each in targets]),
        "exponents": torch.cat([each.exponents for each in targets]).to(torch.int16),
        "windows": torch.tensor([each.window or 0 for each in targets], dtype=torch.int32),
    }
    if targets[0].indices is not None:
        indices = torch.cat([each.indices for each in targets if each.indices is not None])
        is_short = indices.shape[1] <= _SHORT
        parts["indices"] = indices.to(torch.int16 if is_short else torch.int32)
        rest = torch.cat([each.rest for each in targets if each.rest is not None])
        parts["rest"] = rest.to(torch.float32)
    return {name: part.cpu().contiguous() for name, part in parts.items()}


def _unpack(parts: Mapping[str, Tensor]) -> list[AttentionMapTarget]:
    indices, rest = parts.get("indices"), parts.get("rest")
    return [
        AttentionMapTarget(
            parts["values"][i : i + 1],
            parts["exponents"][i : i + 1],
            None if indices is None else indices[i : i + 1],
            None if rest is None else rest[i : i + 1],
            window or None,
        )
        for i, window in enumerate(parts["windows"].tolist())
    ]


def _checksum(parts: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(parts):
        part = parts[name]
        value = zlib.crc32(f"{name} {part.dtype} {tuple(part.shape)};".encode(), value)
        value = zlib.crc32(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value
