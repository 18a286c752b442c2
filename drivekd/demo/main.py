"""Runs the arms of the demo in worker processes and writes the report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drivekd.data import load_records
from drivekd.demo.data import Contents, make_world, open_world
from drivekd.demo.devices import choose_device, default_workers, device_name
from drivekd.demo.evaluation import tally_majority
from drivekd.demo.jobs import Job, in_order, read_run, work
from drivekd.demo.overlays import draw_overlays
from drivekd.demo.settings import (
    CAPABILITIES,
    COMPARISONS,
    DEFAULT_ARMS,
    FULL_ARMS,
    LOGIT_SHARE,
    MULTI_AGP,
    SHARE,
    SMOKE_STEPS,
    SMOKE_WORLD,
    ArmSpec,
    Training,
    World,
)
from drivekd.demo.teachers import read_facts
from drivekd.demo.workers import Failure, run_jobs
from drivekd.errors import DataError, RunFailedError
from drivekd.study.plots import Plot
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
)
CPU_NOTE = (
    "CPU seconds are processor time of one thread, evaluation left out, with the teachers running "
    "live in every step. Runs side by side share the machine."
)
GPU_NOTE = (
    "Trained on a GPU in float32 without TF32. CPU seconds are those of the process that drives "
    "it, waiting for it included; runs side by side share the GPU, so wall seconds are no speed of "
    "one run alone."
)


@dataclass(frozen=True)
class _Plan:
    """Everything that a study is to hold."""

    arms: tuple[ArmSpec, ...]
    seeds: tuple[int, ...]
    world: World
    training: Training
    data: Path
    contents: Contents
    output: Path
    device: str
    workers: int

    def jobs(self) -> list[Job]:
        """All runs, seed by seed."""
        return [
            Job(
                arm,
                seed,
                self.world,
                self.training,
                self.data,
                self.contents.digest,
                self.output / "students" / f"{arm.name}-{seed}",
                self.device,
            )
            for seed in self.seeds
            for arm in self.arms
        ]


def prepare(folder: Path, *, workers: int | None = None, fast: bool = False) -> Path:
    """What `drivekd.demo.prepare` documents."""
    world = SMOKE_WORLD if fast else World()
    make_world(folder, world, workers=workers or os.cpu_count() or 1, progress=_print_frames)
    return folder


def run_demo(
    output: Path,
    *,
    arms: Sequence[str] | None = None,
    full: bool = False,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    steps: int | None = None,
    fast: bool = False,
    data: Path | None = None,
    device: str = "auto",
    report_only: bool = False,
) -> Path:
    """What `drivekd.demo.run` documents."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    begin = time.monotonic()
    chosen = _choose_arms(arms, full=full)
    device = choose_device(device)
    workers = workers or default_workers(device)
    world = SMOKE_WORLD if fast else World()
    output = output.absolute()
    folder = output / "data" if data is None else data.absolute()
    wanted = seeds if seeds is not None else FULL_SEEDS if full else (0,)
    plan = _Plan(
        arms=chosen,
        seeds=tuple(dict.fromkeys(wanted)),
        world=world,
        training=Training(steps=steps or (SMOKE_STEPS if fast else Training.steps)),
        data=folder,
        contents=_world(folder, world, workers, may_make=data is None and not report_only),
        output=output,
        device=device,
        workers=workers,
    )
    print(
        f"{len(plan.arms)} arms x {len(plan.seeds)} seed(s), {plan.training.steps} steps each, on "
        f"{device_name(device)}, {min(workers, len(plan.jobs()))} at a time -> {output}",
        flush=True,
    )
    made = _run_all(plan, report_only=report_only)
    if made.runs:
        study = _study(plan, made)
        page = write_report(output, study, figures=_overlays(plan, study))
        print(f"\n{format_table(study)}\n\n{(time.monotonic() - begin) / 60:.1f} minutes")
    if made.interrupted:
        raise KeyboardInterrupt
    if made.failures:
        failed = "; ".join(f"{job.name}: {failure.reason}" for job, failure in made.failures)
        kept = f"; the report of the others is {page}" if made.runs else ""
        raise RunFailedError(
            f"{len(made.failures)} of {len(plan.jobs())} runs failed{kept}: {failed}"
        )
    if not made.runs:
        raise DataError(f"{output} holds no finished run of these arms and seeds")
    return page


def _choose_arms(names: Sequence[str] | None, *, full: bool) -> tuple[ArmSpec, ...]:
    """The arms of these names, in the report's order."""
    if names is None:
        return FULL_ARMS if full else DEFAULT_ARMS
    known = [arm.name for arm in FULL_ARMS]
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"arms has {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(arm for arm in FULL_ARMS if arm.name in names)


