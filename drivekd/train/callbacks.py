"""Trainer callbacks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import transformers


class JsonlLogger(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes every log row to `<output_dir>/log.jsonl`, flushed at once.

    A row is the logged values with `step`; values that are not finite become null. A run that
    resumes keeps the rows up to its checkpoint and goes on; a fresh run moves an older file to
    `log.1.jsonl`, `log.2.jsonl`, ...
    """

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make room for this run's rows."""
        file = self._file(args)
        if not state.is_world_process_zero or not file.exists():
            return
        if state.global_step == 0:
            number = 1
            while (older := file.with_name(f"log.{number}.jsonl")).exists():
                number += 1
            os.replace(file, older)
            return
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _belongs(line, state.global_step)]
        draft = file.with_name("log.jsonl.draft")
        draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, file)

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one row."""
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, **(logs or {})}
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        file = self._file(args)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite) + "\n")

    @staticmethod
    def _file(args: transformers.TrainingArguments) -> Path:
        return Path(args.output_dir) / "log.jsonl"


def _belongs(line: str, step: int) -> bool:
    """Whether a row is of training up to a step; not one cut short, nor a run's last summary."""
    try:
        row = json.loads(line)
        return float(row["step"]) <= step and "train_runtime" not in row
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
