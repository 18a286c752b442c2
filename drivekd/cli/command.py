"""The process of the `drivekd` command: `drivekd.cli.main`, and an end that no thread can spoil."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

from drivekd.cli import main

_UNCAUGHT = 1  # Python's own exit code after a traceback


def command() -> None:
    """Run the command line and end this process with its exit code.

    One of several processes ends without Python's finalization. A gloo thread may still hold the
    last tensor that it has communicated, even after `destroy_process_group()`. Where it lets go of
    it while the interpreter is being finalized, it aborts the process (PyTorch 2.13,
    https://github.com/pytorch/pytorch/pull/179291), and a launcher takes a training that is
    complete for one that has failed.

    Raises:
        SystemExit: With the exit code.
    """
    code = _UNCAUGHT

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        os._exit(code)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit.register(leave)  # the first one in is the last one out, after all others' handlers
    try:
        code = main()
    except SystemExit as end:  # argparse's
        code = end.code if isinstance(end.code, int) else _UNCAUGHT
        raise
    sys.exit(code)