def _world(folder: Path, world: World, workers: int, *, may_make: bool) -> Contents:
    """The data set's contents; it is made if that is allowed."""
    if not may_make:
        return open_world(folder, world)
    try:
        return make_world(folder, world, workers=workers, progress=_print_frames)
    except ImportError as error:
        raise ImportError(
            f"{error}; without it, give --data a data set that `drivekd demo --prepare DIR` made "
            "on another machine",
            name=error.name,
        ) from error


@dataclass
class _Made:
    """What came of a plan's jobs: runs in the order of the jobs."""

    runs: list[Run]
    missing: list[Job]
    failures: list[tuple[Job, Failure]]
    interrupted: bool = False


def _run_all(plan: _Plan, *, report_only: bool) -> _Made:
    """Every run, made in worker processes or read back."""
    jobs = plan.jobs()
    runs = {job: run for job in jobs if (run := read_run(job)) is not None}
    failures: list[tuple[Job, Failure]] = []
    interrupted = False
    if runs:
        print(f"{len(runs)} of {len(jobs)} runs were done before", flush=True)
    missing = [] if report_only else [job for job in jobs if job not in runs]
    try:
        for job, outcome in run_jobs(in_order(missing, plan.workers), plan.workers, work):
            if isinstance(outcome, Failure):
                failures.append((job, outcome))
                print(f"{job.name} FAILED: {outcome.reason}", flush=True)
            else:
                runs[job] = outcome
                print(f"{len(runs)} of {len(jobs)} runs done", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted; {len(runs)} of {len(jobs)} runs are done and kept", flush=True)
    done = [runs[job] for job in jobs if job in runs]
    return _Made(done, [job for job in jobs if job not in runs], failures, interrupted)


def _overlays(plan: _Plan, study: Study) -> list[Plot]:
    """Attention of the teachers and of one student: of the main arm, if there is one."""
    finished = {(run.arm, run.seed) for run in study.runs}
    jobs = [job for job in plan.jobs() if (job.arm.name, job.seed) in finished]
    job = next((job for job in jobs if job.arm == MULTI_AGP), jobs[-1])
    return draw_overlays(plan.data, plan.world, job.output / "student", job.name)


def _study(plan: _Plan, made: _Made) -> Study:
    """The document behind the report."""
    facts, data = read_facts(), plan.data
    train, test = load_records(data / "train.json"), load_records(data / "test.json")
    arms = [arm for arm in plan.arms if any(run.arm == arm.name for run in made.runs)]
    names = {arm.name for arm in arms}
    world, training, is_whole_world = plan.world, plan.training, plan.world == World()
    settings: dict[str, Any] = {
        "frames (train, val, test)": [world.train_frames, world.val_frames, world.test_frames],
        "students' share of the training frames": world.student_fraction,
        "test questions": len(test),
        "student seeds": list(plan.seeds),
        "steps": training.steps,
        "batch size": training.batch_size,
        "learning rate": training.learning_rate,
        "share of CE's gradient norm held by each attention signal": SHARE,
        "share held by each logit signal": LOGIT_SHARE,
        "teachers' steps (joint, then own capability)": [facts.joint_steps, facts.own_steps],
        "teacher parameters": facts.teachers[0].parameters,
        "student parameters": made.runs[0].parameters,
        "device": device_name(plan.device),
        "runs at a time": min(plan.workers, len(plan.jobs())),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "highway-env": plan.contents.versions["highway-env"],
    }
    teachers = tuple(replace(each, name=f"{each.name} teacher") for each in facts.teachers)
    notes = [*NOTES, CPU_NOTE if plan.device == "cpu" else GPU_NOTE]
    if not is_whole_world:
        notes.insert(0, TINY)
    if made.missing:
        notes.insert(0, f"Not finished: {', '.join(job.name for job in made.missing)}.")
    return Study(
        title="Three teachers, one student, a simulated highway",
        settings=settings,
        notes=tuple(notes),
        capabilities=CAPABILITIES,
        arms=tuple(Arm(arm.name, arm.label, arm.description) for arm in arms),
        runs=tuple(made.runs),
        teachers=teachers if is_whole_world else (),  # measured on that world's test set
        baselines=(Baseline("majority answer", tally_majority(test, train)),),
        reference=arms[0].name,
        comparisons=tuple(Comparison(a, b) for a, b in COMPARISONS if {a, b} <= names),
    )


def _print_frames(split: str, done: int, total: int) -> None:
    """A line now and then while frames are made."""
    if done == total or done % 500 == 0:
        print(f"simulating {split}: {done} of {total} frames", flush=True)
