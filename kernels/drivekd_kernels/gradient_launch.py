"""Launchers of the gradient kernels: one table a call, one launch for each kind of tensor in it.

Gradients come flat, present ones only, grouped by tensor (`drivekd.ops.gradient_layout`): tensor t
owns `grads[offsets[t] : offsets[t + 1]]`, of one dtype, dense and in one memory order. Nothing is
read back, and nothing is compiled anew when sizes or numbers of tensors change.
"""

import contextlib
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from drivekd_kernels.gradient_combine import combine_kernel
from drivekd_kernels.gradient_gram import fold_kernel, gram_kernel
from drivekd_kernels.gradient_table import (
    CHUNK,
    Batch,
    Integers,
    Kind,
    Table,
    batches,
    exclusive_sum,
    num_items,
)

WARPS = 4
FOLD_BLOCK, FOLD_WARPS = 2048, 8
# Gradients that one program of the Gram holds: 36 sums of 64 bits a thread.
MAX_COUNT = 8
_FEW = 4  # gradients up to which a step has two 16-byte loads of each, else one

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def gram(
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    num_tasks: int,
    num_patterns: int,
) -> Tensor:
    """Gram matrices (num_patterns, num_tasks, num_tasks), float64; zero where a task is absent.

    A tensor of more than MAX_COUNT gradients is read two gradients at a time.
    """
    device = grads[0].device
    table = Table()
    by_row: dict[int, list[Batch]] = {}
    for batch in batches(grads, tasks, offsets, rows):
        by_row.setdefault(batch.row, []).append(batch)
    # Slots of one pattern and set of gradients follow each other.
    ranges: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    num_slots = 0
    for row, own in by_row.items():
        present = own[0].tasks
        for members in _read_together(len(present)):
            first_slot = num_slots
            for batch in own:
                own_items = num_items(batch.sizes)
                table.add(
                    len(members),
                    batch.dtype,
                    batch.sizes,
                    [num_slots + exclusive_sum(own_items)],
                    batch.addresses[:, members],
                )
                num_slots += int(own_items.sum())
            for pair, (a, b) in enumerate(_lower_triangle(len(members))):
                cell = row, present[members[a]], present[members[b]]
                ranges.setdefault(cell, (pair, first_slot, num_slots))
    first_cell = table.append(_cells(ranges, num_slots, num_tasks, num_patterns))
    on_device, groups = table.to(device)

    most = max((kind.count for kind, _, _ in groups), default=0)
    num_pairs = most * (most + 1) // 2
    partials = torch.empty((num_pairs, num_slots), dtype=torch.float64, device=device)
    values = torch.empty((num_patterns, num_tasks, num_tasks), dtype=torch.float64, device=device)
    with _on(device):
        for kind, first_entry, items in groups:
            exact = tl.float32 if kind.dtype == torch.bfloat16 else tl.float64
            gram_kernel[(items,)](
                on_device,
                partials,
                first_entry,
                num_slots,
                EXACT=exact,
                **_meta(kind, 2 if kind.count <= _FEW else 1),
            )
        cells = num_patterns * num_tasks * (num_tasks + 1) // 2
        fold_kernel[(cells,)](
            on_device, partials, values, first_cell, BLOCK=FOLD_BLOCK, num_warps=FOLD_WARPS
        )
    return values


def combine(
    out: Sequence[Tensor],
    grads: Sequence[Tensor],
    tasks: Sequence[int],
    offsets: Sequence[int],
    rows: Sequence[int],
    weights: Tensor,
    *,
    accumulate: bool,
) -> None:
    """`out[t] (+)= sum_k weights[rows[t], k] grads[t, k]`; weights (S, K) float64, contiguous."""
    table = Table()
    for batch in batches(grads, tasks, offsets, rows):
        targets = np.array([out[tensor].data_ptr() for tensor in batch.tensors], dtype=np.int64)
        addresses = np.concatenate([targets[:, None], batch.addresses], axis=1)
        places = batch.row * weights.shape[1] + np.array(batch.tasks, dtype=np.int64)
        after = np.broadcast_to(places, batch.addresses.shape)
        table.add(len(places), batch.dtype, batch.sizes, [], addresses, after)
    on_device, groups = table.to(weights.device)
    with _on(weights.device):
        for kind, first_entry, items in groups:
            unroll = 2 if kind.count <= _FEW and kind.dtype.itemsize > 2 else 1
            combine_kernel[(items,)](
                on_device, weights, first_entry, ACCUMULATE=accumulate, **_meta(kind, unroll)
            )


def _read_together(count: int) -> list[list[int]]:
    """Sets of a tensor's gradients that a program reads, so that every pair is in one of them."""
    if count <= MAX_COUNT:
        return [list(range(count))]
    return [list(pair) for pair in combinations(range(count), 2)]


def _lower_triangle(size: int) -> list[tuple[int, int]]:
    """Pairs (a, b), b <= a, in the order of the partial results."""
    return [(a, b) for a in range(size) for b in range(a + 1)]


def _cells(
    ranges: dict[tuple[int, int, int], tuple[int, int, int]],
    num_slots: int,
    num_tasks: int,
    num_patterns: int,
) -> Integers:
    """For each cell of the lower triangles: the partial results it sums, and its two places."""
    words = []
    for row in range(num_patterns):
        for a, b in _lower_triangle(num_tasks):
            pair, begin, end = ranges.get((row, a, b), (0, 0, 0))
            first = row * num_tasks**2
            places = first + a * num_tasks + b, first + b * num_tasks + a
            words += [pair * num_slots + begin, pair * num_slots + end, *places]
    return np.array(words, dtype=np.int64)


def _meta(kind: Kind, unroll: int) -> dict[str, Any]:
    """What the kernels must know when they are compiled."""
    return {
        "COUNT": kind.count,
        "DTYPE": DTYPES[kind.dtype],
        "ALIGNED": kind.aligned,
        "CHUNK": CHUNK,
        "LANES": 32 * WARPS,
        "VEC": 16 // kind.dtype.itemsize,
        "UNROLL": unroll,
        "num_warps": WARPS,
    }


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Launch on that device, whatever the current one is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
