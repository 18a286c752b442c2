"""How many bytes a model's weights and its cache of keys and values take, from the config alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from drivekd.train.teachers import head_class

# Settings of attention whose cache is not one key and one value per head and token.
_OTHER_CACHES = ("kv_lora_rank", "global_head_dim", "num_global_key_value_heads")


def weight_count(config: Any) -> int:
    """Parameters of a model of this config with its language-model head, tied ones once.

    Raises:
        ValueError: Transformers has no language model for this config.
    """
    with torch.device("meta"):
        model = head_class(config)(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def kv_cache_bytes(
    config: Any, dtype: torch.dtype, *, tokens: int, batch_size: int = 1
) -> int | None:
    """Bytes of the keys and values that generating keeps of so many tokens a sequence.

    batch_size x 2 x key heads x head dim x bytes of a number, times the sum over layers of the
    tokens that a layer keeps: all of them, or of a sliding window w at most the last w - 1. After
    generating n tokens the last one is not in the cache: it holds prompt + n - 1.

    Args:
        config: The model's config.
        dtype: dtype of keys and values.
        tokens: Tokens of each sequence.
        batch_size: Sequences.

    Returns:
        Bytes; None where the cache is of another kind: latent attention, state spaces, chunks.
    """
    text = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    if any(getattr(text, name, None) is not None for name in _OTHER_CACHES):
        return None
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(key_heads, int):
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = sum(
        min(tokens, layer.sliding_window - 1)
        if isinstance(layer, DynamicSlidingWindowLayer)
        else tokens
        for layer in layers
    )
    return int(batch_size * 2 * key_heads * head_dim * dtype.itemsize * kept)


def held_kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in getattr(cache, "layers", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )
