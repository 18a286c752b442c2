"""The object that weights the losses of a distillation."""

from __future__ import annotations

from typing import Any

from drivekd.reweighting import BalancedWeights, OnlineWeights, Reweighting, StaticWeights
from drivekd.train.config import ANCHOR, DistillConfig


def build_reweighting(config: DistillConfig) -> Reweighting:
    """Make the object that weights the losses of a distillation."""
    options: dict[str, Any] = dict(config.weighting_options)
    if config.weighting == "balance":
        return BalancedWeights({signal.name: signal.share for signal in config.signals}, **options)
    weights = {ANCHOR: 1.0} | {signal.name: signal.weight for signal in config.signals}
    if config.weighting == "online":
        return OnlineWeights(weights, **options)
    return StaticWeights(weights, **options)
