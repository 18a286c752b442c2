"""From contrasts to a signal for each capability, with its reason and how sure it is.

The rule is ours. A layer whose maps are alike for a capability's records, and unlike those of other
capabilities, holds a pattern of that capability, which a student can be taught; `contrast` at equal
wording says how much. The paper's layers are kept unless another candidate has a contrast that is
above 0, and larger by more than chance with all candidates counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from drivekd.pairing import match_layer_groups, resolve_layers
from drivekd.study.prestudy.measures import REGIONS
from drivekd.study.prestudy.resampling import (
    MIN_PICTURES,
    SIGNIFICANT,
    Array,
    Comparison,
    Estimate,
    compare,
)
from drivekd.study.prestudy.result import Suggestion
from drivekd.study.prestudy.wording import MAX_GAP
from drivekd.study.verify import PAPER_SIGNALS

CLEAR, WEAK, NOISE = "clear", "weak", "within noise"
SMALL, UNKNOWN = "too small to matter", "not measurable"
MATERIAL = 0.05  # of contrast, and of cosine between student and teacher
# What wording does to maps is no straight line, least of all in the first layer. Of 60 untrained
# teachers of the demo's size 57 stay below this, and none is called clear
# (benchmarks/untrained_contrast.py).
UNTRAINED = 0.32
MANY_PICTURES = 30  # with fewer, nothing is called clear
SINKS, LITTLE = 0.25, 0.02  # shares worth a word

DEFAULTS = {signal.name: signal for signal in PAPER_SIGNALS}


@dataclass(frozen=True)
class Candidate:
    """Layers of a teacher and a region that could be distilled."""

    spec: str | int
    layers: tuple[int, ...]
    region: str

    def __str__(self) -> str:
        return f"{layer_words(self.spec)}, {self.region}"


@dataclass(frozen=True)
class Measured:
    """What a suggestion for one capability is made of.

    Attributes:
        contrast: By region, (L,) of the teacher's layers, at equal wording.
        pictures: How many different pictures the records have.
        records: How many records.
        words_within: Mean cosine of the words of two of the records.
        words_across: Of one of them and one of another capability.
        words_gap: The difference in standard deviations (`wording_gap`).
        vision_mass: (L,) mean share of attention that falls on vision tokens.
        sink_share: (L,) mean share of that which falls on the few shared tokens.
        sink_floor: What that is of even attention.
        alignment: By region, (L_s, L_t); empty without a student.
        num_student_layers: 0 where it is not known.
    """

    contrast: Mapping[str, Estimate]
    pictures: int
    records: int
    words_within: float
    words_across: float
    words_gap: float
    vision_mass: Array
    sink_share: Array
    sink_floor: float
    alignment: Mapping[str, Estimate]
    num_student_layers: int


def layer_words(spec: str | int) -> str:
    """Layers as a recipe names them, in a sentence."""
    if isinstance(spec, str) and ".." in spec:
        return f"layers {spec}"
    return f"layer {spec}" if isinstance(spec, int) else f"the {spec} layer"


def candidates(capability: str, num_layers: int) -> list[Candidate]:
    """The paper's choice first, then what it is compared with.

    For one layer: every layer, in both regions. For a range of layers: the range and its thirds
    (halves below six layers, nothing else below four), in both regions.

    Raises:
        ValueError: The teacher does not have the paper's layers.
    """
    signal = DEFAULTS[capability]
    assert isinstance(signal.teacher_layers, str) and signal.region is not None
    spec, own = signal.teacher_layers, signal.region
    layers = tuple(resolve_layers(spec, num_layers))
    others: list[tuple[str | int, tuple[int, ...]]] = [(spec, layers)]
    if ".." in spec:
        pieces = min(3, len(layers) // 2)
        if pieces > 1:
            parts = [tuple(map(int, part)) for part in np.array_split(layers, pieces)]
            others += [(f"{part[0]}..{part[-1]}", part) for part in parts]
    else:
        others += [(_name(i, num_layers), (i,)) for i in range(num_layers) if (i,) != layers]
    regions = (own, *(region for region in REGIONS if region != own))
    return [Candidate(spec, part, region) for region in regions for spec, part in others]


def suggest(capability: str, num_layers: int, measured: Measured) -> Suggestion:
    """The signal for one capability.

    Args:
        capability: One that the paper has a signal for.
        num_layers: L of the teacher.
        measured: What was measured.

    Returns:
        The paper's layers and region unless the evidence for another candidate is clear: a contrast
        of at least UNTRAINED, larger by as much, both with 95 % intervals above 0, p up to 0.01
        with all candidates counted, and MANY_PICTURES pictures. With p up to 0.05, fewer pictures,
        or MATERIAL instead of UNTRAINED it is weak: said, not suggested.
    """
    choices = candidates(capability, num_layers)
    contrast = _of_candidates(choices, measured.contrast)
    low, high = contrast.interval()
    default, reasons = choices[0], []
    if not np.isfinite(contrast.value[0]):
        reasons.append(
            f"Not measurable: {measured.records} records of {measured.pictures} pictures, and "
            "contrast needs different pictures, and other capabilities to compare with. The "
            "paper's layers stay."
        )
        return _suggestion(capability, default, UNKNOWN, None, measured, num_layers, reasons)
    reasons.append(
        f"The paper's choice ({default}) has, at equal wording, a contrast of "
        f"{_with_interval(contrast.value[0], low[0], high[0])} over {measured.records} records of "
        f"{measured.pictures} pictures."
    )
    if low[0] <= 0:
        reasons.append("That is no more than chance gives: it need not be a pattern at all.")
    elif contrast.value[0] < UNTRAINED:
        reasons.append("Untrained models can show as much.")
    if measured.words_gap > MAX_GAP:
        reasons.append(
            "But its questions are worded so much alike, and so unlike the others "
            f"(cosine of words {measured.words_within:.2f} among them, {measured.words_across:.2f} "
            "to others), that no pattern can be told from wording. The paper's layers stay."
        )
        return _suggestion(capability, default, UNKNOWN, None, measured, num_layers, reasons)
    found = compare(contrast, 0)
    if found is None:
        why = (
            f"{MIN_PICTURES} different pictures are needed to judge differences"
            if measured.pictures < MIN_PICTURES
            else "no candidate differs"
        )
        reasons.append(f"No comparison: {why}. The paper's layers stay.")
        return _suggestion(capability, default, UNKNOWN, None, measured, num_layers, reasons)
    best = choices[found.index]
    evidence = judge(found, measured.pictures, clear_from=UNTRAINED)
    is_pattern = low[found.index] > 0 and contrast.value[found.index] >= MATERIAL
    if evidence in (CLEAR, WEAK) and not is_pattern:
        evidence = SMALL
    if evidence == CLEAR and contrast.value[found.index] < UNTRAINED:
        evidence = WEAK
    reasons.append(
        f"The strongest of {found.tested} others ({best}) has "
        f"{contrast.value[found.index]:.2f}, {_with_interval(found.gain, found.low, found.high)} "
        f"more, p = {found.p:.2g} with all of them counted: {evidence}."
    )
    if evidence == WEAK:
        reasons.append("The paper's layers stay; the others are worth a training of their own.")
    elif evidence != CLEAR:
        reasons.append("The paper's layers stay.")
    chosen = best if evidence == CLEAR else default
    return _suggestion(capability, chosen, evidence, found, measured, num_layers, reasons)


def judge(found: Comparison, pictures: int, *, clear_from: float) -> str:
    """How strong the evidence of a comparison is, in one of a few words.

    Args:
        found: The comparison.
        pictures: How many different pictures it is of.
        clear_from: The gain below which nothing is clear.
    """
    if found.p > SIGNIFICANT or found.low <= 0:
        return NOISE
    if found.gain < MATERIAL:
        return SMALL
    is_clear = found.p <= 0.01 and pictures >= MANY_PICTURES and found.gain >= clear_from
    return CLEAR if is_clear else WEAK


def _of_candidates(choices: list[Candidate], by_layer: Mapping[str, Estimate]) -> Estimate:
    """(C,) mean over each candidate's layers."""
    parts = [(by_layer[each.region], list(each.layers)) for each in choices]
    return Estimate(
        np.array([part.value[layers].mean() for part, layers in parts]),
        np.stack([part.draws[:, layers].mean(1) for part, layers in parts], axis=1),
    )


