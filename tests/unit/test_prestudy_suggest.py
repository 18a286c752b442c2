"""From numbers to signals: the paper's layers stay unless something else is clearly better."""

import math

import numpy as np
import pytest
import yaml

from drivekd.study.prestudy.resampling import Estimate
from drivekd.study.prestudy.result import Curve, Document, Margins, Prestudy
from drivekd.study.prestudy.suggest import (
    CLEAR,
    NOISE,
    SMALL,
    UNKNOWN,
    UNTRAINED,
    WEAK,
    Measured,
    candidates,
    suggest,
)

LAYERS = 12


def estimate(values, *, spread=0.02, draws=1000, seed=0):
    """A statistic with normal draws, all cells independent."""
    values = np.asarray(values, dtype=float)
    noise = np.random.default_rng(seed).standard_normal((draws, *values.shape))
    return Estimate(values, values + spread * noise)


def measured(text_to_vision=0.2, full=0.2, *, spread=0.02, **settings):
    """Flat contrasts, unless values by layer are given."""
    flat = [
        np.full(LAYERS, value) if np.ndim(value) == 0 else value for value in (text_to_vision, full)
    ]
    contrast = {
        region: estimate(values, spread=spread, seed=seed)
        for seed, (region, values) in enumerate(
            zip(("text_to_vision", "full"), flat, strict=True), 1
        )
    }
    return Measured(
        **{
            "contrast": contrast,
            "pictures": 40,
            "records": 48,
            "words_within": 0.6,
            "words_across": 0.4,
            "words_gap": 0.8,
            "vision_mass": np.full(LAYERS, 0.3),
            "sink_share": np.full(LAYERS, 0.05),
            "sink_floor": 1 / 64,
            "alignment": {},
            "num_student_layers": 0,
            **settings,
        }
    )


def peak(layer, height=0.6, base=0.2):
    values = np.full(LAYERS, base)
    values[layer] = height
    return values


@pytest.mark.parametrize(
    ("capability", "spec", "region"),
    [
        ("perception", "first", "text_to_vision"),
        ("reasoning", "0..-2", "full"),
        ("planning", "penultimate", "text_to_vision"),
    ],
)
def test_differences_within_noise_keep_the_papers_choice_and_say_so(capability, spec, region):
    found = suggest(capability, LAYERS, measured(spread=0.2))
    assert (found.teacher_layers, found.student_layers, found.region) == (spec, spec, region)
    assert found.is_default and found.evidence == NOISE and found.p > 0.05
    text = " ".join(found.reasons)
    assert "0.20 [" in text and "within noise" in text and "The paper's layers stay" in text


@pytest.mark.parametrize("capability", ["perception", "planning"])
def test_a_layer_that_is_clearly_better_is_suggested_with_its_numbers(capability):
    found = suggest(capability, LAYERS, measured(text_to_vision=peak(5)))
    assert (found.teacher_layers, found.region, found.evidence) == (5, "text_to_vision", CLEAR)
    assert not found.is_default and found.gain == pytest.approx(0.4) and found.p <= 0.01
    assert found.student_layers == 5  # counted from the nearer end
    text = " ".join(found.reasons)
    assert "layer 5, text_to_vision" in text and "0.60" in text and "of 23 others" in text


def test_another_region_can_be_suggested():
    found = suggest("perception", LAYERS, measured(full=peak(0)))
    assert (found.teacher_layers, found.student_layers, found.region) == ("first", "first", "full")
    assert not found.is_default


def test_a_range_is_compared_with_ranges():
    values = np.where(np.arange(LAYERS) >= 8, 0.7, 0.1)
    found = suggest("reasoning", LAYERS, measured(full=values))
    assert (found.teacher_layers, found.evidence) == ("8..10", CLEAR)
    assert found.student_layers == "-4..-2"  # nothing is known of the student
    known = suggest("reasoning", LAYERS, measured(full=values, num_student_layers=6))
    assert known.student_layers == "4..5"
    flat = suggest("reasoning", LAYERS, measured(full=peak(3, 0.5)))
    assert flat.teacher_layers in ("0..-2", "0..3")  # never a single layer
    specs = [each.spec for each in candidates("reasoning", LAYERS)]
    assert specs == ["0..-2", "0..3", "4..7", "8..10"] * 2
    assert [str(each) for each in candidates("reasoning", 3)] == [
        "layers 0..-2, full",
        "layers 0..-2, text_to_vision",
    ]


def test_few_pictures_are_weak_evidence_at_best():
    found = suggest("perception", LAYERS, measured(text_to_vision=peak(5), pictures=12))
    assert found.evidence == WEAK and found.is_default and found.teacher_layers == "first"
    text = " ".join(found.reasons)
    assert "layer 5, text_to_vision" in text and "worth a training of their own" in text


def test_what_is_sure_and_small_does_not_matter():
    better = measured(text_to_vision=peak(5, 0.23), spread=0.001)
    found = suggest("perception", LAYERS, better)
    assert found.is_default and found.evidence == SMALL and found.p <= 0.01


@pytest.mark.parametrize(("height", "base"), [(UNTRAINED - 0.01, 0.0), (0.6, 0.45)])
def test_what_untrained_models_show_too_is_weak_evidence(height, base):
    """A contrast, or a gain, that wording alone may leave is said and not suggested."""
    found = suggest("perception", LAYERS, measured(peak(5, height, base), 0.0, spread=0.005))
    assert found.evidence == WEAK and found.is_default and found.p <= 0.01


def test_what_is_better_than_a_bad_default_and_no_pattern_itself_does_not_matter():
    found = suggest("perception", LAYERS, measured(peak(0, -0.4, base=0.0), 0.0))
    assert found.is_default and found.evidence == SMALL
    assert "need not be a pattern" in " ".join(found.reasons)


