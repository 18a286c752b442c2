"""Jobs side by side, each lane a process of its own: one that fails leaves the others alone."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from drivekd.demo.jobs import Job
from drivekd.study.schema import Run

Work = Callable[[Job], Run]
ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Failure:
    """Why a job has no run, in a line."""

    reason: str


def run_jobs(jobs: Sequence[Job], workers: int, work: Work) -> Iterator[tuple[Job, Run | Failure]]:
    """Run jobs in that many processes, started in the order of `jobs`.

    A process serves one job after the other, so that what it has loaded is loaded once. Closing
    the iterator, or an exception while it waits, ends the processes; what they had not finished is
    lost.

    Args:
        jobs: what to do.
        workers: processes at a time, at least 1.
        work: a function of a module, called in the processes.

    Yields:
        Each job with its run, or with why it has none, as they end.
    """
    waiting = deque(jobs)
    lanes: list[_Lane] = []
    try:
        while waiting and len(lanes) < workers:
            lanes.append(_Lane(work, waiting.popleft()))
        busy = list(lanes)
        while busy:
            ready = wait([lane.connection for lane in busy])
            for lane in [each for each in busy if each.connection in ready]:
                job, outcome = lane.job, lane.outcome()
                if waiting:
                    lane.begin(waiting.popleft())
                else:
                    busy.remove(lane)
                yield job, outcome
    finally:
        for lane in lanes:
            lane.stop()


class _Lane:
    """A process, and the job that it is at."""

    def __init__(self, work: Work, job: Job) -> None:
        self._work = work
        self._start()
        self.begin(job)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        self._process.start()
        theirs.close()  # so that a process that dies closes the last end

    def begin(self, job: Job) -> None:
        """Give it a job, and a new process if the last one died."""
        if not self._process.is_alive():
            self._start()
        self.job = job
        self.connection.send(job)

    def outcome(self) -> Run | Failure:
        """What came of the job; waits for it."""
        try:
            outcome: Run | Failure = self.connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Failure(f"its process ended with {how}")
        return outcome

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self.connection.close()
        self._process.terminate()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, work: Work) -> None:
    """Do jobs until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        outcome: Run | Failure
        try:
            outcome = work(job)
        except Exception as error:
            job.output.mkdir(parents=True, exist_ok=True)
            file = job.output / ERROR_FILE
            file.write_text(traceback.format_exc(), encoding="utf-8")
            outcome = Failure(f"{type(error).__name__}: {' '.join(str(error).split())} ({file})")
        connection.send(outcome)
