"""How fast a training runs, how much memory it takes, and how long it still has to go."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from drivekd.train.ranks import gather


class Speed:
    """Tokens, memory and time between log rows; no synchronisation until `flush`."""

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []
        self._first: tuple[float, int] | None = None
        self._last = 0.0

    def add(self, attention_mask: Tensor | None, step: int) -> None:
        """Note the tokens of a micro-batch, before its work begins.

        Args:
            attention_mask: (B, N), 1 for tokens that are no padding; None counts none.
            step: Optimizer steps done.
        """
        if self._first is None:
            self._last = time.monotonic()
            self._first = (self._last, step)
        if attention_mask is not None:
            self._tokens.append((attention_mask > 0).sum())

    def flush(self, step: int, max_steps: int) -> dict[str, float]:
        """What a log row says; every process must call it.

        Args:
            step: Optimizer steps done.
            max_steps: Optimizer steps of the whole training.

        Returns:
            `tokens_per_second` of all processes since the last call, `memory_gib` (the most that
            was allocated on the GPU since the last call; without one, the process's peak resident
            memory; of several processes the largest) and `seconds_left`, from the steps since the
            start or resume. Time for evaluating and saving is included. Empty before the first
            `add`.
        """
        if self._first is None:
            return {}
        now, (start, first_step) = time.monotonic(), self._first
        tokens = int(torch.stack(self._tokens).sum()) if self._tokens else 0
        everyone = gather((tokens, _peak_memory()))
        tokens = sum(own for own, _ in everyone)
        row = {"memory_gib": max(memory for _, memory in everyone)}
        if now > self._last:
            row["tokens_per_second"] = tokens / (now - self._last)
        if step > first_step:
            row["seconds_left"] = (max_steps - step) * (now - start) / (step - first_step)
        self._tokens, self._last = [], now
        return row


def _peak_memory() -> float:
    """GiB."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    import resource

    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
