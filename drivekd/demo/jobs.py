"""Runs as jobs for worker processes: what one needs, how its result is kept and read back.

This module is cheap to import: a worker loads torch and transformers when it starts to work.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from drivekd.demo.settings import CAPABILITIES, ArmSpec, Training, World
from drivekd.errors import DataError
from drivekd.study.schema import Arm, Run, Study


@dataclass(frozen=True)
class Job:
    """What a worker process needs to make one run."""

    arm: ArmSpec
    seed: int
    world: World
    training: Training
    data: Path
    output: Path

    @property
    def file(self) -> Path:
        """Where the finished run is kept."""
        return self.output / "run.json"

    @property
    def cost(self) -> float:
        """Rough cost against the plain arm, for starting the longest first."""
        return self.arm.steps_factor * (1 + len(self.arm.signals))

    @property
    def key(self) -> str:
        """All settings of the run, as text."""
        parts = [asdict(self.arm), self.seed, asdict(self.world), asdict(self.training)]
        return json.dumps(parts, sort_keys=True)


def work(job: Job) -> Run:
    """Make a run in this process and keep it."""
    os.environ["OMP_NUM_THREADS"] = "1"
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
        title=f"{job.arm.name}, seed {job.seed}",
        settings={"key": job.key},
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
    if study.settings["key"] != job.key:
        raise DataError(
            f"{job.output} was made with other settings; remove it or choose another --output"
        )
    return study.runs[0]
