"""Tiny transformers models with random weights, and inputs for them; CPU, float32, no downloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
import transformers
from torch import nn

from drivekd.tokens import TokenLayout

VOCAB = 320
IMAGE = 300
VISION_START, VISION_END, VIDEO = 302, 303, 301
NUM_TOKENS = 24
IMAGE_TOKENS = 4

Inputs = dict[str, torch.Tensor]


class Shape(TypedDict, total=False):
    """What every family's decoder can be made with."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def _text_settings(
    layers: int = 4, hidden: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 0
) -> dict[str, Any]:
    wide = {"head_dim": head_dim} if head_dim else {}
    return wide | {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


# Vectors that start at random numbers, unlike norms and most biases.
_RANDOM_VECTORS = ("image_newline", "mlp.fc1.bias", "mlp.fc2.bias")


def _finish(model: nn.Module, seed: int, std: float = 0.15) -> nn.Module:
    """Weights wide enough for maps that are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith(_RANDOM_VECTORS):
                parameter.normal_(std=std, generator=generator)
    return model.eval()


def qwen2(
    *,
    seed: int = 0,
    sliding_window: int | None = None,
    first_sliding_layer: int = 2,
    **shape: Unpack[Shape],
) -> Any:
    """Qwen2ForCausalLM; with `sliding_window` the layers from `first_sliding_layer` on slide."""
    settings = _text_settings(**shape)
    if sliding_window is not None:
        settings |= {
            "use_sliding_window": True,
            "sliding_window": sliding_window,
            "max_window_layers": first_sliding_layer,
        }
    return _finish(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)), seed)


def llama(*, seed: int = 0, **shape: Unpack[Shape]) -> Any:
    """LlamaForCausalLM."""
    settings = _text_settings(**shape)
    return _finish(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)), seed)


def qwen3(*, seed: int = 0, head_dim: int = 24, **shape: Unpack[Shape]) -> Any:
    """Qwen3ForCausalLM: query and key norms, heads wider than the hidden size over their number."""
    settings = _text_settings(head_dim=head_dim, **shape)
    return _finish(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)), seed)


_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 14,
}


def internvl(*, seed: int = 0, text: str = "qwen2", **shape: Unpack[Shape]) -> Any:
    """InternVLForConditionalGeneration around Qwen2; four tokens per 56 x 56 image."""
    settings = _text_settings(**shape)
    config = transformers.InternVLConfig(
        vision_config={**_VISION, "image_size": (56, 56), "patch_size": (14, 14)},
        text_config={"model_type": text, **settings},
        image_token_id=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=0.5,
    )
    return _finish(transformers.InternVLForConditionalGeneration(config), seed)


def llava_onevision(
    *, seed: int = 0, grids: Sequence[Sequence[int]] = ((28, 28),), **shape: Unpack[Shape]
) -> Any:
    """LlavaOnevisionForConditionalGeneration: SigLIP tower, Qwen2 language model."""
    settings = _text_settings(**shape)
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "image_size": 28},
        text_config={"model_type": "qwen2", **settings},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[list(grid) for grid in grids],
        vision_feature_layer=-1,
    )
    return _finish(transformers.LlavaOnevisionForConditionalGeneration(config), seed)


def _qwen_vl_settings(
    **shape: Unpack[Shape],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    text = _text_settings(**shape)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
    }
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return vision, text, tokens


def _rope(head_dim: int, sections: list[int]) -> dict[str, Any]:
    """Rotary settings; of other head dims than the usual 16 the first axis takes the rest."""
    sections = [sections[0] + head_dim // 2 - sum(sections), *sections[1:]]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


def qwen2_5_vl(*, seed: int = 0, **shape: Unpack[Shape]) -> Any:
    """Qwen2_5_VLForConditionalGeneration with multi-axis rotary positions."""
    vision, text, tokens = _qwen_vl_settings(**shape)
    rope = _rope(text["hidden_size"] // text["num_attention_heads"], [2, 3, 3])
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**vision, "window_size": 112, "fullatt_block_indexes": [1]},
        text_config={**text, "rope_parameters": rope},
        **tokens,
    )
    return _finish(transformers.Qwen2_5_VLForConditionalGeneration(config), seed)


def qwen3_vl(*, seed: int = 0, head_dim: int = 16, **shape: Unpack[Shape]) -> Any:
    """Qwen3VLForConditionalGeneration: query and key norms, interleaved rotary axes, deepstack."""
    vision, text, tokens = _qwen_vl_settings(head_dim=head_dim, **shape)
    rope = _rope(head_dim, [4, 2, 2]) | {"mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        vision_config={**vision, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config={**text, "rope_parameters": rope},
        **tokens,
    )
    return _finish(transformers.Qwen3VLForConditionalGeneration(config), seed)


def text_inputs(*, batch: int = 2, padding: str | None = None, seed: int = 0) -> Inputs:
    """(B, N) random tokens; with padding the last sample has five padding tokens on that side."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 290, (batch, NUM_TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding == "left":
        attention_mask[-1, :5] = 0
    elif padding == "right":
        attention_mask[-1, -5:] = 0
    elif padding is not None:
        raise ValueError(f"padding must be left, right or None, got {padding!r}")
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _with_padding(inputs: Inputs) -> Inputs:
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    return inputs


def image_inputs(*, batch: int = 2, padding: str | None = None, seed: int = 0) -> Inputs:
    """Text with one image of four tokens per sample at 6 .. 9, 56 x 56 pixels (InternVL)."""
    inputs = text_inputs(batch=batch, padding=padding, seed=seed)
    inputs["input_ids"][:, 6 : 6 + IMAGE_TOKENS] = IMAGE
    generator = torch.Generator().manual_seed(seed + 1)
    inputs["pixel_values"] = torch.randn(batch, 3, 56, 56, generator=generator)
    return _with_padding(inputs)


def qwen_vl_inputs(*, batch: int = 2, padding: str | None = None, seed: int = 0) -> Inputs:
    """Text with one image of four tokens per sample at 7 .. 10, as flattened patches."""
    inputs = text_inputs(batch=batch, padding=padding, seed=seed)
    input_ids = inputs["input_ids"]
    input_ids[:, 6], input_ids[:, 11] = VISION_START, VISION_END
    input_ids[:, 7 : 7 + IMAGE_TOKENS] = IMAGE
    generator = torch.Generator().manual_seed(seed + 1)
    inputs["pixel_values"] = torch.randn(batch * 16, 3 * 2 * 14 * 14, generator=generator)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
    inputs["mm_token_type_ids"] = (input_ids == IMAGE).int()
    return _with_padding(inputs)


def llava_inputs(*, batch: int = 2, padding: str | None = None, seed: int = 0) -> Inputs:
    """Text with one 28 x 28 image per sample at 6 .. 15: base view, tile and its two newlines."""
    inputs = text_inputs(batch=batch, padding=padding, seed=seed)
    inputs["input_ids"][:, 6:16] = IMAGE
    generator = torch.Generator().manual_seed(seed + 1)
    inputs["pixel_values"] = torch.randn(batch, 2, 3, 28, 28, generator=generator)
    inputs["image_sizes"] = torch.tensor([[28, 28]] * batch)
    inputs["batch_num_images"] = torch.ones(batch, dtype=torch.int64)
    return _with_padding(inputs)


def layout_of(inputs: Inputs) -> TokenLayout:
    """Image tokens and padding of these inputs."""
    return TokenLayout.from_masks(
        inputs["input_ids"] == IMAGE, valid=inputs["attention_mask"].bool()
    )


@dataclass(frozen=True)
class Family:
    """A model maker and an input maker that fit each other."""

    model: Callable[..., Any]
    inputs: Callable[..., Inputs]


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qwen2, text_inputs),
    "llama": Family(llama, text_inputs),
    "qwen3": Family(qwen3, text_inputs),
    "internvl": Family(internvl, image_inputs),
    "internvl3_5": Family(functools.partial(internvl, text="qwen3"), image_inputs),
    "qwen2_5_vl": Family(qwen2_5_vl, qwen_vl_inputs),
    "qwen3_vl": Family(qwen3_vl, qwen_vl_inputs),
    "llava_onevision": Family(llava_onevision, llava_inputs),
}
