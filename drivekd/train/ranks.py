"""What the processes of a training tell each other, so that they go on, and stop, together."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from drivekd import errors

_T = TypeVar("_T", bound=Exception)
_RUNS = itertools.count()


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def launched() -> int:
    """How many processes the launcher says that there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share_a_cpu() -> bool:
    """Whether a launcher started several processes where there is no GPU.

    Trainer finds them together only with `use_cpu`; otherwise each would train alone.
    """
    return launched() > 1 and not torch.accelerator.is_available()


def gather(value: Any) -> list[Any]:
    """Every process' value, by rank; this one's alone without a process group."""
    if not is_distributed():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def union(own: Collection[str], names: Sequence[str], device: torch.device) -> frozenset[str]:
    """The names that any process has; one small all-reduce.

    Args:
        own: What this process has.
        names: All that there are, in the same order on all processes.
        device: Where the process group communicates.
    """
    if not is_distributed():
        return frozenset(own)
    flags = torch.tensor([name in own for name in names], dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return frozenset(name for name, any_has in zip(names, flags.tolist(), strict=True) if any_has)


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes; one all-reduce."""
    if not is_distributed():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def raise_together(error: _T | None, kind: type[_T], device: torch.device) -> None:
    """Raise on all processes if one has an error; one small all-reduce if none has.

    Args:
        error: This process' error, or None.
        kind: The class of the error that all raise.
        device: Where the process group communicates.

    Raises:
        Exception: Of class `kind`; its message is that of the process, or those of the processes,
            that had one, with their ranks.
    """
    if not is_distributed():
        if error is not None:
            raise error
        return
    if not union([] if error is None else ["error"], ["error"], device):
        return
    messages = gather(None if error is None else str(error))
    text = "; ".join(f"rank {rank}: {own}" for rank, own in enumerate(messages) if own is not None)
    raise kind(text) from error


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Name one process' error in all of them.

    The one that fails leaves its error in the process group's store. When it ends, communication
    breaks off in the others (with gloo at once; with NCCL the launcher ends them, or its time-out),
    and they raise what they find there.

    Raises:
        Exception: This process' own error; or, where communication broke off because another
            process has failed, one of the same class as that one's (of `drivekd.errors`, else
            RuntimeError).
    """
    if not is_distributed():
        yield
        return
    number = next(_RUNS)
    store = PrefixStore(f"drivekd/run-{number}", _get_default_store())
    rank = dist.get_rank()
    try:
        yield
    except Exception as error:
        own = json.dumps([rank, type(error).__name__, str(error)])
        with contextlib.suppress(dist.DistError):  # whoever held the store has ended
            first, kind, message = json.loads(store.compare_set("failure", "", own))
            if first != rank and _is_consequence(error):
                known = getattr(errors, kind, RuntimeError)
                raise known(f"rank {first}: {message}") from error
        raise


def _is_consequence(error: BaseException) -> bool:
    """Whether an error may be that communication broke off, or come of it."""
    own = tuple(each for each in vars(errors).values() if isinstance(each, type))
    if isinstance(error, own):
        return error.__cause__ is not None and _is_consequence(error.__cause__)
    return isinstance(error, RuntimeError)
