"""The `drivekd` command. Every subcommand imports what it needs when it runs, and not before."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivekd.cli_cache import add_cache_command
from drivekd.cli_data import FOUND_PROBLEMS, OK, add_data_commands
from drivekd.cli_prestudy import add_prestudy_command
from drivekd.cli_profile import add_profile_command
from drivekd.cli_report import add_report_command
from drivekd.errors import (
    BackendUnavailableError,
    CacheError,
    CaptureError,
    CheckpointError,
    DataError,
    NonFiniteLossError,
    RecipeError,
    RunFailedError,
    TokenMismatchError,
    TrainingMemoryError,
    UnsupportedEngineError,
)

if TYPE_CHECKING:
    from drivekd.driving.scoring import Scores
    from drivekd.study.tables import Table

# What a user can put right; anything else is a bug and shows its traceback.
EXPECTED_ERRORS = (
    BackendUnavailableError,
    CacheError,
    CaptureError,
    CheckpointError,
    DataError,
    NonFiniteLossError,
    RecipeError,
    RunFailedError,
    TokenMismatchError,
    TrainingMemoryError,
    UnsupportedEngineError,
    ImportError,
    OSError,
)
FAILED = 2

_DESCRIPTION = """\
drivekd distils large driving vision-language models into small ones: the student learns where its
teachers look, from attention maps that are never held in memory, for perception, reasoning and
planning. It runs on a CPU or a GPU.

start here:
  drivekd doctor              what is installed, what was built, what runs where
  drivekd demo                the whole job in minutes, on a simulated highway and without a GPU;
                              then open runs/demo/report.html
  drivekd data check FILE     whether your own records can be used
  drivekd distill RECIPE      your own models and records
"""
_EPILOG = """\
examples:
  drivekd demo --fast                                 see that everything works, learn nothing
  drivekd demo --seeds 0 1 2 --output runs/three      means with standard errors
  drivekd demo --prepare world                        the data set alone, for another machine:
  drivekd demo --full --device cuda --data world      every arm, side by side on its GPU
  drivekd distill recipes/multi.yaml training.learning_rate=1e-5 training.output_dir=runs/a
  drivekd cache recipes/multi.yaml cache.path=runs/targets --dry-run
  drivekd verify recipes/multi.yaml                   fused losses against eager ones
  drivekd profile runs/a/student path/to/large        memory, tokens/s, time to the first token
  drivekd data check train.json --root images/
  drivekd doctor OpenGVLab/InternVL3-8B-hf            what its parts as a teacher would cost
  drivekd data convert llava.json --output train.jsonl --question-type perception
  drivekd evaluate runs/a/student test.json --blank --reference train.json

where things go:
  demo        runs/demo, or --output: report.html, report.md, report.json, plots, data, students
  distill     training.output_dir of the recipe: student/, log.jsonl, checkpoint-*/
  cache       cache.path of the recipe
  verify      there too: verify.json
  report      report.html beside the run's log.jsonl
  prestudy    prestudy in training.output_dir, runs/prestudy, or --output
  the others  to the terminal; --json (data, doctor, evaluate, profile) for programs

exit codes:
  0 all is well   1 the command ran and found problems   2 it could not do what was asked

`drivekd COMMAND --help` says more about each. An error is one line; --debug shows its traceback.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0; 1 where a check found problems; 2 where the command failed.

    Raises:
        SystemExit: with code 2 for a command line that is not legal, 0 after `--help`.
    """
    settings = _parse(build_parser(), arguments)
    try:
        code: int = settings.run(settings)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("drivekd: interrupted", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        own_module = isinstance(error, ImportError) and (error.name or "").startswith("drivekd")
        if settings.debug or own_module:
            raise
        print(f"drivekd {settings.command}: error: {_one_line(error)}", file=sys.stderr)
        return FAILED


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; argparse itself refuses KEY=VALUE behind an option."""
    settings, rest = parser.parse_known_args(arguments)
    if hasattr(settings, "overrides") and all("=" in r and r[0] != "-" for r in rest):
        settings.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return settings


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="drivekd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_distill(commands)
    add_cache_command(commands, _add_command)
    add_prestudy_command(commands, _add_command)
    _add_verify(commands)
    add_profile_command(commands, _add_command)
    add_report_command(commands, _add_command)
    add_data_commands(commands, _add_command)
    _add_evaluate(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, *, help: str, description: str) -> Any:
    """A subcommand; --debug is legal behind its name too."""
    command = commands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    command.set_defaults(run=run, command=name)
    return command


