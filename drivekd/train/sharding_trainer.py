"""A transformers.Trainer that shards as DistributedDataParallel copies: the same files and logs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from drivekd.errors import RecipeError
from drivekd.train import ranks, sharding


class ShardingTrainer(transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with `drivekd.train.sharding`, for FSDP2 on any device.

    Checkpoints and gradient norms are those of one process.
    """

    _vision_is_whole = False

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own, which on CPUs shards as well where FSDP is asked for.

        Raises:
            RecipeError: A launcher started several processes, which have not found each other.
            UnsupportedEngineError: FSDP1.
        """
        if ranks.launched() > 1 and self.args.world_size == 1:
            raise RecipeError(
                f"a launcher started {ranks.launched()} processes but each would train alone, "
                "without a GPU; on CPUs give training.use_cpu=true (TrainingArguments.use_cpu)"
            )
        with sharding.on_any_device(self.args):
            super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            sharding.set_up(self.accelerator.state.fsdp_plugin)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.is_fsdp2:
            sharding.name_layers(self.accelerator.state.fsdp_plugin, self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._step_apart()
        return prepared

    def _step_apart(self) -> None:
        if self.accelerator.is_fsdp2 and sharding.trains_beside_shards(self.model):
            sharding.step_apart(self.optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own, which under FSDP2 writes the whole student, tied weights once."""
        if not self.accelerator.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        state = sharding.gather_model(self.model, keep=self.args.should_save)
        if self.args.should_save:
            with sharding.plain_classes(self.model):
                self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Trainer's own, for evaluation.

        Raises:
            DataError: Under FSDP2, only some processes' batches have images.
        """
        self._check_same_inputs(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _check_same_inputs(self, inputs: Mapping[str, Any]) -> None:
        if self.accelerator.is_fsdp2 and not self._vision_is_whole:
            sharding.check_same_inputs(inputs, self.args.device)

    def _student_autocast(self) -> Any:
        """Autocast where parts beside FSDP2's shards do not get its mixed precision."""
        is_partly_sharded = self.accelerator.is_fsdp2 and bool(
            self.accelerator.state.fsdp_plugin.ignored_modules
        )
        return self.accelerator.autocast() if is_partly_sharded else contextlib.nullcontext()

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        return sharding.whole(super()._get_grad_norm(*args, **kwargs))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.accelerator.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.gather_optimizer(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Of several processes on CPUs the device is "cpu:0", to which torch.load reads nothing.
        own = self.accelerator.is_fsdp2 or self.args.device == torch.device("cpu", 0)
        if checkpoint is None or not own:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        file = Path(checkpoint) / OPTIMIZER_NAME
        if not file.exists():  # of a run with save_only_model
            return
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        sharding.load_optimizer(self.optimizer, state)
        self._step_apart()  # the state says how another launcher's optimizer stepped
        scheduler = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
