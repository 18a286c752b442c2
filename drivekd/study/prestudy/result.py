"""A pre-study's outcome: plain data, and the JSON document that it is kept as."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from drivekd.study.schema import decode, finite

FORMAT = 1

KINDS = ("text_to_vision", "full", "hidden")


@dataclass(frozen=True)
class Curve:
    """A number for each layer (or stretch of an answer), with the central 95 % of its draws.

    Bounds are NaN, in JSON null, where there were too few pictures to say anything.
    """

    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Similarity:
    """How alike records are in one kind of features, by layer.

    Attributes:
        within: Mean cosine between two records of the capability.
        across: Mean cosine between one of them and one of another capability.
        contrast: `drivekd.study.prestudy.resampling.contrast` of the two.
        beyond_words: The same at equal wording (`drivekd.study.prestudy.wording`); suggestions
            follow it.
        dispersion: Mean 1 - cosine to the mean over the capability's records.
    """

    within: Curve
    across: Curve
    contrast: Curve
    beyond_words: Curve
    dispersion: Curve


@dataclass(frozen=True)
class Margins:
    """Generalized margins of answers.

    Attributes:
        records: How many.
        pictures: How many different pictures they have.
        answer_tokens: Median length of an answer.
        along: By stretch of the answer.
        mean: One value: over tokens of an answer, then over records.
    """

    records: int
    pictures: int
    answer_tokens: float
    along: Curve
    mean: Curve


@dataclass(frozen=True)
class Capability:
    """What was measured on the records of one question type.

    Attributes:
        name: The question type.
        records: How many.
        pictures: How many different pictures they have.
        tokens: Median length of a record.
        words_within: Mean cosine between the word counts of two records of the capability.
        words_across: The same of one of them and one of another capability.
        words_gap: The difference in standard deviations (`wording_gap`).
        adjacent: As in `drivekd.study.prestudy.observe.Observation`, like the next four.
        vision_text: Likewise.
        vision_mass: Likewise.
        sink_share: Likewise.
        row_share: Likewise.
        sink_floor: Likewise; mean over records.
        similarity: By kind: "text_to_vision", "full", "hidden".
        alignment: (L_s, L_t) mean over records, by region; empty without a student.
        margins: Of the answers.
    """

    name: str
    records: int
    pictures: int
    tokens: float
    words_within: float
    words_across: float
    words_gap: float
    adjacent: Curve
    vision_text: Curve
    vision_mass: Curve
    sink_share: Curve
    row_share: Curve
    sink_floor: float
    similarity: dict[str, Similarity]
    alignment: dict[str, tuple[tuple[float, ...], ...]]
    margins: Margins


@dataclass(frozen=True)
class Suggestion:
    """A signal for one capability, and how sure it is.

    Attributes:
        capability: Which.
        teacher_layers: As a recipe names layers.
        student_layers: Likewise.
        region: "text_to_vision" or "full".
        is_default: Whether teacher layers and region are the paper's.
        evidence: "clear", "weak", "within noise", "too small to matter" or "not measurable".
        gain: Contrast of the most clearly better candidate minus the default's; NaN without one.
        p: Of that gain, corrected for the number of candidates; NaN without one.
        reasons: Sentences with the numbers.
    """

    capability: str
    teacher_layers: str | int
    student_layers: str | int
    region: str
    is_default: bool
    evidence: str
    gain: float
    p: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Prestudy:
    """All that was measured of one teacher.

    Attributes:
        teacher: Its path, or what it was called.
        student: Likewise; empty without one.
        num_layers: L of the teacher.
        num_student_layers: L of the student; 0 where it is not known.
        capabilities: In the order asked for.
        general: Margins of general records, under "general", if there were any.
        suggestions: For capabilities that the paper has a signal for.
        settings: What else it was made with.
    """

    teacher: str
    student: str
    num_layers: int
    num_student_layers: int
    capabilities: tuple[Capability, ...]
    general: dict[str, Margins]
    suggestions: tuple[Suggestion, ...]
    settings: dict[str, str | int | float]


@dataclass(frozen=True)
class Document:
    """The pre-studies of one call, one for each teacher."""

    studies: tuple[Prestudy, ...]

    def to_json(self) -> str:
        """As JSON text; numbers that are not finite become null."""
        document = finite({"format": FORMAT, **asdict(self)})
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Document:
        """Read what `to_json` wrote.

        Raises:
            ValueError: Not JSON, another format, a missing or unknown key (with its place).
            TypeError: A value of the wrong kind (with its place).
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"prestudy: not a drivekd pre-study of format {FORMAT}")
        made: Document = decode(cls, document, "prestudy")
        return made
