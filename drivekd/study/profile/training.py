"""What the steps of a recipe's training cost, and which part of it is distillation."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback

from drivekd.errors import RecipeError, TrainingMemoryError
from drivekd.phases import listening, phase
from drivekd.study.measure import MemoryTrace, device_name, release, untouched_random
from drivekd.study.profile.clock import OTHER, PhaseClock
from drivekd.train.config import DistillConfig, ProjectionConfig
from drivekd.train.recipe import Recipe
from drivekd.train.run import make_ready, make_trainer
from drivekd.train.trainer import DistillTrainer

# What a profile must not do, or do otherwise than asked for.
_QUIET = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "auto_find_batch_size": False,
    "resume_from_checkpoint": None,
}
PLAIN, ONE_BACKWARD = "plain fine-tuning", "one backward for all losses"


@dataclass(frozen=True)
class Phase:
    """A part of a training step.

    Attributes:
        name: What it is.
        seconds: Of a step, mean over steps.
        peak_bytes: The most memory in it, beside what was there when the step began; None where
            it was not looked at.
    """

    name: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Steps:
    """Steps of a training, timed without looking inside.

    Attributes:
        name: Of the recipe, or of what was changed about it.
        seconds: Of each step, from the end of the one before: data, logging and all.
        tokens: Of each step, without padding.
        peak_bytes: The most memory of a step, beside what was there when it began.
        held_bytes: Weights and buffers of student and teachers and the optimizer's state.
        problem: Why it was not measured; None where it was.
    """

    name: str
    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    peak_bytes: int | None
    held_bytes: dict[str, int]
    problem: str | None = None

    @property
    def step_seconds(self) -> float | None:
        """Median over steps."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens over all time."""
        return sum(self.tokens) / sum(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class TrainingProfile:
    """What a recipe's training steps cost.

    Attributes:
        steps: As they run, without looking inside.
        split_seconds: Of each of as many further steps, with a wait at each phase's ends.
        phases: Their parts, in the order in which they come; seconds add up to the mean of
            `split_seconds`.
        what_if: The same recipe with less, on the same records.
        device: The student's.
        dtype: Of the student's weights.
        attention: Of the student's decoder.
        records: In an optimizer step.
    """

    steps: Steps
    split_seconds: tuple[float, ...]
    phases: tuple[Phase, ...]
    what_if: tuple[Steps, ...]
    device: str
    dtype: str
    attention: str
    records: int


def profile_recipe(
    recipe: Recipe,
    *,
    steps: int = 5,
    warmup: int = 2,
    what_if: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> TrainingProfile:
    """Run a few steps of a recipe's own training and measure where time and memory go.

    Nothing is saved: the trainer works in a temporary folder that is deleted, logs nothing, and
    the run's own folder is not looked at. Random generators are afterwards where they were.
    Images are not all decoded beforehand. Of `steps` steps the time is taken as they run, of as
    many more phase by phase; on a CPU one more is followed for its memory. With `what_if` the
    recipe is loaded and run again without signals, and, where gradients are joined or weighted
    loss by loss, with one backward for all losses.

    Args:
        recipe: What `load_recipe` gave.
        steps: Optimizer steps that are measured, at least 1.
        warmup: Steps before, at least 1: the first one makes the optimizer's state.
        what_if: Whether to measure the recipe with less.
        progress: Is told what is done.

    Raises:
        RecipeError: A setting does not fit, or there are several processes.
        DataError: A record is not usable.
        TrainingMemoryError: Memory ran out; the message says which settings to change.
        ValueError: `steps` or `warmup` is below 1.
        OSError: A checkpoint or file does not exist.
    """
    for name, value in (("steps", steps), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"{name} is {value}, wanted at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a profile is of one process; run it without torchrun or accelerate")
    with untouched_random(), tempfile.TemporaryDirectory(prefix="drivekd-profile-") as folder:
        progress("the recipe as it is")
        own = _run(recipe, "this recipe", folder, steps, warmup, splits=True)
        others = []
        for name, changed in _changes(recipe).items() if what_if else ():
            progress(name)
            try:
                found = _run(changed, name, folder, steps, warmup, splits=False).steps
            except TrainingMemoryError as error:
                found = Steps(name, (), (), None, {}, problem=str(error).split(". ")[0])
            others.append(found)
    return dataclasses.replace(own, what_if=tuple(others))


def _changes(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with less."""
    distill = recipe.distill
    if not distill.active:
        return {}
    changes = {PLAIN: dataclasses.replace(recipe, distill=DistillConfig(), cache=None)}
    if distill.projection.method != "none" or distill.weighting != "static":
        together = dataclasses.replace(
            distill,
            projection=ProjectionConfig(method="none"),
            weighting="static",
            weighting_options=type(distill)().weighting_options,
        )
        # Steps that log compare gradients, one backward a loss.
        training = {**recipe.training, "logging_strategy": "no"}
        changes[ONE_BACKWARD] = dataclasses.replace(recipe, distill=together, training=training)
    return changes


def _run(
    recipe: Recipe, name: str, folder: str, steps: int, warmup: int, *, splits: bool
) -> TrainingProfile:
    """Train for as long as it takes to measure."""
    count = warmup + steps + 1 + (steps if splits else 0)
    training = {**recipe.training, **_QUIET, "output_dir": folder, "max_steps": count}
    recipe = dataclasses.replace(recipe, training=training)
    watch = _Watch(steps, warmup, splits=splits)
    ready = make_ready(recipe, decode=False)
    trainer = make_trainer(recipe, ready, callbacks=[watch], trainer_class=_ProfiledTrainer)
    trainer.remove_callback(PrinterCallback)
    place = trainer.args.device
    watch.follow(trainer)
    try:
        with listening(watch):
            trainer.train()
        held = _held(trainer)
        student: Any = trainer.model
        return TrainingProfile(
            steps=Steps(
                name,
                tuple(watch.seconds),
                tuple(int(tokens) for tokens in watch.tokens),
                max(watch.peaks.values(), default=None),
                held,
            ),
            split_seconds=tuple(sum(step.values()) for step in watch.split),
            phases=watch.phases(),
            what_if=(),
            device=device_name(place),
            dtype=str(next(student.parameters()).dtype).removeprefix("torch."),
            attention=str(student.config.get_text_config(decoder=True)._attn_implementation),
            records=trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        )
    finally:
        trainer.accelerator.free_memory()
        del trainer
        watch.leave()
        release(place)


class _ProfiledTrainer(DistillTrainer):
    """Names the phases that are Trainer's own, and counts tokens."""

    step_tokens: Tensor | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with phase("data"):
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        with phase("data"):
            prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        mask = prepared.get("attention_mask")
        if mask is not None:
            tokens = (mask > 0).sum()
            before = self.step_tokens
            self.step_tokens = tokens if before is None else before + tokens
        return prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with phase("student and cross-entropy"):
            return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.accelerator.backward

        def backward(*inner: Any, **settings: Any) -> None:
            with phase("backward of all losses"):
                plain(*inner, **settings)

        self.accelerator.backward = backward
        try:
            return super().training_step(*args, **kwargs)
        finally:
            del self.accelerator.backward

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with phase("optimizer"):
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        with phase("optimizer"):
            return super()._get_grad_norm(model, grad_norm=grad_norm)


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Times the steps of a training: first as they run, then phase by phase, then memory."""

    def __init__(self, steps: int, warmup: int, *, splits: bool) -> None:
        self._plain = range(warmup, warmup + steps)
        self._split = range(warmup + steps, warmup + (2 * steps if splits else steps))
        self._trainer: Any = None
        self._devices: list[torch.device] = []
        self._time = self._memory = PhaseClock([])
        self._active: PhaseClock | None = None
        self._begin = 0.0
        self.seconds: list[float] = []
        self.tokens: list[Tensor | int] = []

    def follow(self, trainer: DistillTrainer) -> None:
        """Know the trainer whose steps these are, and the devices that it uses."""
        self._trainer = trainer
        models = _models(trainer).values()
        used = {p.device for each in models for model in each for p in model.parameters()}
        self._devices = [place for place in used if place.type == "cuda"]
        self._time = PhaseClock(self._devices)
        self._memory = PhaseClock(self._devices, None if self._devices else MemoryTrace())

    def begin(self, name: str) -> None:
        if self._active is not None:
            self._active.begin(name)

    def end(self) -> None:
        if self._active is not None:
            self._active.end()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._next(0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.begin("optimizer")  # until the step ends: update, schedule, gradients set to zero

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.leave()
        for device in self._devices:
            torch.cuda.synchronize(device)
        if state.global_step - 1 in self._plain:
            self.seconds.append(time.perf_counter() - self._begin)
            self.tokens.append(self._trainer.step_tokens or 0)
        self._next(state.global_step)

    def _next(self, step: int) -> None:
        self._trainer.step_tokens = None
        if step in self._split:
            self._active = self._time
        elif step == self._split.stop:
            self._active = self._memory
        if self._active is not None:
            self._active.start()
        self._begin = time.perf_counter()

    def leave(self) -> None:
        """Stop the clock that runs, if one does."""
        if self._active is not None:
            self._active.stop()
        self._active = None

    @property
    def split(self) -> list[dict[str, float]]:
        """Of each step that was split the seconds by phase."""
        return self._time.seconds

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes by phase."""
        clocks = (self._time.peaks, self._memory.peaks)
        names = {name for peaks in clocks for name in peaks}
        return {name: max(peaks.get(name, 0) for peaks in clocks) for name in names}

    def phases(self) -> tuple[Phase, ...]:
        """The parts of a step, in the order in which they come."""
        names = dict.fromkeys(name for step in self.split for name in step if name != OTHER)
        return tuple(
            Phase(
                name,
                sum(step.get(name, 0.0) for step in self.split) / len(self.split),
                self.peaks.get(name),
            )
            for name in (*names, *([OTHER] if self.split else []))
        )


def _models(trainer: DistillTrainer) -> dict[str, list[nn.Module]]:
    teachers = [] if trainer.plan is None else trainer.plan.teachers
    return {"student": [trainer.model], "teachers": teachers}


def _held(trainer: DistillTrainer) -> dict[str, int]:
    """Bytes that a training holds all the time, by what they are."""
    tensors: dict[str, list[Any]] = {
        name: [t for model in models for t in (*model.parameters(), *model.buffers())]
        for name, models in _models(trainer).items()
    }
    states = trainer.optimizer.state.values()
    tensors["optimizer"] = [t for own in states for t in own.values() if isinstance(t, Tensor)]
    return {
        name: sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in own}.values())
        for name, own in tensors.items()
    }
