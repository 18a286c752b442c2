"""What the demo runs: sizes, the three signals, and the arms that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHARE, LOGIT_SHARE = 0.2, 0.5
LONG = 10 / 3  # times the steps: 2,000
CAPABILITIES = ("perception", "reasoning", "planning")


@dataclass(frozen=True)
class World:
    """The simulated data: frames per split, their seed, and the students' share of the first."""

    train_frames: int = 3000
    val_frames: int = 300
    test_frames: int = 900
    seed: int = 0
    student_fraction: float = 0.15
    val_questions: int = 600


@dataclass(frozen=True)
class Training:
    """Optimisation of a student: the same for every arm."""

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    max_grad_norm: float = 1.0
    evaluate_every: int = 100


@dataclass(frozen=True)
class ArmSpec:
    """One way of training the student.

    Attributes:
        name: identifier, as in the report.
        label: how tables and plots call it.
        description: what is different about it, in a sentence.
        signals: which capabilities' attention maps are distilled.
        projection: the projector's method; "none" sums.
        teachers: "capability" (the shipped ones), "random" (untrained weights), "blank" (the
            shipped ones looking at an empty road), or "" for no teacher.
        logits: distil the teachers' next-token distributions instead of their attention maps.
        share: what share of cross-entropy's gradient norm each signal is held at.
        steps_factor: training length against the other arms.
    """

    name: str
    label: str
    description: str
    signals: tuple[str, ...] = ()
    projection: Literal["agp", "none"] = "none"
    teachers: Literal["capability", "random", "blank", ""] = ""
    logits: bool = False
    share: float = 0.0
    steps_factor: float = 1.0


CE = ArmSpec("ce", "CE only", "cross-entropy on the answers, no teacher")
MULTI_AGP = ArmSpec(
    "multi+agp",
    "three teachers, AGP",
    "attention maps of three capability teachers, joined by asymmetric gradient projection",
    CAPABILITIES,
    "agp",
    "capability",
    share=SHARE,
)
DEFAULT_ARMS = (CE, MULTI_AGP)
FULL_ARMS = (
    CE,
    MULTI_AGP,
    ArmSpec(
        "multi",
        "three teachers, plain sum",
        "the same signals and shares, gradients summed without projection",
        CAPABILITIES,
        "none",
        "capability",
        share=SHARE,
    ),
    *(
        ArmSpec(
            name,
            f"{name} teacher alone",
            f"only the {name} teacher's attention maps",
            (name,),
            "none",
            "capability",
            share=SHARE,
        )
        for name in CAPABILITIES
    ),
    ArmSpec(
        "ce-long",
        "CE, 3.3x the steps",
        "cross-entropy alone, 3.3 times as long",
        steps_factor=LONG,
    ),
    ArmSpec(
        "multi+agp-long",
        "three teachers, AGP, 3.3x the steps",
        "multi+agp, 3.3 times as long",
        CAPABILITIES,
        "agp",
        "capability",
        share=SHARE,
        steps_factor=LONG,
    ),
    ArmSpec(
        "logit-kl",
        "three teachers, logit KL",
        "the same teachers' next-token distributions at the answers, no attention maps",
        CAPABILITIES,
        "none",
        "capability",
        logits=True,
        share=LOGIT_SHARE,
    ),
    ArmSpec(
        "random-teacher",
        "control: untrained teachers",
        "multi+agp with teachers of random weights: what regularising alone gives",
        CAPABILITIES,
        "agp",
        "random",
        share=SHARE,
    ),
    ArmSpec(
        "blank-teacher",
        "control: teachers see an empty road",
        "multi+agp with teachers that see an empty road: what a fixed habit of looking gives",
        CAPABILITIES,
        "agp",
        "blank",
        share=SHARE,
    ),
)
COMPARISONS = (
    ("multi+agp", "multi"),
    ("multi+agp", "ce-long"),
    ("multi+agp-long", "ce-long"),
    ("multi+agp", "logit-kl"),
    ("multi+agp", "random-teacher"),
    ("multi+agp", "blank-teacher"),
)

SMOKE_STEPS = 20
SMOKE_WORLD = World(train_frames=120, val_frames=20, test_frames=60, val_questions=60)
