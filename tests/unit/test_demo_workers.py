"""Jobs side by side: every outcome arrives, a failure names itself and harms nobody else."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest

from drivekd.demo.jobs import Job, in_order
from drivekd.demo.settings import FULL_ARMS, Training, World
from drivekd.demo.workers import ERROR_FILE, Failure, run_jobs


def jobs_for(output, seeds, arms=FULL_ARMS[:1]):
    return [
        Job(arm, seed, World(), Training(), output, "d", output / f"{arm.name}-{seed}")
        for seed in seeds
        for arm in arms
    ]


def work(job):
    """Stands in for training: what happens depends on the seed."""
    if job.seed == 1:
        raise RuntimeError("no\n  luck")
    if job.seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.seed == 99:
        time.sleep(600)
    return f"run of {job.seed} by {os.getpid()}"


def test_one_failure_and_one_crash_leave_the_others_alone(tmp_path):
    outcomes = dict(run_jobs(jobs_for(tmp_path, range(5)), 2, work))
    by_seed = {job.seed: outcome for job, outcome in outcomes.items()}
    assert set(by_seed) == set(range(5))
    for seed in (0, 3, 4):
        assert by_seed[seed].startswith(f"run of {seed} by")
    file = tmp_path / "ce-1" / ERROR_FILE
    assert by_seed[1] == Failure(f"RuntimeError: no luck ({file})")
    assert "in work" in file.read_text()
    assert by_seed[2] == Failure("its process ended with signal SIGKILL")


def test_a_process_serves_one_job_after_the_other(tmp_path):
    outcomes = [outcome for _, outcome in run_jobs(jobs_for(tmp_path, (3, 4, 5)), 1, work)]
    assert len({outcome.split(" by ")[1] for outcome in outcomes}) == 1


def test_leaving_ends_the_processes(tmp_path):
    running = run_jobs(jobs_for(tmp_path, (0, 99)), 2, work)
    job, _ = next(running)
    assert job.seed == 0
    running.close()
    assert not multiprocessing.active_children()


def test_nothing_to_do_starts_nothing():
    assert list(run_jobs([], 4, work)) == []


def order(jobs, workers):
    return [f"{job.arm.name}-{job.seed}" for job in in_order(jobs, workers)]


def test_many_workers_take_the_main_arms_and_then_the_longest(tmp_path):
    jobs = jobs_for(tmp_path, (0, 1), FULL_ARMS)
    first = order(jobs, 12)
    assert first[:4] == ["multi+agp-0", "multi+agp-1", "ce-0", "ce-1"]
    assert first[4:7] == ["multi+agp-long-0", "multi+agp-long-1", "multi-0"]
    assert "ce-long-0" in first[-10:]  # one forward and backward, if for long
    assert sorted(first) == sorted(f"{job.arm.name}-{job.seed}" for job in jobs)


def test_few_workers_go_seed_by_seed(tmp_path):
    first = order(jobs_for(tmp_path, (0, 1), FULL_ARMS), 2)
    assert first[:3] == ["multi+agp-0", "ce-0", "multi+agp-long-0"]
    assert [name[-1] for name in first] == ["0"] * len(FULL_ARMS) + ["1"] * len(FULL_ARMS)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"device": "cuda"}, "device"), ({"digest": "e"}, "data"), ({"seed": 5}, "seed"),
     ({"training": Training(steps=7)}, "training.steps"), ({"arm": FULL_ARMS[1]}, "arm.name")],
)  # fmt: skip
def test_settings_hold_whatever_a_run_depends_on(tmp_path, change, name):
    (job,) = jobs_for(tmp_path, (0,))
    assert replace(job, **change).settings[name] != job.settings[name]
