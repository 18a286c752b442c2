"""The commands `drivekd data check` and `drivekd data convert`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivekd.cli.common import FOUND_PROBLEMS, OK, AddCommand
from drivekd.errors import DataError

if TYPE_CHECKING:
    from drivekd.data.check import Checker, Problem
    from drivekd.data.reading import Entry
    from drivekd.data.records import TypeNames

_FORMATS = ("auto", "drivekd", "jsonl", "llava", "sharegpt", "drivelm", "drivebench")
_SHOWN = 5


def add_data_commands(commands: Any, add_command: AddCommand) -> None:
    """Add `data` with its two commands to the parser."""
    data = commands.add_parser("data", help="check or convert files of records")
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_check(actions, add_command)
    _add_convert(actions, add_command)


def _add_check(actions: Any, add_command: AddCommand) -> None:
    check = add_command(
        actions,
        "check",
        _run_check,
        help="read records, name every problem",
        description="Read files of records once and name every problem with file and record, "
        "grouped by kind; frames and\nquestions in two files too. Files are JSON or JSON lines "
        "(.gz too); a file is a split. Exit code 1 if\nthere are problems.",
    )
    check.set_defaults(command="data check")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.add_argument(
        "--root", type=Path, metavar="DIR", help="where image paths start; default: each file's own"
    )
    types = check.add_mutually_exclusive_group()
    types.add_argument(
        "--types",
        nargs="+",
        metavar="NAME",
        help="the legal question types; default: perception, reasoning and planning where a record "
        "has one of them, else any",
    )
    types.add_argument(
        "--recipe", type=Path, metavar="FILE", help="take the legal types from its mixing"
    )
    check.add_argument(
        "--model",
        metavar="MODEL",
        help="also find this model's special tokens, and texts longer than it reads",
    )
    _add_reading(check, _FORMATS)
    output = check.add_mutually_exclusive_group()
    output.add_argument(
        "--all", action="store_true", help=f"list every problem, not the first {_SHOWN} of a kind"
    )
    output.add_argument("--json", action="store_true", help="print every problem as JSON")


def _add_convert(actions: Any, add_command: AddCommand) -> None:
    convert = add_command(
        actions,
        "convert",
        _run_convert,
        help="write records of any known format as ours",
        description="Write LLaVA or ShareGPT conversations, DriveLM, DriveBench, a Hugging Face "
        "data set or our own\nrecords as our JSON lines. DriveLM's prediction and behavior become "
        "reasoning (--map changes that).\nExit code 1, and no output, if an item is no record.",
    )
    convert.set_defaults(command="data convert")
    convert.add_argument("source", metavar="IN", help="a file; for hf a folder or a hub name")
    convert.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    convert.add_argument(
        "--images",
        type=Path,
        metavar="ROOT",
        help="where image paths start: makes absolute paths below it relative, and takes the "
        "images that a data set holds itself",
    )
    convert.add_argument("--split", metavar="NAME", help="split of a Hugging Face data set")
    convert.add_argument("--force", action="store_true", help="replace an output that exists")
    convert.add_argument(
        "--skip-bad", action="store_true", help="leave out what is no record, write the rest"
    )
    _add_reading(convert, (*_FORMATS, "hf"))
    convert.add_argument("--json", action="store_true", help="print the counts as JSON")


def _add_reading(command: Any, formats: tuple[str, ...]) -> None:
    command.add_argument(
        "--format", choices=formats, default="auto", help="default: told by the content"
    )
    command.add_argument(
        "--question-type", default="", metavar="NAME", help="type of records that name none"
    )
    command.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="FROM=TO",
        help="question types to rename, such as behavior=planning",
    )


def _names(settings: argparse.Namespace) -> TypeNames:
    from drivekd.data.records import TypeNames

    pairs = [text.partition("=") for text in settings.map]
    for (source, _, target), text in zip(pairs, settings.map, strict=True):
        if not source.strip() or not target.strip():
            raise DataError(f"--map got {text!r}, wanted FROM=TO")
    renamed = {source.strip(): target.strip() for source, _, target in pairs}
    return TypeNames(settings.question_type.strip(), renamed)


def _run_check(settings: argparse.Namespace) -> int:
    from drivekd.data.check import Split
    from drivekd.data.reading import read_entries

    names = _names(settings)
    if len(set(settings.files)) < len(settings.files):
        raise DataError("a file is given twice; each is a split of its own")
    for file in settings.files:
        file.open("rb").close()  # what is not there ends the command before a long check
    checker = _checker(settings)
    counts: Counter[str] = Counter()
    shown: dict[str, list[Problem]] = {}
    for problem in checker.check(
        Split(
            str(file),
            _not_none(read_entries(file, settings.format, names)),
            settings.root or file.parent,
        )
        for file in settings.files
    ):
        counts[problem.kind] += 1
        if settings.all or settings.json or counts[problem.kind] <= _SHOWN:
            shown.setdefault(problem.kind, []).append(problem)
    if settings.json:
        print(json.dumps(_as_json(checker, counts, shown), indent=1, ensure_ascii=False))
    else:
        _print_report(checker, counts, shown)
    return FOUND_PROBLEMS if counts else OK


def _not_none(entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries; a file without any is a fault."""
    found = False
    for entry in entries:
        found = True
        yield entry
    if not found:
        raise DataError("holds no records")


