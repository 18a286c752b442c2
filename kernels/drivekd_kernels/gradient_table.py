"""Tables of ragged gradient lists: built on the host, copied to the device without a sync.

`gradient_items.py` says what a table looks like. Records of equal (count, dtype, alignment) form a
group, which one launch serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 15  # elements of an item
_ALIGNMENT = 16  # bytes of the widest load

# Pinned tables of calls made while a CUDA graph was captured: its replays copy from them again.
_captured: list[Tensor] = []


@dataclass(frozen=True)
class Kind:
    """What a kernel must know about a tensor's gradients when it is compiled."""

    count: int
    dtype: torch.dtype
    aligned: bool


class Group(NamedTuple):
    """A launch: its kind, where the entries of its items begin, and how many items it has."""

    kind: Kind
    first_entry: int
    num_items: int


@dataclass
class _Records:
    places: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    num_items: int = 0


class Table:
    """Collects records, then becomes one int64 vector on a device."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._groups: dict[Kind, _Records] = {}

    def add(
        self,
        like: Tensor,
        count: int,
        addresses: Sequence[int],
        *,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> int:
        """Append the record (size, first item, before, addresses, after); return its items.

        Args:
            like: one of the gradients: its size and dtype are those of all.
            count: number of gradients.
            addresses: theirs, and their output's where there is one.
            before: words in front of the addresses.
            after: words behind them.
        """
        size = like.numel()
        num_chunks = -(-size // CHUNK)
        if num_chunks == 0:
            return 0
        aligned = all(address % _ALIGNMENT == 0 for address in addresses)
        own = self._groups.setdefault(Kind(count, like.dtype, aligned), _Records())
        own.places.append(len(self._words))
        own.chunks.append(num_chunks)
        self._words += (size, own.num_items, *before, *addresses, *after)
        own.num_items += num_chunks
        return num_chunks

    def append(self, words: Sequence[int]) -> int:
        """Append words; return the place of the first."""
        place = len(self._words)
        self._words += words
        return place

    def to(self, device: torch.device) -> tuple[Tensor, list[Group]]:
        """The table and its launches.

        On a GPU the copy is asynchronous, from pinned memory that torch's allocator does not reuse
        before the copy has run. While a CUDA graph is captured the pinned table is kept for the
        life of the process, because every replay reads it again; addresses in it are those of the
        captured call, so its gradients must stay where they are, as for any captured kernel.
        """
        parts = [torch.tensor(self._words, dtype=torch.int64)]
        groups, first_entry = [], len(self._words)
        for kind, own in self._groups.items():
            entries = torch.tensor([own.places, own.chunks], dtype=torch.int64)
            parts.append(torch.repeat_interleave(entries[0], entries[1]))
            groups.append(Group(kind, first_entry, own.num_items))
            first_entry += own.num_items
        table = torch.cat(parts)
        if device.type != "cuda":
            return table.to(device), groups
        pinned = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(pinned)
        return pinned.to(device, non_blocking=True), groups
