"""What several commands share: exit codes, kinds of arguments, progress."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

OK, FOUND_PROBLEMS, FAILED = 0, 1, 2

MOST_SEED = 2**32 - 1  # numpy's
_EVERY_SECONDS = 5.0
AddCommand = Callable[..., Any]  # of a parser: name, function, help=, description=


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}; it must be at least 1")
    return value


def natural(text: str) -> int:
    """An int of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"is {value}; it must be at least 0")
    return value


def seed(text: str) -> int:
    """A seed of numpy and torch, for argparse."""
    value = int(text)
    if not 0 <= value <= MOST_SEED:
        raise argparse.ArgumentTypeError(f"is {value}; it must be from 0 to {MOST_SEED}")
    return value


class Progress:
    """A line on the terminal every few seconds, with the time left."""

    def __init__(self) -> None:
        self._what = ""
        self._start = self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say where the work is, if it is time to."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._last = what, now, now
        if now - self._last < _EVERY_SECONDS:
            return
        self._last = now
        left = (now - self._start) / max(done, 1) * (total - done)
        print(f"{what} {done:,} of {total:,}, {left / 60:.0f} min left", file=sys.stderr)
