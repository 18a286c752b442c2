"""FSDP2 in the trainer: a sharded student while training, whole files on the disk.

Checkpoints hold the student as `save_pretrained` writes it and the optimizer's state as one
process has it, so that they neither tell nor care how many processes wrote them: a run goes on
under another launcher, and every checkpoint is a student that `from_pretrained` loads.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from drivekd.capture.model import find_decoder
from drivekd.errors import DataError, UnsupportedEngineError
from drivekd.train import ranks

# Inputs that make a vision tower run.
_IMAGES = ("pixel_values", "pixel_values_videos")
_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_wanted(args: transformers.TrainingArguments) -> bool:
    """Whether the settings or `accelerate launch` ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextlib.contextmanager
def on_any_device(args: transformers.TrainingArguments) -> Iterator[None]:
    """Let Accelerate shard on CPUs as well; alone it would go on with DDP there, without a word.

    Raises:
        UnsupportedEngineError: FSDP1.
    """
    state = args.distributed_state
    if is_wanted(args) and _version(args) == 1:
        raise UnsupportedEngineError(
            "FSDP1 is not supported: its flat parameters have no gradients of their own, and it is "
            "deprecated; FSDP2 is: set fsdp_version: 2 in the accelerate config (accelerate "
            "to-fsdp2 rewrites one), or training.fsdp_config.version=2"
        )
    if not is_wanted(args) or state is None or state.distributed_type != DistributedType.MULTI_CPU:
        yield
        return
    # One of the kinds for which Accelerate's state turns to FSDP; it asks for no GPU after that.
    state.distributed_type = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state.distributed_type == DistributedType.MULTI_GPU:
            state.distributed_type = DistributedType.MULTI_CPU


def _version(args: transformers.TrainingArguments) -> int:
    """1 or 2, as Accelerate reads it."""
    if args.fsdp_plugin_args is not None:
        return int(args.fsdp_plugin_args["fsdp_version"])
    return int(os.environ.get("FSDP_VERSION", "1"))


def refuse_engines(trainer: transformers.Trainer) -> None:
    """Raise unless this way to use several devices gives gradients that can be projected.

    Raises:
        UnsupportedEngineError: DeepSpeed, FSDP2 with its parameters on the host, or DataParallel.
    """
    if trainer.is_deepspeed_enabled:
        raise UnsupportedEngineError(
            "signals under DeepSpeed are not supported: its gradients are no one's before it has "
            "reduced them. To shard the student use FSDP2: accelerate launch --config_file "
            "recipes/launch/fsdp2.yaml, or training.fsdp=true"
        )
    if trainer.accelerator.is_fsdp2 and isinstance(
        trainer.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy
    ):
        raise UnsupportedEngineError(
            "signals under FSDP2 with parameters on the host are not supported: their gradients "
            "are not where the ranks meet; set fsdp_offload_params: false "
            "(training.fsdp_config.cpu_offload=false), shard over more GPUs or freeze more"
        )
    if trainer.args.n_gpu > 1:
        raise UnsupportedEngineError(
            f"this process sees {trainer.args.n_gpu} GPUs, and signals under DataParallel are not "
            "supported: launch one process per GPU with accelerate launch or torchrun, give the "
            "others to the teachers (teacher_device=auto), or make one GPU visible "
            "(CUDA_VISIBLE_DEVICES)"
        )


def set_up(plugin: Any) -> None:
    """What the trainer wants of Accelerate's FSDP2 plugin, before the student is sharded.

    Args:
        plugin: An `accelerate.FullyShardedDataParallelPlugin` of version 2.
    """
    # The models of transformers return views, which nobody here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if plugin.mixed_precision_policy is not None:
        # Accelerate's own policy also reduces gradients, and returns the loss, in 16 bits.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
        )


