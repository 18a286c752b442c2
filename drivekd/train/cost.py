"""What loading a model or a part of it will cost: from config and file headers alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from drivekd.capture.model import decoder_layers, find_decoder
from drivekd.train.config import LayerSpec
from drivekd.train.models import check_same_vision_configs
from drivekd.train.recipe import Recipe
from drivekd.train.teachers import (
    base_class,
    deepest_layer,
    from_checkpoint,
    head_class,
    num_layers,
    read_config,
    truncate_config,
)
from drivekd.train.weights import Checkpoint

ROLES: Mapping[str, LayerSpec | None] = {
    "perception": "first",
    "reasoning": "0..-2",
    "planning": "penultimate",
    "whole model": None,
}
# What a layer runs before its attention function sees queries and keys.
_BEFORE_ATTENTION = ("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class LoadingCost:
    """What one role of one checkpoint loads and computes.

    Attributes:
        role: Name of the role.
        checkpoint: Folder or hub name.
        depth: Decoder layers of the whole model.
        layers: Decoder layers that are loaded, the first ones.
        parameters: Parameters that are loaded, tied ones once.
        outside: Of these the ones outside the decoder's layers: vision tower, projector,
            embeddings, last norm and head.
        run_per_token: Parameters of decoder layers that work on each token; a forward for maps
            ends at the deepest layer's queries and keys. Two floating-point operations each.
        bytes: Size of the loaded parameters in memory.
        bytes_read: Tensor data read from the files.
        bytes_on_disk: Tensor data of all files.
        files_read: Files that are opened for weights.
        files: Files of the checkpoint.
    """

    role: str
    checkpoint: str
    depth: int
    layers: int
    parameters: int
    outside: int
    run_per_token: int
    bytes: int
    bytes_read: int
    bytes_on_disk: int
    files_read: int
    files: int


class _Headers(Checkpoint):
    """A checkpoint that hands out tensors without data and notes which were asked for."""

    def read(self, name: str, index: Any = ...) -> Tensor:
        header = self.header(name)
        self.bytes_read[name] = header.num_bytes
        dtype = _DTYPES.get(header.dtype, torch.uint8)
        empty: Tensor = torch.empty(header.shape, dtype=dtype, device="meta")[index]
        return empty


def loading_cost(
    path: str | Path,
    layers: LayerSpec | Sequence[LayerSpec] | None,
    *,
    role: str = "teacher",
    dtype: str = "auto",
) -> LoadingCost:
    """What `load_teacher` (or `load_model`, for `layers=None`) will load, without doing it.

    Runs the loader itself on tensors without data: reads the config and the files' headers.

    Args:
        path: Folder, or a hub name whose files are in the local cache; nothing is fetched.
        layers: As for `load_teacher`; None is the whole model with its head.
        role: Name for the result.
        dtype: dtype of the weights in memory; "auto" is as saved.

    Raises:
        TypeError: `layers` is of another kind.
        ValueError: A layer does not exist, or the checkpoint lacks a weight that is needed.
        OSError: There is no such checkpoint, or it has no safetensors weights.
    """
    config = read_config(path, local_files_only=True)
    if layers is None:
        model_class = head_class(config)
        wanted = config
    else:
        wanted = truncate_config(config, deepest_layer(config, layers) + 1)
        model_class = base_class(wanted)
    with _Headers(path, local_files_only=True) as checkpoint, _no_progress_bar():
        model = from_checkpoint(model_class, checkpoint, wanted, dtype=dtype, device="meta")
        read = checkpoint.bytes_read
        total = checkpoint.total_bytes
    decoder_parts = decoder_layers(find_decoder(model))
    inside = _count(decoder_parts)
    parameters = _count(model)
    idle = 0 if layers is None else _after_attention(decoder_parts[-1])
    return LoadingCost(
        role=role,
        checkpoint=str(path),
        depth=num_layers(config),
        layers=len(decoder_parts),
        parameters=parameters,
        outside=parameters - inside,
        run_per_token=inside - idle,
        bytes=sum(each.nbytes for each in model.parameters()),
        bytes_read=sum(read.values()),
        bytes_on_disk=total,
        files_read=len({checkpoint.file_of(name) for name in read}),
        files=len(checkpoint.files),
    )


def recipe_costs(recipe: Recipe) -> list[LoadingCost]:
    """The costs of a recipe's student and of each of its teachers.

    A checkpoint under several names is loaded once; it is listed with each of them, as deep as
    the deepest of their layers.

    Raises:
        ValueError: A layer does not exist, or a checkpoint lacks a weight that is needed.
        TokenMismatchError: A teacher makes other tokens of an image than the student.
        OSError: A checkpoint cannot be read.
    """
    costs = [loading_cost(recipe.student, None, role="student", dtype=recipe.dtype)]
    needs = recipe.distill.teacher_layers()
    by_place: dict[str, list[str]] = {}
    for name in needs:
        by_place.setdefault(recipe.teachers[name], []).append(name)
    for path, names in by_place.items():
        together = [needs[name] for name in names]
        configs = (read_config(each, local_files_only=True) for each in (path, recipe.student))
        check_same_vision_configs(*configs, name=names[0])
        whole = any(layers is None for layers in together)
        layers = [layer for role in together if role is not None for layer in role]
        costs.append(
            loading_cost(
                path,
                None if whole else layers,
                role=", ".join(names),
                dtype=recipe.teacher_dtype,
            )
        )
    return costs


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' bar, which would say that weights are loaded."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _after_attention(layer: nn.Module) -> int:
    """Parameters of a layer that a forward stopped at its attention function does not reach."""
    return sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if not any(part in _BEFORE_ATTENTION for part in name.split("."))
    )
