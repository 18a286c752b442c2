"""One run of the demo: an arm, a seed, a student, and everything the report says about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from drivekd.data.collate import Collator
from drivekd.demo.data import Splits, blanked, load_splits
from drivekd.demo.evaluation import tally_answers
from drivekd.demo.jobs import Job
from drivekd.demo.models import STUDENT, TEACHER, CachedEncoder, build_model, save_model
from drivekd.demo.settings import ArmSpec, World
from drivekd.demo.teachers import load_teacher, load_tokenizer
from drivekd.study.schema import CurvePoint, LossPoint, ProjectionPoint, Run, Signal
from drivekd.study.statistics import micro
from drivekd.train import DistillConfig, DistillTrainer, ProjectionConfig, SignalConfig
from drivekd.train.placement import leave_other_gpus

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

LOG_EVERY = 20  # steps
RANDOM_TEACHER_SEED = 999

# The paper's three signals; the layers of a teacher are resolved against its own depth.
ATTENTION: Mapping[str, Mapping[str, Any]] = {
    "perception": {
        "student_layers": "first",
        "teacher_layers": "first",
        "region": "text_to_vision",
    },
    "reasoning": {"student_layers": "0..-2", "teacher_layers": "0..-2", "region": "full"},
    "planning": {
        "student_layers": "penultimate",
        "teacher_layers": "penultimate",
        "region": "text_to_vision",
    },
}


def distill_config(arm: ArmSpec, seed: int) -> DistillConfig:
    """The trainer's settings of an arm."""
    signals = [
        SignalConfig(name=name, teacher=name, kind="logits", share=arm.share)
        if arm.logits
        else SignalConfig(name=name, teacher=name, share=arm.share, **ATTENTION[name])
        for name in arm.signals
    ]
    return DistillConfig(
        signals=tuple(signals), projection=ProjectionConfig(method=arm.projection, seed=seed)
    )


def prepare_teachers(
    arm: ArmSpec, tokenizer: PreTrainedTokenizerFast, empty_road: Tensor, clock: TeacherClock
) -> dict[str, nn.Module]:
    """The teachers of an arm, by capability; the clock is started and stopped by their forwards.

    Args:
        arm: which teachers.
        tokenizer: the models' tokenizer.
        empty_road: (1, 3, H, W) pixels, what teachers of the kind "blank" see in every picture.
        clock: counts their processor time.
    """
    teachers: dict[str, nn.Module] = {}
    for i, name in enumerate(arm.signals):
        if arm.teachers == "random":
            teacher = build_model(TEACHER, tokenizer, seed=RANDOM_TEACHER_SEED + i)
        else:
            teacher = load_teacher(name)
        if arm.teachers == "blank":
            teacher.register_forward_pre_hook(partial(_blank, empty_road), with_kwargs=True)
        clock.watch(teacher)
        teachers[name] = teacher
    return teachers


