"""Gradients of a model that every rank holds whole: distributed data parallel.

The K gradients are averaged first and projected afterwards, so that the update does not depend on
how many ranks share a batch. Each rank receives the means of one shard (reduce-scatter), its part
of the Gram matrix is summed over ranks, and the combined shards are put together again
(all-gather): as much traffic as (K + 1) / 2 all-reduces, less where losses are shallow.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram
from drivekd.projection.agreement import Statement, agree
from drivekd.projection.local import (
    LocalGradients,
    Reduced,
    Scalars,
    TaskGradients,
    check_reached,
    in_order,
)

_BUCKET_ELEMENTS = 2**24


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype that have gradients of the same losses.

    Attributes:
        positions: Their places among the parameters.
        sizes: Their numbers of elements.
        tasks: The losses that have a gradient, as places among the names.
    """

    positions: list[int]
    sizes: list[int]
    tasks: tuple[int, ...]


class ReplicatedGradients(LocalGradients):
    """Averages gradients over the ranks of a group; every rank holds all parameters.

    A gradient that some ranks lack counts as zero there; one that all lack is absent.

    Args:
        parameters: The parameters, each once, in the same order on all ranks.
        group: The ranks.

    Raises:
        ValueError: This rank is not in `group`.
    """

    is_distributed = True

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        super().__init__(parameters)
        if dist.get_rank(group) < 0:
            raise ValueError("process_group does not hold this rank")
        self.group = group
        self._num_ranks = dist.get_world_size(group)
        shapes = [(tuple(parameter.shape), parameter.dtype) for parameter in parameters]
        digest = hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()
        self._described = f"{len(shapes)} tensors ({digest})"
        # Of the projection under way: set by reduce, read by add.
        self._buckets: list[Bucket] = []

    def reduce(
        self, grads: TaskGradients, statement: Statement, weights: Scalars, values: Scalars
    ) -> Reduced:
        """Average the gradients, each rank one shard; inner products and scalars over all ranks.

        Raises:
            ValueError: The ranks do not agree, see `agree`.
            NotImplementedError: Sparse gradients.
        """
        own = {name: _mask(entries) for name, entries in grads.items()}
        statements = self._agreed(replace(statement, reached=own))
        names = tuple(sorted({name for other in statements for name in other.reached}))
        if not names:
            raise ValueError("losses is empty: no rank has a loss; give at least one loss to one")
        reached = []
        for name in names:
            mask = 0
            for other in statements:
                mask |= other.reached.get(name, 0)
            reached.append(mask)
        self._buckets = self._filled_buckets(reached)
        lists = self._averaged(names, grads)
        gram = gradient_gram(self._counted(lists))
        check_reached(names, gram)
        # One number per loss: for how many ranks a weight, a value is counted.
        holders = [sum(name in other.reached for other in statements) for name in names]
        shares = [
            {
                name: own[name] / count
                for name, count in zip(names, counts, strict=True)
                if name in own
            }
            for own, counts in ((weights, holders), (values, [self._num_ranks] * len(names)))
        ]
        rows = [in_order(own, names, gram.values) for own in shares]
        packed = torch.cat([gram.values.flatten(), *rows])
        dist.all_reduce(packed, group=self.group)
        total, *rows = torch.split(packed, [gram.values.numel(), len(names), len(names)])
        gram = GradientGram(gram.patterns, total.view_as(gram.values))
        return Reduced(names, lists, gram, *rows)

    def add(self, reduced: Reduced, weights: Tensor) -> None:
        """Combine the shards, gather them and add the update to `.grad`."""
        self._write(combine_gradients(reduced.lists, weights, out=first_present(reduced.lists)))

    def _agreed(self, statement: Statement) -> list[Statement]:
        return agree(replace(statement, parameters=self._described), self.group)

    def _is_bucketed(self, position: int) -> bool:
        """Whether a parameter's gradient is still to be averaged over the ranks."""
        return True

    def _filled_buckets(self, reached: Sequence[int]) -> list[Bucket]:
        """Buckets for all parameters that a loss reaches, given a bit mask of those per loss."""
        buckets: list[Bucket] = []
        open_buckets: dict[tuple[torch.dtype, tuple[int, ...]], Bucket] = {}
        for position, parameter in enumerate(self.parameters):
            tasks = tuple(task for task, mask in enumerate(reached) if mask >> position & 1)
            if not tasks or not self._is_bucketed(position):
                continue
            key = (parameter.dtype, tasks)
            if key not in open_buckets:
                open_buckets[key] = Bucket([], [], tasks)
                buckets.append(open_buckets[key])
            bucket = open_buckets[key]
            bucket.positions.append(position)
            bucket.sizes.append(parameter.numel())
            if sum(bucket.sizes) >= _BUCKET_ELEMENTS:
                del open_buckets[key]
        return buckets

    def _scattered(self, bucket: Bucket, grads: list[Tensor | None] | None) -> Tensor:
        """This rank's shard of the mean gradient; frees the gradients that went into it."""
        size = sum(bucket.sizes)
        shard_size = max(1, -(-size // self._num_ranks))
        like = self.parameters[bucket.positions[0]]
        flat = torch.zeros(shard_size * self._num_ranks, dtype=like.dtype, device=like.device)
        for position, piece in zip(
            bucket.positions, torch.split(flat[:size], bucket.sizes), strict=True
        ):
            if grads is not None:
                grad, grads[position] = grads[position], None
                if grad is not None:
                    piece.view(grad.shape).copy_(grad)
        # Before the sum, as DistributedDataParallel does, so that fp16 does not overflow.
        flat /= self._num_ranks
        shard = torch.empty(shard_size, dtype=like.dtype, device=like.device)
        _reduce_scatter(shard, flat, self.group)
        return shard

    def _averaged(self, names: Sequence[str], grads: TaskGradients) -> list[list[Tensor | None]]:
        """For every loss this rank's shard of every bucket, None where it has no gradient."""
        lists: list[list[Tensor | None]] = [[None] * len(self._buckets) for _ in names]
        for number, bucket in enumerate(self._buckets):
            for task in bucket.tasks:
                lists[task][number] = self._scattered(bucket, grads.get(names[task]))
        return lists

    def _counted(self, lists: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
        """What this rank contributes to the inner products."""
        return lists

    def _write(self, shards: Sequence[Tensor | None]) -> None:
        """Gather the update's buckets and add them to `.grad`."""
        for bucket, shard in zip(self._buckets, shards, strict=True):
            assert shard is not None
            flat = shard.new_empty(shard.numel() * self._num_ranks)
            _all_gather(flat, shard, self.group)
            pieces = torch.split(flat[: sum(bucket.sizes)], bucket.sizes)
            for position, piece in zip(bucket.positions, pieces, strict=True):
                parameter = self.parameters[position]
                update = piece.view(parameter.shape)
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter).copy_(update)
                else:
                    parameter.grad += update


def _all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    # Renamed in torch 2.13, which warns of the old name.
    new = getattr(dist, "all_gather_single", None)
    (new or dist.all_gather_into_tensor)(whole, shard, group=group)


def _reduce_scatter(shard: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    new = getattr(dist, "reduce_scatter_single", None)
    (new or dist.reduce_scatter_tensor)(shard, whole, group=group)


def _mask(entries: Sequence[Tensor | None]) -> int:
    mask = 0
    for position, grad in enumerate(entries):
        if grad is not None:
            if grad.layout is not torch.strided:
                raise NotImplementedError(
                    f"the gradient of parameters[{position}] has layout {grad.layout}; only dense "
                    "gradients work (nn.Embedding(sparse=False))"
                )
            mask |= 1 << position
    return mask


def first_present(lists: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """For every tensor a gradient whose memory may hold the combination."""
    columns = zip(*lists, strict=True)
    return [next((grad for grad in column if grad is not None), None) for column in columns]