def test_what_cannot_be_measured_is_not_judged():
    nothing = {
        region: Estimate(np.full(LAYERS, np.nan), np.empty((0, LAYERS)))
        for region in ("text_to_vision", "full")
    }
    found = suggest("planning", LAYERS, measured(contrast=nothing, pictures=1))
    assert found.evidence == UNKNOWN and found.is_default and math.isnan(found.p)
    assert "Not measurable" in found.reasons[0]
    few = {r: Estimate(e.value, e.draws[:0]) for r, e in measured(peak(5)).contrast.items()}
    found = suggest("planning", LAYERS, measured(contrast=few, pictures=5))
    assert found.evidence == UNKNOWN and found.is_default
    assert "8 different pictures are needed" in " ".join(found.reasons)


def test_wording_that_explains_everything_keeps_the_papers_choice():
    """The demo's planning has one question: in an untrained model its first layer looks special."""
    gap = {"words_within": 0.8, "words_across": 0.5, "words_gap": 3.0}
    found = suggest("planning", LAYERS, measured(full=peak(0, 0.9), **gap))
    assert found.evidence == UNKNOWN and found.is_default
    assert "cosine of words 0.80 among them, 0.50 to others" in " ".join(found.reasons)


def test_a_teacher_without_the_papers_layers_is_refused():
    with pytest.raises(ValueError, match="layer -2 does not exist"):
        candidates("planning", 1)


def test_sinks_and_little_attention_to_vision_are_said():
    shares = {"sink_share": np.full(LAYERS, 0.7), "vision_mass": np.full(LAYERS, 0.004)}
    text = " ".join(suggest("perception", LAYERS, measured(**shares)).reasons)
    assert "Only 0.4% of the text's attention" in text
    assert "70% of the attention to vision falls on the same few tokens" in text
    assert "loss: cosine" in text
    text = " ".join(suggest("reasoning", LAYERS, measured(**shares)).reasons)
    assert "loss: cosine" not in text  # its region is the whole map
    few = measured(sink_share=np.full(LAYERS, 0.3), sink_floor=0.25)  # of four vision tokens one
    assert "loss: cosine" not in " ".join(suggest("perception", LAYERS, few).reasons)


def test_the_student_layer_that_is_closest_is_taken_if_clearly_closer():
    cosine = np.full((6, LAYERS), 0.5)
    cosine[4, 5] = 0.9
    pairs = {region: estimate(cosine, spread=0.01) for region in ("text_to_vision", "full")}
    student = {"alignment": pairs, "num_student_layers": 6}
    found = suggest("perception", LAYERS, measured(peak(5), **student))
    assert (found.teacher_layers, found.student_layers) == (5, "penultimate")
    assert "its layer 4 0.90" in " ".join(found.reasons)
    default = suggest("perception", LAYERS, measured(spread=0.2, **student))
    assert (default.teacher_layers, default.student_layers) == ("first", "first")
    assert "the layer at the same depth stays" in " ".join(default.reasons)
    noise = {region: estimate(cosine, spread=0.5) for region in pairs}
    kept = suggest("perception", LAYERS, measured(peak(5), alignment=noise, num_student_layers=6))
    assert kept.student_layers == 2  # at the same depth
    ranged = suggest("reasoning", LAYERS, measured(spread=0.2, **student))
    assert ranged.student_layers == "0..-2"
    assert "mean cosine of 0.5" in " ".join(ranged.reasons)


def document(suggestion):
    curve = Curve((1.0, float("nan")), (0.5, float("nan")), (1.5, float("nan")))
    margins = Margins(3, 2, 4.0, curve, Curve((1.0,), (float("nan"),), (2.0,)))
    return Document(
        (Prestudy("t", "", LAYERS, 0, (), {"general": margins}, (suggestion,), {"tau": 1.0}),)
    )


def test_json_round_trip_with_what_is_not_known():
    nothing = {
        region: Estimate(np.full(LAYERS, np.nan), np.empty((0, LAYERS)))
        for region in ("text_to_vision", "full")
    }
    made = document(suggest("planning", LAYERS, measured(contrast=nothing)))
    text = made.to_json()
    again = Document.from_json(text)
    assert again.to_json() == text and "NaN" not in text
    assert again.studies[0].suggestions[0].reasons == made.studies[0].suggestions[0].reasons
    assert math.isnan(again.studies[0].general["general"].along.value[1])


def test_other_documents_are_refused():
    text = document(suggest("planning", LAYERS, measured())).to_json()
    with pytest.raises(ValueError, match="not a drivekd pre-study of format 1"):
        Document.from_json(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"studies\[0\].* unknown keys"):
        Document.from_json(text.replace('"num_layers"', '"depth"'))


def test_signals_are_yaml_with_reasons_as_comments():
    from drivekd.study.prestudy.report import signals_yaml

    made = document(suggest("perception", LAYERS, measured(text_to_vision=peak(5))))
    text = signals_yaml(made, {"perception": ("large", "path/to/large")})
    assert yaml.safe_load(text) == {
        "teachers": {"large": "path/to/large"},
        "distill": {
            "signals": [
                {
                    "name": "perception",
                    "teacher": "large",
                    "student_layers": 5,
                    "teacher_layers": 5,
                    "region": "text_to_vision",
                }
            ]
        },
    }
    comments = " ".join(line.strip().lstrip("# ") for line in text.splitlines() if "#" in line)
    assert "of 23 others (layer 5, text_to_vision) has 0.60" in comments
    assert max(map(len, text.splitlines())) <= 100
