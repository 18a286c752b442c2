"""The `drivekd` command. Every subcommand imports what it needs when it runs, and not before."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from drivekd import errors
from drivekd.cli.cache import add_cache_command
from drivekd.cli.common import FAILED, OK
from drivekd.cli.data import add_data_commands
from drivekd.cli.demo import add_demo_command
from drivekd.cli.distill import add_distill_command
from drivekd.cli.doctor import add_doctor_command
from drivekd.cli.evaluate import add_evaluate_command
from drivekd.cli.prestudy import add_prestudy_command
from drivekd.cli.profile import add_profile_command
from drivekd.cli.report import add_report_command
from drivekd.cli.verify import add_verify_command

# What a user can put right; anything else is a bug and shows its traceback.
EXPECTED_ERRORS = (
    errors.BackendUnavailableError,
    errors.CacheError,
    errors.CaptureError,
    errors.CheckpointError,
    errors.DataError,
    errors.NonFiniteLossError,
    errors.RecipeError,
    errors.RunFailedError,
    errors.TokenMismatchError,
    errors.TrainingMemoryError,
    errors.UnsupportedEngineError,
    ImportError,
    OSError,
)

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
    for add in (
        add_demo_command, add_distill_command, add_cache_command, add_prestudy_command,
        add_verify_command, add_profile_command, add_report_command, add_data_commands,
        add_evaluate_command, add_doctor_command,
    ):  # fmt: skip
        add(commands, _add_command)
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


def _one_line(error: BaseException) -> str:
    """The error's message with its line breaks taken out; its kind where it has none."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