def _suggestion(
    capability: str,
    chosen: Candidate,
    evidence: str,
    found: Comparison | None,
    measured: Measured,
    num_layers: int,
    reasons: list[str],
) -> Suggestion:
    student, said = _student_layers(chosen, measured, num_layers)
    layers = list(chosen.layers)
    mass = float(np.nanmean(measured.vision_mass[layers]))
    sinks = float(np.nanmean(measured.sink_share[layers]))
    if chosen.region == "text_to_vision" and mass < LITTLE:
        said.append(f"Only {mass:.1%} of the text's attention there falls on vision tokens.")
    if chosen.region == "text_to_vision" and sinks > max(SINKS, 3 * measured.sink_floor):
        said.append(
            f"{sinks:.0%} of the attention to vision falls on the same few tokens in every row: "
            "mse matches mostly these; compare with loss: cosine."
        )
    return Suggestion(
        capability,
        chosen.spec,
        student,
        chosen.region,
        chosen == candidates(capability, num_layers)[0],
        evidence,
        float("nan") if found is None else found.gain,
        float("nan") if found is None else found.p,
        (*reasons, *said),
    )


def _student_layers(
    chosen: Candidate, measured: Measured, num_layers: int
) -> tuple[str | int, list[str]]:
    """The student's layers for these of the teacher, and why."""
    depth = measured.num_student_layers
    start = _matching(chosen, num_layers, depth)
    if chosen.region not in measured.alignment:
        if isinstance(start, str) and ".." not in start:
            return start, []
        return start, [
            "The student's layers are those at the same depth"
            + ("." if depth else ", counted from the nearer end: its own is not known here.")
        ]
    alignment = measured.alignment[chosen.region]
    if len(chosen.layers) > 1:
        own = resolve_layers(start, depth)
        groups = match_layer_groups(len(own), len(chosen.layers))
        cosines = [
            alignment.value[layer, [chosen.layers[t] for t in group]]
            for layer, group in zip(own, groups, strict=True)
        ]
        mean = float(np.nanmean(np.concatenate(cosines)))
        return start, [
            f"The student's maps have a mean cosine of {mean:.2f} to those that their layers are "
            "paired with."
        ]
    (teacher,) = chosen.layers
    (default,) = resolve_layers(start, depth)
    column = Estimate(alignment.value[:, teacher], alignment.draws[:, :, teacher])
    sentence = (
        f"The student's {_ordinal(start)} has a cosine of {column.value[default]:.2f} to the "
        "teacher's"
    )
    found = compare(column, default)
    if found is None:
        return start, [f"{sentence}; whether another is closer cannot be said."]
    evidence = judge(found, measured.pictures, clear_from=MATERIAL)
    other = (
        f"{sentence}, its layer {found.index} {column.value[found.index]:.2f} "
        f"(p = {found.p:.2g} of {found.tested} others: {evidence})"
    )
    if evidence == CLEAR:
        return _name(found.index, depth), [f"{other}, which is taken."]
    return start, [f"{other}: the layer at the same depth stays."]


def _matching(chosen: Candidate, num_layers: int, depth: int) -> str | int:
    """Layers at the same depth of a student, which may be unknown (0)."""
    spec = chosen.spec
    if isinstance(spec, str) and (".." not in spec or spec == DEFAULTS["reasoning"].student_layers):
        return spec
    ends = [chosen.layers[0], chosen.layers[-1]]
    if depth:
        placed = [round(end * (depth - 1) / (num_layers - 1)) for end in ends]
        first, last = placed
        return _name(first, depth) if first == last else f"{first}..{last}"
    first, last = (end if 2 * end < num_layers else end - num_layers for end in ends)
    return first if isinstance(spec, int) else f"{first}..{last}"


def _name(layer: int, num_layers: int) -> str | int:
    """A layer as recipes of any depth would name it, where they can."""
    named = {num_layers - 1: "last", num_layers - 2: "penultimate", 0: "first"}
    return named.get(layer, layer)


def _ordinal(spec: str | int) -> str:
    return f"layer {spec}" if isinstance(spec, int) else f"{spec} layer"


def _with_interval(value: float, low: float, high: float) -> str:
    if not np.isfinite(low):
        return f"{value:.2f}"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
