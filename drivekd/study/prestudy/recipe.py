"""A pre-study of a recipe's teachers, or of a model, on records in files."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drivekd.data import Collator, Record, load_records
from drivekd.data.conversation import describe_record
from drivekd.data.encode import Encoder
from drivekd.errors import DataError, RecipeError, TokenMismatchError
from drivekd.study.prestudy.prestudy import prestudy
from drivekd.study.prestudy.report import signals_yaml
from drivekd.study.prestudy.result import Document, Prestudy
from drivekd.train.encoders import build_encoder
from drivekd.train.models import load_model
from drivekd.train.recipe import EncoderConfig, Recipe, load_recipe
from drivekd.train.run import check_place, check_tokenizer

_RECIPES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be studied.

    Args:
        source: A recipe (a YAML file), or a model: its folder or hub name.
        records: File of records.
        overrides: Changes of the recipe.
        student: The student, folder or hub name; None is the recipe's, or none.
        general: File of records that are not about driving, or None.
        root: Folder that image paths of `records` start from; None is the recipe's `data.root`, or
            the file's folder. Those of `general` start from its own folder.
        capabilities: Question types to study.
        limit: Records of each, and of `general`; 0 is all. Those of many different pictures are
            taken first.
        device: Where models run; None is a GPU if there is one.
        dtype: Of the models' weights; None is the recipe's, or as saved.
        tau: Temperature of margins.
        resamples: Draws for the bounds.
        seed: Of the choice of records, and the draws.
    """

    source: str
    records: Path
    overrides: Sequence[str] = ()
    student: str | None = None
    general: Path | None = None
    root: Path | None = None
    capabilities: Sequence[str] = ("perception", "reasoning", "planning")
    limit: int = 32
    device: str | None = None
    dtype: str | None = None
    tau: float = 1.0
    resamples: int = 1000
    seed: int = 0


def run_prestudy(
    request: Request, *, progress: Callable[[str, int, int], None] | None = None
) -> tuple[Document, str, Path]:
    """Study every teacher of a request.

    Teachers of a recipe are looked at one after the other, each on the records of all capabilities;
    the suggestion for a capability comes from its own teacher: that of the signal of its name, the
    one of its name, or the only one.

    Args:
        request: What is to be studied.
        progress: Called with what is looked at, how many records are done, and of how many.

    Returns:
        The numbers, the signals as YAML, and the folder that results belong to unless the user
        names one.

    Raises:
        DataError: A capability has no record, or a record no picture or no answer.
        RecipeError: The recipe, a model or a setting does not fit.
        TokenMismatchError: Student and teacher do not see the same tokens.
        CaptureError: A model cannot be captured.
        OSError: A file or checkpoint does not exist.
    """
    is_recipe = Path(request.source).suffix in _RECIPES
    if request.overrides and not is_recipe:
        raise RecipeError(
            f"{request.overrides[0]} changes a recipe, but {request.source} is a model; name a "
            f"file that ends with {' or '.join(_RECIPES)}"
        )
    recipe = load_recipe(request.source, request.overrides) if is_recipe else None
    teachers = _teachers(request, recipe)
    student = request.student or (None if recipe is None else recipe.student)
    for role, path in [
        ("student", student),
        *((f"teacher {n!r}", p) for n, p in teachers.values()),
    ]:
        if path is not None:
            check_place(role, path)
    chosen = _choose(request)
    general = _sample(load_records(request.general), request) if request.general else []
    root = request.root or _recipe_root(recipe) or request.records.parent
    start = student or next(path for _, path in teachers.values())
    encode = _Encoding(recipe, start, root)
    device = _device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, path in teachers.values():
        check_tokenizer(name, path, encode.tokenizer)
    own = None if student is None else _load("student", student, request, recipe).to(device)
    studies = []
    for path in dict.fromkeys(path for _, path in teachers.values()):
        name = next(n for n, p in teachers.values() if p == path)
        teacher = _load(f"teacher {name!r}", path, request, recipe).to(device)
        batches = encode.batches(chosen, teacher.config)
        others = encode.elsewhere(request.general).batches(general, teacher.config)

        def tell(what: str, done: int, name: str = name) -> None:
            if progress is not None:
                total = len(chosen) if what == "records" else len(general)
                progress(f"teacher {name}: {what}", done, total)

        with _as_recipe_errors(name):
            study = prestudy(
                teacher,
                batches,
                student=own,
                general=others,
                capabilities=request.capabilities,
                names=(path, student or ""),
                tau=request.tau,
                resamples=request.resamples,
                seed=request.seed,
                progress=tell,
            )
        own_capabilities = {c for c, (_, p) in teachers.items() if p == path}
        studies.append(_completed(study, own_capabilities, request))
        del teacher, batches, others
        gc.collect()  # before the next one takes memory
    document = Document(tuple(studies))
    folder = Path("runs") if recipe is None else Path(recipe.training["output_dir"])
    return document, signals_yaml(document, teachers), folder / "prestudy"