def _add_demo(commands: Any) -> None:
    command = _add_command(
        commands,
        "demo",
        _run_demo,
        help="distil on a simulated highway and write a report",
        description="Simulate highway scenes with questions about them, train small students with "
        "and without\nteachers, and write a report with every baseline. The same command goes on "
        "where it was stopped.\nNeeds highway-env (pip install 'drivekd[demo]'), or --data.",
    )
    command.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s"
    )
    arms = command.add_mutually_exclusive_group()
    arms.add_argument("--full", action="store_true", help="every arm and control, three seeds")
    arms.add_argument("--arms", nargs="+", metavar="ARM", help="these arms; default: ce multi+agp")
    command.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="student seeds; default 0, with --full 0 1 2",
    )
    command.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="runs side by side, a process of one thread each; default: the machine's cores, on "
        "a GPU also no more than one for each 2 GiB of its memory",
    )
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where models run, in float32; default: a GPU if torch sees one",
    )
    length = command.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive, metavar="N", help="steps of each student")
    length.add_argument(
        "--fast",
        action="store_true",
        help="a small world and a few steps: shows that it works, learns nothing",
    )
    world = command.add_mutually_exclusive_group()
    world.add_argument(
        "--prepare",
        type=Path,
        metavar="DIR",
        help="only make the data set, into DIR, for --data here or on another machine",
    )
    world.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a data set made by --prepare; checked; default: data/ in --output, made if need be",
    )
    command.add_argument(
        "--report-only", action="store_true", help="train nothing; report what has finished"
    )


def _add_distill(commands: Any) -> None:
    command = _add_command(
        commands,
        "distill",
        _run_distill,
        help="train a student as a recipe says",
        description="Train the student of a recipe (a YAML file; recipes/ holds examples). "
        "Settings given behind it\nreplace the recipe's, such as training.learning_rate=1e-5.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")


def _add_verify(commands: Any) -> None:
    command = _add_command(
        commands,
        "verify",
        _run_verify,
        help="check the fused losses on your own models and records",
        description="Compare each loss of a recipe and its gradients with those of eager "
        "attention, on the recipe's\nstudent, teachers and first records: errors against what the "
        "dtype allows, time and memory. Needs\nroom for a second copy of the models. Exit code 1 "
        "if anything differs.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.add_argument(
        "--samples", type=_positive, default=2, metavar="N", help="records in the batch; default: 2"
    )
    command.add_argument(
        "--repeats", type=_positive, default=3, metavar="N", help="timed steps; default: 3"
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="default: verify.json in training.output_dir"
    )


