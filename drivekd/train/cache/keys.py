"""What decides a cached target: everything that its name is a hash of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from drivekd.train.weights import Checkpoint

FORMAT = 1  # of entries and of how they are named; another number makes every old entry a miss
WHOLE_BYTES = 2**30  # checkpoints up to this size are hashed whole
BLOCK = 4096  # bytes hashed at the begin, middle and end of each tensor of larger ones
_SIZES = {"float16": 2, "float32": 4}
_SHORT = 2**15 - 1  # most tokens whose indices fit in 16 bits


@dataclass(frozen=True)
class TeacherRecord:
    """What a cache must know of a teacher.

    Attributes:
        identity: Hash of its config and weights.
        depth: Layers of its text decoder.
    """

    identity: str
    depth: int


@dataclass(frozen=True)
class MapSpec:
    """Which maps of which teacher are kept, and how.

    Attributes:
        teacher: The teacher's identity.
        groups: For each target the teacher layers that it is the mean of.
        region: "full" or "text_to_vision".
        top_k: Cells of a full map's row; None for rectangles.
        dtype: Of the values, "float16" or "float32".
        precision: dtype and autocast that the teacher runs in.
    """

    teacher: str
    groups: tuple[tuple[int, ...], ...]
    region: str
    top_k: int | None
    dtype: str
    precision: str

    @property
    def digest(self) -> str:
        """16 hex digits, the first part of its entries' keys."""
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def key(self, sample: str) -> str:
        """The name of one sample's entry."""
        return f"{self.digest}-{sample}"

    def entry_bytes(self, *, num_tokens: int, num_text: int, num_vision: int) -> int:
        """Size of an entry's tensors for a sample with so many tokens."""
        item = _SIZES[self.dtype]
        if self.region == "text_to_vision":
            rows = max(1, num_text)
            size = rows * max(1, num_vision) * item + rows * 2
        else:
            index = 2 if num_tokens <= _SHORT else 4
            kept = num_tokens if self.top_k is None else min(self.top_k, num_tokens)
            size = num_tokens * (kept * (item + index) + 2 + 4)
        return len(self.groups) * (size + 4)


def sample_digest(features: Mapping[str, Tensor]) -> str:
    """32 hex digits of all model inputs of one encoded record, labels left out.

    Tokens, pixels and grids as the teacher gets them, to the bit: a changed image, question or
    image setting is another sample, and so is one whose pixels another version of the image
    libraries rounds in another way.
    """
    digest = hashlib.sha256()
    for name in sorted(features):
        if name == "labels":
            continue
        tensor = features[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def teacher_identity(path: str | Path, *, local_files_only: bool = False) -> str:
    """Hash of a checkpoint's config and weights.

    Up to 1 GiB of weights are hashed whole. Of larger ones the size and header of every file, and
    4 KiB at the begin, in the middle and at the end of every tensor: training changes nearly every
    number of a tensor that it changes at all, so one block tells.

    Args:
        path: Folder or hub name, with safetensors weights.
        local_files_only: Never fetch anything.

    Raises:
        FileNotFoundError: It has no safetensors weights.
        OSError: A file is missing.
    """
    digest = hashlib.sha256()
    with Checkpoint(path, local_files_only=local_files_only) as checkpoint:
        digest.update(checkpoint.local_path("config.json").read_bytes())
        files = [checkpoint.local_path(name) for name in sorted(checkpoint.files)]
    whole = sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    for file in files:
        with file.open("rb") as stream:
            if whole:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length)
            digest.update(f"{file.stat().st_size};".encode() + header)
            for name, entry in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                for place in (begin, (begin + end) // 2, max(begin, end - BLOCK)):
                    stream.seek(place)
                    digest.update(stream.read(min(BLOCK, end - place)))
    return digest.hexdigest()[:32]
