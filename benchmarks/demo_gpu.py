"""The demo on a GPU in a limited time: `python -m benchmarks.demo_gpu DATA --output DIR`.

DATA is what `drivekd demo --prepare` made, as a folder or as a tar archive of it: neither
highway-env nor a network is needed. When the time is nearly over the demo is interrupted, and the
report is of the runs that had finished. DIR/demo.tar.gz, unpacked into `results/<gpu>/`, is what
`python -m benchmarks.report` reads: demo/demo.json (times, machine, runs) and the report's files.
DRIVEKD_DRY=1 does the same on a CPU and a small world, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import DRY, write_machine
from drivekd.demo.settings import FULL_ARMS
from drivekd.study.report import DOCUMENT, load_study
from drivekd.study.schema import Run, Study
from drivekd.study.tables import by_capability

FOLDER = "demo"
REPORT_SECONDS = 30  # of the limit, for the report of what has finished


def unpack(data: Path, folder: Path) -> Path:
    """The data set's folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: an archive without a data set.
    """
    if data.is_dir():
        return data
    with tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
    for stamp in folder.rglob("world.json"):
        return stamp.parent
    raise ValueError(f"{data} holds no world.json; archive a folder that --prepare made")


def run_demo(arguments: Sequence[str], seconds: float, log: Path) -> tuple[int, float]:
    """Run the demo, interrupted once that many seconds are over; its exit code and wall time."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "drivekd", "demo", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(timeout=REPORT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    wall = time.monotonic() - begin
    print(log.read_text(encoding="utf-8"))
    return code, wall


def row_of(study: Study, run: Run) -> dict[str, Any]:
    """What demo.json says about a run; everything else is in report.json."""
    tallies = zip(study.capabilities, by_capability(study, run.accuracy), strict=True)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.steps,
        "wall_s": run.wall_seconds,
        "cpu_s": run.cpu_seconds,
        "accuracy": {capability: tally.accuracy for capability, tally in tallies},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 only if every run finished."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_gpu", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180, help="for everything")
    parser.add_argument("--workers", type=int, default=2 if DRY else 12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0] if DRY else [0, 1, 2])
    names = [arm.name for arm in FULL_ARMS]
    short = [arm.name for arm in FULL_ARMS if arm.steps_factor == 1]
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=names,
        default=short[:2] if DRY else short,
        help="default: all but those that train 3.3 times as long",
    )
    parser.add_argument("--work", type=Path, help="keep students here; a second call goes on")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        data = unpack(options.data, Path(scratch))
        work = (options.work or Path(scratch) / "work").absolute()
        work.mkdir(parents=True, exist_ok=True)
        settings = ["--arms", *options.arms, "--seeds", *map(str, options.seeds)]
        settings += ["--workers", str(options.workers), "--device", "cpu" if DRY else "cuda"]
        settings += ["--fast"] if DRY else []
        options.output.mkdir(parents=True, exist_ok=True)
        log = options.output / "demo.log"  # not in the scratch: there even if all this is killed
        code, wall = run_demo(
            [*settings, "--data", str(data.absolute()), "--output", str(work)],
            max(1.0, options.seconds - REPORT_SECONDS - (time.monotonic() - begin)),
            log,
        )
        planned = len(options.arms) * len(options.seeds)
        facts = {"dry": DRY, "arguments": settings, "exit_code": code, "planned": planned}
        done = write_facts(work, facts, wall)
        archive = options.output / f"{FOLDER}.tar.gz"
        with tarfile.open(archive, "w:gz") as packed:
            for path in [log, *sorted(work.iterdir())]:
                if path.is_file():
                    packed.add(path, f"{FOLDER}/{path.name}")
    print(f"\n{done} of {planned} runs in {wall:.0f} s -> {archive}")
    return 0 if done == planned else 1


def write_facts(work: Path, facts: dict[str, Any], wall: float) -> int:
    """Write demo.json, which adds up the wall time of all calls; the number of finished runs."""
    file = work / "demo.json"
    before = json.loads(file.read_text(encoding="utf-8"))["wall_s"] if file.exists() else 0.0
    write_machine(file)
    machine = json.loads(file.read_text(encoding="utf-8"))
    runs = []
    if (work / DOCUMENT).exists():
        study = load_study(work)
        runs = [row_of(study, run) for run in study.runs]
    document = {**machine, **facts, "wall_s": before + wall, "runs": runs}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return len(runs)


if __name__ == "__main__":
    sys.exit(main())
