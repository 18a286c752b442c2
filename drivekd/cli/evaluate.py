"""The command `drivekd evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivekd.cli.common import OK, AddCommand, positive

if TYPE_CHECKING:
    from drivekd.driving.scoring import Scores
    from drivekd.study.tables import Table


def add_evaluate_command(commands: Any, add_command: AddCommand) -> None:
    """Add `evaluate` to the parser."""
    command = add_command(
        commands,
        "evaluate",
        _run_evaluate,
        help="score a saved student on multiple-choice records",
        description="Let a saved model answer multiple-choice records greedily, and score it.",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="folder of a saved model")
    command.add_argument("records", type=Path, metavar="RECORDS", help="file of records")
    command.add_argument(
        "--root", type=Path, metavar="DIR", help="where image paths start; default: RECORDS' folder"
    )
    command.add_argument(
        "--recipe", type=Path, metavar="FILE", help="take encoder settings from this recipe"
    )
    command.add_argument("--blank", action="store_true", help="also score with images blanked")
    command.add_argument(
        "--reference", type=Path, metavar="FILE", help="training records, for the majority baseline"
    )
    command.add_argument("--batch-size", type=positive, default=32, metavar="N")
    command.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    command.add_argument("--answers", type=Path, metavar="FILE", help="write answers as JSON lines")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _run_evaluate(settings: argparse.Namespace) -> int:
    import torch

    from drivekd.data import load_records
    from drivekd.driving.scoring import score
    from drivekd.study.evaluate import generate_answers
    from drivekd.study.tables import to_text
    from drivekd.train import EncoderConfig, load_model, load_recipe
    from drivekd.train.encoders import build_encoder

    if not settings.model.is_dir():
        raise FileNotFoundError(f"{settings.model} is not a folder; MODEL is that of a saved model")
    records = load_records(settings.records)
    reference = load_records(settings.reference) if settings.reference else None
    encoding = load_recipe(settings.recipe).encoder if settings.recipe else EncoderConfig()
    root = settings.root or settings.records.parent
    encoder, processing = build_encoder(encoding, settings.model, root)
    model = load_model(settings.model).to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(*, blank_images: bool) -> list[str]:
        return generate_answers(
            model,
            encoder,
            getattr(processing, "tokenizer", processing),
            records,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            blank_images=blank_images,
        )

    answers = answer(blank_images=False)
    if settings.answers:
        rows = [{"id": r.id, "answer": a} for r, a in zip(records, answers, strict=True)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        settings.answers.write_text(lines, encoding="utf-8")
    scores = score(records, answers, reference=reference)
    blank = score(records, answer(blank_images=True)) if settings.blank else None
    if settings.json:
        document = {"scores": scores.to_dict(), "blank": blank.to_dict() if blank else None}
        print(json.dumps(document, indent=1))
    else:
        print(to_text(_score_table(scores, blank)))
    return OK


def _score_table(scores: Scores, blank: Scores | None) -> Table:
    """Accuracy by capability and by kind of question, with baselines where they were asked for."""
    from drivekd.study.tables import NOT_MEASURED, Row, Table

    columns = ["", "questions", "accuracy", "majority", "blank image", "no choice readable"]
    groups = {"by_capability": "capability", "by_question": "question"}
    if scores.by_question.keys() == scores.by_capability.keys():  # records name no kinds
        del groups["by_question"]
    rows = []
    for group, kind in groups.items():
        for name, tally in getattr(scores, group).items():
            cells = (
                f"{tally.count:,}",
                f"{100 * tally.accuracy:.1f} ± {100 * tally.standard_error:.1f}",
                NOT_MEASURED if tally.majority is None else f"{100 * tally.majority:.1f}",
                f"{100 * getattr(blank, group)[name].accuracy:.1f}" if blank else NOT_MEASURED,
                f"{tally.unparsable:,}",
            )
            rows.append(Row(name, cells, kind))
    notes = (
        "Percent of questions answered correctly ± binomial standard error. An answer without a "
        "readable choice counts as wrong.",
    )
    return Table("Accuracy", tuple(columns), tuple(rows), notes)
