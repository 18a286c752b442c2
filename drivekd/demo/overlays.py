"""Attention of the teachers and a student on frames of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from drivekd.capture import capture_attention
from drivekd.data import Record
from drivekd.data.collate import collate_features
from drivekd.demo.data import load_splits
from drivekd.demo.models import GRID, CachedEncoder
from drivekd.demo.settings import CAPABILITIES, World
from drivekd.demo.teachers import load_teacher, load_tokenizer
from drivekd.driving import Scene, render_scene
from drivekd.functional import attention_map
from drivekd.study.overlays import Overlay, plot_overlays
from drivekd.study.plots import Plot
from drivekd.tokens import TokenLayout

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration

_LAYER = {"perception": 0, "reasoning": -2, "planning": -2}
_ROWS = 3
_ZOOM = 4


def draw_overlays(data: Path, world: World, student_folder: Path, who: str) -> list[Plot]:
    """One figure a capability: where the teacher and the student look before they answer.

    The map is the head mean of the first layer for perception and of the penultimate one otherwise,
    in the row of the prompt's last token, over the vision tokens. `who` names the student.
    """
    from transformers import InternVLForConditionalGeneration

    student = InternVLForConditionalGeneration.from_pretrained(student_folder).eval()
    splits = load_splits(data, world)
    encoder = CachedEncoder(load_tokenizer(), splits.root)
    plots = []
    for name in CAPABILITIES:
        records = _examples(splits.test, name)
        teacher_maps = _maps(load_teacher(name), encoder, records, _LAYER[name])
        student_maps = _maps(student, encoder, records, _LAYER[name])
        overlays = [
            Overlay(
                image=render_scene(Scene.from_meta(record.meta), scale=_ZOOM),
                teacher=teacher,
                student=learnt,
                title=f"{record.question.splitlines()[-1]} -> {record.answer}",
            )
            for record, teacher, learnt in zip(records, teacher_maps, student_maps, strict=True)
        ]
        which = "first" if _LAYER[name] == 0 else "penultimate"
        title = f"Attention before answering: {name}"
        plots.append(
            Plot(
                name=f"overlay_{name}",
                title=title,
                caption=f"Head mean of the {which} layer, from the prompt's last token to the "
                f"picture: frame, {name} teacher, student {who}, student minus teacher. Test "
                "frames, the first of each kind of question.",
                alt=f"Attention of the {name} teacher and of {who} over {len(records)} "
                "test frames, patch by patch, and their difference.",
                png=plot_overlays(overlays, title=title),
            )
        )
    return plots


def _examples(records: Sequence[Record], capability: str) -> list[Record]:
    """The first record of each kind of question of a capability, with a busy frame."""
    chosen: dict[object, Record] = {}
    for record in records:
        vehicles = record.meta["vehicles"]
        busy = isinstance(vehicles, Sequence) and len(vehicles) >= 4
        if record.question_type == capability and busy:
            chosen.setdefault(record.meta["qid"], record)
    return list(chosen.values())[:_ROWS]


@torch.no_grad()
def _maps(
    model: InternVLForConditionalGeneration,
    encoder: CachedEncoder,
    records: Sequence[Record],
    layer: int,
) -> list[npt.NDArray[np.float32]]:
    """(rows, columns) attention over the picture for each record."""
    prompts = [encoder.encode_prompt(record) for record in records]
    batch = collate_features(prompts, pad_token_id=0)
    tokens = TokenLayout.from_batch(batch, model.config)
    with capture_attention(model, [layer], stop_after_last=True) as captured:
        model(**batch, use_cache=False)
    record = captured[layer]
    maps = attention_map(record.query, record.key, tokens, scale=record.scale)
    return [
        maps[i, len(prompt["input_ids"]) - 1][tokens.is_vision[i]].reshape(GRID).numpy()
        for i, prompt in enumerate(prompts)
    ]
