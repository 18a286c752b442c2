"""Models by folder or by config, loaded one after the other and measured on one prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drivekd.data import load_records
from drivekd.errors import DataError, RecipeError, TokenMismatchError
from drivekd.study.costs import quantity
from drivekd.study.measure import free_bytes, release, resident_bytes, untouched_random
from drivekd.study.profile.deployment import Deployment, describe, profile_model
from drivekd.study.profile.prompt import Prompt, record_prompt, synthetic_prompt
from drivekd.study.profile.sizes import weight_count
from drivekd.train.guards import is_out_of_memory
from drivekd.train.models import check_same_vision_configs, load_model
from drivekd.train.recipe import DtypeName, EncoderConfig
from drivekd.train.teachers import head_class, is_quantized, read_config


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Which prompt models answer.

    Args:
        records: A file of records, of which the first is the prompt; None makes one up.
        root: Folder that image paths start from; None is the file's.
        encoding: How the record becomes model inputs.
        text_tokens: Without records: tokens of text.
        images: Without records: images; None is one for models that see, else none.
        image_size: Without records: (height, width); None is the model's own.
    """

    records: Path | None = None
    root: Path | None = None
    encoding: EncoderConfig = field(default_factory=EncoderConfig)
    text_tokens: int = 512
    images: int | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Source:
    """A model to measure.

    Attributes:
        path: Folder or hub name; for random weights also a config.json.
        is_random: Whether weights are made up from the config instead of loaded.
    """

    path: str
    is_random: bool = False


def profile_models(
    sources: Sequence[Source],
    prompt: PromptSettings,
    *,
    device: str = "cpu",
    dtype: DtypeName = "auto",
    attn_implementation: str | None = None,
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 64,
    warmup: int = 1,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Deployment]:
    """Load models one after the other and measure each; see `profile_model`.

    A model whose weights alone take more than the device has free is not loaded: that, and memory
    that runs out on the way, is a result with a `problem`.

    Args:
        sources: The models; ratios are of the first one.
        prompt: What they answer. Of a record each model makes its own tokens where its folder has
            a tokenizer; one without reads the first model's, if both make the same tokens.
        device: Where they run.
        dtype: dtype of weights; "auto" is as saved, or as the config says.
        attn_implementation: Attention implementation; None is transformers' choice.
        batch_sizes: As in `profile_model`.
        new_tokens: Likewise.
        warmup: Likewise.
        rounds: Likewise.
        progress: Is told what is done.

    Returns:
        One result for each model and batch size, in this order.

    Raises:
        DataError: The record cannot be used.
        RecipeError: A model is of a kind that does not generate, or a prompt does not fit it.
        TokenMismatchError: A model without tokenizer makes other tokens than the first one.
        OSError: There is no such checkpoint or file.
    """
    place = _device(device)
    configs = [_config(source) for source in sources]
    prompts = _prompts(sources, configs, prompt)
    results: list[Deployment] = []
    for source, config, own in zip(sources, configs, prompts, strict=True):
        progress(f"{source.path}: {own.tokens} prompt tokens, {own.images} images")
        try:
            results += _profile(
                source, config, own, place, dtype, attn_implementation,
                batch_sizes, new_tokens, warmup, rounds,
            )  # fmt: skip
        except ValueError as error:
            raise RecipeError(f"{source.path}: {error}") from error
    return results


