"""`drivekd profile`: what models cost when they answer, and what a recipe's steps cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivekd.cli.common import FOUND_PROBLEMS, OK, AddCommand, positive
from drivekd.errors import RecipeError

if TYPE_CHECKING:
    from drivekd.study.tables import Table

_RECIPE_SUFFIXES = (".yaml", ".yml")
# Options of one way to call it, with their defaults; None in the parser means not given.
_OF_MODELS = {
    "random_weights": (), "records": None, "root": None, "encoder_recipe": None,
    "text_tokens": 512, "images": None, "image_size": None, "batch_sizes": (1,),
    "new_tokens": 64, "rounds": 5, "dtype": "auto", "attention": None, "device": None,
}  # fmt: skip
_OF_RECIPES = {"steps": 5, "no_what_if": False}


def add_profile_command(commands: Any, add_command: AddCommand) -> None:
    """Add `drivekd profile` to the command line.

    Args:
        commands: The subparsers.
        add_command: `drivekd.cli`'s way of adding one.
    """
    command = add_command(
        commands,
        "profile",
        _run_profile,
        help="memory and speed of models, or of a recipe's training steps",
        description="MODEL...: let each model answer one prompt greedily, a set number of tokens, "
        "and measure memory,\ntokens a second and the time to the first token; how many times "
        "better the first model is. Exit\ncode 1 if one does not fit.\n\n"
        "RECIPE.yaml [KEY=VALUE...]: run a few steps of its training on its records, save nothing, "
        "and say\nwhere time and memory go, and what the same costs without distillation.",
    )
    command.add_argument(
        "what",
        nargs="*",
        metavar="MODEL",
        help="folders or hub names of models; or one RECIPE.yaml, with KEY=VALUE behind it",
    )
    command.set_defaults(overrides=[])
    _add_model_options(command.add_argument_group("options with MODEL"))
    steps = command.add_argument_group("options with RECIPE.yaml")
    steps.add_argument("--steps", type=positive, metavar="N", help="steps that count; default: 5")
    steps.add_argument(
        "--no-what-if",
        action="store_true",
        default=None,
        help="do not also run it without signals and with one backward",
    )
    command.add_argument(
        "--warmup", type=positive, metavar="N", help="rounds or steps before; default: 1 or 2"
    )
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    output.add_argument("--markdown", action="store_true", help="print the tables as Markdown")


def _add_model_options(group: Any) -> None:
    group.add_argument(
        "--random-weights",
        nargs="+",
        metavar="CONFIG",
        help="more models, made from a config.json or its folder with random weights: time and "
        "memory do not depend on values",
    )
    group.add_argument(
        "--records", type=Path, metavar="FILE", help="the prompt is the first of these records"
    )
    group.add_argument(
        "--root", type=Path, metavar="DIR", help="where image paths start; default: the file's own"
    )
    group.add_argument(
        "--encoder-recipe", type=Path, metavar="FILE", help="take encoder settings from this recipe"
    )
    group.add_argument(
        "--text-tokens",
        type=positive,
        metavar="N",
        help="without --records: tokens of text; default: 512",
    )
    group.add_argument(
        "--images",
        type=_natural,
        metavar="N",
        help="without --records: pictures; default: 1 for models that see",
    )
    group.add_argument(
        "--image-size",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of these pictures, in pixels; default: the model's own, 448 448 for Qwen-VL",
    )
    group.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        metavar="N",
        help="copies of the prompt that are answered at once; default: 1",
    )
    group.add_argument(
        "--new-tokens", type=positive, metavar="N", help="tokens of each answer; default: 64"
    )
    group.add_argument("--rounds", type=positive, metavar="N", help="timed answers; default: 5")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; default: as saved",
    )
    group.add_argument("--attention", metavar="NAME", help="attention implementation, such as sdpa")
    group.add_argument("--device", help="default: cuda if there is one, else cpu")


def _run_profile(settings: argparse.Namespace) -> int:
    recipes = [name for name in settings.what if name.endswith(_RECIPE_SUFFIXES)]
    if recipes:
        return _profile_recipe(settings, recipes[0])
    return _profile_models(settings)


def _profile_recipe(settings: argparse.Namespace, recipe: str) -> int:
    rest = [name for name in settings.what if name != recipe]
    if wrong := [name for name in rest if "=" not in name]:
        raise RecipeError(
            f"{wrong[0]} stands beside the recipe {recipe}; give models or one recipe"
        )
    _refuse(settings, _OF_MODELS, "belongs to models, not to a recipe")
    _defaults(settings, _OF_RECIPES)
    from drivekd.study.profile.report import training_document, training_tables
    from drivekd.study.profile.training import profile_recipe
    from drivekd.train import load_recipe

    profile = profile_recipe(
        load_recipe(recipe, [*rest, *settings.overrides]),
        steps=settings.steps,
        warmup=settings.warmup or 2,
        what_if=not settings.no_what_if,
        progress=_say,
    )
    _show(settings, training_document(profile), training_tables(profile))
    return OK


def _profile_models(settings: argparse.Namespace) -> int:
    _refuse(settings, _OF_RECIPES, "belongs to a recipe, not to models")
    if settings.overrides or any("=" in name for name in settings.what):
        raise RecipeError("KEY=VALUE changes a recipe; there is none (RECIPE.yaml)")
    _defaults(settings, _OF_MODELS)
    if not settings.what and not settings.random_weights:
        raise RecipeError("nothing to profile; give MODEL, --random-weights CONFIG or RECIPE.yaml")
    import torch

    from drivekd.study.profile.models import PromptSettings, Source, profile_models
    from drivekd.study.profile.report import deployment_document, deployment_table
    from drivekd.train import EncoderConfig, load_recipe

    encoding = EncoderConfig()
    if settings.encoder_recipe:
        encoding = load_recipe(settings.encoder_recipe).encoder
    sources = [Source(path) for path in settings.what]
    sources += [Source(path, is_random=True) for path in settings.random_weights]
    results = profile_models(
        sources,
        PromptSettings(
            records=settings.records,
            root=settings.root,
            encoding=encoding,
            text_tokens=settings.text_tokens,
            images=settings.images,
            image_size=settings.image_size and tuple(settings.image_size),
        ),
        device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=settings.dtype,
        attn_implementation=settings.attention,
        batch_sizes=settings.batch_sizes,
        new_tokens=settings.new_tokens,
        warmup=settings.warmup or 1,
        rounds=settings.rounds,
        progress=_say,
    )
    _show(settings, deployment_document(results), [deployment_table(results)])
    return FOUND_PROBLEMS if any(result.problem for result in results) else OK


def _refuse(settings: argparse.Namespace, options: dict[str, Any], why: str) -> None:
    for name in options:
        if getattr(settings, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} {why}")


def _defaults(settings: argparse.Namespace, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def _show(settings: argparse.Namespace, document: dict[str, Any], tables: Sequence[Table]) -> None:
    from drivekd.study.tables import to_markdown, to_text

    if settings.json:
        print(json.dumps(document, indent=1))
    else:
        write = to_markdown if settings.markdown else to_text
        print("\n\n".join(write(table).rstrip() for table in tables))


def _say(what: str) -> None:
    print(f"profile: {what}", file=sys.stderr)


def _natural(text: str) -> int:
    """An int of at least 0, for argparse."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"is {value}; it must be at least {least}")
    return value
