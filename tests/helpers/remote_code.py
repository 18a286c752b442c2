"""InternVL's remote code, as its public modelling file arranges it, around a Hugging Face Qwen2.

A `PreTrainedModel` that transformers does not know: a vision tower of its own with layers and a
class token, pixel shuffle, `mlp1`, and `language_model`. Its config has `llm_config` and no image
token; the token's id is an attribute of the model that the caller sets. Read: OpenGVLab/InternVL
0328579, internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.helpers.toy_models import IMAGE, Inputs, _finish, image_inputs, qwen2

TILE, PATCH = 56, 14
_VISION_WIDTH = 32


class InternVisionConfig(transformers.PreTrainedConfig):
    model_type = "intern_vit_6b"

    def __init__(self, hidden_size=_VISION_WIDTH, image_size=TILE, patch_size=PATCH, **options):
        self.hidden_size = hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        super().__init__(**options)


class InternVLChatConfig(transformers.PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(
        self, vision_config=None, llm_config=None, select_layer=-1, downsample_ratio=0.5,
        ps_version="v2", force_image_size=None, **options,
    ):  # fmt: skip
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = transformers.Qwen2Config(**(llm_config or {}))
        self.select_layer = select_layer
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.force_image_size = force_image_size
        super().__init__(**options)


class _VisionAttention(nn.Module):
    """One `qkv`, no attention registry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, count, width = hidden.shape
        q, k, v = self.qkv(hidden).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        output = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(output.transpose(1, 2).reshape(batch, count, width))


class _VisionLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.norm1 = _VisionAttention(width), nn.LayerNorm(width)
        self.mlp, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.ls1, self.ls2 = (nn.Parameter(0.5 * torch.ones(width)) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ls1 * self.attn(self.norm1(hidden))
        return hidden + self.ls2 * self.mlp(self.norm2(hidden)).tanh()


class InternVisionModel(transformers.PreTrainedModel):
    config_class = InternVisionConfig

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([_VisionLayer(width) for _ in range(2)])
        self.post_init()

    def forward(self, pixel_values: Tensor, output_hidden_states: bool, return_dict: bool) -> Any:
        patches = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(patches), -1, -1)
        states = [torch.cat([first, patches], dim=1)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return SimpleNamespace(last_hidden_state=states[-1], hidden_states=tuple(states))


class InternVLChat(transformers.PreTrainedModel):
    """vision_model, mlp1 and language_model; four tokens a tile of 56 x 56 pixels."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(
        self, *, layers: int = 4, seed: int = 0, hidden: int = 64, select_layer: int = -1
    ) -> None:
        language_model = qwen2(layers=layers, hidden=hidden, seed=seed)
        config = InternVLChatConfig(
            llm_config=language_model.config.to_dict(), select_layer=select_layer
        )
        super().__init__(config)
        language_model.config = config.llm_config = language_model.config
        merged = _VISION_WIDTH * int(1 / config.downsample_ratio) ** 2
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # for biases, which _finish leaves alone
            self.vision_model = InternVisionModel(config.vision_config)
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(merged), nn.Linear(merged, hidden), nn.GELU(),
                nn.Linear(hidden, hidden),
            )  # fmt: skip
        self.language_model = language_model
        self.img_context_token_id = None  # as it is until chat() or the caller sets it
        self.post_init()
        _finish(self, seed)
        self.img_context_token_id = IMAGE

    def pixel_shuffle(self, patches: Tensor, scale: float) -> Tensor:
        """(tiles, W, H, C) -> (tiles, W * scale, H * scale, C / scale^2)."""
        tiles, w, h, c = patches.shape
        patches = patches.view(tiles, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3)
        shape = (tiles, int(h * scale), int(w * scale), int(c / scale**2))
        return patches.reshape(shape).permute(0, 2, 1, 3)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 4, hidden), of the layer that the config selects, without the class token."""
        every = self.config.select_layer != -1
        output = self.vision_model(pixel_values, output_hidden_states=every, return_dict=True)
        patches = output.last_hidden_state
        if every:
            patches = output.hidden_states[self.config.select_layer]
        patches = patches[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        patches = patches.reshape(len(patches), side, side, -1)
        patches = self.pixel_shuffle(patches, self.config.downsample_ratio)
        return self.mlp1(patches.reshape(len(patches), -1, patches.shape[-1]))

    def embed(self, input_ids: Tensor, pixel_values: Tensor, image_flags: Tensor) -> Tensor:
        """Token embeddings with the features of tiles that are no stand-ins in their places."""
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)[image_flags == 1]
        rows = embeds.view(-1, embeds.shape[-1])
        selected = (input_ids == self.img_context_token_id).flatten()
        rows[selected] = rows[selected] * 0.0 + features.reshape(-1, rows.shape[-1])
        return rows.view_as(embeds)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Embeddings, the language model, and cross-entropy from its logits."""
        output = self.language_model(
            inputs_embeds=self.embed(input_ids, pixel_values, image_flags.squeeze(-1)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        loss = None
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, **options: Any) -> Tensor:
        """Answers, from embeddings."""
        flags = torch.ones(len(pixel_values), dtype=torch.int64)
        return self.language_model.generate(
            inputs_embeds=self.embed(input_ids, pixel_values, flags), **options
        )


def chat_inputs(*, batch: int = 2, padding: str | None = None, seed: int = 0) -> Inputs:
    """`image_inputs` with the flags of its tiles, as the remote code's collator makes them."""
    inputs = image_inputs(batch=batch, padding=padding, seed=seed)
    return inputs | {"image_flags": torch.ones(batch, 1, dtype=torch.int64)}
