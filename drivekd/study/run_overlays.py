"""Attention overlays of a run: where its teachers and its student look on its own records."""

from __future__ import annotations

import dataclasses
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from drivekd.capture import CapturedAttention, capture_attention
from drivekd.data import Record, load_records
from drivekd.data.collate import collate_features
from drivekd.data.conversation import describe_record, load_image
from drivekd.data.encode import Encoder
from drivekd.errors import RecipeError
from drivekd.functional import attention_map
from drivekd.losses import AttentionMapLoss
from drivekd.study.grids import View, find_views
from drivekd.study.overlays import Overlay, plot_overlays
from drivekd.study.plots import Drawn, Plot
from drivekd.tokens import TokenLayout
from drivekd.train import checkpoints
from drivekd.train.config import LayerSpec, SignalConfig
from drivekd.train.encoders import build_encoder
from drivekd.train.models import load_model, prepare_teachers
from drivekd.train.recipe import Recipe, load_recipe
from drivekd.train.run import data_root
from drivekd.train.run_folder import RECIPE
from drivekd.train.signals import signal_loss
from drivekd.train.tuning import merge_adapters

_LOG = logging.getLogger(__name__)
_WIDTH = 480  # pixels of a frame
_STRETCH = 4.0  # of the longer side to the shorter one
_TITLE = 90  # characters

Map = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Example:
    """A record that can be drawn."""

    record: Record
    inputs: dict[str, Tensor]
    tokens: TokenLayout
    views: list[View]
    images: list[Image.Image]


def overlays_of_run(
    run: Path,
    *,
    recipe_file: Path | None = None,
    overrides: Sequence[str] = (),
    count: int = 2,
    device: torch.device | str = "cpu",
) -> Drawn:
    """Overlays of a run by the recipe that its folder remembers, or another.

    Args:
        run: The run's folder.
        recipe_file: The recipe; None is the folder's own.
        overrides: Changes to it.
        count: Records a signal.
        device: Where models run.

    Returns:
        As `draw_run_overlays`; without a recipe in the folder only a note.

    Raises:
        RecipeError: A recipe or override that was asked for is not valid.
    """
    file = recipe_file or run / RECIPE
    if not file.is_file() and recipe_file is None:
        return Drawn(notes=(f"No overlays: {file} does not exist; name a recipe by --recipe.",))
    try:
        recipe = load_recipe(file, overrides)
    except RecipeError as error:
        if recipe_file is not None or overrides:
            raise
        return Drawn(notes=(f"No overlays: {_line(error)}.",))
    return draw_run_overlays(recipe, run, count=count, device=device)


def draw_run_overlays(
    recipe: Recipe, run: Path, *, count: int, device: torch.device | str = "cpu"
) -> Drawn:
    """Draw the maps of each attention signal on some of the run's records.

    A map is the mean over heads, over the signal's layers (a teacher's layers in the groups that
    the loss compares) and over the text tokens that come after the picture, of their attention to
    each of its vision tokens. Teachers are loaded one after the other, each as deep as its signals
    need. Whatever goes wrong is a note: a report of curves is not lost to a picture.

    Args:
        recipe: The run's recipe.
        run: Its folder; the student is its `student`, else the newest whole checkpoint.
        count: Records a signal, evaluation records first.
        device: Where the models run.
    """
    signals = [signal for signal in recipe.distill.active if signal.kind == "attention"]
    notes = [
        f"{signal.name} compares {signal.kind}: it has no attention map to draw."
        for signal in recipe.distill.active
        if signal.kind != "attention"
    ]
    if not signals:
        return Drawn((), (*notes, "No signal of the recipe compares attention maps."))
    try:
        folder = _student_folder(run)
        root = data_root(recipe)
        encoder, processing = build_encoder(recipe.encoder, _with_tokenizer(folder, recipe), root)
        student = _load_student(folder, recipe).to(device).eval()
        chosen, skipped = _examples(recipe, signals, encoder, processing, student, root, count)
    except Exception as error:
        return Drawn((), (*notes, f"Attention overlays could not be drawn: {_line(error)}."))
    notes += skipped
    plots = []
    for name in dict.fromkeys(signal.teacher for signal in signals):
        own = [signal for signal in signals if signal.teacher == name and chosen[signal.name]]
        if not own:
            continue
        try:
            _LOG.warning("loading teacher %r for overlays", name)
            needs = dataclasses.replace(recipe.distill, signals=tuple(own), mixing=None)
            teacher = prepare_teachers(
                {name: recipe.teachers[name]},
                needs.teacher_layers(),
                student,
                torch.device(device),
                dtype=recipe.teacher_dtype,
            )[name]
        except Exception as error:
            names = ", ".join(signal.name for signal in own)
            notes.append(f"Teacher {name!r} of {names} could not be loaded: {_line(error)}.")
            continue
        for signal in own:
            try:
                plots.append(_draw(signal, student, teacher, chosen[signal.name], folder))
            except Exception as error:
                notes.append(f"The maps of {signal.name} could not be drawn: {_line(error)}.")
        del teacher
    return Drawn(tuple(plots), tuple(notes))


