"""Tables of ragged gradient lists: built on the host, copied to the device without a sync.

`gradient_items.py` says what a table looks like. Records of equal (count, dtype, alignment) form a
group, which one launch serves. Whole columns are computed at once: a model has hundreds of tensors,
and the GPU may be waiting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 15  # elements of an item
_ALIGNMENT = 16  # bytes of the widest load

Integers = NDArray[np.int64]

# Pinned memory for tables of calls that a CUDA graph captures: not every version of torch can
# allocate it there, so other calls see to it that some is left over.
_spares: list[Tensor] = []
_NUM_SPARES = 8
# Pinned tables of captured calls: replays copy from them again.
_captured: list[Tensor] = []


class Batch(NamedTuple):
    """The tensors of one pattern and dtype.

    Attributes:
        row: of the pattern.
        tasks: that have a gradient, ascending.
        dtype: of the gradients.
        tensors: which they are, ascending.
        sizes: (tensors,) elements.
        addresses: (tensors, tasks) of the gradients.
    """

    row: int
    tasks: tuple[int, ...]
    dtype: torch.dtype
    tensors: list[int]
    sizes: Integers
    addresses: Integers


def batches(
    grads: Sequence[Tensor], tasks: Sequence[int], offsets: Sequence[int], rows: Sequence[int]
) -> Iterator[Batch]:
    """A flat gradient list (`drivekd.ops.gradient_layout`) by pattern, rows ascending."""
    members: dict[tuple[int, torch.dtype], list[int]] = {}
    for tensor, row in enumerate(rows):
        members.setdefault((row, grads[offsets[tensor]].dtype), []).append(tensor)
    pointers = np.array([grad.data_ptr() for grad in grads], dtype=np.int64)
    first = np.asarray(offsets, dtype=np.int64)
    for (row, dtype), own in sorted(members.items(), key=lambda item: item[0][0]):
        present = tuple(tasks[offsets[own[0]] : offsets[own[0] + 1]])
        places = first[own, None] + np.arange(len(present))
        sizes = np.array([grads[offsets[tensor]].numel() for tensor in own], dtype=np.int64)
        yield Batch(row, present, dtype, own, sizes, pointers[places])


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


class Table:
    """Collects records, then becomes one int64 vector on a device."""

    def __init__(self) -> None:
        self._parts: list[Integers] = [np.empty(0, dtype=np.int64)]
        self._length = 0
        self._entries: dict[Kind, list[Integers]] = {}

    def add(
        self,
        count: int,
        dtype: torch.dtype,
        sizes: Integers,
        before: Sequence[Integers],
        addresses: Integers,
        after: Integers | None = None,
    ) -> None:
        """Append a record (size, first item, before, addresses, after) for each tensor.

        Args:
            count: number of a tensor's gradients.
            dtype: of them.
            sizes: (tensors,) elements.
            before: columns (tensors,) in front of the addresses.
            addresses: (tensors, n) of the gradients, and of the output where there is one.
            after: (tensors, n) behind the addresses.
        """
        items = num_items(sizes)
        matching = (addresses % _ALIGNMENT == 0).all(axis=1)
        for aligned in (True, False):
            own = matching == aligned
            if not items[own].any():
                continue
            entries = self._entries.setdefault(Kind(count, dtype, aligned), [])
            first = exclusive_sum(items[own]) + sum(map(len, entries))
            columns = [sizes[own], first, *(each[own] for each in before), *addresses[own].T]
            if after is not None:
                columns += [*after[own].T]
            records = np.stack(columns, axis=1)
            places = self.append(records) + records.shape[1] * np.arange(len(records))
            entries.append(np.repeat(places, items[own]))

    def append(self, words: Integers) -> int:
        """Append words; return the place of the first."""
        place = self._length
        self._parts.append(words.reshape(-1))
        self._length += words.size
        return place

    def to(self, device: torch.device) -> tuple[Tensor, list[Group]]:
        """The table and its launches.

        On a GPU the copy is asynchronous, from pinned memory that torch's allocator does not reuse
        before the copy has run.
        """
        groups = []
        for kind, entries in self._entries.items():
            own = np.concatenate(entries)
            groups.append(Group(kind, self.append(own), len(own)))
        table = torch.from_numpy(np.concatenate(self._parts))
        if device.type != "cuda":
            return table.to(device), groups
        return _pinned(table).to(device, non_blocking=True), groups


def _pinned(table: Tensor) -> Tensor:
    """A copy of the table in pinned memory.

    While a CUDA graph is captured it is kept for the life of the process, because every replay
    reads it again. Addresses in it are those of the captured call, so its gradients must stay where
    they are, as for any captured kernel.
    """
    large_enough = [spare for spare in _spares if len(spare) >= len(table)]
    if torch.cuda.is_current_stream_capturing():
        if large_enough:
            _captured.append(large_enough.pop()[: len(table)].copy_(table))
            _spares[:] = large_enough
        else:
            _captured.append(table.pin_memory())
        return _captured[-1]
    if len(large_enough) < _NUM_SPARES:
        length = 1 << len(table).bit_length()
        missing = range(_NUM_SPARES - len(large_enough))
        new = [torch.empty(length, dtype=table.dtype, pin_memory=True) for _ in missing]
        _spares[:] = [*large_enough, *new]
    return table.pin_memory()


def num_items(sizes: Integers) -> Integers:
    """Items of tensors of so many elements."""
    return -(-sizes // CHUNK)


def exclusive_sum(values: Integers) -> Integers:
    """For each value the sum of those before it."""
    return np.cumsum(values) - values
