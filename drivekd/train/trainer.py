"""A transformers.Trainer whose step learns from teachers' attention maps as well."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.data.collate import Collator, Route
from drivekd.projection import GradientProjector
from drivekd.reweighting import Reweighting
from drivekd.train import placement, ranks, sharding
from drivekd.train.cache.targets import bind, teacher_precision, warn_of_missing
from drivekd.train.config import ANCHOR, DistillConfig
from drivekd.train.dataset import has_text_alone, question_types_of
from drivekd.train.guards import TaskLoss, advise_on_memory, check_finite_together
from drivekd.train.metrics import StepMetrics
from drivekd.train.models import check_named, prepare_teachers
from drivekd.train.recipe import CacheConfig
from drivekd.train.saving import SurvivingTrainer
from drivekd.train.scaling import micro_batch_factor
from drivekd.train.signals import Signal, SignalPlan, StudentCapture
from drivekd.train.speed import Speed
from drivekd.train.weighting import build_reweighting

STATE_FILE = "drivekd_state.pt"
# What a collator's batch holds beside model inputs.
_BATCH_EXTRAS = frozenset({"tokens", "routes", "question_types", "record_ids"})


class DistillTrainer(SurvivingTrainer):
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

    The logged `loss` is the cross-entropy alone; `drivekd.train.metrics.StepMetrics` and
    `drivekd.train.speed.Speed` name what is logged beside it. A signal with a static weight of 0
    costs nothing: its teacher is not loaded, its layers are not captured and its loss is not
    computed.

    Where weights are static and nothing is projected, one plain backward serves all losses, and
    gradients are compared (norms, cosines) on logging steps only.

    Several processes (`accelerate launch`, torchrun), the student whole on each (DDP) or sharded
    (FSDP2, by Accelerate's plugin or `args.fsdp`): the losses' gradients are averaged over
    processes and then joined, as `GradientProjector` does; weights, norms, updates and log rows
    are those of all processes together, and checkpoints those of one. With
    `gradient_accumulation_steps` above 1, `projection.every="step"` communicates once per step
    instead of once per micro-batch under DDP.

    Args:
        student: The model to train.
        teachers: Models or checkpoint paths by name. Of a path only what the signals need is
            loaded (`load_teacher`). They are put on the student's device or `teacher_device`, in
            eval mode, without gradients, and are never saved.
        config: Signals and how they are mixed, weighted and joined.
        question_types: The question types of the data, for mixing; None reads them from
            `train_dataset`.
        teacher_dtype: dtype of teachers that are loaded, as in `load_model`.
        teacher_device: Where teachers run: a device such as "cuda:1", a mapping from teachers to
            devices, "auto" (`drivekd.train.placement.place_teachers`), or None for the student's.
            If given, a process without a launcher trains on one GPU and leaves the others to them.
        cache: Where the targets of attention signals are (`drivekd.train.cache_targets`); the
            teachers of these signals are then paths, which need not exist, and are not loaded.
        **trainer_arguments: Those of `transformers.Trainer` but `model`. The data collator must be
            a `drivekd.data.Collator`; its routes are set from `config`.

    Raises:
        CacheError: The cache has nothing of a signal, or is damaged; while training, also where a
            record has no entry.
        TypeError: An argument has the wrong kind.
        ValueError: A teacher is missing, a layer does not exist, or mixing does not fit the data.
        UnsupportedEngineError: FSDP1, or signals under DeepSpeed or DataParallel.
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
        teacher_device: placement.Placement = None,
        cache: CacheConfig | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(config, DistillConfig):
            raise TypeError(f"config is a {type(config).__name__}, wanted DistillConfig")
        if trainer_arguments.get("model_init") is not None:
            raise ValueError("model_init is not supported; make the student before the trainer")
        if teacher_device is not None and trainer_arguments.get("args") is not None:
            placement.leave_other_gpus(trainer_arguments["args"])
        super().__init__(model=student, **trainer_arguments)
        self.distill_config = config
        self.distill_metrics = StepMetrics(
            threshold=config.small_share_warning,
            method=config.projection.method,
            names=config.names,
        )
        self._speed = Speed()
        self.plan: SignalPlan | None = None
        self.projector: GradientProjector | None = None
        self.reweighting: Reweighting | None = None
        self._update_done = False
        self._is_sharded = False
        self._trains_beside_shards = False
        if config.active:
            self._prepare_signals(teachers, question_types, teacher_dtype, teacher_device, cache)

    def _prepare_signals(
        self,
        teachers: Mapping[str, nn.Module | str | Path],
        question_types: Collection[str] | None,
        teacher_dtype: str,
        teacher_device: placement.Placement,
        cache: CacheConfig | None,
    ) -> None:
        config = self.distill_config
        sharding.refuse_engines(self)
        check_named(teachers)
        collator: object = self.data_collator
        if not isinstance(collator, Collator):
            raise TypeError(
                f"data_collator is a {type(collator).__name__}, wanted drivekd.data.Collator: "
                "signals need its token layout and routes"
            )
        cached = {}
        devices = placement.place_teachers(teacher_device, teachers, self.args.device)
        needs = config.teacher_layers(cached=cache is not None)
        if cache is not None:
            precision = teacher_precision(teacher_dtype, self.args)
            cached = bind(cache, config, self.model, teachers, precision=precision)
            teachers = {
                name: teacher
                for name, teacher in teachers.items()
                if name in needs or name not in config.teacher_layers()
            }
        with sharding.whole_models():
            ready = prepare_teachers(
                teachers,
                needs,
                self.model,
                devices,
                dtype=teacher_dtype,
            )
        data = (self.train_dataset, self.eval_dataset)
        if self.accelerator.is_fsdp2 and any(map(has_text_alone, data)):
            sharding.replicate_vision(self.accelerator.state.fsdp_plugin, self.model)
            self._vision_is_whole = True
        types = question_types_of(self.train_dataset) if question_types is None else question_types
        self.plan = SignalPlan(config, self.model, ready, types, cached)
        warn_of_missing(cached, self.plan.signals, self.train_dataset)
        self.data_collator = collator.with_routes(self.plan.routes, self.plan.sources)
        self.plan.helpers.to(self.args.device)
        self.projector = self._make_projector(self.plan)
        self.reweighting = build_reweighting(config)

    def _make_projector(self, plan: SignalPlan) -> GradientProjector:
        """A projector for the student as it is now, sharded or not, and what is trained beside."""
        projection = self.distill_config.projection
        return GradientProjector(
            nn.ModuleList([self.model, plan.helpers]),
            method=projection.method,
            anchor=ANCHOR,
            missing=projection.missing,
            ce_multiplicity=projection.ce_multiplicity,
            every=projection.every,
            seed=projection.seed,
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint; "last" or True (the newest of `output_dir`, which
                must exist); "auto" (the newest, if there is one); None or False for a fresh run.
            trial: As in `transformers.Trainer`.
            ignore_keys_for_eval: As in `transformers.Trainer`.

        Returns:
            What `transformers.Trainer.train` returns.

        Raises:
            CheckpointError: The checkpoint is damaged, or one could not be written.
            NonFiniteLossError: A loss is not finite.
            TrainingMemoryError: Memory ran out; the message says which settings to change.
            ValueError: There is no checkpoint to resume from, or it does not fit the student.
        """
        with ranks.failing_together(), advise_on_memory(self.args, self.distill_config):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; evaluation needs no teachers, and a cache has training records only."""
        collator = self.data_collator
        if isinstance(collator, Collator) and not kwargs.get("is_training", False):
            self.data_collator = collator.with_routes({})
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's scheduler; what is trained beside the student first gets a group of its own.

        Not before: Accelerate has an optimizer's parameters sharded, and knows the student's alone.
        """
        helpers = [] if self.plan is None else list(self.plan.helpers.parameters())
        known = {id(own) for group in self.optimizer.param_groups for own in group["params"]}
        if helpers and id(helpers[0]) not in known:
            self.optimizer.add_param_group({"params": helpers, "weight_decay": 0.0})
        return super().create_scheduler(*args, **kwargs)

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
            NonFiniteLossError: A loss is not finite; the message names it, its layers and records.
        """
        self._restore_total_loss()
        self._check_same_inputs(inputs)
        self._speed.add(inputs.get("attention_mask"), self.state.global_step)
        if self.plan is None:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            self._note(loss * self.current_gradient_accumulation_steps, {}, inputs)
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
        """Log a row; rows of training also get losses, weights, shares and speed."""
        if "loss" in logs:
            logs.update(self.distill_metrics.flush())
            logs.update(self._speed.flush(self.state.global_step, self.state.max_steps))
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
        if self._update_done:
            plan.helpers.zero_grad()  # Trainer does so for the student alone
        self._update_done = self.accelerator.gradient_state.sync_gradients
        routes = inputs.get("routes", {})
        signals, own = self._present(plan, routes)
        with self.accelerator.autocast():
            teachers = plan.run_teachers(routes)
        if self._compares_gradients():
            # Outside DistributedDataParallel: the projector averages the gradients.
            model = self.model
        with (
            StudentCapture(model, signals) as capture,
            self.compute_loss_context_manager(),
            self._student_autocast(),
        ):
            loss, outputs = self.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            cross_entropy: Tensor = loss * micro_batch_factor(self, num_items_in_batch)
        logits = outputs["logits"] if any(signal.loss is None for signal in signals) else None
        with self.accelerator.autocast():
            output = capture.output(logits)
            signal_losses = plan.losses(own, inputs, teachers, output)
            losses = {name: loss.layers.mean() for name, loss in signal_losses.items()}
            for signal in signals:
                losses.setdefault(signal.config.name, output.zero(signal))
        del outputs, logits, capture, teachers, output
        self._backward({ANCHOR: cross_entropy, **losses}, signals)
        self._note(cross_entropy, signal_losses, inputs)
        logged: Tensor = cross_entropy.detach() / self.current_gradient_accumulation_steps
        return logged

    def _present(
        self, plan: SignalPlan, routes: Mapping[str, Route]
    ) -> tuple[list[Signal], list[Signal]]:
        """The signals of this micro-batch, and those of them that have samples in this process.

        FSDP2 communicates inside a backward: a signal of any process is one of all.
        """
        own = plan.present(routes)
        if not self.accelerator.is_fsdp2:
            return own, own
        names = [signal.config.name for signal in plan.signals]
        has = [signal.config.name for signal in own]
        together = ranks.union(has, names, self.args.device)
        return [signal for signal in plan.signals if signal.config.name in together], own

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
        is_step = self.distill_config.projection.every == "step"
        if is_step and self.accelerator.gradient_state.sync_gradients:
            report = self.projector.step()
        if report is not None:
            self.distill_metrics.add_report(report, scale=1.0 if is_step else 1.0 / steps)

    def _compares_gradients(self) -> bool:
        """Whether this micro-batch's gradients are taken task by task."""
        config = self.distill_config
        if config.projection.method != "none" or config.weighting != "static":
            return True
        if self._trains_beside_shards or (self.plan is not None and len(self.plan.helpers)):
            return True  # outside DistributedDataParallel or FSDP2: the projector averages them
        every = 0 if self.args.logging_strategy == "no" else self.state.logging_steps
        return bool(every) and (self.state.global_step + 1) % int(every) == 0

    def _note(
        self, cross_entropy: Tensor, signals: Mapping[str, TaskLoss], inputs: Mapping[str, Any]
    ) -> None:
        """Log the losses of a micro-batch; refuse any that is not finite."""
        anchor = TaskLoss(cross_entropy.detach()[None], (), inputs.get("record_ids", ()))
        losses = {ANCHOR: anchor, **signals}
        check_finite_together(losses, self.state.global_step + 1, self.args.device)
        self.distill_metrics.add_losses(losses)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self._distill_state(), Path(output_dir) / STATE_FILE)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._follow_sharding()
        return prepared

    def _follow_sharding(self) -> None:
        """Make the projector anew once Accelerate has put shards in the parameters' place."""
        if self.plan is not None and self.accelerator.is_fsdp2 and not self._is_sharded:
            self._is_sharded = True
            self._trains_beside_shards = sharding.trains_beside_shards(self.model)
            self.projector = self._make_projector(self.plan)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._follow_sharding()
        super()._load_optimizer_and_scheduler(checkpoint)
        file = None if checkpoint is None else Path(checkpoint) / STATE_FILE
        state = {}
        if file is not None and file.exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
        self.resume_total_loss(state.get("total_loss"))
        if file is None or self.projector is None or self.plan is None:
            return
        if "projector" not in state:
            raise ValueError(
                f"{checkpoint} has no state of projection and weighting in {file.name}: it was "
                "not saved by a run with signals (or with save_only_model). To start a new run "
                "from its weights, give it as the student instead of resuming"
            )
        self.projector.load_state_dict(state["projector"])
        self.plan.helpers.load_state_dict(state["helpers"])
        if self.reweighting is not None:
            self.reweighting.load_state_dict(state["reweighting"])

    def _distill_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"total_loss": self._total_loss_scalar}
        if self.plan is None or self.projector is None or self.reweighting is None:
            return state
        return state | {
            "projector": self.projector.state_dict(),
            "reweighting": self.reweighting.state_dict(),
            "helpers": self.plan.helpers.state_dict(),
        }
