"""Which decoder is captured, and what a capture refuses because maps do not follow from q and k."""

import pytest
import torch
import transformers
from torch import nn

from drivekd.capture import capture_attention
from drivekd.capture.masks import unexplained
from drivekd.errors import CaptureError
from tests.helpers.toy_models import IMAGE, image_inputs, internvl, llama, qwen2, text_inputs
from tests.helpers.traces import Container, run, traces

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


# --- finding the decoder ------------------------------------------------------------------------


def test_a_plain_module_around_a_language_model():
    model = Container(qwen2())
    input_ids = text_inputs()["input_ids"]
    with capture_attention(model, [-2]) as captured:
        logits = model(input_ids)
    expected = run(model.language_model, {"input_ids": input_ids}, [-2])
    assert logits.shape == (2, 24, 320)
    assert captured.input_ids is input_ids
    torch.testing.assert_close(captured[2].query, expected[2].query)


def test_the_language_model_inside_may_be_called_instead():
    model, inputs = internvl(), image_inputs()
    embeds = torch.randn(2, 24, 64)
    with torch.no_grad(), capture_attention(model, [1], stop_after_last=True) as captured:
        assert model.model.language_model(inputs_embeds=embeds) is None
        assert captured[1].query.shape == (2, 4, 24, 16)
        assert model(**inputs) is None


def test_two_language_models_are_listed():
    model = nn.ModuleDict({"small": qwen2(), "large": llama()})
    with pytest.raises(CaptureError, match=r"2 text decoders: large\.model, small\.model"):
        capture_attention(model, [0])


def test_no_language_model():
    with pytest.raises(CaptureError, match="holds no text decoder"):
        capture_attention(nn.Sequential(nn.Linear(2, 2)), [0])


def test_a_decoder_that_runs_twice_in_one_forward_is_refused():
    class Twice(Container):
        def forward(self, input_ids):
            return super().forward(input_ids) + super().forward(input_ids)

    model = Twice(qwen2())
    with pytest.raises(CaptureError, match="decoder ran twice"), capture_attention(model, [0]):
        model(text_inputs()["input_ids"])


def test_unknown_attention_implementation():
    model = qwen2()
    model.config._attn_implementation_internal = "homemade"
    with pytest.raises(CaptureError, match="'homemade' is not in transformers' attention registry"):
        run(model, text_inputs())


def test_attention_that_bypasses_the_registry():
    class Own(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    model = qwen2()
    model.model.layers[2].self_attn = Own()
    with pytest.raises(CaptureError, match=r"layer 2 .* 0 self-attention modules"):
        capture_attention(model, [2])


# --- what a token layout cannot express ---------------------------------------------------------


def refuses(model, inputs, match, layers=(0,), error=NotImplementedError, **options):
    before = traces(model)
    with pytest.raises(error, match=match), capture_attention(model, layers):
        model(**inputs, **options)
    assert traces(model) == before


def test_softcap_is_refused():
    config = transformers.Gemma2Config(**TEXT, sliding_window=8, query_pre_attn_scalar=16)
    model = transformers.Gemma2ForCausalLM(config)
    model.set_attn_implementation("eager")
    refuses(model, text_inputs(), "soft cap on attention scores")


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.GptOssForCausalLM(config)
    model.set_attn_implementation("eager")
    refuses(model, text_inputs(), r"attention sinks \(s_aux\)")


def test_chunked_attention_is_refused():
    config = transformers.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=96, num_local_experts=1, attention_chunk_size=8
    )
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(NotImplementedError, match="layer 0 is of type 'chunked_attention'"):
        capture_attention(model, [0])


def test_cross_attention_layer_is_refused():
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        **text, cross_attention_layers=[1], rope_parameters=rope
    )
    model = transformers.MllamaForCausalLM(config)
    with pytest.raises(NotImplementedError, match=r"layer 1 .* has cross-attention only"):
        capture_attention(model, [1])
    run(model, text_inputs(), [0])


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_families_with_bidirectional_image_blocks_are_refused(family):
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 14, "image_size": 28,
    }  # fmt: skip
    if family == "gemma3":
        config = transformers.Gemma3Config(
            text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma", **TEXT},
            vision_config=vision, image_token_index=IMAGE, projection_dim=64,
        )  # fmt: skip
        model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match=f"'{family}' lets image tokens"):
        capture_attention(model, [0])