def name_layers(plugin: Any, model: nn.Module) -> None:
    """Name the layers that become groups of their own, where the settings leave that to the model.

    Some models also list classes that they do not have, which Accelerate refuses.
    """
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        return
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(own).__name__ for own in model.modules()}
        listed = getattr(model, "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(listed))


def trains_beside_shards(model: nn.Module) -> bool:
    """Whether a sharded model has parameters to train whose gradients FSDP2 does not average."""
    return any(own.requires_grad and not isinstance(own, DTensor) for own in model.parameters())


def step_apart(optimizer: Any) -> None:
    """Let an optimizer of torch update shards and whole parameters one by one.

    Its fused and foreach kernels take lists of one kind only.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        group.update({name: False for name in ("fused", "foreach") if name in group})
    if getattr(inner, "_step_supports_amp_scaling", False):
        inner._step_supports_amp_scaling = False  # of the fused kernel


def replicate_vision(plugin: Any, model: nn.Module) -> None:
    """Keep everything but the text decoder and its head whole on every process.

    FSDP2 gathers a layer where it runs, in step with the other processes; a vision tower does not
    run in a process whose batch has no image.

    Args:
        plugin: An `accelerate.FullyShardedDataParallelPlugin` of version 2.
        model: The student, before it is sharded.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    plugin.ignored_modules = list(_beside(model, find_decoder(model), head))
    plugin.cpu_ram_efficient_loading = False  # it would leave them without weights


def _beside(module: nn.Module, decoder: nn.Module, head: nn.Module | None) -> Iterator[nn.Module]:
    """The largest parts of a module without the decoder and the head."""
    for child in module.children():
        if child is decoder or child is head:
            continue
        parts = list(child.modules())
        if decoder in parts or head in parts:
            yield from _beside(child, decoder, head)
        else:
            yield child


def check_same_inputs(inputs: Mapping[str, Any], device: torch.device) -> None:
    """Raise on all ranks if images reach some ranks' models and not others', rather than hang.

    Args:
        inputs: This rank's micro-batch.
        device: Where the process group communicates.

    Raises:
        DataError: Some ranks have no image.
    """
    has = any(inputs.get(name) is not None for name in _IMAGES)
    if len(ranks.union(["some" if has else "none"], ["some", "none"], device)) == 2:
        raise DataError(
            f"this rank's micro-batch has {'' if has else 'no '}images but another's has "
            f"{'none' if has else 'some'}: a vision tower sharded by FSDP2 must run on all ranks. "
            "Give records as drivekd.data.Record with signals, so that it is kept whole, put an "
            "image into every batch, or use DDP"
        )


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """Let every process read the weights of the models that it loads inside.

    Where Accelerate loads for FSDP with little memory, `from_pretrained` reads weights in the first
    process alone and leaves the others' as they happen to be; a student gets them when it is
    sharded, a teacher would not.
    """
    before = os.environ.pop(_EFFICIENT_LOADING, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_EFFICIENT_LOADING] = before


def gather_model(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The whole weights of a sharded model on the CPU; all ranks must call it.

    Args:
        model: The model.
        keep: Whether this rank wants them; others take part and get nothing.

    Returns:
        What `state_dict` gives for the model before it was sharded; empty if not `keep`.
    """
    named = model.state_dict(keep_vars=True)
    known: dict[int, Tensor | None] = {}
    for own in named.values():
        if id(own) not in known:  # tied weights have several names
            full = whole(own.detach())
            # Nothing of it elsewhere: it would stay in the memory of the GPU.
            known[id(own)] = full.cpu() if keep else None
    gathered = {name: known[id(own)] for name, own in named.items()}
    return {name: tensor for name, tensor in gathered.items() if tensor is not None}


def plain_class(model: nn.Module) -> Any:
    """The class of a model before `fully_shard` put one of its own in front."""
    classes = type(model).__mro__
    return classes[classes.index(FSDPModule) + 1] if FSDPModule in classes else classes[0]


@contextlib.contextmanager
def plain_classes(model: nn.Module) -> Iterator[None]:
    """Let a sharded model's modules be of the classes that they were.

    Transformers looks up by them under which names a family's weights are saved.
    """
    before = {own: type(own) for own in model.modules() if isinstance(own, FSDPModule)}
    try:
        for own in before:
            own.__class__ = plain_class(own)
        yield
    finally:
        for own, sharded in before.items():
            own.__class__ = sharded


def gather_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """The state of an optimizer of shards as one process has it, on the CPU.

    All ranks must call it.

    Args:
        optimizer: The optimizer.
        keep: Whether this rank wants the state; others take part and get nothing.

    Returns:
        What `state_dict` gives for whole parameters; empty if not `keep`.
    """

    def kept(value: Any) -> Any:
        full = whole(value)
        if full is value:
            return value
        return full.cpu() if keep else None

    state = tree_map(kept, optimizer.state_dict())
    return state if keep else {}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state as one process has it into an optimizer of shards; each rank takes its part."""
    parameters = [own for group in optimizer.param_groups for own in group["params"]]
    parts = {
        index: {
            key: _part(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in own.items()
        }
        for index, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def load_model(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Load whole weights into a sharded model; each rank takes its part."""
    set_model_state_dict(model, dict(whole), options=StateDictOptions(full_state_dict=True))


def load_adapter(model: Any, file: Path) -> None:
    """Load the weights that PEFT saved into a sharded model with such an adapter.

    Raises:
        ValueError: The file is of another adapter.
    """
    from peft import get_peft_model_state_dict

    saved, own = load_file(file), get_peft_model_state_dict(model)
    if saved.keys() != own.keys():
        differing = sorted(saved.keys() ^ own.keys())
        raise ValueError(f"{file} does not fit the student's adapter: {differing[:3]} differ")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_part(tensor, saved[name]))


def _part(like: Tensor, value: Tensor) -> Tensor:
    """The shard of a whole tensor that goes with `like`; all of it where that is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Any) -> Any:
    """A sharded tensor put together; anything else as it is.

    Of a norm of shards, which is still to be summed over the ranks, `.item()` is this rank's part.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
