"""A stand-in for InternVL's remote code: its attributes and its way of calling a Qwen2 inside."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.toy_models import IMAGE, _finish, qwen2

TILE, PATCH = 56, 14


class _VisionModel(nn.Module):
    """Patches, one attention layer of its own, no transformers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, hidden, PATCH, PATCH)
        self.attention = nn.MultiheadAttention(hidden, 2, batch_first=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.attention(patches, patches, patches, need_weights=False)[0]


class InternVLChat(nn.Module):
    """vision_model, mlp1 and language_model; four tokens a tile."""

    def __init__(self, *, layers: int = 4, seed: int = 0, hidden: int = 64) -> None:
        super().__init__()
        vision = 32
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # for biases, which _finish leaves alone
            self.vision_model = _VisionModel(vision)
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(4 * vision), nn.Linear(4 * vision, hidden), nn.GELU(),
                nn.Linear(hidden, hidden),
            )  # fmt: skip
        self.language_model = qwen2(layers=layers, hidden=hidden, seed=seed)
        self.config = SimpleNamespace(downsample_ratio=0.5)
        self.img_context_token_id = IMAGE
        _finish(self, seed)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 4, hidden): four patches become one token."""
        patches = self.vision_model(pixel_values)
        tiles, count, width = patches.shape
        return self.mlp1(patches.reshape(tiles, count // 4, 4 * width))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings with the tiles' features in the places of image tokens."""
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        if pixel_values is None:
            return embeds
        features = self.extract_feature(pixel_values)
        is_image = input_ids == self.img_context_token_id
        return embeds.masked_scatter(is_image[..., None], features.reshape(-1, embeds.shape[-1]))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The remote code's forward: embeddings, then the language model's whole output."""
        output = self.language_model(
            inputs_embeds=self.embed(input_ids, pixel_values),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **options,
        )
        output.loss = None
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, **options: Any) -> Tensor:
        """Answers, from embeddings."""
        return self.language_model.generate(
            inputs_embeds=self.embed(input_ids, pixel_values), **options
        )
