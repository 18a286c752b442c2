"""The README's loops, each as a diff: what a user has, and what it becomes."""

import re
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(frozen=True)
class Loop:
    """A loop before and after, and how many lines were added."""

    before: str
    after: str
    added: int


def loops():
    """The loops in the README's order: plain, Accelerate, Trainer with losses, with signals."""
    text = README.read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```diff\n(.*?)```", text, flags=re.DOTALL):
        lines = block.splitlines()
        assert all(not line or line[0] in " +-" for line in lines), block
        before, after = (
            "\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-"
        )
        found.append(Loop(before, after, sum(line.startswith("+") for line in lines)))
    return dict(zip(("plain", "accelerate", "trainer", "signals"), found, strict=True))
