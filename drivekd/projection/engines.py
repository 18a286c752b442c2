"""Which engine holds the gradients: this process alone, replicas (DDP) or shards (FSDP2)."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from drivekd.projection.checks import is_dtensor
from drivekd.projection.local import LocalGradients
from drivekd.projection.replicas import ReplicatedGradients


def make_engine(
    parameters: Sequence[Tensor], module: nn.Module | None, group: dist.ProcessGroup | None
) -> LocalGradients:
    """The engine for `parameters`.

    Args:
        parameters: The parameters, each once.
        module: The module that they come from; needed where FSDP2 has sharded it.
        group: The ranks whose gradients are averaged; None is the mesh of sharded parameters, or
            the default group, where there is one.
    """
    if module is not None and any(is_dtensor(parameter) for parameter in parameters):
        from drivekd.projection.shards import ShardedGradients

        return ShardedGradients(parameters, module, group)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None or dist.get_world_size(group) == 1:
        return LocalGradients(parameters)
    return ReplicatedGradients(parameters, group)
