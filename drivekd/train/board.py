"""TensorBoard for runs that are resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations import TensorBoardCallback

FOLDER = "tensorboard"


class RunBoard(TensorBoardCallback):  # type: ignore[misc]
    """Trainer's TensorBoard callback, with one folder for a training however often it is resumed.

    That is `<output_dir>/tensorboard` (or TENSORBOARD_LOGGING_DIR). A run that resumes takes back
    what was written after its checkpoint; a fresh run moves an older folder to `tensorboard.1`,
    `tensorboard.2`, ..., as `drivekd.train.JsonlLogger` does. Transformers' own starts a new folder
    every time, so that curves overlap.
    """

    tb_writer: Any
    logging_dir: str | None

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the folder."""
        if state.is_world_process_zero and self.tb_writer is None:
            is_resumed = state.global_step > 0
            if self.logging_dir is None:
                folder = Path(args.output_dir) / FOLDER
                if not is_resumed:
                    _move_aside(folder)
                self.logging_dir = str(folder)
            self.tb_writer = self._SummaryWriter(
                log_dir=self.logging_dir, purge_step=state.global_step + 1 if is_resumed else None
            )
        super().on_train_begin(args, state, control, **kwargs)


def use_run_board(trainer: transformers.Trainer) -> None:
    """Put `RunBoard` in the place of Trainer's own callback, if it has one."""
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(RunBoard())


def _move_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (older := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.replace(folder, older)
