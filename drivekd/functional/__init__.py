"""The public functions: stateless, validated, documented; they delegate and keep nothing."""

from drivekd.functional.attention import (
    attention_map,
    attention_map_loss,
    layerwise_attention_map_loss,
)
from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram
from drivekd.functional.target_loss import (
    attention_map_target_loss,
    layerwise_attention_map_target_loss,
)
from drivekd.functional.targets import AttentionMapTarget, attention_map_targets

__all__ = [
    "AttentionMapTarget",
    "GradientGram",
    "attention_map",
    "attention_map_loss",
    "attention_map_target_loss",
    "attention_map_targets",
    "combine_gradients",
    "gradient_gram",
    "layerwise_attention_map_loss",
    "layerwise_attention_map_target_loss",
]
