"""Processors over `toy_data.tokenizer` and transformers' own image processors, as checkpoints have.

Transformers' processor classes themselves want torchvision; what they add is the expansion of an
image's placeholder, which is here.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers import toy_data
from tests.helpers.toy_models import IMAGE, IMAGE_TOKENS


class _Processor:
    chat_template = toy_data.TEMPLATE
    image_token = toy_data.IMAGE_TOKEN

    def __init__(self):
        self.tokenizer = toy_data.tokenizer()

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert not tokenize
        turns = [
            {
                "role": turn["role"],
                "content": "".join(part.get("text", self.image_token) for part in turn["content"]),
            }
            for turn in conversation
        ]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def __call__(self, *, text, images, add_special_tokens, return_tensors):
        output = {} if images is None else self._images(images)
        counts = output.pop("counts", [])
        parts = text[0].split(self.image_token)
        assert len(parts) == len(counts) + 1
        whole = parts[0]
        for count, part in zip(counts, parts[1:], strict=True):
            whole += "<user> " + f"{self.image_token} " * count + "<user> " + part
        ids = self.tokenizer(whole, add_special_tokens=False, return_tensors=return_tensors)
        types = {"mm_token_type_ids": (ids["input_ids"] == IMAGE).int()}
        return {"input_ids": ids["input_ids"], **output, **self._types(types)}


class QwenProcessor(_Processor):
    """Patches of 14 pixels, merged two by two, at the picture's own aspect ratio."""

    def __init__(self, *, max_pixels=28 * 28 * 12):
        super().__init__()
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=max_pixels)

    def _types(self, types):
        return types

    def _images(self, images):
        output = dict(self.image_processor(images=images, return_tensors="pt"))
        return output | {"counts": (output["image_grid_thw"].prod(1) // 4).tolist()}


class TilesProcessor(_Processor):
    """InternVL: up to six tiles of 56 x 56 pixels, and a thumbnail."""

    def __init__(self):
        super().__init__()
        self.image_processor = GotOcr2ImageProcessorPil(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6
        )

    def _types(self, types):
        return {}

    def _images(self, images):
        output = dict(self.image_processor(images=images, return_tensors="pt"))
        tiles = torch.as_tensor(np.asarray(output.pop("num_patches"))).tolist()
        return output | {"counts": [count * IMAGE_TOKENS for count in tiles]}
