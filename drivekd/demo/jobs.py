"""Runs as jobs for worker processes: what one needs, how its result is kept and read back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drivekd.demo.data import differences
from drivekd.demo.settings import CAPABILITIES, DEFAULT_ARMS, ArmSpec, Training, World
from drivekd.errors import DataError
from drivekd.study.schema import Arm, Run, Study

SETTINGS_KEY = "run"


@dataclass(frozen=True)
class Job:
    """What a worker process needs to make one run.

    Attributes:
        arm: how the student is trained.
        seed: of its weights and of the order of its data.
        world: settings of the data.
        training: settings of the optimisation.
        data: folder of the data set.
        digest: of the data set's contents.
        output: folder of the run.
        device: "cpu" or "cuda".
    """

    arm: ArmSpec
    seed: int
    world: World
    training: Training
    data: Path
    digest: str
    output: Path
    device: str = "cpu"

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.arm.name} (seed {self.seed})"

    @property
    def file(self) -> Path:
        """Where the finished run is kept."""
        return self.output / "run.json"

    @property
    def settings(self) -> dict[str, Any]:
        """All that the run's result depends on, flat."""
        parts = {"arm": asdict(self.arm), "world": asdict(self.world)}
        parts["training"] = asdict(self.training)
        flat = {f"{part}.{name}": value for part in parts for name, value in parts[part].items()}
        return {**flat, "seed": self.seed, "device": self.device, "data": self.digest}


def in_order(jobs: Sequence[Job], workers: int) -> list[Job]:
    """The jobs in the order in which to start them.

    The arms that every report needs come first, then the longest, so that none is left for the
    end. Few workers go seed by seed, so that a study that is stopped has whole seeds.
    """
    seed_by_seed = workers < len({job.arm for job in jobs})

    def rank(job: Job) -> tuple[float, ...]:
        cost = job.arm.steps_factor * (1 + len(job.arm.signals))
        return (job.seed if seed_by_seed else 0, job.arm not in DEFAULT_ARMS, -cost, job.seed)

    return sorted(jobs, key=rank)


def work(job: Job) -> Run:
    """Make a run in this process and keep it."""
    from transformers.utils import logging

    from drivekd.demo.training import run_job

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin = time.monotonic()

    def say(line: str) -> None:
        minutes = (time.monotonic() - begin) / 60
        print(f"  {job.arm.name} (seed {job.seed}, {minutes:.1f} min)  {line}", flush=True)

    run = run_job(job, say)
    document = Study(
        title=job.name,
        settings={SETTINGS_KEY: json.dumps(job.settings)},
        notes=(),
        capabilities=CAPABILITIES,
        arms=(Arm(job.arm.name, job.arm.label, job.arm.description),),
        runs=(run,),
        reference=job.arm.name,
    )
    partial = job.file.with_suffix(".tmp")
    partial.write_text(document.to_json(), encoding="utf-8")
    partial.replace(job.file)
    return run


def read_run(job: Job) -> Run | None:
    """A finished run; None if there is none yet.

    Raises:
        DataError: the run was made with other settings.
    """
    if not job.file.exists():
        return None
    study = Study.from_json(job.file.read_text(encoding="utf-8"))
    remedy = "remove it or choose another --output"
    if SETTINGS_KEY not in study.settings:
        raise DataError(f"{job.output} holds a run of another version of drivekd; {remedy}")
    found = json.loads(str(study.settings[SETTINGS_KEY]))
    wanted = json.loads(json.dumps(job.settings))
    if unlike := differences(found, wanted):
        raise DataError(f"{job.output} holds a run made with other settings: {unlike}; {remedy}")
    return study.runs[0]
