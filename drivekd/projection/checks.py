"""What the projector refuses, before anything is differentiated."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Attributes that engines leave on the parameters they take over.
_ENGINES = {
    "ds_id": "DeepSpeed ZeRO-3",
    "_hp_mapping": "DeepSpeed ZeRO",
    "param_idx_in_group": "DeepSpeed ZeRO",
    "_fsdp_flattened": "FSDP1",
    "_is_flat_param": "FSDP1",
}
# The marks of DDP with find_unused_parameters or static_graph, and of the last layer that is
# checkpointed, are close to the model's outputs.
_SEARCHED_NODES = 64


class Scaler(Protocol):
    """The part of `torch.amp.GradScaler` that the projector uses."""

    def scale(self, outputs: Any) -> Any:
        """`outputs` times the current scale."""
        ...


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, without importing what makes them."""
    return _is_a(tensor, "DTensor")


def _is_a(thing: object, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def check_parameters(parameters: object) -> list[Tensor]:
    """The parameters, each once."""
    advice = "for FSDP2 (fully_shard) give the model itself as parameters"
    is_fsdp = False
    if isinstance(parameters, nn.Module):
        if _is_a(parameters, "DeepSpeedEngine"):
            raise NotImplementedError(
                "parameters is a DeepSpeedEngine, which keeps gradients of its own; train with "
                "DistributedDataParallel or FSDP2"
            )
        is_fsdp = any(_is_a(module, "FSDPModule") for module in parameters.modules())
        advice = "the model has no FSDP2 module (fully_shard)"
        parameters = parameters.parameters()
    if isinstance(parameters, Tensor | Mapping | str) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be a module or an iterable of tensors, got "
            f"{type(parameters).__name__}"
        )
    unique: dict[int, Tensor] = {}
    for position, parameter in enumerate(parameters):
        name = f"parameters[{position}]"
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(parameter).__name__}; pass parameters, not "
                "parameter groups or named parameters"
            )
        if not parameter.is_leaf:
            raise ValueError(f"{name} is no leaf: it has no .grad to add to")
        if parameter.requires_grad or parameter.is_floating_point():
            if is_dtensor(parameter) and not is_fsdp:
                raise NotImplementedError(
                    f"{name} is a DTensor; {advice}. Tensor, context and expert parallel engines "
                    "are not supported: gradients there are parts of sums that only they know"
                )
            check_engine(name, parameter)
            unique[id(parameter)] = parameter
    if not unique:
        raise ValueError("parameters is empty; give at least one parameter to differentiate for")
    return list(unique.values())


def check_engine(name: str, parameter: Tensor) -> None:
    """Refuse parameters whose gradients are not in `.grad`, or only in part."""
    for attribute, engine in _ENGINES.items():
        if getattr(parameter, attribute, None) not in (None, False):
            raise NotImplementedError(
                f"{name} belongs to {engine}, which keeps gradients of its own; train with "
                "DistributedDataParallel or FSDP2"
            )


def check_losses(losses: object, *, may_be_empty: bool = False) -> dict[str, Tensor]:
    """The losses by name: scalars with a graph."""
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must map names to tensors, got {type(losses).__name__}")
    if not losses and not may_be_empty:
        raise ValueError("losses is empty; give at least one loss")
    for name, loss in losses.items():
        if not isinstance(name, str):
            raise TypeError(f"losses has the key {name!r}; names are strings")
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{name!r}] must be a tensor, got {type(loss).__name__}")
        if is_dtensor(loss):
            raise NotImplementedError(
                f"losses[{name!r}] is a DTensor: tensor parallel losses are not supported"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"losses[{name!r}] has shape {tuple(loss.shape)}; wanted a scalar, reduce it first"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{name!r}] does not require grad; leave out a loss that is absent from "
                "this step, or check that it was not computed under no_grad or detached"
            )
        if loss.is_complex():
            raise TypeError(f"losses[{name!r}] has dtype {loss.dtype}; wanted a real number")
        marks = _nodes_near(loss)
        if any("CheckpointFunction" in node.name() for node in marks):
            raise NotImplementedError(
                f"losses[{name!r}] comes through reentrant gradient checkpointing, whose layers "
                "only .backward() reaches: their gradients would be missing; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if any(_expects_ddp_sync(node) for node in marks):
            raise NotImplementedError(
                f"losses[{name!r}] comes from DistributedDataParallel with find_unused_parameters "
                "or static_graph, which waits for a reduction of its own; run the forward and this "
                "call under its no_sync(): the projector averages the gradients"
            )
    return dict(losses)


def _nodes_near(loss: Tensor) -> list[Any]:
    """The last nodes of a loss's graph, nearest first."""
    queue: list[Any] = [loss.grad_fn]
    seen: dict[Any, None] = {}
    while queue and len(seen) < _SEARCHED_NODES:
        node = queue.pop(0)
        if node is None or node in seen:
            continue
        seen[node] = None
        queue.extend(parent for parent, _ in node.next_functions)
    return list(seen)


def _expects_ddp_sync(node: Any) -> bool:
    if "DDPSink" not in node.name():
        return False
    wrapper = getattr(node, "ddp_weakref", lambda: None)()
    return bool(getattr(wrapper, "require_backward_grad_sync", True))


def check_weights(weights: object, names: Iterable[str]) -> None:
    """Refuse a mapping that lacks a loss or holds what is no weight."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights must be a mapping of names to numbers, a Reweighting or None, got "
            f"{type(weights).__name__}"
        )
    for name in names:
        if name not in weights:
            raise ValueError(f"weights has no entry for the loss {name!r}; it has {list(weights)}")
    for name, weight in weights.items():
        label = f"weights[{name!r}]"
        if isinstance(weight, Tensor):
            if weight.numel() != 1 or not weight.is_floating_point():
                raise ValueError(
                    f"{label} has shape {tuple(weight.shape)} and dtype {weight.dtype}; wanted a "
                    "floating scalar"
                )
        elif not isinstance(weight, int | float) or isinstance(weight, bool):
            raise TypeError(f"{label} must be a number or a tensor, got {type(weight).__name__}")
        elif not math.isfinite(as_float(weight)) or weight < 0:
            raise ValueError(f"{label} is {as_float(weight)}; wanted a finite number of at least 0")


def check_positive(name: str, value: object) -> float:
    """`value` as a finite float above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = as_float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name} is {number}; wanted a finite number above 0")
    return number


def as_float(value: int | float) -> float:
    """The number; infinity for an int beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_group(group: object) -> None:
    """Refuse what is no process group."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}; of a DeviceMesh give mesh.get_group()"
        )


def check_scaler(scaler: object) -> None:
    """Refuse what cannot scale."""
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}"
        )


def scale_of(scaler: Scaler | None, device: torch.device) -> Tensor | None:
    """The scaler's scale as a 0-d float64 device tensor, without a host sync."""
    if scaler is None:
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale.to(torch.float64)
