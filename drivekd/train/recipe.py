"""Recipes: a whole distillation in one YAML file, checked key by key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from drivekd.errors import RecipeError
from drivekd.reweighting.checks import is_finite
from drivekd.train.config import DistillConfig, nearest
from drivekd.train.recipe_tree import apply_override, kind_of, read_tree
from drivekd.train.training_values import check_training_value
from drivekd.train.tuning import LoraConfig

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the records are.

    Args:
        train: File of training records.
        eval: File of records whose cross-entropy is measured during training; None for none.
        root: Folder that image paths start from; None is the training file's folder.
        check: What is looked at before training: "full" decodes every image, "quick" looks for
            their files only. A run that goes on with the records it has checked is quick.
    """

    train: str
    eval: str | None = None
    root: str | None = None
    check: Literal["full", "quick"] = "full"


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How records become model inputs.

    Args:
        kind: "single_tile" squashes every image to one tile, "processor" uses the checkpoint's own
            processor, "auto" takes single_tile for InternVL and its kin (the config has
            `image_seq_length` and `downsample_ratio`) and the processor for all others.
        padding_side: Where batches are padded.
        image_size: (height, width) of the tile; None is the vision tower's. Like all that follows
            for single_tile only.
        image_mean: Mean per channel; None is read from the checkpoint's preprocessor_config.json.
        image_std: Standard deviation per channel, likewise.
        start_image_token: Token before an image's tokens; None is the tokenizer's, if it has one.
        end_image_token: Token after them, likewise.
    """

    kind: Literal["auto", "single_tile", "processor"] = "auto"
    padding_side: Literal["left", "right"] = "right"
    image_size: tuple[int, int] | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    start_image_token: str | None = None
    end_image_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where the targets of attention signals are kept, so that training needs no teacher.

    Args:
        path: Folder of the cache; it may serve many recipes.
        top_k: How many cells of each row of a full map are kept; the mass of the others is spread
            evenly over them. Text-to-vision maps are kept whole.
        dtype: Of the kept probabilities. float16 keeps each to 2^-11 (0.05 %) of itself. Losses of
            students that still have to learn change by less than that, their gradients by less
            than 0.1 %; the root of an "mse" never by more than 2^-11 of the root mean square of
            the target. A student as close to its teacher as that needs float32.
        batch_size: Records in one forward of a teacher when the cache is filled.
        shard_mib: Size at which a file of the cache is finished; what a kill costs at most.

    Raises:
        ValueError: A number is below 1.
    """

    path: str
    top_k: int = 64
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = 4
    shard_mib: float = 64.0

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        if self.shard_mib <= 0:
            raise ValueError(f"shard_mib is {self.shard_mib}, wanted a number above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole distillation. Paths are relative to the working directory.

    Args:
        student: Checkpoint folder or hub name of the student.
        data: Records.
        training: Arguments of `transformers.TrainingArguments`, `output_dir` among them.
        teachers: Checkpoints by name.
        encoder: How records become model inputs.
        distill: Signals and how they are mixed, weighted and joined; none is plain training.
        freeze: Parts of the student that are not trained: "vision", "projector", "embeddings", or
            pieces of parameter names (`drivekd.train.tuning.freeze`).
        lora: Train low-rank adapters of the text decoder instead; None for none. They are merged
            into the student that is saved.
        dtype: dtype of the student's weights.
        teacher_dtype: dtype of the teachers' weights; "auto" is as saved.
        teacher_device: Where teachers run: a device such as "cuda:1", a mapping from teachers to
            devices, "auto" (`drivekd.train.placement.place_teachers`), or None for the student's.
        attn_implementation: Attention implementation of the student; None is transformers' choice.
        cache: Where targets of attention signals are kept (`drivekd cache`); with one, training
            reads them and loads no teacher for these signals. None: teachers run in every step.
    """

    student: str
    data: DataConfig
    training: Mapping[str, Any]
    teachers: Mapping[str, str] = field(default_factory=dict)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    freeze: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    dtype: DtypeName = "float32"
    teacher_dtype: DtypeName = "auto"
    teacher_device: str | Mapping[str, str] | None = None
    attn_implementation: str | None = None
    cache: CacheConfig | None = None

    def __post_init__(self) -> None:
        if not self.training.get("output_dir"):
            raise ValueError("training needs output_dir, where checkpoints and the log go")
        for name in self.teacher_device if isinstance(self.teacher_device, Mapping) else ():
            if name not in self.teachers:
                raise ValueError(
                    f"teacher_device names the teacher {name!r}, which teachers does not have; "
                    f"{nearest(name, self.teachers)}"
                )
        for signal in self.distill.signals:
            if signal.teacher not in self.teachers:
                hint = nearest(signal.teacher, self.teachers)
                raise ValueError(
                    f"signal {signal.name!r} names the teacher {signal.teacher!r}, which teachers "
                    f"does not have; {hint}"
                )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file with the fields of `Recipe`. Its key `base` may name another recipe, or
            several, relative to the file, that it changes: mappings are merged key by key, anything
            else (a list, a number, null) takes the base's place, and a mapping that meets a list
            changes the entries that its keys name, as overrides do. Of several bases later ones
            win, and the file over all of them.
        overrides: Changes such as "training.learning_rate=1e-4"; the value is YAML. List entries
            are named by index, or by their `name`: "distill.signals.perception.share=0.05".

    Returns:
        The recipe.

    Raises:
        RecipeError: A file cannot be read or is its own base, a key does not exist (the message
            names the nearest that does), is missing or given twice, a value has the wrong type or
            is not legal, or an override names nothing.

    Example:
        >>> recipe = load_recipe("recipes/multi.yaml",
        ...     ["training.max_steps=100"])  # doctest: +SKIP
    """
    file = Path(path)
    tree = read_tree(file)
    try:
        for override in overrides:
            apply_override(tree, override)
        recipe = _build(Recipe, tree, "")
        _check_training(recipe.training)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error
    return recipe


def _build(cls: type[_T], tree: Any, where: str) -> _T:
    """Make a dataclass from a mapping, every key and type checked."""
    if not isinstance(tree, dict):
        raise RecipeError(f"{where or 'recipe'} is {kind_of(tree)}, wanted a mapping")
    fields = {each.name: each for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in fields:
            raise RecipeError(f"unknown key {prefix}{key}; {nearest(str(key), fields)}")
    for name, each in fields.items():
        required = (
            each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        )
        if required and name not in tree:
            raise RecipeError(f"{prefix}{name} is missing")
    values = {key: _convert(value, hints[key], f"{prefix}{key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where or 'recipe'}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a YAML value against a type hint and convert lists and mappings."""
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(
                f"{where} is {value!r}, wanted one of {list(arguments)}; "
                f"{nearest(str(value), map(str, arguments))}"
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if origin in (Mapping, dict):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is {kind_of(value)}, wanted a mapping")
        return {
            str(key): _convert(entry, arguments[1], f"{where}.{key}")
            for key, entry in value.items()
        }
    if origin in (list, Sequence):
        if not isinstance(value, list):
            raise RecipeError(f"{where} is {kind_of(value)}, wanted a list")
        return [_convert(entry, arguments[0], f"{where}.{i}") for i, entry in enumerate(value)]
    return _convert_scalar(value, hint, where)


def _convert_union(value: Any, arguments: tuple[Any, ...], where: str) -> Any:
    errors = []
    for argument in arguments:
        if isinstance(value, dict) and get_origin(argument) in (Mapping, dict):
            return _convert(value, argument, where)  # what is wrong is inside
        try:
            return _convert(value, argument, where)
        except RecipeError as error:
            errors.append(str(error))
    if len(arguments) == 2 and type(None) in arguments:
        raise RecipeError(errors[arguments.index(type(None)) - 1])
    raise RecipeError(f"{where} is {kind_of(value)}, wanted {_union_name(arguments)}")


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{where} is {kind_of(value)}, wanted a list")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        raise RecipeError(f"{where} has {len(value)} entries, wanted {len(arguments)}")
    return tuple(
        _convert(entry, argument, f"{where}.{_label(entry, i)}")
        for i, (entry, argument) in enumerate(zip(value, arguments, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    """Numbers, strings, booleans and null; any other class is left to whoever takes the value."""
    if isinstance(value, int) and not is_finite(value):
        raise RecipeError(f"{where} is {kind_of(value)}, which no float holds")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) or hint is type(None):
        exact = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
        if not exact:
            raise RecipeError(f"{where} is {kind_of(value)}, wanted {_name(hint)}")
        return value
    if isinstance(hint, type) and not isinstance(value, str | hint):
        raise RecipeError(f"{where} is {kind_of(value)}, wanted {_name(hint)}")
    return value


def _check_training(training: Mapping[str, Any]) -> None:
    """Check keys, types and values against the fields of transformers.TrainingArguments."""
    from transformers import TrainingArguments

    fields = {each.name for each in dataclasses.fields(TrainingArguments) if each.init}
    hints = typing.get_type_hints(TrainingArguments)
    for key, value in training.items():
        if key not in fields:
            close = nearest(key, fields)
            hint = close if close.startswith("did") else "see transformers.TrainingArguments"
            raise RecipeError(f"unknown key training.{key}; {hint}")
        if key == "fsdp" and isinstance(value, bool):
            continue  # annotated as the string that older versions took
        _convert(value, hints[key], f"training.{key}")
        check_training_value(key, value, hints[key])


def _label(entry: Any, index: int) -> str:
    """How an error names a list entry: by its name where it has one."""
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else str(index)


def _name(hint: Any) -> str:
    if get_origin(hint) in (Mapping, dict):
        return "a mapping"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, "null" if hint is type(None) else getattr(hint, "__name__", str(hint)))


def _union_name(arguments: tuple[Any, ...]) -> str:
    return " or ".join(_name(argument) for argument in arguments)
