"""Which weights of a student are trained: all, some frozen, or low-rank adapters beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from drivekd.capture.model import find_decoder, path_to
from drivekd.errors import RecipeError
from drivekd.train.config import nearest

# Names by which families call a part, for those who do not want to look them up.
_PARTS = {
    "vision": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "visual.merger"),
    "embeddings": ("embed_tokens",),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the text decoder's linear maps; all else of the student is frozen.

    Args:
        rank: Rank of every adapter.
        alpha: The adapters' output is scaled by alpha / rank.
        dropout: On the adapters' inputs, from 0 to below 1.
        targets: Ends of the names of the linear maps that get one, such as "q_proj"; None is all
            of the text decoder's.

    Raises:
        ValueError: A value is not legal.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, wanted 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, wanted more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, wanted 0 or more and below 1")


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Freeze parts of a model.

    Args:
        model: The student; what is left must hold a weight to train.
        parts: "vision", "projector", "embeddings", or pieces of parameter names between dots, such
            as "language_model.layers.0".

    Raises:
        RecipeError: A part does not exist, or nothing is left.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for part in parts:
        pieces = _PARTS.get(part, (part,))
        own = {name for name in names if any(f".{piece}." in f".{name}." for piece in pieces)}
        if part == "vision":
            own = {name for name in own if ".visual.merger." not in f".{name}"}
        if not own:
            known = {piece for name in names for piece in name.split(".") if not piece.isdigit()}
            raise RecipeError(
                f"freeze names {part!r}, which is no part of {type(model).__name__}; "
                f"{nearest(part, known | set(_PARTS))}"
            )
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in own:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"freeze={list(parts)} leaves nothing to train")


def add_adapters(model: nn.Module, settings: LoraConfig) -> Any:
    """The model with adapters, in PEFT's wrapper; their weights alone require grad.

    Args:
        model: The student.
        settings: Rank, targets, ...

    Returns:
        A `peft.PeftModel`.

    Raises:
        RecipeError: A target names no linear map of the text decoder.
        ImportError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora needs the library peft: pip install 'drivekd[lora]'") from error
    decoder = find_decoder(model)
    prefix = path_to(model, decoder)[-1][0]
    linear = [name for name, each in decoder.named_modules() if isinstance(each, nn.Linear)]
    chosen = set(linear)
    if settings.targets is not None:
        ends = {name.rsplit(".", 1)[-1] for name in linear}
        for target in settings.targets:
            if target not in ends and not any(name.endswith(f".{target}") for name in linear):
                raise RecipeError(
                    f"lora.targets names {target!r}, which is no linear map of the text decoder; "
                    f"{nearest(target, ends)}"
                )
        chosen = {
            name
            for name in linear
            for target in settings.targets
            if f".{name}".endswith(f".{target}")
        }
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[f"{prefix}.{name}" if prefix else name for name in sorted(chosen)],
    )
    return peft.get_peft_model(model, config)


def merge_adapters(model: Any) -> Any:
    """The model with its adapters, if any, added to the weights that they stand beside."""
    return model.merge_and_unload() if has_adapters(model) else model


def merge_saved_adapters(model: Any, folder: Path) -> Any:
    """The model that adapters were made for, with saved ones added to its weights."""
    import peft

    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def has_adapters(model: Any) -> bool:
    """Whether a model is wrapped by PEFT."""
    return callable(getattr(model, "merge_and_unload", None))