def test_bidirectional_text_model_is_refused():
    config = transformers.Gemma3TextConfig(**TEXT, use_bidirectional_attention=True)
    with pytest.raises(NotImplementedError, match="both directions"):
        capture_attention(transformers.Gemma3ForCausalLM(config), [0])


def test_a_non_causal_call_is_refused():
    refuses(qwen2(), text_inputs(), "layer 0 is not causal", is_causal=False)


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [("sdpa", torch.bool), ("sdpa", torch.float32), ("eager", torch.float32)],
)
def test_a_mask_with_a_bidirectional_block_is_refused(implementation, kind):
    model = qwen2()
    model.set_attn_implementation(implementation)
    visible = torch.ones(24, 24, dtype=torch.bool).tril()
    masks = []
    for block in (slice(0, 0), slice(6, 10)):
        mask = visible.clone()
        mask[block, block] = True
        if kind != torch.bool:
            mask = torch.zeros(24, 24).masked_fill(~mask, torch.finfo(kind).min)
        masks.append(mask.expand(2, 1, 24, 24))
    causal, blocks = ({**text_inputs(), "attention_mask": mask} for mask in masks)
    run(model, causal)
    refuses(model, blocks, "lets tokens see later ones")


def test_a_flex_mask_with_a_bidirectional_block_is_seen():
    from torch.nn.attention.flex_attention import create_block_mask

    group = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 2]])

    def blocks(b, h, q, k):
        return (q >= k) | (group[b, q] == group[b, k])

    mask = create_block_mask(blocks, 2, None, 4, 4, device="cpu")
    assert "lets tokens see later ones" in unexplained(mask, None, 2, 4, group.device)
    causal = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 4, 4, device="cpu")
    assert unexplained(causal, None, 2, 4, group.device) is None
    assert unexplained(causal, None, 2, 1, group.device) is None


def test_a_cache_that_holds_tokens_is_refused():
    model, inputs = qwen2(), text_inputs()["input_ids"]
    cache = model(input_ids=inputs[:, :10], use_cache=True).past_key_values
    more = {"input_ids": inputs[:, 10:], "past_key_values": cache}
    refuses(model, more, "14 queries and 24 keys: cross-attention, a prefix or a key-value cache")


PACKED = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, 24)


@pytest.mark.parametrize("use_cache", [True, None])
def test_packing_that_the_cache_makes_transformers_ignore_is_refused(use_cache):
    inputs = {"input_ids": text_inputs()["input_ids"], "position_ids": PACKED}
    refuses(qwen2(), inputs, "with use_cache", error=CaptureError, use_cache=use_cache)


def test_packing_that_a_mask_makes_transformers_ignore_is_refused():
    inputs = text_inputs() | {"position_ids": PACKED}
    refuses(qwen2(), inputs, "with attention_mask", error=CaptureError, use_cache=False)


def test_positions_of_left_padding_are_not_packing():
    inputs = text_inputs(padding="left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    run(qwen2(), inputs | {"position_ids": positions})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused():
    model = qwen2().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    match = r'gradient_checkpointing_kwargs=\{"use_reentrant": False\}'
    refuses(model, text_inputs(), match, error=CaptureError)
    with torch.no_grad():
        run(model, text_inputs())


def test_a_frozen_model_in_grad_mode_is_captured():
    model = qwen2().requires_grad_(False).train()
    with capture_attention(model, [0]) as captured:
        model(**text_inputs())
    assert not captured[0].query.requires_grad


@pytest.mark.filterwarnings("ignore:.*DataParallel.*:UserWarning")
def test_data_parallel_is_refused():
    with pytest.raises(NotImplementedError, match="DataParallel, which cannot be captured"):
        capture_attention(nn.DataParallel(qwen2()), [0])


def test_tensor_parallel_is_refused():
    model = qwen2()
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="tensor-parallel"):
        capture_attention(model, [0])
