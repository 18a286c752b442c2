"""What a capture may touch and has to give back, and the shortest way to run one."""

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from drivekd.capture import capture_attention

# What a first forward leaves on a model without any capture.
OF_TRANSFORMERS = {"_output_capturing_hooks_installed"}


def traces(*models):
    """Everything a capture touches: the registry, modules' attribute names and their forwards."""
    attributes = [
        (set(module.__dict__) - OF_TRANSFORMERS, id(module.__dict__.get("forward")))
        for model in models
        for module in model.modules()
    ]
    return dict(AttentionInterface._global_mapping), attributes


def run(model, inputs, layers=(0,), **options):
    """Capture layers of one forward without gradients."""
    with torch.no_grad(), capture_attention(model, layers, **options) as captured:
        model(**inputs, use_cache=False)
    return captured


class Container(nn.Module):
    """A plain module that feeds embeddings to a transformers model."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=embeds).logits
