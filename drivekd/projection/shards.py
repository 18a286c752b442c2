"""Gradients of a model that FSDP2 (`fully_shard`) has sharded over the ranks.

FSDP2 reduces gradients inside backward and leaves this rank's shard of the mean in `.grad`, so
every loss has a backward of its own and `.grad` is taken away in between. Inner products of shards
are partial sums: one all-reduce completes the Gram matrix, and the combination stays on the shard.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from drivekd.projection.agreement import Statement, check_same_losses
from drivekd.projection.local import TaskGradients
from drivekd.projection.replicas import ReplicatedGradients, first_present

_FOREIGN_DIMENSIONS = {"tp": "tensor", "cp": "context", "sp": "sequence", "ep": "expert"}


class ShardedGradients(ReplicatedGradients):
    """Gradients of FSDP2's shards, and of parameters beside them that every rank holds whole.

    Args:
        parameters: The parameters, each once.
        module: The model that `fully_shard` was applied to, or that holds such modules.
        group: The ranks; None is those of the parameters' mesh.

    Raises:
        NotImplementedError: Tensor, context or expert parallel parameters, several meshes, a mesh
            that does not span `group`, an optimiser inside backward.
    """

    def __init__(
        self, parameters: Sequence[Tensor], module: nn.Module, group: dist.ProcessGroup | None
    ) -> None:
        self._modules = [own for own in module.modules() if isinstance(own, FSDPModule)]
        sharded = {i: own for i, own in enumerate(parameters) if isinstance(own, DTensor)}
        for i, parameter in sharded.items():
            _check_placements(f"parameters[{i}]", parameter)
        self._sharded = list(sharded)
        meshes = {parameter.device_mesh for parameter in sharded.values()}
        if len(meshes) > 1:
            raise NotImplementedError(
                f"the parameters lie on {len(meshes)} device meshes; the projector works where "
                "FSDP2 shards all of them over one"
            )
        (mesh,) = meshes
        if group is None:
            group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        assert group is not None
        super().__init__(parameters, group)
        if mesh.size() != self._num_ranks:
            raise NotImplementedError(
                f"the parameters lie on a mesh of {mesh.size()} ranks, but process_group has "
                f"{self._num_ranks}; pass the group of the mesh's ranks as process_group"
            )
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        self._is_first_holder = not any(coordinate[:-1])
        self._shards: list[list[Tensor | None]] = []

    def agree(self, statement: Statement) -> None:
        """Make sure that all ranks run the same backwards: FSDP2 communicates inside them."""
        check_same_losses(self._agreed(statement))

    def differentiate(
        self, losses: Sequence[tuple[str, Tensor]], seed: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, list[Tensor | None]]]:
        """Each loss's gradients, of shards where parameters are sharded.

        Parameters are gathered once, and stay whole until all losses are done. FSDP2's switches for
        gradient synchronisation and resharding are on afterwards, as they are by default.
        """
        for i, parameter in enumerate(self.parameters):
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise NotImplementedError(
                    f"parameters[{i}] has a post-accumulate-grad hook (an optimiser inside "
                    "backward?), which would run once per loss; step the optimiser after the "
                    "projector"
                )
        before = [parameter.grad for parameter in self.parameters]
        self._take_grads()
        # FSDP2 sets a module up in the first forward of its root.
        modules = [own for own in self._modules if own._get_fsdp_state()._is_root is not None]
        for module in modules:
            module.set_requires_gradient_sync(True, recurse=False)
            module.set_is_last_backward(True)
            # FSDP2 gathers where gradients enter a module by its output; those of captured queries
            # and keys do not.
            module.unshard()
        try:
            for number, (name, loss) in enumerate(losses, start=1):
                is_last = number == len(losses)
                for module in modules:
                    module.set_reshard_after_backward(is_last, recurse=False)
                torch.autograd.backward(loss, seed(loss), retain_graph=not is_last)
                _finish_backward(modules)
                yield name, self._take_grads()
        finally:
            for module in modules:
                module.set_reshard_after_backward(True, recurse=False)
                module.reshard()
            for parameter, grad in zip(self.parameters, before, strict=True):
                parameter.grad = grad

    def _agreed(self, statement: Statement) -> list[Statement]:
        statements = super()._agreed(statement)
        sharded = sum(1 << i for i in self._sharded)
        for name, mask in statements[0].reached.items():
            for rank, other in enumerate(statements):
                differing = (mask ^ other.reached.get(name, mask)) & sharded
                if differing:
                    i = differing.bit_length() - 1
                    raise RuntimeError(
                        f"FSDP2 gave the loss {name!r} a gradient of parameters[{i}] on rank "
                        f"{rank if other.reached[name] >> i & 1 else 0} only; all ranks must run "
                        "the same layers"
                    )
        return statements

    def _take_grads(self) -> list[Tensor | None]:
        taken = []
        for parameter in self.parameters:
            taken.append(parameter.grad)
            parameter.grad = None
        return taken

    def _is_bucketed(self, position: int) -> bool:
        return position not in self._sharded

    def _averaged(self, names: Sequence[str], grads: TaskGradients) -> list[list[Tensor | None]]:
        """The buckets of replicated parameters, then the shards as FSDP2 left them."""
        buckets = super()._averaged(names, grads)
        self._shards = [[grads[name][i] for i in self._sharded] for name in names]
        return [
            [*own, *map(_local, shards)] for own, shards in zip(buckets, self._shards, strict=True)
        ]

    def _counted(self, lists: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
        """Every shard once: on the first of the ranks that hold it."""
        if self._is_first_holder:
            return lists
        start = len(self._buckets)
        return [
            [*own[:start], *(None if g is None else g.flatten()[:0] for g in own[start:])]
            for own in lists
        ]

    def _write(self, shards: Sequence[Tensor | None]) -> None:
        """Gather the update's buckets; add its shards to `.grad` where they are."""
        start = len(self._buckets)
        super()._write(shards[:start])
        for i, update, holder in zip(
            self._sharded, shards[start:], first_present(self._shards), strict=True
        ):
            parameter = self.parameters[i]
            if update is None:
                continue
            if parameter.grad is None:
                # The combination was written into the memory of this gradient.
                parameter.grad = holder
            else:
                local = _local(parameter.grad)
                assert local is not None
                local += update
        self._shards = []


