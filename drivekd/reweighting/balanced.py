"""Loss weights that hold every loss at a set share of the anchor's gradient norm."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drivekd.reweighting.checks import (
    check_anchor,
    check_keys,
    check_known,
    check_norms,
    check_number,
    check_numbers,
    vector,
)


class BalancedWeights:
    """Holds each loss's weighted gradient norm at a set share of the anchor's.

    The weight that would do so now is `share_k |g_anchor| / |g_k|`; the weight in use is its
    exponential moving average, taken in the log domain (norms vary by factors, not by amounts). The
    first observation starts the average. A loss that is absent from a step keeps its state, and a
    zero or non-finite norm, its own or the anchor's, leaves it untouched. Before the first usable
    observation the weight is 0. The anchor's weight is 1.

    Args:
        shares: Share of the anchor's gradient norm, above 0: one number for every other loss, or
            one per name. 0.02 to 0.25 was useful.
        ema: Weight of the past in the average, in [0, 1); 0 follows every step.
        max_weight: Upper bound of every weight, or None. A loss whose gradient vanishes asks for
            ever larger weights.

    Raises:
        TypeError: `shares`, `ema` or `max_weight` is no number (or mapping of numbers).
        ValueError: One of them is out of range.

    Note:
        AGP with `ce_multiplicity="official"` counts the anchor once per other loss, so that the
        effective share is `shares` divided by the number of other losses.
    """

    def __init__(
        self,
        shares: Mapping[str, float] | float = 0.1,
        *,
        ema: float = 0.9,
        max_weight: float | None = None,
    ) -> None:
        self._shares: dict[str, float] | float
        if isinstance(shares, Mapping):
            self._shares = check_numbers("shares", shares, minimum=0.0, open_below=True)
        else:
            self._shares = check_number("shares", shares, minimum=0.0, open_below=True)
        self._ema = check_number("ema", ema, minimum=0.0, below=1.0)
        self._max_weight = math.inf
        if max_weight is not None:
            self._max_weight = check_number("max_weight", max_weight, minimum=0.0, open_below=True)
        self._log_weights: dict[str, Tensor] = {}

    def weights(self, names: tuple[str, ...], norms: Tensor, anchor: str) -> Tensor:
        """The averaged weights after this step's norms, (K,) float64; 1 for the anchor.

        Raises:
            TypeError: `norms` is no float64 tensor.
            ValueError: The anchor is absent or has a share, a name has no share, or `norms` is
                not (K,).
        """
        check_norms(names, norms)
        at = check_anchor(names, anchor)
        others = [name for name in names if name != anchor]
        if isinstance(self._shares, Mapping):
            if anchor in self._shares:
                raise ValueError(f"shares has {anchor!r}, the anchor; its weight is always 1")
            check_known("shares", others, self._shares)
            shares = [1.0 if name == anchor else self._shares[name] for name in names]
        else:
            shares = [self._shares] * len(names)
        unseen = norms.new_full((), math.nan)
        before = torch.stack([self._log_weights.get(n, unseen).to(norms.device) for n in names])

        seen_now = (vector(shares, norms.device) * norms[at] / norms).log()
        average = self._ema * before + (1.0 - self._ema) * seen_now
        after = torch.where(before.isnan(), seen_now, average)
        after = torch.where(seen_now.isfinite(), after, before)
        for name, log_weight in zip(names, after.unbind(), strict=True):
            if name != anchor:
                self._log_weights[name] = log_weight
        weights = torch.where(after.isnan(), 0.0, after.exp()).clamp(max=self._max_weight)
        return torch.cat([weights[:at], torch.ones_like(weights[:1]), weights[at + 1 :]])

    def state_dict(self) -> dict[str, Any]:
        """The averages, by name: `{"log_weights": {name: 0-d float64 tensor}}`."""
        return {"log_weights": {name: own.clone() for name, own in self._log_weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; tensors move to the device of the next norms."""
        check_keys(state, ("log_weights",))
        self._log_weights = {name: own.clone() for name, own in state["log_weights"].items()}
