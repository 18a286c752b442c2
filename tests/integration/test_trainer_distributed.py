"""Two gloo processes against one process that accumulates over two micro-batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
from pathlib import Path
from transformers import TrainingArguments
from drivekd.data import Collator
from drivekd.train import DistillConfig, DistillTrainer, ProjectionConfig, SignalConfig
from tests.helpers import toy_data, toy_models

root, accumulation, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
layers = dict(student_layers=0, teacher_layers=0, region="full", weight=100.0)
signals = [SignalConfig(name=n, teacher="t", **layers) for n in ("sort", "fold")]
states = {}
for method in ("stage1", "none"):
    student = toy_models.internvl(layers=2, hidden=32, seed=1)
    trainer = DistillTrainer(
        student,
        {"t": toy_models.internvl(layers=2, hidden=32, seed=2)},
        DistillConfig(
            signals=signals, weighting="static", projection=ProjectionConfig(method=method)
        ),
        args=TrainingArguments(
            output_dir=str(root / name), per_device_train_batch_size=2, max_steps=2, optim="sgd",
            gradient_accumulation_steps=accumulation, learning_rate=0.05, max_grad_norm=0.0,
            lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, train_sampling_strategy="sequential", dataloader_pin_memory=False,
            logging_steps=100,
        ),
        data_collator=Collator(toy_data.encoder(root), student.config, pad_token_id=toy_data.PAD),
        train_dataset=torch.load(root / "records.pt", weights_only=False),
    )
    trainer.train()
    states[method] = {k: v.detach() for k, v in student.state_dict().items()}
torch.save(states, root / f"{name}-{trainer.args.process_index}.pt")
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def run(root, accumulation, name, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        own = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", SCRIPT, str(root), str(accumulation), name]
        started.append(
            subprocess.Popen(command, env=own, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        )
    errors = []
    for process in started:
        try:
            errors.append(process.communicate(timeout=120)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            errors.append("timed out: " + process.communicate()[1])
    assert [process.returncode for process in started] == [0] * processes, errors


@pytest.mark.slow
def test_two_processes_equal_two_micro_batches(tmp_path):
    """With and without projection; in the second step one process has no sample of a signal."""
    from tests.helpers import toy_data

    types = ("sort", "fold", "sort", "fold", "sort", "sort", "iron", "iron")
    torch.save(toy_data.records(tmp_path, types), tmp_path / "records.pt")
    run(tmp_path, 2, "one", 1)
    run(tmp_path, 1, "two", 2)
    states = [torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1")]
    for method in ("stage1", "none"):
        one, two, other = (state[method] for state in states)
        assert all(torch.equal(two[name], other[name]) for name in two)
        scale = max(value.abs().max() for value in one.values())
        error = max((one[name] - two[name]).abs().max() for name in one)
        assert error <= 1e-6 * scale, (method, error, scale)
    first, second = (states[0][method] for method in ("stage1", "none"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
