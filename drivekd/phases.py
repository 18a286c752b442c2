"""Named stretches of a training step, for a listener such as `drivekd profile`'s clock.

Without a listener a phase costs nothing but entering a `with`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Listener(Protocol):
    """What is told where phases begin and end; phases nest."""

    def begin(self, name: str) -> None:
        """A phase begins."""

    def end(self) -> None:
        """The innermost phase ends."""


_listeners: list[Listener] = []


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A stretch of a step with a name; told to the listener, if there is one."""
    if not _listeners:
        yield
        return
    listener = _listeners[-1]
    listener.begin(name)
    try:
        yield
    finally:
        listener.end()


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of all phases inside."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