def _student_folder(run: Path) -> Path:
    """The finished student, or the newest checkpoint.

    Raises:
        FileNotFoundError: There is neither.
    """
    found = run / "student"
    if found.is_dir():
        return found
    newest = checkpoints.newest_complete(run)
    if newest is None:
        raise FileNotFoundError(f"{run} has no student yet, and no whole checkpoint")
    return newest


def _load_student(folder: Path, recipe: Recipe) -> Any:
    """A student, or a checkpoint, which may hold adapters alone."""
    if not (folder / "adapter_config.json").is_file():
        return load_model(folder, dtype=recipe.dtype)
    import peft

    start = load_model(recipe.student, dtype=recipe.dtype)
    return merge_adapters(peft.PeftModel.from_pretrained(start, folder))


def _with_tokenizer(folder: Path, recipe: Recipe) -> str | Path:
    """Where tokenizer and image settings are: beside a finished student, else at its start."""
    return folder if folder.name == "student" else recipe.student


def _examples(
    recipe: Recipe,
    signals: Sequence[SignalConfig],
    encoder: Encoder,
    processing: Any,
    student: Any,
    root: Path,
    count: int,
) -> tuple[dict[str, list[_Example]], list[str]]:
    """For each signal the first records that it works on and that can be drawn; and faults."""
    files = [file for file in (recipe.data.eval, recipe.data.train) if file is not None]
    records = [record for file in files for record in load_records(file)]
    mixing = recipe.distill.resolve_mixing({record.question_type for record in records})
    pad = int(getattr(processing, "tokenizer", processing).pad_token_id)
    made: dict[int, _Example | None] = {}
    faults: dict[str, None] = {}

    def example(index: int) -> _Example | None:
        if index not in made:
            try:
                made[index] = _encode(records[index], encoder, student, root, pad)
            except Exception as error:
                made[index] = None
                faults[f"{describe_record(records[index])} cannot be drawn: {_line(error)}."] = None
        return made[index]

    chosen: dict[str, list[_Example]] = {}
    for signal in signals:
        candidates = _candidates(records, mixing[signal.name], example)
        chosen[signal.name] = [each for each, _ in zip(candidates, range(count), strict=False)]
        if not chosen[signal.name]:
            faults[f"No record of {signal.name} with a picture could be drawn."] = None
    return chosen, list(faults)


def _candidates(
    records: Sequence[Record],
    weights: Mapping[str, float],
    example: Callable[[int], _Example | None],
) -> Iterator[_Example]:
    """Records with pictures that a signal works on; gives up after a few that cannot be drawn."""
    failed = 0
    for index, record in enumerate(records):
        if not record.images or record.question_type not in weights:
            continue
        made = example(index)
        if made is not None:
            yield made
        elif (failed := failed + 1) == 3:
            return


def _encode(record: Record, encoder: Encoder, student: Any, root: Path, pad: int) -> _Example:
    encoded = encoder(record)
    images = [load_image(record, path, root) for path in record.images]
    views = find_views(encoder, student.config, encoded, [image.size[::-1] for image in images])
    inputs = collate_features([encoded], pad_token_id=pad)
    del inputs["labels"]
    tokens = TokenLayout.from_batch(inputs, student.config)
    for view in views:
        if not _asking(tokens, view).any():
            raise ValueError(f"it has no text after image {view.image + 1}")
    return _Example(record, inputs, tokens, views, images)


def _asking(tokens: TokenLayout, view: View) -> Tensor:
    """(N,) bool, the text tokens that come after a view's last token."""
    asking = tokens.is_text[0].clone()
    asking[: max(map(max, view.tokens)) + 1] = False
    return asking