def _profile(
    source: Source,
    config: Any,
    prompt: Prompt,
    place: torch.device,
    dtype: DtypeName,
    attn_implementation: str | None,
    batch_sizes: Sequence[int],
    new_tokens: int,
    warmup: int,
    rounds: int,
) -> list[Deployment]:
    """One model, loaded here and let go of again."""
    release(place)
    count, number = weight_count(config), _dtype(config, dtype)
    name, weights = source.path, "random" if source.is_random else "checkpoint"
    allocated = torch.cuda.memory_allocated(place) if place.type == "cuda" else 0
    before, free, needed = (allocated, resident_bytes()), free_bytes(place), count * number.itemsize
    problem = None
    if free is not None and needed > free and not is_quantized(config):
        problem = f"does not fit: weights of {quantity(needed)}B, {quantity(free)}B are free"
    else:
        try:
            with untouched_random():
                model = _load(source, config, place, dtype, attn_implementation)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = f"out of memory while loading: {(str(error).splitlines() or [''])[0]}"
    if problem is None:
        return profile_model(
            model, prompt, name=name, weights=weights, batch_sizes=batch_sizes,
            new_tokens=new_tokens, warmup=warmup, rounds=rounds, memory_before=before,
        )  # fmt: skip
    release(place)
    return [
        describe(
            config, prompt, name=name, weights=weights, parameters=count, dtype=number,
            place=place, batch_size=size, new_tokens=new_tokens, problem=problem,
        )
        for size in batch_sizes
    ]  # fmt: skip


def _device(name: str) -> torch.device:
    """A device that is there."""
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise RecipeError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def _config(source: Source) -> Any:
    """A model's config."""
    path = Path(source.path)
    is_file = source.is_random and path.is_file()
    if is_file and path.name != "config.json":
        raise RecipeError(f"{path} is no folder of a model, and not the config.json of one")
    try:
        config = read_config(path.parent if is_file else source.path)
        head_class(config)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if source.is_random and is_quantized(config):
        raise RecipeError(f"{path} is quantised; random weights are those of plain models only")
    return config


def _dtype(config: Any, dtype: DtypeName) -> torch.dtype:
    """The dtype in which weights will be."""
    found = getattr(config, "dtype", None) if dtype == "auto" else dtype
    found = getattr(torch, found) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def _load(
    source: Source, config: Any, place: torch.device, dtype: DtypeName, attention: str | None
) -> Any:
    if not source.is_random:
        return load_model(source.path, dtype=dtype, attn_implementation=attention).to(place)
    settings = {} if attention is None else {"attn_implementation": attention}
    with torch.device(place):
        model = head_class(config)._from_config(
            copy.deepcopy(config), dtype=_dtype(config, dtype), **settings
        )
    return model.eval()


def _prompts(
    sources: Sequence[Source], configs: Sequence[Any], settings: PromptSettings
) -> list[Prompt]:
    """A prompt for each model."""
    if settings.records is None:
        return [_synthetic(config, configs[0], settings) for config in configs]
    records = load_records(settings.records)
    if not records:
        raise DataError(f"{settings.records} holds no records")
    root = settings.root or settings.records.parent
    found: list[Prompt | None] = []
    for source in sources:
        folder = Path(source.path).parent if Path(source.path).is_file() else Path(source.path)
        own = None
        if not source.is_random or _has_tokenizer(folder):
            place = folder if folder.is_dir() else source.path
            own = record_prompt(records[0], place, root, settings.encoding)
        found.append(own)
    known = next(((p, c) for p, c in zip(found, configs, strict=True) if p is not None), None)
    if known is None:
        raise RecipeError("no model has a tokenizer, which --records needs")
    prompts = []
    for source, config, own in zip(sources, configs, found, strict=True):
        if own is None:
            own = known[0]
            check_same_vision_configs(config, known[1], name=source.path)
            largest = int(own.inputs["input_ids"].max())
            if largest >= config.get_text_config(decoder=True).vocab_size:
                raise TokenMismatchError(f"{source.path} lacks the token {largest} of the prompt")
        prompts.append(own)
    return prompts


def _synthetic(config: Any, first: Any, settings: PromptSettings) -> Prompt:
    images = settings.images
    if images is None:
        images = int(getattr(first, "vision_config", None) is not None)
    return synthetic_prompt(
        config, text_tokens=settings.text_tokens, images=images, image_size=settings.image_size
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists()