def _checker(settings: argparse.Namespace) -> Checker:
    from drivekd.data.check import Checker

    types = settings.types
    if settings.recipe:
        from drivekd.train import load_recipe

        types = list(load_recipe(settings.recipe).distill.mixing or ()) or None
    if settings.model is None:
        return Checker(question_types=types)
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    config = AutoConfig.from_pretrained(settings.model)
    text = getattr(config, "text_config", None) or config
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return Checker(
        question_types=types,
        special_tokens=sorted(added | set(tokenizer.all_special_tokens)),
        count_tokens=lambda content: len(tokenizer(content, add_special_tokens=False)["input_ids"]),
        max_length=getattr(text, "max_position_embeddings", None),
    )


def _print_report(checker: Checker, counts: Counter[str], shown: dict[str, list[Problem]]) -> None:
    for kind, problems in shown.items():
        print(f"{kind}: {counts[kind]:,}")
        for problem in problems:
            print(f"  {problem}")
        if more := counts[kind] - len(problems):
            print(f"  ... and {more:,} more (--all lists them)")
    for name, summary in checker.summaries.items():
        types = ", ".join(f"{kind} {n:,}" for kind, n in sorted(summary.types.items())) or "empty"
        found = _count(summary.problems, "problem") if summary.problems else "no problems"
        print(
            f"{name}: {_count(summary.records, 'record')} ({types}), "
            f"{_count(summary.images, 'image')}, {found}"
        )


def _as_json(
    checker: Checker, counts: Counter[str], shown: dict[str, list[Problem]]
) -> dict[str, object]:
    return {
        "files": {name: vars(summary) for name, summary in checker.summaries.items()},
        "counts": counts,
        "problems": [dataclasses.asdict(p) for problems in shown.values() for p in problems],
    }


def _run_convert(settings: argparse.Namespace) -> int:
    from drivekd.data.convert import convert_records

    done = convert_records(
        settings.source,
        settings.output,
        format=settings.format,
        images=settings.images,
        names=_names(settings),
        split=settings.split,
        force=settings.force,
        skip_faulty=settings.skip_bad,
    )
    records = done.types.total()
    if settings.json:
        document = {
            "output": str(settings.output) if done.written else None,
            "records": records,
            "types": done.types,
            "images": len(done.images),
            "images_missing": done.missing,
            "images_root": str(done.root),
            "faults": [{"index": index, "fault": fault} for index, fault in done.faults],
        }
        print(json.dumps(document, indent=1, ensure_ascii=False))
        return FOUND_PROBLEMS if done.faults else OK
    for index, fault in done.faults[:_SHOWN]:
        print(f"{settings.source}[{index}]: {fault}")
    if len(done.faults) > _SHOWN:
        print(f"... and {len(done.faults) - _SHOWN:,} more")
    if not done.written:
        print(
            f"{_count(len(done.faults), 'item')} of {records + len(done.faults):,} cannot be "
            "converted; nothing was written (--skip-bad leaves them out)"
        )
        return FOUND_PROBLEMS
    types = ", ".join(f"{kind} {n:,}" for kind, n in sorted(done.types.items())) or "empty"
    print(f"{settings.output}: {_count(records, 'record')} ({types})")
    if done.images:
        missing = f", of which {done.missing:,} are not there" if done.missing else ""
        print(f"{_count(len(done.images), 'image')} under {done.root}{missing}")
    if done.images and done.root.absolute() != settings.output.absolute().parent:
        print(f"give that folder as data.root of a recipe, or as --root {done.root}")
    return FOUND_PROBLEMS if done.faults else OK


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
