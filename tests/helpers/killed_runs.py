"""Runs that are killed at any point and started again, in forked children of one process."""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from drivekd.data import Collator
from drivekd.train import DistillConfig, DistillTrainer, JsonlLogger, SignalConfig, checkpoints
from tests.helpers import toy_data, toy_models

TYPES = ("sort", "fold", "sort", "wash", "fold", "sort", "wash", "fold")
# What may differ between two runs of the same training.
CLOCK = ("runtime", "_per_second", "seconds_left", "memory")
SIGNALS = (
    SignalConfig(name="sort", teacher="a", student_layers=0, teacher_layers=0, region="full"),
    SignalConfig(name="fold", teacher="a", kind="hidden", student_layers=1, teacher_layers=2),
)
WRITES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def train(root: Path, run: Path) -> None:
    """Eight steps over four epochs; log rows and checkpoints at different steps."""
    torch.manual_seed(0)
    student = toy_models.internvl(layers=2, hidden=32, seed=1)
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    trainer = DistillTrainer(
        student,
        {"a": toy_models.internvl(layers=3, hidden=48, seed=2)},
        DistillConfig(signals=SIGNALS),
        args=transformers.TrainingArguments(
            output_dir=str(run),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=8,
            learning_rate=1e-3,
            logging_steps=2,
            save_steps=3,
            save_total_limit=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=Collator(toy_data.encoder(root), student.config, pad_token_id=toy_data.PAD),
        train_dataset=toy_data.records(root, TYPES),
        callbacks=[JsonlLogger()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint="auto")
    torch.save(student.state_dict(), run.with_suffix(".pt"))


def start(root: Path, run: Path, prepare=lambda: None) -> int:
    """Train in a forked child; returns its process id."""

    def work():
        prepare()
        train(root, run)

    return forked(work)


def forked(work) -> int:
    """Do something in a forked child, which leaves with 0 when it is done; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not there after a fork: it would wait
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def finish(child: int, *, may_be_killed: bool) -> bool:
    """Wait; whether the child came to its end."""
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0 or (killed and may_be_killed), status
    return status == 0


def count_writes(run: Path, act) -> None:
    """Call `act(n)` before the n-th change of the file system under a folder."""
    numbers = itertools.count(1)

    def hook(event, args):
        if event not in WRITES or not isinstance(args[0], str | Path):
            return
        reads = event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR))
        if not reads and str(args[0]).startswith(str(run)):
            act(next(numbers))

    sys.addaudithook(hook)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(number: int) -> None:
    """Be killed with the n-th file of torch.save half written."""
    save, numbers = torch.save, itertools.count(1)

    def torn(thing, file, *args, **kwargs):
        save(thing, file, *args, **kwargs)
        if next(numbers) == number:
            os.truncate(file, Path(file).stat().st_size // 2)
            kill_self()

    torch.save = torn


def rows_of(run: Path) -> list:
    lines = (run / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not any(c in k for c in CLOCK)} for row in rows]


def check_checkpoints(run: Path) -> int:
    """Every checkpoint is whole; the newest step."""
    folders = list(run.glob("checkpoint-*"))
    for folder in folders:
        assert (folder / checkpoints.MANIFEST).exists(), folder
        checkpoints.check(folder)
    return max((int(folder.name.split("-")[1]) for folder in folders), default=0)


def main(root: Path, *, seed: int = 0) -> int:
    """Kill runs in three ways; all end as the one that was left alone. Returns how many kills."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    whole = root / "whole"
    log = root / "writes"

    def record(number):
        log.write_text(str(number))

    begin = time.monotonic()
    assert finish(start(root, whole, lambda: count_writes(whole, record)), may_be_killed=False)
    seconds, writes = time.monotonic() - begin, int(log.read_text())
    weights, rows = torch.load(whole.with_suffix(".pt")), rows_of(whole)
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6, 8]
    draw = random.Random(seed)
    at_write = [("write", draw.randint(1, writes)) for _ in range(6)]
    in_save = [("save", draw.randint(1, 12)) for _ in range(2)]
    any_time = [("time", draw.uniform(0.3, 0.9) * seconds) for _ in range(2)]
    kills = 0
    for case, (how, when) in enumerate([*at_write, *in_save, *any_time]):
        run = root / f"killed-{case}"
        newest, done = 0, False
        for attempt in range(3):
            again = draw.randint(1, max(1, writes // 2)) if attempt else when

            def prepare(how=how if attempt == 0 else "write", again=again, run=run):
                if how == "write":
                    count_writes(run, lambda number: number == again and kill_self())
                elif how == "save":
                    kill_in_save(again)

            child = start(root, run, prepare)
            if how == "time" and attempt == 0:
                time.sleep(when)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            done = finish(child, may_be_killed=True)
            kills += not done
            step = check_checkpoints(run)
            assert step >= newest, "a good checkpoint was lost"
            newest = step
            if done:
                break
        if not done:
            assert finish(start(root, run), may_be_killed=False)
        assert not (run / checkpoints.STAGING).exists()
        mine = torch.load(run.with_suffix(".pt"))
        assert all(torch.equal(mine[name], weights[name]) for name in weights), (how, when)
        for got, wanted in zip(rows_of(run), rows, strict=True):
            assert got == wanted, (how, when)
        assert {p.name for p in run.glob("checkpoint-*")} >= {"checkpoint-6", "checkpoint-8"}
    return kills
