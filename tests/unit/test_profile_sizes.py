"""Bytes of weights and of keys and values from a config, against real models and their caches."""

import pytest
import torch

from drivekd.study.profile.sizes import held_kv_bytes, kv_cache_bytes, weight_count
from tests.helpers.toy_models import FAMILIES, qwen2


def generated(model, inputs, new_tokens):
    return model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        pad_token_id=0,
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "internvl", "qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_cache_are_those_that_generating_keeps(family, dtype):
    own = FAMILIES[family]
    model, inputs = own.model(heads=4, kv_heads=2).to(dtype), own.inputs(batch=3)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    output = generated(model, inputs, 5)
    tokens = output.sequences.shape[1] - 1
    expected = kv_cache_bytes(model.config, dtype, tokens=tokens, batch_size=3)
    assert held_kv_bytes(output.past_key_values) == expected > 0


def test_one_key_head_less_takes_less_cache():
    three, one = (
        kv_cache_bytes(qwen2(heads=6, hidden=96, kv_heads=n).config, torch.float16, tokens=1)
        for n in (3, 1)
    )
    assert three == 3 * one == 4 * 2 * 3 * 16 * 2  # layers, keys and values, heads, dim, bytes


def test_layers_with_a_window_keep_no_more_than_it():
    model = qwen2(layers=4, sliding_window=8, first_sliding_layer=3)
    output = generated(model, FAMILIES["qwen2"].inputs(batch=2), 4)
    tokens = output.sequences.shape[1] - 1
    expected = kv_cache_bytes(model.config, torch.float32, tokens=tokens, batch_size=2)
    assert held_kv_bytes(output.past_key_values) == expected
    assert expected == 2 * 2 * 2 * 16 * 4 * (3 * tokens + 7)


def test_latent_attention_has_no_number():
    config = qwen2().config
    config.kv_lora_rank = 8
    assert kv_cache_bytes(config, torch.float32, tokens=1) is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameters_are_counted_without_making_them(family):
    model = FAMILIES[family].model()
    assert weight_count(model.config) == sum(p.numel() for p in model.parameters())


def test_tied_weights_count_once():
    config = qwen2().config
    untied = weight_count(config)
    config.tie_word_embeddings = True
    assert untied - weight_count(config) == config.vocab_size * config.hidden_size
