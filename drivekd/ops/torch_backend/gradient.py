"""Gram matrices and linear combinations of ragged gradient lists in plain PyTorch, on any device.

Both ops copy the gradients chunk by chunk into a float64 buffer (tasks, chunk), which stays in
cache on a CPU, and do all arithmetic there: products of 16- and 32-bit gradients are exact in
float64, and no partial sum is ever held in fp32. Nothing is read back to the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd.ops.dispatch import register
from drivekd.ops.gradient_layout import Pattern, as_flat, patterns

# Elements of a chunk: on a CPU, few enough for torch to copy them in one thread (waking others
# costs more, much more on a busy machine); elsewhere, enough to fill an accelerator.
_CHUNK_CPU = 1 << 15
_CHUNK_ACCELERATOR = 1 << 20
# On an accelerator a chunk's Gram is a batch of products over so many columns each: one single
# (K, chunk) x (chunk, K) product has too little output to occupy it.
_BLOCK = 1 << 12


@dataclass(frozen=True)
class _Piece:
    """Elements [start, stop) of a tensor, at [column, column + stop - start) of the buffer."""

    tensor: int
    start: int
    stop: int
    column: int


@register("gradient_gram", "torch")
def gradient_gram(
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    num_tasks: int,
    num_patterns: int,
) -> Tensor:
    """Gram matrices (num_patterns, num_tasks, num_tasks), float64; zero where a task is absent."""
    device = grads[0].device
    values = torch.zeros(num_patterns, num_tasks, num_tasks, dtype=torch.float64, device=device)
    for pattern in patterns(tasks, offsets, rows):
        present = len(pattern.tasks)
        gram = torch.zeros(present, present, dtype=torch.float64, device=device)
        for columns, _ in _float64_chunks(grads, offsets, pattern):
            gram += _gram(columns)
        for i, task in enumerate(pattern.tasks):
            for j, other in enumerate(pattern.tasks):
                values[pattern.row, task, other] = gram[i, j]
    return values


@register("combine_gradients", "torch")
def combine_gradients(
    out: Sequence[Tensor],
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    weights: Tensor,
    accumulate: bool,
) -> None:
    """`out[t] (+)= sum_k weights[rows[t], k] grads[t, k]`, rounded once to the dtype of `out`."""
    flat_out = [as_flat(tensor) for tensor in out]
    for pattern in patterns(tasks, offsets, rows):
        weight = torch.stack([weights[pattern.row, task] for task in pattern.tasks])
        for columns, pieces in _float64_chunks(grads, offsets, pattern):
            total = weight @ columns
            for piece in pieces:
                target = flat_out[piece.tensor][piece.start : piece.stop]
                update = total[piece.column : piece.column + piece.stop - piece.start]
                target.copy_(update + target if accumulate else update)


def _gram(columns: Tensor) -> Tensor:
    """(K, K) inner products of the rows of (K, columns)."""
    if columns.device.type == "cpu":
        return torch.stack([columns @ row for row in columns])
    return _gram_in_blocks(columns)


def _gram_in_blocks(columns: Tensor) -> Tensor:
    blocks = columns.view(len(columns), -1, _BLOCK).transpose(0, 1)
    return torch.bmm(blocks, blocks.mT).sum(0)


def _float64_chunks(
    grads: Sequence[Tensor], offsets: Sequence[int], pattern: Pattern
) -> Iterator[tuple[Tensor, list[_Piece]]]:
    """Yield (present tasks, columns) float64 buffers and what their columns hold.

    The number of columns is a multiple of `_BLOCK`, filled up with zeros. The next buffer
    overwrites the last one.
    """
    first = grads[0]
    sizes = [(tensor, grads[offsets[tensor]].numel()) for tensor in pattern.tensors]
    longest = _CHUNK_CPU if first.device.type == "cpu" else _CHUNK_ACCELERATOR
    capacity = min(longest, _round_up(sum(size for _, size in sizes)))
    buffer = first.new_empty((len(pattern.tasks), capacity), dtype=torch.float64)
    for pieces in _pieces(sizes, capacity):
        for piece in pieces:
            length = piece.stop - piece.start
            own = grads[offsets[piece.tensor] : offsets[piece.tensor + 1]]
            for row, grad in enumerate(own):
                target = buffer[row, piece.column : piece.column + length]
                target.copy_(as_flat(grad)[piece.start : piece.stop])
        filled = pieces[-1].column + pieces[-1].stop - pieces[-1].start
        used = _round_up(filled)
        buffer[:, filled:used].zero_()
        yield buffer[:, :used], pieces


def _pieces(sizes: Sequence[tuple[int, int]], capacity: int) -> Iterator[list[_Piece]]:
    """Cut (tensor, number of elements) pairs into chunks of at most `capacity` elements.

    Small tensors share a chunk, so that the work does not depend on how ragged the list is.
    """
    chunk: list[_Piece] = []
    column = 0
    for tensor, size in sizes:
        start = 0
        while start < size:
            stop = min(size, start + capacity - column)
            chunk.append(_Piece(tensor, start, stop, column))
            column += stop - start
            start = stop
            if column == capacity:
                yield chunk
                chunk, column = [], 0
    if chunk:
        yield chunk


def _round_up(columns: int) -> int:
    return -(-columns // _BLOCK) * _BLOCK
