"""What the ranks of a distributed run tell each other before their gradients meet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

# What must be the same on all ranks, and what to do where it is not.
_MUST_BE_EQUAL = {
    "parameters": "give all ranks the same parameters in the same order",
    "settings": "make the projector with the same arguments on all ranks",
    "seed": "give all ranks the same seed, call backward() on all of them equally often, and load "
    "the same state",
    "scale": "give all ranks the same scale",
    "scaler": "give all ranks a scaler, or none",
    "weighting": "give all ranks the same kind of weights",
}


@dataclass(frozen=True)
class Statement:
    """What one rank says about its part of a projection; host data only.

    Attributes:
        parameters: Digest of the parameters' shapes and dtypes.
        settings: The projector's arguments.
        seed: The seed, and a digest of the state of the generator that draws the order.
        scale: Factor of the update.
        scaler: Whether there is a `GradScaler`.
        weighting: Kind of the loss weights.
        weights: The weights that are numbers, by loss.
        reached: For every loss of this rank a bit mask of the parameters that have a gradient.
    """

    parameters: str
    settings: tuple[Any, ...]
    seed: tuple[int, str]
    scale: float
    scaler: bool
    weighting: str
    weights: Mapping[str, float]
    reached: Mapping[str, int]


def agree(own: Statement, group: dist.ProcessGroup) -> list[Statement]:
    """The statements of all ranks, by rank; one small gather, read back to the host.

    Raises:
        ValueError: On all ranks alike, where the ranks do not agree; it names what and who.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    statements: list[Statement] = everyone
    for field, advice in _MUST_BE_EQUAL.items():
        first = getattr(statements[0], field)
        for rank, statement in enumerate(statements):
            other = getattr(statement, field)
            if other != first:
                raise ValueError(
                    f"{field} is {first} on rank 0 but {other} on rank {rank}; {advice}"
                )
    weights: dict[str, tuple[int, float]] = {}
    for rank, statement in enumerate(statements):
        for name, weight in statement.weights.items():
            holder, known = weights.setdefault(name, (rank, weight))
            if weight != known:
                raise ValueError(
                    f"weights[{name!r}] is {known} on rank {holder} but {weight} on rank {rank}; "
                    "give all ranks the same weights"
                )
    return statements


def check_same_losses(statements: list[Statement]) -> None:
    """Refuse ranks that hold different losses."""
    first = sorted(statements[0].reached)
    for rank, statement in enumerate(statements):
        other = sorted(statement.reached)
        if other != first:
            raise ValueError(
                f"losses has {first} on rank 0 but {other} on rank {rank}. FSDP reduces inside "
                "every backward, so that all ranks must give the same losses: where a rank has no "
                "sample for one, give a zero that is computed like the loss (the losses of drivekd "
                "are exact zeros with a graph where sample_weight or tokens leave no sample)"
            )
