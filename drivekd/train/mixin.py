"""A `transformers.Trainer` of one's own, made to learn from several losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.data.collate import Route
from drivekd.projection import GradientProjector
from drivekd.reweighting import Reweighting
from drivekd.tokens import TokenLayout
from drivekd.train.config import ANCHOR, DistillConfig
from drivekd.train.guards import TaskLoss, check_finite_together
from drivekd.train.metrics import StepMetrics
from drivekd.train.models import prepare_teachers
from drivekd.train.saving import EndsExactly, can_load_weights, load_weights
from drivekd.train.scaling import micro_batch_factor
from drivekd.train.signals import SignalPlan, StudentCapture
from drivekd.train.weighting import build_reweighting

STATE_FILE = "drivekd_mixin.pt"
_ALL = "all"


class DistillMixin(EndsExactly):
    """Put it before a Trainer class: each step then joins the gradients of several losses.

    Everything else is the class's own: its `compute_loss` gives the cross-entropy, its collator
    the batches, its optimizer, clipping, fp16 scaling, evaluation, saving and callbacks stay. Give
    signals and teachers by `distill` and `teachers`, or override `named_losses`.

    Scaling under gradient accumulation, as in `DistillTrainer`: `compute_loss` keeps Trainer's
    (each token of an optimizer step weighs the same, by `num_items_in_batch`); every other loss is
    the mean over its micro-batch, and an optimizer step takes the mean over micro-batches. With
    `projection.every="step"` or method "none" with static weights, n micro-batches of b samples
    thus are one of n x b samples, where each has as many samples that count; projected in every
    micro-batch (the default, as in the public code) they are not. Projection and weights see
    cross-entropy times the number of micro-batches. Several processes are one large batch.

    The logged `loss` is the cross-entropy; losses, weights, shares and cosines are logged beside
    it. Projection and weighting are saved with each checkpoint and resumed.

    Args:
        *arguments: Those of the Trainer.
        distill: Signals, weighting and projection; every signal works on all samples, `mixing`
            needs `DistillTrainer`, and so does kind "hidden". None leaves the losses to
            `named_losses`.
        teachers: Models or checkpoint paths by name, as for `DistillTrainer`.
        teacher_dtype: dtype of teachers that are loaded.
        projector: Joins the gradients; None makes one as `distill` says, or by default.
        weights: Loss weights by name, or a `Reweighting`; None is what `distill` says, or 1.
        **trainer_arguments: Those of the Trainer.

    Raises:
        TypeError: `distill` is of another kind, or the class has no `named_losses` and no signals.
        ValueError: A teacher is missing, or a layer does not exist.
        NotImplementedError: DeepSpeed, FSDP, DataParallel; mixing; signals of kind "hidden".

    Example:
        >>> class Distiller(DistillMixin, transformers.Trainer):  # doctest: +SKIP
        ...     pass
        >>> perception = SignalConfig(name="perception", teacher="large", student_layers="first",
        ...     teacher_layers="first", region="text_to_vision")  # doctest: +SKIP
        >>> trainer = Distiller(model=student, args=arguments, train_dataset=data,
        ...     distill=DistillConfig(signals=[perception]),
        ...     teachers={"large": "OpenGVLab/InternVL3-8B-hf"})  # doctest: +SKIP
    """

    def __init__(
        self,
        *arguments: Any,
        distill: DistillConfig | None = None,
        teachers: Mapping[str, nn.Module | str | Path] | None = None,
        teacher_dtype: str = "auto",
        projector: GradientProjector | None = None,
        weights: Mapping[str, float] | Reweighting | None = None,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(*arguments, **trainer_arguments)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.n_gpu > 1:
            raise NotImplementedError(
                "DistillMixin needs whole gradients in one process per device: DeepSpeed, FSDP and "
                "DataParallel are not supported; launch with torchrun, or make one GPU visible"
            )
        if distill is not None and not isinstance(distill, DistillConfig):
            raise TypeError(f"distill is a {type(distill).__name__}, wanted a DistillConfig")
        config = distill or DistillConfig()
        if distill is None and type(self).named_losses is DistillMixin.named_losses:
            raise TypeError("give signals by distill=DistillConfig(...), or override named_losses")
        self.plan = None if distill is None else self._plan(config, teachers or {}, teacher_dtype)
        own = config.projection
        settings: dict[str, Any] = (
            {}
            if distill is None
            else {
                "method": own.method,
                "missing": own.missing,
                "ce_multiplicity": own.ce_multiplicity,
                "every": own.every,
                "seed": own.seed,
            }
        )
        self.projector = projector or GradientProjector(self.model, **settings)
        self.distill_weights = build_reweighting(config) if weights is None and distill else weights
        self.distill_metrics = StepMetrics(
            threshold=config.small_share_warning, method=settings.get("method", "agp")
        )

    def named_losses(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Mapping[str, Tensor]:
        """The losses of a micro-batch, on the device and with their graphs; override at will.

        Args:
            model: The student.
            inputs: The batch, on the device.
            num_items_in_batch: Labels of the whole optimizer step, for "ce" alone.

        Returns:
            0-d losses by name. "ce" is scaled as `compute_loss` must be: a sum over labels divided
            by `num_items_in_batch`, or, where the class sets `model_accepts_loss_kwargs` to False
            or the model takes no loss arguments, a mean over the micro-batch. All others are means
            over the micro-batch. A loss without samples is left out.
        """
        if self.plan is None:
            raise TypeError("named_losses is not overridden and there are no signals")
        tokens = inputs.pop("tokens", None)
        batch = {key: value for key, value in inputs.items() if key != "labels"}
        if tokens is None:
            tokens = TokenLayout.from_batch(batch, self.model.config)
        rows = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        routes = {route: Route(rows, batch) for route in self.plan.routes}
        signals = self.plan.signals
        labels = inputs["labels"]  # compute_loss may take it out
        with self.accelerator.autocast():
            teachers = self.plan.run_teachers(routes)
        with StudentCapture(model, signals) as capture, self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        logits = outputs["logits"] if any(signal.loss is None for signal in signals) else None
        around = {"routes": routes, "tokens": tokens, "labels": labels}
        around["question_types"] = [_ALL] * len(rows)
        with self.accelerator.autocast():
            found = self.plan.losses(signals, around, teachers, capture.output(logits))
        return {ANCHOR: loss, **{name: task.layers.mean() for name, task in found.items()}}

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch: losses, and their joined gradient added into `.grad`.

        Returns:
            0-d cross-entropy, detached, with Trainer's scaling.

        Raises:
            NonFiniteLossError: A loss is not finite.
            ValueError: `named_losses` gave no loss of the anchor's name.
        """
        # Not the DistributedDataParallel around it: the projector averages the gradients.
        student = self.model
        student.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        losses = dict(self.named_losses(student, inputs, num_items_in_batch))
        if ANCHOR not in losses:
            raise ValueError(f"named_losses gave {sorted(losses)}; {ANCHOR!r} must be among them")
        losses[ANCHOR] = losses[ANCHOR] * micro_batch_factor(self, num_items_in_batch)
        tasks = {name: TaskLoss(loss.detach()[None], (), ()) for name, loss in losses.items()}
        check_finite_together(tasks, self.state.global_step + 1, self.args.device)
        self.distill_metrics.add_losses(tasks)
        steps = self.current_gradient_accumulation_steps
        report = self.projector.backward(
            losses,
            weights=self.distill_weights,
            scaler=self.accelerator.scaler,
            scale=1.0 / steps,
        )
        is_step = report is None
        if is_step and self.accelerator.gradient_state.sync_gradients:
            report = self.projector.step()
        if report is not None:
            self.distill_metrics.add_report(report, scale=1.0 if is_step else 1.0 / steps)
        logged: Tensor = losses[ANCHOR].detach() / steps
        return logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row; rows of training also get losses, weights, shares and cosines."""
        if "loss" in logs:
            logs.update(self.distill_metrics.flush())
        super().log(logs, start_time)

    def _plan(
        self,
        config: DistillConfig,
        teachers: Mapping[str, nn.Module | str | Path],
        dtype: str,
    ) -> SignalPlan:
        if config.mixing is not None:
            raise NotImplementedError(
                "distill.mixing needs question types, which drivekd.train.DistillTrainer and its "
                "Collator know; here every signal works on all samples"
            )
        if hidden := [signal.name for signal in config.active if signal.kind == "hidden"]:
            raise NotImplementedError(
                f"signal {hidden[0]!r} compares hidden states through a map that is trained along; "
                "use drivekd.train.DistillTrainer"
            )
        needs = config.teacher_layers()
        ready = prepare_teachers(teachers, needs, self.model, self.args.device, dtype=dtype)
        return SignalPlan(config, self.model, ready, {_ALL})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if can_load_weights(model):
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"projector": self.projector.state_dict()}
            if isinstance(self.distill_weights, Reweighting):
                state["weights"] = self.distill_weights.state_dict()
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = None if checkpoint is None else Path(checkpoint) / STATE_FILE
        if file is None:
            return
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} has no {file.name}: not saved by a Trainer with DistillMixin. "
                "To start a new run from its weights, load them into the model"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.projector.load_state_dict(state["projector"])
        if isinstance(self.distill_weights, Reweighting):
            self.distill_weights.load_state_dict(state["weights"])
