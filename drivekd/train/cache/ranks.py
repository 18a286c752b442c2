"""The processes of one launch, which fill a cache together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import transformers
from torch import distributed

_T = TypeVar("_T")


class Ranks:
    """This process among those that torchrun or accelerate started; alone without them.

    Args:
        args: Training arguments; they set up device and process group.

    Attributes:
        device: This process' device.
        index: Its number.
        count: How many there are.
    """

    def __init__(self, args: transformers.TrainingArguments) -> None:
        self.device = args.device
        self.index: int = args.process_index
        self.count: int = args.world_size

    @property
    def is_first(self) -> bool:
        """Whether this one speaks and tidies up for all."""
        return self.index == 0

    def share(self, work: Sequence[_T]) -> Sequence[_T]:
        """This process' part."""
        return work[self.index :: self.count]

    def gather(self, value: _T) -> list[_T]:
        """Every process' value, in order."""
        if self.count == 1:
            return [value]
        values: list[_T | None] = [None] * self.count
        distributed.all_gather_object(values, value)
        return [each for each in values if each is not None]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()

    def close(self) -> None:
        """End the process group, after everybody is done."""
        if self.count > 1 and distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
