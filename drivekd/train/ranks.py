"""What the processes of a training tell each other, so that they go on, and stop, together."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from drivekd import errors

_T = TypeVar("_T", bound=Exception)
_RUNS = itertools.count()
# How long a process that has failed waits, in seconds: for the others to fail on their own, and for
# them to read why; it may be the one that holds the store.
_GRACE, _PATIENCE = 2.0, 10.0


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
    """Stop all processes with the error of the one that fails inside.

    The one that fails says why in the process group's store. If the others have not failed as well
    soon after, it leaves the group: communication with it then breaks off in the others (with gloo
    at once; with NCCL the launcher ends them, or its time-out), and they raise what they read.

    Raises:
        Exception: This process' own error; or, where communication broke off because another
            process has failed, one of the same class as that one's (of `drivekd.errors`, else
            RuntimeError).
    """
    if not is_distributed():
        yield
        return
    number = next(_RUNS)
    store = _get_default_store()
    notes = _Notes(PrefixStore(f"drivekd/run-{number}", store))
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        yield
    except Exception as error:
        first, kind, message = notes.add(rank, error)
        if not notes.wait_for(size, _GRACE):
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
            notes.wait_for(size, _PATIENCE)
        if first != rank and _is_consequence(error):
            known = getattr(errors, kind, RuntimeError)
            raise known(f"rank {first}: {message}") from error
        raise


class _Notes:
    """Which processes have failed, and why the first did, in a store that all of them reach."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def add(self, rank: int, error: Exception) -> tuple[int, str, str]:
        """Note a failure; rank, class and message of the first one."""
        own = (rank, type(error).__name__, str(error))
        with contextlib.suppress(RuntimeError):  # whoever held the store is gone
            # Set before the count is raised: a reader who sees the count finds it.
            written = self._store.compare_set("first", "", json.dumps(own))
            self._store.add("count", 1)
            first, kind, message = json.loads(written)
            return first, kind, message
        return own

    def wait_for(self, count: int, seconds: float) -> bool:
        """Whether that many processes have failed, after waiting for them."""
        end = time.monotonic() + seconds
        try:
            while self._store.add("count", 0) < count:
                if time.monotonic() > end:
                    return False
                time.sleep(0.05)
        except RuntimeError:
            pass
        return True


def _is_consequence(error: Exception) -> bool:
    """Whether an error may be that communication broke off."""
    own = [each for each in vars(errors).values() if isinstance(each, type)]
    return isinstance(error, RuntimeError) and not isinstance(error, tuple(own))
