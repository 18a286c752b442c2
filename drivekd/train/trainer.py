"""A transformers.Trainer whose step learns from teachers' attention maps as well."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from drivekd.capture import capture_attention
from drivekd.data.collate import Collator
from drivekd.projection import GradientProjector
from drivekd.reweighting import BalancedWeights, OnlineWeights, Reweighting, StaticWeights
from drivekd.train.config import ANCHOR, DistillConfig
from drivekd.train.metrics import StepMetrics
from drivekd.train.models import prepare_teachers
from drivekd.train.signals import Signal, SignalPlan

STATE_FILE = "drivekd_state.pt"
# What a collator's batch holds beside model inputs.
_BATCH_EXTRAS = frozenset({"tokens", "routes", "question_types", "record_ids"})


class DistillTrainer(transformers.Trainer):  # type: ignore[misc]
    """Trains a student on answers and on signals from teachers.

    A step runs each teacher, without gradients, on the samples routed to it and no further than
    the last layer that is needed, the student once on the whole batch, and joins the gradients of
    cross-entropy and signals by `drivekd.GradientProjector`. Without signals it is
    `transformers.Trainer`, step for step and at its cost.

    Scaling under gradient accumulation: cross-entropy is `Trainer`'s own, each token of the
    optimizer step weighs the same (`num_items_in_batch`); a signal is its mean over the
    micro-batch's samples divided by the number of micro-batches. Projection and weighting see
    cross-entropy times the number of micro-batches, so that its gradient has the size of one
    micro-batch's mean whatever the accumulation.

    The logged `loss` is the cross-entropy alone; `drivekd.train.metrics.StepMetrics` names what is
    logged beside it. Where weights are static and nothing is projected, one plain backward serves
    all losses, and gradients are compared (norms, cosines) on logging steps only. Under torchrun
    the losses' gradients are averaged over processes and then joined, as `GradientProjector` does:
    weights, norms and updates are those of all processes together. With
    `gradient_accumulation_steps` above 1, `projection.every="step"` communicates once per step
    instead of once per micro-batch.

    Args:
        student: The model to train.
        teachers: Models or checkpoint paths by name. They are put on the student's device, in eval
            mode, without gradients, and are never saved.
        config: Signals and how they are mixed, weighted and joined.
        question_types: The question types of the data, for mixing; None reads them from
            `train_dataset`.
        teacher_dtype: dtype of teachers that are loaded, as in `load_model`.
        **trainer_arguments: Those of `transformers.Trainer` but `model`. The data collator must be
            a `drivekd.data.Collator`; its routes are set from `config`.

    Raises:
        TypeError: An argument has the wrong kind.
        ValueError: A teacher is missing, a layer does not exist, or mixing does not fit the data.
        NotImplementedError: Signals under DeepSpeed, FSDP or DataParallel.
    """

    data_collator: Any

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module | str | Path],
        config: DistillConfig,
        *,
        question_types: Collection[str] | None = None,
        teacher_dtype: str = "auto",
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(config, DistillConfig):
            raise TypeError(f"config is a {type(config).__name__}, wanted DistillConfig")
        if trainer_arguments.get("model_init") is not None:
            raise ValueError("model_init is not supported; make the student before the trainer")
        super().__init__(model=student, **trainer_arguments)
        self.distill_config = config
        self.distill_metrics = StepMetrics(threshold=config.small_share_warning)
        self.plan: SignalPlan | None = None
        self.projector: GradientProjector | None = None
        self.reweighting: Reweighting | None = None
        if config.signals:
            self._prepare_signals(teachers, question_types, teacher_dtype)

    def _prepare_signals(
        self,
        teachers: Mapping[str, nn.Module | str | Path],
        question_types: Collection[str] | None,
        teacher_dtype: str,
    ) -> None:
        config = self.distill_config
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.n_gpu > 1:
            raise NotImplementedError(
                "signals need whole gradients in one process per device: DeepSpeed, FSDP and "
                "DataParallel are not supported by this trainer; launch with torchrun, or make one "
                "GPU visible (CUDA_VISIBLE_DEVICES)"
            )
        collator: object = self.data_collator
        if not isinstance(collator, Collator):
            raise TypeError(
                f"data_collator is a {type(collator).__name__}, wanted drivekd.data.Collator: "
                "signals need its token layout and routes"
            )
        wanted = {signal.teacher for signal in config.signals}
        ready = prepare_teachers(
            teachers, wanted, self.model, self.args.device, dtype=teacher_dtype
        )
        types = _question_types(self.train_dataset) if question_types is None else question_types
        self.plan = SignalPlan(config, self.model, ready, types)
        self.data_collator = collator.with_routes(self.plan.routes)
        self.projector = GradientProjector(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            method=config.projection.method,
            anchor=ANCHOR,
            missing=config.projection.missing,
            ce_multiplicity=config.projection.ce_multiplicity,
            every=config.projection.every,
            seed=config.projection.seed,
        )
        self.reweighting = build_reweighting(config)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch: forwards, losses, joined gradients added into `.grad`.

        Returns:
            0-d cross-entropy, detached, with `Trainer`'s scaling.

        Raises:
            RuntimeError: A loss is not finite; the message names it and the batch's records.
        """
        with _advice_on_memory():
            if self.plan is None:
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
                self._note({ANCHOR: loss * self.current_gradient_accumulation_steps}, inputs)
                return loss
            return self._distill_step(self.plan, model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of a batch, as `Trainer` computes it from the model inputs alone."""
        inputs = {key: value for key, value in inputs.items() if key not in _BATCH_EXTRAS}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row; rows of training also get losses, weights and gradient shares."""
        if "loss" in logs:
            logs.update(self.distill_metrics.flush())
        super().log(logs, start_time)

    def _distill_step(
        self,
        plan: SignalPlan,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        routes = inputs.get("routes", {})
        signals = plan.present(routes)
        with self.accelerator.autocast():
            teachers = plan.run_teachers(routes)
        if self._compares_gradients():
            # Outside DistributedDataParallel: the projector averages the gradients.
            model = self.model
        layers = sorted({layer for signal in signals for layer in signal.student_layers})
        with contextlib.ExitStack() as stack:
            capture = stack.enter_context(capture_attention(model, layers)) if layers else None
            stack.enter_context(self.compute_loss_context_manager())
            loss, outputs = self.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            cross_entropy: Tensor = loss * self._accumulation(num_items_in_batch)
        logits = outputs["logits"] if any(signal.loss is None for signal in signals) else None
        with self.accelerator.autocast():
            signal_losses = plan.losses(signals, inputs, teachers, capture, logits)
        del outputs, logits, capture, teachers
        losses = {ANCHOR: cross_entropy, **signal_losses}
        self._backward(losses, signals)
        self._note(losses, inputs)
        logged: Tensor = cross_entropy.detach() / self.current_gradient_accumulation_steps
        return logged

    def _backward(self, losses: Mapping[str, Tensor], signals: list[Signal]) -> None:
        """Add the joined gradient of a micro-batch into `.grad`."""
        steps = self.current_gradient_accumulation_steps
        if self.projector is None or not self._compares_gradients():
            total = losses[ANCHOR]
            for signal in signals:
                total = total + signal.config.weight * losses[signal.config.name]
            self.accelerator.backward(total / steps)
            return
        report = self.projector.backward(
            losses, weights=self.reweighting, scaler=self.accelerator.scaler, scale=1.0 / steps
        )
        is_last = self.accelerator.gradient_state.sync_gradients
        if is_last and self.distill_config.projection.every == "step":
            report = self.projector.step()
        if report is not None:
            self.distill_metrics.add_report(report)

    def _compares_gradients(self) -> bool:
        """Whether this micro-batch's gradients are taken task by task."""
        config = self.distill_config
        if config.projection.method != "none" or config.weighting != "static":
            return True
        every = 0 if self.args.logging_strategy == "no" else self.state.logging_steps
        return bool(every) and (self.state.global_step + 1) % int(every) == 0

    def _accumulation(self, num_items_in_batch: Tensor | int | None) -> int:
        """Factor from `compute_loss`'s cross-entropy to one of a micro-batch mean's size."""
        if self.compute_loss_func is None and (
            num_items_in_batch is None or not self.model_accepts_loss_kwargs
        ):
            return 1
        return int(self.current_gradient_accumulation_steps)

    def _note(self, losses: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> None:
        """Log the losses of a micro-batch; refuse any that is not finite."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if not bool(values.isfinite().all()):
            broken = {
                name: value
                for name, value in zip(losses, values.tolist(), strict=True)
                if not torch.isfinite(torch.tensor(value))
            }
            raise RuntimeError(
                f"step {self.state.global_step + 1}: losses are not finite: {broken}; records of "
                f"this micro-batch: {inputs.get('record_ids', 'unknown')}. Look at these records, "
                "lower learning_rate, or use bf16 instead of fp16"
            )
        self.distill_metrics.add_losses(losses)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projector is not None and self.args.should_save:
            torch.save(self._distill_state(), Path(output_dir) / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights through `from_pretrained`, which knows the names they are saved under.

        Trainer's own loading takes the file's names as the module's; those of vision-language
        models differ, and it then goes on with the start weights and a log line.
        """
        model = self.model if model is None else model
        if not isinstance(model, transformers.PreTrainedModel) or _has_adapters(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, report = type(model).from_pretrained(
            resume_from_checkpoint, dtype=model.dtype, output_loading_info=True
        )
        if report["missing_keys"] or report["unexpected_keys"]:
            missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
            raise ValueError(
                f"{resume_from_checkpoint} does not fit the student: it lacks {missing[:3]} and "
                f"has {unexpected[:3]} beside"
            )
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.projector is None:
            return
        file = Path(checkpoint) / STATE_FILE
        if not file.exists():
            raise ValueError(
                f"{checkpoint} has no {file.name}, the state of projection and weighting: it was "
                "not saved by a run with signals (or with save_only_model). To start a new run "
                "from its weights, give it as the student instead of resuming"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.projector.load_state_dict(state["projector"])
        if self.reweighting is not None:
            self.reweighting.load_state_dict(state["reweighting"])

    def _distill_state(self) -> dict[str, Any]:
        if self.projector is None or self.reweighting is None:
            return {}
        return {
            "projector": self.projector.state_dict(),
            "reweighting": self.reweighting.state_dict(),
        }


def build_reweighting(config: DistillConfig) -> Reweighting:
    """Make the object that weights the losses of a distillation."""
    options: dict[str, Any] = dict(config.weighting_options)
    if config.weighting == "balance":
        return BalancedWeights({signal.name: signal.share for signal in config.signals}, **options)
    weights = {ANCHOR: 1.0} | {signal.name: signal.weight for signal in config.signals}
    if config.weighting == "online":
        return OnlineWeights(weights, **options)
    return StaticWeights(weights, **options)


def _has_adapters(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def _question_types(dataset: Any) -> set[str]:
    """The question types of a data set of records."""
    try:
        return {dataset[index].question_type for index in range(len(dataset))}
    except (TypeError, AttributeError) as error:
        raise TypeError(
            "the question types cannot be read from train_dataset, which is no sequence of "
            "drivekd.data.Record; pass question_types"
        ) from error


@contextlib.contextmanager
def _advice_on_memory() -> Iterator[None]:
    """Say on an out-of-memory error what to change; the error goes on as it is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            "drivekd: lower per_device_train_batch_size and raise gradient_accumulation_steps, set "
            "gradient_checkpointing, load teachers in bfloat16, give signals fewer layers, or set "
            "projection.method none with weighting static (one backward instead of one per signal)"
        )
        raise
