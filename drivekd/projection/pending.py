"""What a projection waits for: gradients by loss, and what holds for all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drivekd.projection.checks import Scaler
from drivekd.reweighting import LossObserver, Reweighting

Weights = Mapping[str, float | Tensor] | Reweighting


@dataclass
class Pending:
    """Gradients that have not been projected yet, of one micro-batch or of a step's."""

    grads: dict[str, list[Tensor | None]] = field(default_factory=dict)
    weights: dict[str, float | Tensor] | Reweighting | None = None
    scaler: Scaler | None = None
    started: bool = False
    _values: dict[str, list[Tensor]] = field(default_factory=dict)
    _calls: int = 0

    def join(self, weights: Weights | None, scaler: Scaler | None) -> None:
        """Take the arguments of one more `backward`; the last weights of a loss count.

        Raises:
            ValueError: `weights` or `scaler` changed kind.
        """
        if self.started and scaler is not self.scaler:
            raise ValueError("scaler changed between two backward() calls of one step")
        before = self.weights
        if isinstance(weights, Mapping):
            if self.started and not isinstance(before, dict):
                raise ValueError("weights changed kind between two backward() calls of one step")
            self.weights = {**(before if isinstance(before, dict) else {}), **weights}
        else:
            if self.started and weights is not before:
                raise ValueError("weights changed kind between two backward() calls of one step")
            self.weights = weights
        self.scaler = scaler
        self.started = True

    def open(self, losses: Mapping[str, Tensor]) -> None:
        """Make room for losses, in their order, and note their values if somebody wants them."""
        self._calls += 1
        for name, loss in losses.items():
            self.grads.setdefault(name, [])
            if isinstance(self.weights, LossObserver):
                value = loss.detach().to(torch.float64).reshape(())
                self._values.setdefault(name, []).append(value)

    def add(self, name: str, grads: list[Tensor | None]) -> None:
        """Add a loss's gradients to what is there; takes the list over."""
        total = self.grads[name]
        if not total:
            self.grads[name] = grads
            return
        for i, before in enumerate(total):
            grad, grads[i] = grads[i], None
            # Out of place: autograd may hand out one tensor for two parameters.
            total[i] = grad if before is None else before if grad is None else before + grad

    def values(self) -> dict[str, Tensor]:
        """0-d float64 means of the loss values over all `backward` calls, absent ones as 0."""
        return {name: torch.stack(own).sum() / self._calls for name, own in self._values.items()}
