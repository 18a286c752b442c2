"""Fixed loss weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from drivekd.reweighting.checks import (
    check_keys,
    check_known,
    check_norms,
    check_numbers,
    vector,
)


class StaticWeights:
    """Fixed weights.

    Args:
        weights: Weight of every loss that may come, finite and at least 0.

    Raises:
        TypeError: A weight is no number.
        ValueError: A weight is negative or not finite.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = check_numbers("weights", weights, minimum=0.0)

    def weights(self, names: tuple[str, ...], norms: Tensor, anchor: str) -> Tensor:
        """The fixed weights of `names`, (K,) float64.

        Raises:
            TypeError: `norms` is no float64 tensor.
            ValueError: A name has no weight, or `norms` is not (K,).
        """
        check_norms(names, norms)
        check_known("weights", names, self._weights)
        return vector([self._weights[name] for name in names], norms.device)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are settings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take `state_dict()` back."""
        check_keys(state, ())
