"""A transformers.Trainer whose checkpoints are whole or absent, and whose log resumes exactly."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from drivekd.errors import CheckpointError
from drivekd.train import checkpoints, ranks, sharding
from drivekd.train.sharding_trainer import ShardingTrainer

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_LOG = logging.getLogger(__name__)


class EndsExactly(_Trainer):  # type: ignore[misc]
    """Before a Trainer: a checkpoint that has all of a run's steps is not trained any further."""

    def _run_epoch(self, **settings: Any) -> None:
        """An epoch; none where a checkpoint has all steps: Trainer would do one more."""
        if self.state.global_step >= self.state.max_steps:
            _LOG.warning(
                "the checkpoint has %d of %d steps, there is nothing left to train",
                self.state.global_step,
                self.state.max_steps,
            )
            self.control.should_training_stop = True
            return
        super()._run_epoch(**settings)


class SurvivingTrainer(EndsExactly, ShardingTrainer):
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
        # Newer Trainers divide by the steps since then, but the sum is that of all steps.
        self._initial_global_step = 0
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
            raise CheckpointError(what_to_do(error, run, final)) from error
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
        """Check a checkpoint and load its weights, see `load_weights`."""
        checkpoints.check(Path(resume_from_checkpoint))
        model = self.model if model is None else model
        is_sharded = self.accelerator.is_fsdp2
        if is_sharded and getattr(model, "peft_config", None) is not None:
            file = Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
            sharding.load_adapter(model, file)
        elif can_load_weights(model):
            load_weights(model, resume_from_checkpoint, is_sharded=is_sharded)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def what_to_do(error: BaseException, run: Path, final: Path) -> str:
    """The message for a checkpoint or student that could not be written."""
    last = checkpoints.newest_complete(run)
    free = shutil.disk_usage(run).free / 2**30 if run.is_dir() else 0.0
    kept = "no earlier checkpoint is there" if last is None else f"the last complete one is {last}"
    return (
        f"{final} could not be written ({error}); {run} has {free:.1f} GiB free, {kept}. Make "
        "room (older checkpoints, training.save_total_limit, another training.output_dir), then "
        "go on with training.resume_from_checkpoint=auto"
    )


def can_load_weights(model: nn.Module) -> bool:
    """Whether `load_weights` takes a model: transformers' own, without adapters."""
    has_adapters = getattr(model, "peft_config", None) is not None
    return isinstance(model, transformers.PreTrainedModel) and not has_adapters


def load_weights(model: Any, folder: str, *, is_sharded: bool = False) -> None:
    """Load weights through `from_pretrained`, which knows the names they are saved under.

    Trainer's own loading takes the file's names as the module's; those of vision-language models
    differ, and it then goes on with the start weights and a log line.

    Raises:
        ValueError: The weights do not fit the model.
    """
    with sharding.whole_models():
        saved, report = sharding.plain_class(model).from_pretrained(
            folder, dtype=model.dtype, output_loading_info=True
        )
    if report["missing_keys"] or report["unexpected_keys"]:
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        raise ValueError(
            f"{folder} does not fit the student: it lacks {missing[:3]} and has {unexpected[:3]} "
            "beside"
        )
    if is_sharded:
        sharding.load_model(model, saved.state_dict())
    else:
        model.load_state_dict(saved.state_dict())
