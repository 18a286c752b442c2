"""Several gloo ranks on this machine: each runs every `case_*` function of a module.

`run_ranks` starts the processes and returns what the cases returned, by rank and case; a case that
raised returns `Raised`. One start serves all cases of a module: importing torch takes longer than
most of them. A module's `last`, if any, runs after them and may break the group.
"""

import datetime
import importlib
import os
import socket
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Raised:
    """What a case raised."""

    kind: str
    message: str
    where: str


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(arguments, ranks, *, timeout=120):
    """Run `python *arguments` once per rank, with torchrun's environment; all must succeed."""
    port = free_port()
    started = []
    for rank in range(ranks):
        own = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments], env=own, cwd=ROOT, stderr=subprocess.PIPE, text=True
            )
        )
    errors = []
    for process in started:
        try:
            errors.append(process.communicate(timeout=timeout)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            errors.append("timed out: " + process.communicate()[1])
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(errors)


def run_ranks(module, folder, *, ranks=2, timeout=120):
    """One dict of results per rank, by the name of the case without `case_`."""
    start_ranks(
        ["-W", "error", "-m", "tests.helpers.ranks", module, str(folder)], ranks, timeout=timeout
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def main():
    module, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = {}
    for name, case in vars(module).items():
        if not name.startswith("case_"):
            continue
        torch.manual_seed(0)
        try:
            results[name.removeprefix("case_")] = case()
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            results[name.removeprefix("case_")] = Raised(type(error).__name__, str(error), text)
        distributed.barrier()
    torch.save(results, folder / f"{distributed.get_rank()}.pt")
    if hasattr(module, "last"):
        module.last()
    # As drivekd.cli.command: a thread of gloo could spoil finalization, and hold up the end of the
    # group for ever where a DistributedDataParallel outlives it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    # Results are pickled by this name, not by __main__'s.
    importlib.import_module("tests.helpers.ranks").main()