def _add_evaluate(commands: Any) -> None:
    command = _add_command(
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
    command.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    command.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    command.add_argument("--answers", type=Path, metavar="FILE", help="write answers as JSON lines")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_doctor(commands: Any) -> None:
    command = _add_command(
        commands,
        "doctor",
        _run_doctor,
        help="what is installed, what was built, what runs where",
        description="Show versions, devices, the compiled extension, and which backend each op "
        "would use, and why\nnot another. Exit code 1 if drivekd is not usable here.\n\n"
        "With MODEL or --recipe: what a model, or each part that its signals need, will load and "
        "compute;\nreads its config and the headers of its files, no weights.",
    )
    command.add_argument("model", nargs="?", metavar="MODEL", help="folder, or cached hub name")
    command.add_argument(
        "--layers",
        nargs="+",
        type=_layers,
        metavar="LAYERS",
        help="layers of MODEL whose maps are wanted, such as first, penultimate, 0..-2 or 3; "
        "default: those of perception, reasoning and planning",
    )
    command.add_argument(
        "--recipe", type=Path, metavar="FILE", help="student and teachers of this recipe"
    )
    command.add_argument("--dtype", default="auto", help="of MODEL in memory; default: as saved")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print everything as JSON")
    what.add_argument("--build", action="store_true", help="only what the installation built")


def _run_demo(settings: argparse.Namespace) -> int:
    from drivekd import demo

    if settings.prepare:
        folder = demo.prepare(settings.prepare, workers=settings.workers, fast=settings.fast)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"data set: {folder} ({size / 1e6:.1f} MB); use it with --data {folder}")
        return OK
    report = demo.run(
        settings.output,
        arms=settings.arms,
        full=settings.full,
        seeds=settings.seeds,
        workers=settings.workers,
        steps=settings.steps,
        fast=settings.fast,
        data=settings.data,
        device=settings.device,
        report_only=settings.report_only,
    )
    print(f"report: {report}")
    return OK


def _run_distill(settings: argparse.Namespace) -> int:
    from drivekd import train

    student = train.distill(train.load_recipe(settings.recipe, settings.overrides))
    if os.environ.get("RANK", "0") == "0":  # of several processes the first
        print(f"student: {student}")
    return OK


def _run_verify(settings: argparse.Namespace) -> int:
    from drivekd.study.tables import to_text
    from drivekd.study.verify import DIFFERS
    from drivekd.study.verify_recipe import verify_document, verify_recipe, verify_table
    from drivekd.train import load_recipe

    recipe = load_recipe(settings.recipe, settings.overrides)
    checks = verify_recipe(recipe, samples=settings.samples, repeats=settings.repeats)
    print(to_text(verify_table(checks)))
    document = verify_document(checks)
    file = settings.json or Path(recipe.training["output_dir"]) / "verify.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nall numbers: {file}")
    return FOUND_PROBLEMS if document["verdict"] == DIFFERS else OK


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


def _run_doctor(settings: argparse.Namespace) -> int:
    if settings.model or settings.recipe:
        return _run_doctor_model(settings)
    if settings.layers:
        raise RecipeError("--layers needs a MODEL")
    from drivekd.doctor import diagnose, format_build, format_diagnosis

    diagnosis = diagnose()
    if settings.json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=1))
    else:
        print(format_build(diagnosis) if settings.build else format_diagnosis(diagnosis))
    return FOUND_PROBLEMS if diagnosis.problems else OK


def _run_doctor_model(settings: argparse.Namespace) -> int:
    from drivekd.study.costs import cost_table
    from drivekd.study.tables import to_text
    from drivekd.train.cost import ROLES, loading_cost, recipe_costs
    from drivekd.train.recipe import load_recipe

    try:
        costs = recipe_costs(load_recipe(settings.recipe)) if settings.recipe else []
        if settings.model:
            roles = {"these layers": settings.layers} if settings.layers else ROLES
            costs += [
                loading_cost(settings.model, layers, role=role, dtype=settings.dtype)
                for role, layers in roles.items()
            ]
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if settings.json:
        print(json.dumps([dataclasses.asdict(cost) for cost in costs], indent=1))
    else:
        print(to_text(cost_table(costs)))
    return OK


class _Version(argparse.Action):
    """Prints the installed version; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("drivekd")
        except metadata.PackageNotFoundError:
            version = "(not installed, run from its source tree)"
        print(f"drivekd {version}")
        parser.exit()


def _layers(text: str) -> int | str:
    """A layer's number, or the name of layers, for argparse."""
    return int(text) if text.lstrip("-").isdigit() else text


def _positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}; it must be at least 1")
    return value


def _one_line(error: BaseException) -> str:
    """The error's message with its line breaks taken out; its kind where it has none."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