def run_job(job: Job, say: Callable[[str], None]) -> Run:
    """Train and evaluate one student; saves it under `job.output`.

    Args:
        job: what to run.
        say: called with a line of progress.

    Returns:
        The run as the report shows it.
    """
    torch.set_num_threads(1)  # small models: one thread a process is fastest, and repeatable
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    splits, tokenizer, encoder = _load_data(job.data, job.world, job.device)
    student = build_model(STUDENT, tokenizer, seed=job.seed)
    empty_road = encoder.encode_prompt(blanked(splits.test)[0])["pixel_values"]
    teacher_clock = TeacherClock()
    recorder = Recorder(job, student, encoder, tokenizer, splits, say)
    trainer = DistillTrainer(
        student,
        prepare_teachers(job.arm, tokenizer, empty_road, teacher_clock),
        distill_config(job.arm, job.seed),
        args=_arguments(job),
        train_dataset=splits.student,
        data_collator=Collator(encoder, student.config, pad_token_id=tokenizer.pad_token_id),
        callbacks=[recorder],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    save_model(student, tokenizer, job.output / "student")
    measure = partial(tally_answers, student, encoder, tokenizer)
    clock = recorder.clock
    run = Run(
        arm=job.arm.name,
        seed=job.seed,
        steps=trainer.state.global_step,
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        cpu_seconds=clock.cpu,
        wall_seconds=clock.wall,
        teacher_cpu_seconds=min(teacher_clock.seconds, clock.cpu),
        accuracy=measure(splits.test),
        blank=measure(blanked(splits.test)),
        learning_curve=tuple(recorder.curve),
        loss_curve=tuple(recorder.losses),
        projection_log=tuple(recorder.projections),
    )
    say("test " + _percentages({c: micro(t.values()).accuracy for c, t in run.accuracy.items()}))
    return run


@lru_cache(maxsize=1)  # a process makes one run after the other, of one data set
def _load_data(
    data: Path, world: World, device: str
) -> tuple[Splits, PreTrainedTokenizerFast, CachedEncoder]:
    """The splits, the tokenizer, and the encoder that remembers them encoded."""
    splits, tokenizer = load_splits(data, world), load_tokenizer()
    return splits, tokenizer, CachedEncoder(tokenizer, splits.root, device=device)


class TrainingClock:
    """Processor and wall seconds while it goes."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self._start = (0.0, 0.0)

    def go(self) -> None:
        """Count from now on."""
        self._start = (time.process_time(), time.monotonic())

    def stop(self) -> None:
        """Count no longer."""
        self.cpu += time.process_time() - self._start[0]
        self.wall += time.monotonic() - self._start[1]


class TeacherClock:
    """Processor time spent inside teachers' forwards."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def watch(self, teacher: nn.Module) -> None:
        """Count the forwards of a teacher from now on."""
        teacher.register_forward_pre_hook(lambda *_: self._begin())
        teacher.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._start = time.process_time()

    def _end(self) -> None:
        self.seconds += time.process_time() - self._start


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """Curves of a run: validation accuracies, losses, gradient shares; evaluation is not timed."""

    def __init__(
        self,
        job: Job,
        student: InternVLForConditionalGeneration,
        encoder: CachedEncoder,
        tokenizer: PreTrainedTokenizerFast,
        splits: Splits,
        say: Callable[[str], None],
    ) -> None:
        self._evaluate = partial(tally_answers, student, encoder, tokenizer, splits.val)
        self._every = job.training.evaluate_every
        self._say = say
        self.clock = TrainingClock()
        self.curve: list[CurvePoint] = []
        self.losses: list[LossPoint] = []
        self.projections: list[ProjectionPoint] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._say(f"training begins, {state.max_steps} steps")
        self.clock.go()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock: what comes later is evaluation."""
        self.clock.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure on the validation questions now and then."""
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        self.clock.stop()
        tallies = self._evaluate()
        accuracy = {c: micro(t.values()).accuracy for c, t in tallies.items()}
        self.curve.append(CurvePoint(state.global_step, self.clock.cpu, accuracy))
        done, steps = state.global_step, state.max_steps
        left = self.clock.wall * (steps / done - 1) / 60
        to_go = f", {left:.1f} min to go" if done < steps else ""
        self._say(f"step {done}/{steps}{to_go}  {_percentages(accuracy)}")
        self.clock.go()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep losses and what the projector saw."""
        if "ce" not in logs:
            return
        names = [key.removesuffix("/loss") for key in logs if key.endswith("/loss")]
        values = {"ce": logs["ce"], **{name: logs[f"{name}/loss"] for name in names}}
        self.losses.append(LossPoint(state.global_step, values))
        signals = {
            name: Signal(
                share=logs[f"{name}/share"],
                cosine=logs[f"{name}/cosine_ce"],
                conflict=logs[f"{name}/conflict_ce"],
            )
            for name in names
            if f"{name}/share" in logs
        }
        if signals:
            self.projections.append(ProjectionPoint(state.global_step, signals))


def _arguments(job: Job) -> transformers.TrainingArguments:
    training = job.training
    arguments = transformers.TrainingArguments(
        output_dir=str(job.output),
        max_steps=round(training.steps * job.arm.steps_factor),
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta2=0.98,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        max_grad_norm=training.max_grad_norm,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to=[],
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=job.device == "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    leave_other_gpus(arguments)
    return arguments


def _blank(
    empty_road: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hide the picture from a teacher."""
    return args, {**kwargs, "pixel_values": empty_road.expand_as(kwargs["pixel_values"])}


def _percentages(accuracy: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())