def _finish_backward(modules: Sequence[FSDPModule]) -> None:
    """Reduce what FSDP2 has left.

    It finishes a backward that has entered some module by its output. After any other, the
    gradients of modules whose inputs need none would wait, and be added to the next loss's. Where
    FSDP2 has finished, this does nothing.
    """
    # One state per root would do; the modules of a root share this context.
    states = [module._get_fsdp_state() for module in modules]
    for state in {id(own._state_ctx): own for own in states}.values():
        state._root_post_backward_final_callback()


def _local(grad: Tensor | None) -> Tensor | None:
    """The memory of a DTensor's shard on this rank."""
    if grad is None:
        return None
    with torch.no_grad():
        local: Tensor = grad.to_local()  # type: ignore[attr-defined]
    return local


def _check_placements(name: str, parameter: DTensor) -> None:
    """Refuse what FSDP2 alone does not make: shards over one mesh dimension, copies over others."""
    *outer, last = parameter.placements
    dimensions = parameter.device_mesh.mesh_dim_names or ()
    foreign = [
        kind
        for dimension in dimensions
        for part, kind in _FOREIGN_DIMENSIONS.items()
        if part in dimension.split("_")
    ]
    if (
        foreign
        or not isinstance(last, Shard)
        or not all(isinstance(own, Replicate) for own in outer)
    ):
        what = f"{' and '.join(foreign)} parallel" if foreign else "not sharded by FSDP2 alone"
        raise NotImplementedError(
            f"{name} is a DTensor with placements {parameter.placements} on a mesh with dimensions "
            f"{dimensions}, {what}: its gradients are parts of sums that only that engine knows. "
            "Train with FSDP2 (fully_shard) or DDP"
        )