def _device(name: str) -> torch.device:
    """The device, if something can be put there."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used: {reason}") from error


def _teachers(request: Request, recipe: Recipe | None) -> dict[str, tuple[str, str]]:
    """For each capability the name and path of its teacher."""
    if recipe is None:
        return dict.fromkeys(request.capabilities, ("teacher", request.source))
    if not recipe.teachers:
        raise RecipeError(
            f"{request.source}: the recipe has no teachers; there is nothing to study"
        )
    by_signal = {signal.name: signal.teacher for signal in recipe.distill.signals}
    found = {}
    for capability in request.capabilities:
        name = by_signal.get(capability, capability)
        if name not in recipe.teachers and len(recipe.teachers) == 1:
            (name,) = recipe.teachers
        if name not in recipe.teachers:
            raise RecipeError(
                f"{request.source}: no signal and no teacher is named {capability!r}, and there "
                f"are several teachers ({', '.join(recipe.teachers)}); name capabilities by --types"
            )
        found[capability] = (name, recipe.teachers[name])
    return found


def _recipe_root(recipe: Recipe | None) -> Path | None:
    return None if recipe is None or recipe.data.root is None else Path(recipe.data.root)


def _choose(request: Request) -> list[Record]:
    """The records to look at, of all capabilities; refuses what the measures cannot use."""
    records = load_records(request.records)
    chosen: list[Record] = []
    for capability in request.capabilities:
        own = [record for record in records if record.question_type == capability]
        if not own:
            there = ", ".join(sorted({record.question_type for record in records})) or "none"
            raise DataError(
                f"{request.records} has no record of question type {capability!r} (there are: "
                f"{there}); say which capabilities by --types"
            )
        chosen += _sample(own, request)
    for record in chosen:
        if not record.images:
            raise DataError(
                f"{request.records}: {describe_record(record)} has no picture; text-to-vision "
                "attention is what is looked at, leave records of text alone out"
            )
    return chosen


def _sample(records: Sequence[Record], request: Request) -> list[Record]:
    """Some records in a random order, those of pictures that are new first."""
    order = random.Random(request.seed).sample(list(records), len(records))
    seen: Counter[tuple[str, ...]] = Counter()
    ranked = []
    for record in order:
        ranked.append((seen[record.images], record))
        seen[record.images] += 1
    ranked.sort(key=lambda each: each[0])
    return [record for _, record in ranked[: request.limit or None]]


class _Encoding:
    """Turns records into batches of one."""

    def __init__(self, recipe: Recipe | None, checkpoint: str, root: Path) -> None:
        self._settings = EncoderConfig() if recipe is None else recipe.encoder
        self._checkpoint = checkpoint
        encoder, processing = build_encoder(self._settings, checkpoint, root)
        self._encoder: Encoder = encoder
        self.tokenizer = getattr(processing, "tokenizer", processing)
        self._recipe = recipe

    def elsewhere(self, file: Path | None) -> _Encoding:
        """The same for records whose images start from another file's folder."""
        return self if file is None else _Encoding(self._recipe, self._checkpoint, file.parent)

    def batches(self, records: Sequence[Record], config: Any) -> Iterator[Mapping[str, Any]]:
        """One batch a record; nothing is padded."""
        collator = Collator(self._encoder, config, pad_token_id=self.tokenizer.pad_token_id or 0)
        for record in records:
            yield collator([record]) | {"pictures": [record.images]}


def _load(role: str, path: str, request: Request, recipe: Recipe | None) -> Any:
    """A whole model, frozen."""
    dtype = request.dtype or "auto"
    if recipe is not None and request.dtype is None:
        dtype = recipe.dtype if role == "student" else recipe.teacher_dtype
    try:
        model = load_model(path, dtype=dtype)
    except ValueError as error:
        raise RecipeError(f"{role}: {error}") from error
    return model.eval().requires_grad_(False)


def _completed(study: Prestudy, capabilities: Collection[str], request: Request) -> Prestudy:
    """With where records came from, without the suggestions that another teacher is asked for."""
    own = tuple(each for each in study.suggestions if each.capability in capabilities)
    settings: dict[str, str | int | float] = {
        "records": str(request.records),
        "general": str(request.general or ""),
        "limit": request.limit,
    }
    return replace(study, suggestions=own, settings=settings | study.settings)


@contextmanager
def _as_recipe_errors(name: str) -> Iterator[None]:
    """What a model or setting cannot do, as an error of whoever chose it."""
    try:
        yield
    except (RecipeError, DataError, TokenMismatchError):
        raise
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"teacher {name!r}: {error}") from error
