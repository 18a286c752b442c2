"""Loading students and teachers with their heads, and freezing teachers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from drivekd.errors import TokenMismatchError
from drivekd.train.config import nearest

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
        ValueError: The checkpoint is of another kind of model or lacks weights, so that some
            would stay at their random start.
        OSError: There is no such checkpoint.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    image_text = transformers.AutoModelForImageTextToText
    is_image_text = type(config) in image_text._model_mapping
    auto = image_text if is_image_text else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(
            f"{path} lacks the weights {sorted(report['missing_keys'])[:5]} of "
            f"{type(model).__name__}; give a checkpoint with its language-model head"
        )
    return model


def prepare_teachers(
    teachers: Mapping[str, nn.Module | str | Path],
    wanted: Collection[str],
    student: nn.Module,
    device: torch.device,
    *,
    dtype: str = "auto",
) -> dict[str, nn.Module]:
    """Load the teachers that signals use, freeze them and move them to a device.

    Args:
        teachers: Models or paths by name; one path under several names is loaded once.
        wanted: Names of the teachers that are needed; others are left alone, with a warning.
        student: The student, which may share no parameter with a teacher.
        device: Where to put them; a teacher spread by `device_map` stays where it is.
        dtype: Of loaded teachers, as in `load_model`.

    Returns:
        The needed teachers, in eval mode and without gradients.

    Raises:
        TypeError: A teacher is neither a module nor a path.
        ValueError: A needed teacher is missing, or shares parameters with the student.
        TokenMismatchError: A teacher's image token is not the student's.
    """
    loaded: dict[str, nn.Module] = {}
    prepared: dict[str, nn.Module] = {}
    student_parameters = {id(parameter) for parameter in student.parameters()}
    for name in sorted(wanted):
        if name not in teachers:
            raise ValueError(f"there is no teacher {name!r}; {nearest(name, teachers)}")
        teacher = teachers[name]
        if isinstance(teacher, str | Path):
            if str(teacher) not in loaded:
                loaded[str(teacher)] = load_model(teacher, dtype=dtype)
            teacher = loaded[str(teacher)]
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"teachers[{name!r}] is a {type(teacher).__name__}, wanted a module or a path"
            )
        if any(id(parameter) in student_parameters for parameter in teacher.parameters()):
            raise ValueError(
                f"teacher {name!r} shares parameters with the student; freezing it would freeze "
                "the student, make a copy first"
            )
        _check_image_token(name, teacher, student)
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(device)
        prepared[name] = teacher.eval().requires_grad_(False)
    if unused := sorted(set(teachers) - set(wanted)):
        _LOG.warning("no signal uses the teachers %s; they are not loaded", ", ".join(unused))
    return prepared


def _check_image_token(name: str, teacher: nn.Module, student: nn.Module) -> None:
    configs = [getattr(model, "config", None) for model in (teacher, student)]
    ids = [getattr(config, "image_token_id", None) for config in configs]
    if ids[0] != ids[1]:
        raise TokenMismatchError(
            f"teacher {name!r} has image token {ids[0]} but the student {ids[1]}; both must see "
            "the same tokens"
        )