def _draw(
    signal: SignalConfig,
    student: nn.Module,
    teacher: nn.Module,
    chosen: list[_Example],
    folder: Path,
) -> Plot:
    loss = signal_loss(signal, student, teacher)
    if not isinstance(loss, AttentionMapLoss):
        raise TypeError(f"signal {signal.name!r} compares no attention maps")
    overlays = []
    for example in chosen:
        maps = [_maps(model, layers, example) for model, layers in _sides(loss, student, teacher)]
        overlays += [
            Overlay(
                image=_frame(example.images[view.image], view),
                teacher=_on_grid(maps[1], view, example),
                student=_on_grid(maps[0], view, example),
                title=_title(example, view),
            )
            for view in example.views
        ]
    title = f"Attention of {signal.name}"
    own, theirs = _layers(signal.student_layers), _layers(signal.teacher_layers)
    return Plot(
        name=f"overlay_{signal.name}",
        title=title,
        caption=f"Frame, teacher {signal.teacher!r}, student ({folder.name}), student minus "
        f"teacher: attention to each patch, mean over heads, layers ({own} of the student, "
        f"{theirs} of the teacher) and the text after the picture. "
        + (
            "The signal compares these cells, text token by text token."
            if signal.region == "text_to_vision"
            else "The signal compares the whole map, of which this is a part."
        ),
        alt=f"Attention of teacher {signal.teacher!r} and of the student over {len(overlays)} "
        "pictures, patch by patch, and their difference: " + _words(overlays),
        png=plot_overlays(overlays, title=title),
    )


def _sides(
    loss: AttentionMapLoss, student: nn.Module, teacher: nn.Module
) -> list[tuple[nn.Module, list[tuple[int, float]]]]:
    """Student and teacher with their layers, and what share of the mean map each layer has."""
    own = [(layer, 1 / len(loss.student_layers)) for layer in loss.student_layers]
    shares: dict[int, float] = {}
    for group in loss.groups:
        for index in group:
            layer = loss.teacher_layers[index]
            shares[layer] = shares.get(layer, 0.0) + 1 / (len(group) * len(loss.groups))
    return [(student, own), (teacher, list(shares.items()))]


@torch.no_grad()
def _maps(model: nn.Module, layers: list[tuple[int, float]], example: _Example) -> Tensor:
    """(N, N) head-mean map, mean over layers, on the CPU."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in example.inputs.items()}
    dtype = next(model.parameters()).dtype
    inputs = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    names = [layer for layer, _ in layers]
    with capture_attention(model, names, stop_after_last=True) as captured:
        model(**inputs, use_cache=False)
    tokens = example.tokens.to(device)
    total = torch.zeros((), device=device)
    for layer, share in layers:
        total = total + share * _layer_map(captured, layer, tokens)
    return total.float().cpu()


def _layer_map(captured: CapturedAttention, layer: int, tokens: TokenLayout) -> Tensor:
    record = captured[layer]
    return attention_map(
        record.query, record.key, tokens, scale=record.scale, window=record.window
    )[0]


def _on_grid(whole: Tensor, view: View, example: _Example) -> Map:
    """(rows, columns) mean attention of the text after a picture to its patches."""
    places = torch.tensor(view.tokens)
    grid: Map = whole[_asking(example.tokens, view)].mean(0)[places].numpy()
    return grid


def _frame(image: Image.Image, view: View) -> npt.NDArray[np.uint8]:
    """The picture at the size of a figure's column; very long ones are squashed."""
    rows, columns = len(view.tokens), len(view.tokens[0])
    ratio = min(max(image.width / image.height, 1 / _STRETCH), _STRETCH)
    width = max(_WIDTH if ratio >= 1 else round(_WIDTH * ratio), columns)
    height = max(round(width / ratio), rows)
    is_small = image.width * image.height < width * height
    how = Image.Resampling.NEAREST if is_small else Image.Resampling.BOX
    return np.asarray(image.resize((width, height), how))


def _title(example: _Example, view: View) -> str:
    record = example.record
    words = " ".join(record.question.replace("<image>", " ").split())
    name = record.id or "record"
    which = [f"image {view.image + 1}"] if len(record.images) > 1 else []
    which += [view.name] if view.name else []
    text = ", ".join([name, *which]) + f": {words}"
    return _drawn(textwrap.shorten(text, _TITLE, placeholder=" ..."))


def _drawn(text: str) -> str:
    """A text that matplotlib draws as it is: dollars would be read as formulas."""
    return text.replace("$", r"\$")


def _plain(drawn: str) -> str:
    """What `_drawn` was made of."""
    return drawn.replace(r"\$", "$")


def _words(overlays: Sequence[Overlay]) -> str:
    """Where teacher and student look most, for readers who do not see it."""
    parts = []
    for overlay in overlays:
        spots = [
            "row {} column {}".format(*(int(i) + 1 for i in np.unravel_index(m.argmax(), m.shape)))
            for m in (overlay.teacher, overlay.student)
        ]
        rows, columns = overlay.teacher.shape
        parts.append(
            f"{_plain(overlay.title)} (of {rows} x {columns} patches most at {spots[0]} by the "
            f"teacher, {spots[1]} by the student)"
        )
    return "; ".join(parts) + "."


def _layers(spec: LayerSpec | None) -> str:
    return ", ".join(map(str, spec)) if isinstance(spec, tuple) else str(spec)


def _line(error: BaseException) -> str:
    """An error as the middle of a sentence."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, OSError | ValueError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    return text.rstrip(".: ")
