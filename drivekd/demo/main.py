"""Runs the arms of the demo in worker processes and writes the report."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drivekd.data import load_records
from drivekd.demo.data import make_world
from drivekd.demo.evaluation import tally_majority
from drivekd.demo.jobs import Job, read_run, work
from drivekd.demo.overlays import draw_overlays
from drivekd.demo.settings import (
    CAPABILITIES,
    COMPARISONS,
    DEFAULT_ARMS,
    FULL_ARMS,
    LOGIT_SHARE,
    SHARE,
    SMOKE_STEPS,
    SMOKE_WORLD,
    ArmSpec,
    Training,
    World,
)
from drivekd.demo.teachers import read_facts
from drivekd.study.report import write_report
from drivekd.study.schema import Arm, Baseline, Comparison, Run, Study
from drivekd.study.tables import format_table

FULL_SEEDS = (0, 1, 2)
TINY = (
    "A smoke run on a small world: it shows that everything works, and its accuracies mean nothing."
)
NOTES = (
    "The world is a cartoon: flat bird's-eye pictures of a straight simulated highway, in which a "
    "vehicle's colour and trail give its relative speed away, and the ego vehicle always drives at "
    "16 m/s. A model that answers well reads pixels; nothing here says that it can drive.",
    "The teachers saw all training frames, the students a fixed random 15 % of them: what students "
    "gain from teachers, they gain there. With all frames distillation has only been seen to speed "
    "training up; that is not run here.",
    "Arms are compared at equal steps. Whether a gain is more than a head start, only the two arms "
    "trained 3.3 times as long tell (with --full); the table of CPU seconds says what each cost.",
    "The three capability teachers start from one jointly trained model; the time it took to train "
    "them is not counted in any arm.",
    "A blank image is the empty road. An answer whose letter and words contradict each other is "
    "wrong.",
    "CPU seconds are processor time of one thread, evaluation left out, with the teachers running "
    "live in every step; two arms share the machine.",
)


def run_demo(
    output: Path,
    *,
    full: bool = False,
    seeds: Sequence[int] | None = None,
    workers: int = 2,
    steps: int | None = None,
    fast: bool = False,
) -> Path:
    """What `drivekd.demo.run` documents."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    begin = time.monotonic()
    arms = FULL_ARMS if full else DEFAULT_ARMS
    world = SMOKE_WORLD if fast else World()
    training = Training(steps=steps or (SMOKE_STEPS if fast else Training.steps))
    chosen = tuple(seeds) if seeds is not None else FULL_SEEDS if full else (0,)
    output = output.absolute()
    data = output / "data"
    print(f"{len(arms)} arms x {len(chosen)} seed(s), {training.steps} steps each -> {output}")
    make_world(data, world, workers=workers, progress=_print_frames)
    jobs = [
        Job(arm, seed, world, training, data, output / "students" / f"{arm.name}-{seed}")
        for seed in chosen
        for arm in arms
    ]
    runs = _run_all(jobs, workers)
    study = _study(arms, runs, world, training, data, chosen)
    overlays = draw_overlays(data, world, jobs[1].output / "student")
    page = write_report(output, study, figures=overlays)
    print(format_table(study))
    print(f"\n{(time.monotonic() - begin) / 60:.1f} minutes; plots and tables in {page}")
    return page


def _run_all(jobs: Sequence[Job], workers: int) -> list[Run]:
    """Every run, made in worker processes or read back; the longest of a seed first."""
    runs = [run for job in jobs if (run := read_run(job)) is not None]
    open_jobs = sorted(
        (job for job in jobs if not job.file.exists()), key=lambda job: (job.seed, -job.cost)
    )
    if not open_jobs:
        return runs
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(open_jobs)), mp_context=context)
    try:
        for done in as_completed([pool.submit(work, job) for job in open_jobs]):
            runs.append(done.result())
            print(f"{len(runs)} of {len(jobs)} runs done", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return runs


def _study(
    arms: Sequence[ArmSpec],
    runs: Sequence[Run],
    world: World,
    training: Training,
    data: Path,
    seeds: Sequence[int],
) -> Study:
    """The document behind the report."""
    facts = read_facts()
    train, test = load_records(data / "train.json"), load_records(data / "test.json")
    names = {arm.name for arm in arms}
    settings: dict[str, Any] = {
        "frames (train, val, test)": [world.train_frames, world.val_frames, world.test_frames],
        "students' share of the training frames": world.student_fraction,
        "test questions": len(test),
        "student seeds": list(seeds),
        "steps": training.steps,
        "batch size": training.batch_size,
        "learning rate": training.learning_rate,
        "share of CE's gradient norm held by each attention signal": SHARE,
        "share held by each logit signal": LOGIT_SHARE,
        "teachers' steps (joint, then own capability)": [facts.joint_steps, facts.own_steps],
        "teacher parameters": facts.teachers[0].parameters,
        "student parameters": runs[0].parameters,
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "highway-env")},
    }
    return Study(
        title="Three teachers, one student, a simulated highway",
        settings=settings,
        notes=NOTES if world == World() else (TINY, *NOTES),
        capabilities=CAPABILITIES,
        arms=tuple(Arm(arm.name, arm.label, arm.description) for arm in arms),
        runs=tuple(runs),
        teachers=facts.teachers if world == World() else (),  # measured on that world's test set
        baselines=(Baseline("majority answer", tally_majority(test, train)),),
        reference=arms[0].name,
        comparisons=tuple(Comparison(a, b) for a, b in COMPARISONS if {a, b} <= names),
    )


def _print_frames(split: str, done: int, total: int) -> None:
    """A line now and then while frames are made."""
    if done == total or done % 500 == 0:
        print(f"simulating {split}: {done} of {total} frames", flush=True)
