"""Distil driving vision-language models through attention maps that are never materialised."""

import importlib
from types import ModuleType

from drivekd import functional
from drivekd.capture import capture_attention
from drivekd.errors import (
    BackendUnavailableError,
    CaptureError,
    DataError,
    RecipeError,
    TokenMismatchError,
)
from drivekd.losses import AttentionMapLoss
from drivekd.ops.dispatch import backend_info
from drivekd.pairing import match_layer_groups
from drivekd.projection import (
    GradientProjector,
    ProjectionReport,
    agp_weights,
    pcgrad_weights,
)
from drivekd.reweighting import BalancedWeights, OnlineWeights, StaticWeights
from drivekd.tokens import TokenLayout

__version__ = "0.1.0.dev0"

_ON_DEMAND = ("data", "driving", "study", "train")  # they import transformers, matplotlib, ...

__all__ = [
    "AttentionMapLoss",
    "BackendUnavailableError",
    "BalancedWeights",
    "CaptureError",
    "DataError",
    "GradientProjector",
    "OnlineWeights",
    "ProjectionReport",
    "RecipeError",
    "StaticWeights",
    "TokenLayout",
    "TokenMismatchError",
    "__version__",
    "agp_weights",
    "backend_info",
    "capture_attention",
    "functional",
    "match_layer_groups",
    "pcgrad_weights",
]


def __getattr__(name: str) -> ModuleType:
    """Import a subpackage when it is first named, so that `import drivekd` stays light."""
    if name in _ON_DEMAND:
        return importlib.import_module(f"drivekd.{name}")
    raise AttributeError(f"module 'drivekd' has no attribute {name!r}")
