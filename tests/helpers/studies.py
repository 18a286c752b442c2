"""Made-up studies with the shape of real ones."""

import math

import numpy as np

from drivekd.study.schema import (
    Arm,
    Baseline,
    Comparison,
    CurvePoint,
    LossPoint,
    ProjectionPoint,
    Run,
    Signal,
    Study,
    Teacher,
)
from drivekd.study.statistics import Tally

SIZES = {
    "perception": {"count": 900, "nearest": 900, "ego lane": 929},
    "reasoning": {"lead": 556, "safe left": 550},
    "planning": {"action": 325, "speed": 325},
}
ARMS = {
    "ce": ("CE only", (0.76, 0.47, 0.35)),
    "ce-long": ("CE only, 2,000 steps", (0.79, 0.50, 0.34)),
    "cosine": ("+ attention cosine", (0.85, 0.55, 0.52)),
    "cosine+agp": ("+ attention cosine + AGP", (0.84, 0.54, 0.52)),
    "random": ("control: random-weights teacher", (0.77, 0.48, 0.36)),
    "blank": ("control: teacher sees a blank image", (0.805, 0.512, 0.349)),
}
MAJORITY = (0.364, 0.392, 0.240)


def tallies(levels, rng=None):
    """Tallies around one level a capability."""
    out = {}
    for (capability, kinds), level in zip(SIZES.items(), levels, strict=True):
        out[capability] = {}
        for kind, size in kinds.items():
            noise = 0.0 if rng is None else rng.normal(0, 0.012)
            out[capability][kind] = Tally(round(size * min(1.0, max(0.0, level + noise))), size)
    return out


def make_run(arm, seed, *, curves=True):
    """A run with learning, loss and gradient curves."""
    rng = np.random.default_rng([seed, *arm.encode()])
    steps = 2000 if arm == "ce-long" else 600
    levels = ARMS[arm][1]
    learning, losses, projection = [], [], []
    for step in range(0, steps + 1, 50) if curves else ():
        rise = [1 / (1 + math.exp(-(step - 200 - 80 * i) / 40)) for i in range(3)]
        accuracy = {
            c: low + (high - low) * r + rng.normal(0, 0.01)
            for c, low, high, r in zip(SIZES, MAJORITY, levels, rise, strict=True)
        }
        learning.append(CurvePoint(step, 0.07 * step, accuracy))
    for step in range(10, steps + 1, 10) if curves else ():
        values = {"ce": 2.0 * math.exp(-step / 250) + 0.1 + rng.uniform(0, 0.05)}
        if not arm.startswith("ce"):
            for i, capability in enumerate(SIZES):
                values[capability] = 0.3 * math.exp(-step / 300) + 0.05 * (i + 1)
            signals = {
                c: Signal(0.05 * (i + 1) * (1 + rng.uniform()), rng.normal(0.03, 0.05), 0.0)
                for i, c in enumerate(SIZES)
            }
            signals = {
                c: Signal(s.share, s.cosine, float(s.cosine < 0)) for c, s in signals.items()
            }
            if arm == "cosine+agp":
                projection.append(ProjectionPoint(step, signals))
        losses.append(LossPoint(step, values))
    return Run(
        arm=arm,
        seed=seed,
        steps=steps,
        parameters=158_000,
        cpu_seconds=0.07 * steps + 4.0 * (not arm.startswith("ce")),
        teacher_cpu_seconds=0.0 if arm.startswith("ce") else 4.0,
        accuracy=tallies(levels, rng),
        blank=tallies((0.27, 0.37, 0.19), rng),
        learning_curve=tuple(learning),
        loss_curve=tuple(losses),
        projection_log=tuple(projection),
    )


def make_study(*, arms=tuple(ARMS), seeds=(0, 1, 2), curves=True, **changes):
    """A study of those arms over those seeds."""
    settings = {
        "title": "Attention-map distillation on a simulated highway",
        "settings": {
            "train frames": "450 of 3,000",
            "seeds": list(seeds),
            "torch": "2.13.0",
            "cores": 2,
        },
        "notes": (
            "The world is a cartoon: relative speed is a colour.",
            "The teacher saw 3,000 frames, the students 450 of them.",
        ),
        "capabilities": tuple(SIZES),
        "arms": tuple(Arm(name, ARMS[name][0], f"{ARMS[name][0]}, as described.") for name in arms),
        "runs": tuple(make_run(arm, seed, curves=curves) for arm in arms for seed in seeds),
        "teachers": (
            Teacher("joint teacher", 750_000, tallies((0.965, 0.944, 0.819)), tallies(MAJORITY)),
        ),
        "baselines": (Baseline("majority", tallies(MAJORITY)),),
        "comparisons": (Comparison("cosine", "random"),)
        if {"cosine", "random"} <= set(arms)
        else (),
    }
    return Study(**{**settings, **changes})
