"""The pre-study of one teacher."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from drivekd.capture.model import decoder_depth, decoder_layers, find_decoder
from drivekd.errors import DataError
from drivekd.study.prestudy.measures import REGIONS
from drivekd.study.prestudy.observe import Margin, Observation, observe, observe_margins
from drivekd.study.prestudy.resampling import (
    Array,
    Estimate,
    Members,
    Resampling,
    contrast,
    cosines,
    dispersion,
)
from drivekd.study.prestudy.result import Capability, Curve, Margins, Prestudy, Similarity
from drivekd.study.prestudy.suggest import DEFAULTS, Measured, suggest
from drivekd.study.prestudy.wording import at_equal_wording, wording_gap, wording_similarity
from drivekd.train.models import check_same_vision

_FEATURES = {"text_to_vision": "vision", "full": "pooled", "hidden": "hidden"}


@dataclass(frozen=True)
class _Kind:
    """One kind of features of all records."""

    features: Array  # (n, L, F)
    cosines: Array  # (L, n, n)
    beyond_words: Array  # (L, n, n), those at equal wording


def prestudy(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    student: nn.Module | None = None,
    general: Iterable[Mapping[str, Any]] = (),
    capabilities: Sequence[str] = tuple(DEFAULTS),
    names: tuple[str, str] = ("teacher", "student"),
    num_student_layers: int = 0,
    tau: float = 1.0,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Prestudy:
    """Which layers and regions of a teacher each capability could be distilled from.

    The four measures that the Drive-KD paper names, and the share of attention sinks. The paper
    gives no public formulas: these definitions are ours.

    (a) *Alignment*: by layer the cosine between what goes in and what comes out, and between the
    mean hidden states of vision and text; between every layer of a student and every layer of the
    teacher the cosine of their head-mean maps, row by row, for both regions.
    (b) *Similarity*: cosines between the features of two records of a capability, and of one and a
    record of another capability; `contrast` sets them against each other, as they are and at equal
    wording (`at_equal_wording`), since questions of a capability are worded alike. Features are, by
    layer, the distribution of attention over vision tokens, the pooled whole map (`MapFeatures`),
    and the mean hidden state of the text behind the picture.
    (c) *Dispersion*: mean 1 - cosine of those to their mean over a capability's records.
    (d) *Margin* along the answer (`generalized_margin`), of driving and of general records.

    Bounds are those of 95 % of draws of pictures with replacement; only records of different
    pictures are compared.

    Args:
        teacher: A whole model with its head, in eval mode.
        batches: Batches of `drivekd.data.Collator`, each optionally with `pictures`: for each
            record a value that is equal where they show the same. Every record needs a picture and
            an answer.
        student: A model that sees the same tokens; None for none.
        general: Batches of other records, of which only the answers' margins are measured.
        capabilities: Question types to study; records of others are left out.
        names: What teacher and student are called.
        num_student_layers: Depth of a student that is not given; 0 where it is not known.
        tau: Temperature of margins.
        resamples: Number of draws.
        seed: Of the draws.
        progress: Called with what is looked at and how many records are done.

    Returns:
        All numbers, and a suggestion for each capability that the paper has a signal for.

    Raises:
        DataError: A capability has no record, or a record no picture or no answer.
        TokenMismatchError: The student makes other tokens of an image.
        CaptureError: A model cannot be captured.
        ValueError: The teacher has one layer or not all of them, batches are packed, or `tau` or
            `resamples` is out of range.

    Note:
        One forward of each model a record. Queries and keys of all layers are held while a batch is
        looked at, hidden states of one layer, 128 MiB of rows of head-mean maps and a few times
        that while they are worked on; of logits those of the answer where the model can give them
        alone. What is kept of a record is a few hundred numbers and a hidden state a layer.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, wanted at least 1")
    decoder = find_decoder(teacher)
    num_layers = decoder_depth(decoder)
    if num_layers < 2 or len(decoder_layers(decoder)) != num_layers:
        raise ValueError(
            f"the teacher holds {len(decoder_layers(decoder))} of {num_layers} decoder layers; at "
            "least two, and all of them, are needed"
        )
    if student is not None:
        check_same_vision(names[0], teacher, student)
        num_student_layers = decoder_depth(find_decoder(student))
    seen: list[Observation] = []
    for batch in batches:
        seen += observe(teacher, batch, student=student, tau=tau)
        if progress is not None:
            progress("records", len(seen))
    others: list[Margin] = []
    for batch in general:
        others += observe_margins(teacher, batch, tau=tau)
        if progress is not None:
            progress("general records", len(others))
    seen = [each for each in seen if each.capability in capabilities]
    found = {each.capability for each in seen}
    for name in capabilities:
        if name not in found:
            raise DataError(
                f"no record of question type {name!r}; there are "
                f"{', '.join(sorted(found)) or 'none of those asked for'}"
            )
    draws = Resampling([each.margin.picture for each in seen], resamples=resamples, seed=seed)
    wording = wording_similarity([each.words for each in seen])
    kinds = {name: _kind(seen, attribute, wording) for name, attribute in _FEATURES.items()}
    studied, suggestions = [], []
    for name in capabilities:
        members = np.array([each.capability == name for each in seen])
        capability, contrasts = _capability(name, seen, kinds, wording, draws, members)
        studied.append(capability)
        if name in DEFAULTS:
            measured = _measured(capability, contrasts, seen, draws, members, num_student_layers)
            suggestions.append(suggest(name, num_layers, measured))
    return Prestudy(
        teacher=names[0],
        student=names[1] if student is not None else "",
        num_layers=num_layers,
        num_student_layers=num_student_layers,
        capabilities=tuple(studied),
        general=_general(others, resamples=resamples, seed=seed),
        suggestions=tuple(suggestions),
        settings={
            "tau": tau,
            "resamples": resamples,
            "seed": seed,
            "dtype": str(next(teacher.parameters()).dtype).removeprefix("torch."),
            "device": str(next(teacher.parameters()).device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _kind(seen: Sequence[Observation], attribute: str, wording: Array) -> _Kind:
    features = np.stack([getattr(each, attribute) for each in seen]).astype(np.float64)
    similarity = cosines(features)
    labels = [each.capability for each in seen]
    return _Kind(features, similarity, at_equal_wording(similarity, wording, labels))


def _capability(
    name: str,
    seen: Sequence[Observation],
    kinds: Mapping[str, _Kind],
    wording: Array,
    draws: Resampling,
    members: Members,
) -> tuple[Capability, dict[str, Estimate]]:
    """What was measured, and its contrasts at equal wording by kind."""
    similarity, contrasts = {}, {}
    for kind, data in kinds.items():
        within, across = (draws.similarity(data.cosines, members, o) for o in (members, ~members))
        contrasts[kind] = contrast(
            *(draws.similarity(data.beyond_words, members, o) for o in (members, ~members))
        )
        spread = draws.mean(dispersion(data.features, members), members)
        parts = (within, across, contrast(within, across), contrasts[kind], spread)
        similarity[kind] = Similarity(*(_curve(each) for each in parts))

    def mean(attribute: str) -> Curve:
        return _curve(draws.mean(np.stack([getattr(each, attribute) for each in seen]), members))

    own = [each for each, is_own in zip(seen, members, strict=True) if is_own]
    words = wording_gap(wording, members)
    capability = Capability(
        name=name,
        records=len(own),
        pictures=draws.pictures(members),
        tokens=float(statistics.median(each.num_tokens for each in own)),
        words_within=words[0],
        words_across=words[1],
        words_gap=words[2],
        adjacent=mean("adjacent"),
        vision_text=mean("vision_text"),
        vision_mass=mean("vision_mass"),
        sink_share=mean("sink_share"),
        row_share=mean("row_share"),
        sink_floor=float(np.mean([each.sink_floor for each in own])),
        similarity=similarity,
        alignment={
            region: tuple(tuple(map(float, row)) for row in estimate.value)
            for region, estimate in _alignment(seen, draws, members).items()
        },
        margins=_margins([each.margin for each in seen], draws, members),
    )
    return capability, contrasts


def _alignment(
    seen: Sequence[Observation], draws: Resampling, members: Members
) -> dict[str, Estimate]:
    if not seen[0].alignment:
        return {}
    return {
        region: draws.mean(np.stack([each.alignment[region] for each in seen]), members)
        for region in REGIONS
    }


def _measured(
    capability: Capability,
    contrasts: Mapping[str, Estimate],
    seen: Sequence[Observation],
    draws: Resampling,
    members: Members,
    num_student_layers: int,
) -> Measured:
    return Measured(
        contrast=contrasts,
        pictures=capability.pictures,
        records=capability.records,
        words_within=capability.words_within,
        words_across=capability.words_across,
        words_gap=capability.words_gap,
        vision_mass=np.array(capability.vision_mass.value),
        sink_share=np.array(capability.sink_share.value),
        sink_floor=capability.sink_floor,
        alignment=_alignment(seen, draws, members),
        num_student_layers=num_student_layers,
    )


def _general(margins: Sequence[Margin], *, resamples: int, seed: int) -> dict[str, Margins]:
    if not margins:
        return {}
    draws = Resampling([each.picture for each in margins], resamples=resamples, seed=seed)
    return {"general": _margins(margins, draws, np.ones(len(margins), dtype=np.bool_))}


def _margins(margins: Sequence[Margin], draws: Resampling, members: Members) -> Margins:
    own = [each for each, is_own in zip(margins, members, strict=True) if is_own]
    return Margins(
        records=len(own),
        pictures=draws.pictures(members),
        answer_tokens=float(statistics.median(each.tokens for each in own)),
        along=_curve(draws.mean(np.stack([each.along for each in margins]), members)),
        mean=_curve(draws.mean(np.array([[each.mean] for each in margins]), members)),
    )


def _curve(estimate: Estimate) -> Curve:
    bounds = (estimate.value, *estimate.interval())
    return Curve(*(tuple(map(float, each)) for each in bounds))
