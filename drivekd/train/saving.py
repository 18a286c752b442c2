"""A transformers.Trainer whose checkpoints are whole or absent, and whose log resumes exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from drivekd.errors import CheckpointError
from drivekd.train import checkpoints, ranks, sharding
from drivekd.train.sharding_trainer import ShardingTrainer


class SurvivingTrainer(ShardingTrainer):
    """`transformers.Trainer` with `drivekd.train.checkpoints`.

    `train` takes "last" and "auto" for the checkpoint; a damaged one is refused. Every save logs a
    row first, so that the rows after resuming cover the same steps as those of a run that was not
    interrupted.
    """

    _staging: Path | None = None
    _resumed_total_loss: float | None = None
    _tr_loss: Tensor

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the start or from a checkpoint; see `DistillTrainer.train`."""
        run = Path(self.args.output_dir)
        if self.args.should_save:
            checkpoints.finish_interrupted(run)
        self.accelerator.wait_for_everyone()
        checkpoint = checkpoints.find(resume_from_checkpoint, run)
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def resume_total_loss(self, total: float | None) -> None:
        """Go on with a checkpoint's sum of losses: Trainer starts at 0 and divides by all steps."""
        self._resumed_total_loss = total

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log before each save, so that rows after resuming cover the same steps as without."""
        may_save = self.control.should_save or (
            self.args.save_strategy == SaveStrategy.BEST and self.control.should_evaluate
        )
        if may_save and self.args.logging_strategy != "no":
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._restore_total_loss()
        self._tr_loss = ranks.mean(self._tr_loss)  # Trainer's is this process' since the last row
        return super()._finalize_training(*args, **kwargs)

    def _restore_total_loss(self) -> None:
        if self._resumed_total_loss is not None:
            self._total_loss_scalar, self._resumed_total_loss = self._resumed_total_loss, None

    def _get_output_dir(self, trial: Any) -> str:
        run: str = super()._get_output_dir(trial)
        return run if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside and move it to its place once it is complete."""
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run / checkpoints.STAGING / name, run / name
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(staged)
                checkpoints.publish(staged, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise CheckpointError(_what_to_do(error, run, final)) from error
        finally:
            self._staging = None
        if self.args.should_save:
            checkpoints.rotate(
                run,
                limit=self.args.save_total_limit,
                newest=final,
                best=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `_save_checkpoint` pushes what is in its place."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights through `from_pretrained`, which knows the names they are saved under.

        Trainer's own loading takes the file's names as the module's; those of vision-language
        models differ, and it then goes on with the start weights and a log line.
        """
        checkpoints.check(Path(resume_from_checkpoint))
        model = self.model if model is None else model
        if self.accelerator.is_fsdp2 and _has_adapters(model):
            file = Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
            sharding.load_adapter(model, file)
            return
        if not isinstance(model, transformers.PreTrainedModel) or _has_adapters(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with sharding.whole_models():
            saved, report = sharding.plain_class(model).from_pretrained(
                resume_from_checkpoint, dtype=model.dtype, output_loading_info=True
            )
        if report["missing_keys"] or report["unexpected_keys"]:
            missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
            raise ValueError(
                f"{resume_from_checkpoint} does not fit the student: it lacks {missing[:3]} and "
                f"has {unexpected[:3]} beside"
            )
        if self.accelerator.is_fsdp2:
            sharding.load_model(model, saved.state_dict())
        else:
            model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _what_to_do(error: BaseException, run: Path, final: Path) -> str:
    """The message for a checkpoint that could not be written."""
    last = checkpoints.newest_complete(run)
    free = shutil.disk_usage(run).free / 2**30 if run.is_dir() else 0.0
    kept = "no earlier checkpoint is there" if last is None else f"the last complete one is {last}"
    return (
        f"{final} could not be written ({error}); {run} has {free:.1f} GiB free, {kept}. Make "
        "room (older checkpoints, training.save_total_limit, another training.output_dir), then "
        "go on with training.resume_from_checkpoint=auto"
    )


def _has_adapters(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None
