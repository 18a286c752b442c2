"""The public functions: stateless, validated, documented; they delegate and keep nothing."""

from drivekd.functional.attention import (
    attention_map,
    attention_map_loss,
    layerwise_attention_map_loss,
)
from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram

__all__ = [
    "GradientGram",
    "attention_map",
    "attention_map_loss",
    "combine_gradients",
    "gradient_gram",
    "layerwise_attention_map_loss",
]
