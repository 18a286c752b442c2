"""Loading students and teachers with their heads, and freezing teachers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from drivekd.errors import RecipeError, TokenMismatchError
from drivekd.train.config import LayerSpec, nearest
from drivekd.train.teachers import (
    check_complete,
    load_teacher,
    read_config,
    share_equal_weights,
)

_LOG = logging.getLogger(__name__)


def load_model(
    path: str | Path, *, dtype: str = "auto", attn_implementation: str | None = None
) -> Any:
    """Load a causal language model or vision-language model with its language-model head.

    Args:
        path: Folder or hub name, as for `from_pretrained`.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        attn_implementation: Attention implementation; None is transformers' own choice.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        ValueError: The checkpoint is of another kind of model, is remote code, or lacks weights,
            so that some would stay at their random start.
        OSError: There is no such checkpoint.
    """
    config = read_config(path)
    image_text = transformers.AutoModelForImageTextToText
    is_image_text = type(config) in image_text._model_mapping
    auto = image_text if is_image_text else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_complete(path, type(model), report)
    return model


def check_named(teachers: object) -> None:
    """Refuse teachers that have no names."""
    if not isinstance(teachers, Mapping):
        raise TypeError(
            f"teachers is a {type(teachers).__name__}, wanted a mapping from names to models or "
            "checkpoint paths"
        )


def prepare_teachers(
    teachers: Mapping[str, nn.Module | str | Path],
    needs: Mapping[str, Sequence[LayerSpec] | None],
    student: nn.Module,
    device: torch.device | Mapping[str, torch.device],
    *,
    dtype: str = "auto",
) -> dict[str, nn.Module]:
    """Load what signals need of their teachers, freeze it and move it to a device.

    A checkpoint under several names is loaded once, as deep as the deepest of their layers. Weights
    that several teachers have in common, such as a vision tower that their tuning left alone, are
    held once.

    Args:
        teachers: Models or paths by name.
        needs: For each teacher that is needed the layers whose maps are wanted, or None for the
            whole model with its language-model head. Other teachers are left alone, with a warning.
        student: The student, which may share no parameter with a teacher.
        device: Where to put them, or each of them; a teacher spread by `device_map` stays where it
            is. A checkpoint whose names are on several devices is loaded once on each.
        dtype: Of loaded teachers, as in `load_model`.

    Returns:
        The needed teachers, in eval mode and without gradients.

    Raises:
        TypeError: `teachers` is no mapping, or a teacher neither a module nor a path.
        ValueError: A needed teacher is missing, shares parameters with the student, or is one model
            that is wanted on two devices.
        RecipeError: A checkpoint lacks a weight or a layer, or is of another kind of model.
        TokenMismatchError: A teacher makes other tokens of an image than the student.
    """
    check_named(teachers)
    for name in needs:
        if name not in teachers:
            raise ValueError(f"there is no teacher {name!r}; {nearest(name, teachers)}")
    devices = device if isinstance(device, Mapping) else dict.fromkeys(needs, device)
    loaded: dict[tuple[str, torch.device], nn.Module] = {}
    placed: dict[int, str] = {}
    prepared: dict[str, nn.Module] = {}
    student_parameters = {id(parameter) for parameter in student.parameters()}
    for name in sorted(needs):
        teacher = teachers[name]
        if isinstance(teacher, str | Path):
            place = (_place(teacher), devices[name])
            if place not in loaded:
                roles = [
                    role
                    for role in needs
                    if isinstance(path := teachers[role], str | Path)
                    and (_place(path), devices[role]) == place
                ]
                layers = [needs[role] for role in roles]
                loaded[place] = _load(name, teacher, layers, devices[name], dtype)
                share_equal_weights(loaded.values())  # before the next one takes memory
            teacher = loaded[place]
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"teachers[{name!r}] is a {type(teacher).__name__}, wanted a module or a path"
            )
        if any(id(parameter) in student_parameters for parameter in teacher.parameters()):
            raise ValueError(
                f"teacher {name!r} shares parameters with the student; freezing it would freeze "
                "the student, make a copy first"
            )
        check_same_vision(name, teacher, student)
        if getattr(teacher, "hf_device_map", None) is None:
            first = placed.setdefault(id(teacher), name)
            if devices[first] != devices[name]:
                raise ValueError(
                    f"teachers {first!r} and {name!r} are one model, which cannot be on "
                    f"{devices[first]} and {devices[name]}; give a path, or a copy"
                )
            teacher.to(devices[name])
        prepared[name] = teacher.eval().requires_grad_(False)
    share_equal_weights(loaded.values())
    if unused := sorted(set(teachers) - set(needs)):
        _LOG.warning("no signal uses the teachers %s; they are not loaded", ", ".join(unused))
    return prepared


def _place(path: str | Path) -> str:
    """What is the same for two names of one checkpoint: the real folder, or the hub name."""
    return str(Path(path).resolve()) if Path(path).is_dir() else str(path)


def _load(
    name: str,
    path: str | Path,
    needs: Sequence[Sequence[LayerSpec] | None],
    device: torch.device,
    dtype: str,
) -> nn.Module:
    """Load a checkpoint for all its roles."""
    layers = [layer for role in needs if role is not None for layer in role]
    try:
        if not layers or None in needs:
            model: nn.Module = load_model(path, dtype=dtype)
        else:
            model = load_teacher(path, layers, dtype=dtype, device=device)
    except ValueError as error:
        raise RecipeError(f"teacher {name!r}: {error}") from error
    return model


# What decides which tokens an image or video becomes, in the configs of the families.
_VISION_SETTINGS = (
    "image_token_id", "video_token_id", "image_seq_length", "downsample_ratio",
    "vision_feature_select_strategy", "image_grid_pinpoints", "vision_aspect_ratio",
    "vision_config.image_size", "vision_config.patch_size", "vision_config.spatial_merge_size",
    "vision_config.temporal_patch_size",
)  # fmt: skip


def check_same_vision(name: str, teacher: nn.Module, student: nn.Module) -> None:
    """Raise unless both models make the same tokens of an image.

    Args:
        name: The teacher's name, for the message.
        teacher: A model with a transformers config; one without is not looked at.
        student: Likewise.

    Raises:
        TokenMismatchError: A setting that decides over tokens differs; names it and both values.
    """
    check_same_vision_configs(*(getattr(m, "config", None) for m in (teacher, student)), name=name)


def check_same_vision_configs(teacher: Any, student: Any, *, name: str) -> None:
    """`check_same_vision` on the configs alone, before anything is loaded.

    Raises:
        TokenMismatchError: As `check_same_vision`.
    """
    for setting in _VISION_SETTINGS:
        own, other = (_setting(config, setting) for config in (student, teacher))
        if own != other:
            raise TokenMismatchError(
                f"teacher {name!r} has {setting} {other} but the student {own}; both must see the "
                "same tokens, take models of one family"
            )


def _setting(config: Any, path: str) -> Any:
    """A value somewhere in a config, None where it is not; 14 and (14, 14) are one size."""
    for part in path.split("."):
        config = getattr(config, part, None)
    if isinstance(config, list | tuple):
        parts = [tuple(each) if isinstance(each, list) else each for each in config]
        return parts[0] if len(set(parts)) == 1 else tuple(parts)
    return config
