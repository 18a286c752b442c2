"""What capture_attention promises besides the numbers: arguments, refusals, and no trace left."""

import sys

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import AttentionInterface

from drivekd.capture import capture_attention
from drivekd.capture.model import sees_next_token
from drivekd.errors import CaptureError
from tests.helpers.toy_models import IMAGE, image_inputs, internvl, llama, qwen2, text_inputs

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


def traces(*models):
    """Everything a capture touches: the registry, modules' attribute names and their forwards."""
    attributes = [
        (set(module.__dict__), id(module.__dict__.get("forward")))
        for model in models
        for module in model.modules()
    ]
    return dict(AttentionInterface._global_mapping), attributes


def run(model, inputs, layers=(0,), **options):
    with torch.no_grad(), capture_attention(model, layers, **options) as captured:
        model(**inputs, use_cache=False)
    return captured


class Container(nn.Module):
    """Remote-code style: a plain module that feeds embeddings to a transformers model."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=embeds).logits


# --- layers and records -------------------------------------------------------------------------


def test_negative_and_duplicate_layers_are_one_record():
    captured = run(qwen2(), text_inputs(), [-2, 2, 0, 2])
    assert captured.layers == (0, 2)
    assert captured.num_layers == 4
    assert captured[-2] is captured[2]
    assert captured[-4] is captured[0]


@pytest.mark.parametrize("layers", [[4], [0, -5], [17, 1]])
def test_layers_that_do_not_exist_are_named_with_the_depth(layers):
    with pytest.raises(ValueError, match=r"layers \[.*\] do not exist: .*decoder has 4 layers"):
        capture_attention(qwen2(), layers)


@pytest.mark.parametrize("layers", [0, "0", [0.0], [True], [None], {0, 1}])
def test_layers_of_another_kind_are_a_type_error(layers):
    with pytest.raises(TypeError, match="layers must"):
        capture_attention(qwen2(), layers)


def test_no_layers_and_no_model_are_refused():
    with pytest.raises(ValueError, match="layers is empty"):
        capture_attention(qwen2(), [])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        capture_attention(lambda: None, [0])


def test_reading_a_layer_that_was_not_captured():
    captured = run(qwen2(), text_inputs(), [1])
    with pytest.raises(CaptureError, match=r"layer 0 was not captured: layers \[1\] of 4"):
        captured[0]
    with pytest.raises(CaptureError, match="layer 9 was not captured"):
        captured[9]
    with pytest.raises(TypeError, match="int, got str"):
        captured["1"]


def test_record_is_the_models_own_tensor():
    """A view with graph, not repeated over groups, with the model's scale."""
    model = qwen2(heads=4, kv_heads=2)
    with capture_attention(model, [1]) as captured:
        model(**text_inputs(), use_cache=False)
    record = captured[1]
    assert record.query.shape == (2, 4, 24, 16)
    assert record.key.shape == (2, 2, 24, 16)
    assert record.query.requires_grad
    assert record.key.requires_grad
    assert record.scale == 0.25
    assert record.lse is None
    assert record.window is None


def test_use_cache_without_packing_is_allowed():
    model, inputs = qwen2(), text_inputs(padding="left")
    plain = run(model, inputs)
    with torch.no_grad(), capture_attention(model, [0]) as captured:
        model(**inputs, use_cache=True, position_ids=torch.arange(24)[None])
    torch.testing.assert_close(captured[0].key[0], plain[0].key[0])


def test_a_new_forward_replaces_the_records():
    model = qwen2()
    first, second = text_inputs(seed=1), text_inputs(seed=2)
    with torch.no_grad(), capture_attention(model, [1]) as captured:
        model(**first)
        old = captured[1]
        model(**second)
    assert captured[1] is not old
    assert torch.equal(captured[1].query, run(model, second, [1])[1].query)
    assert captured.input_ids is second["input_ids"]


def test_input_ids_by_position_and_absent_with_embeddings():
    model, input_ids = qwen2(), text_inputs()["input_ids"]
    with torch.no_grad(), capture_attention(model, [0]) as captured:
        model(input_ids)
        assert captured.input_ids is input_ids
        model(inputs_embeds=model.get_input_embeddings()(input_ids))
        assert captured.input_ids is None


def test_select_takes_samples_and_lets_gradients_flow():
    model, inputs = qwen2(), text_inputs(batch=3)
    with capture_attention(model, [0, 2]) as captured:
        model(**inputs)
    rows = torch.tensor([2, 0])
    part = captured.select(rows)
    assert part.layers == captured.layers
    assert part.num_layers == 4
    assert torch.equal(part.input_ids, inputs["input_ids"][rows])
    for layer in (0, -2):
        assert torch.equal(part[layer].query, captured[layer].query[rows])
        assert torch.equal(part[layer].key, captured[layer].key[rows])
        assert part[layer].scale == captured[layer].scale
    assert torch.equal(part.select([1])[0].query, captured[0].query[:1])
    assert part.select([])[0].query.shape == (0, 4, 24, 16)
    grad = torch.autograd.grad((part[2].query * 3.0).sum(), captured[2].query)[0]
    assert torch.equal(grad, torch.tensor([3.0, 0.0, 3.0])[:, None, None, None].expand_as(grad))


def test_select_refuses_masks_and_matrices():
    captured = run(qwen2(), text_inputs())
    with pytest.raises(TypeError, match="sample indices"):
        captured.select(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="one-dimensional"):
        captured.select(torch.zeros(1, 1, dtype=torch.int64))


# --- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaving_leaves_no_trace(implementation):
    model, inputs = internvl(), image_inputs()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        model(**inputs)  # transformers notes a thing or two on a model's first forward
    before = traces(model)
    with torch.no_grad(), capture_attention(model, [0, -1]):
        assert traces(model) != before
        model(**inputs)
        towers = [m for name, m in model.named_modules() if "vision_tower" in name]
        assert len(towers) > 10
        assert not any("_drivekd_tap" in module.__dict__ for module in towers)
    assert traces(model) == before


def test_no_trace_when_an_exception_passes_through():
    model = qwen2()
    before = traces(model)

    def fail(*_):
        raise ZeroDivisionError("in layer 1")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), capture_attention(model, [0, 3]) as captured:
        model(**text_inputs())
    handle.remove()
    assert traces(model) == before
    assert captured[0].query.shape == (2, 4, 24, 16)
    run(model, text_inputs(), [0, 3])


def test_a_failed_forward_does_not_spoil_the_next_one_in_the_same_with():
    model, inputs = qwen2(), text_inputs()
    with torch.no_grad(), capture_attention(model, [0, 3]) as captured:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 24), 10**6))
        model(**inputs)
    assert torch.equal(captured[3].query, run(model, inputs, [3])[3].query)


def test_leaving_without_a_record_raises():
    model = qwen2()
    before = traces(model)
    capture = capture_attention(model, [0, 2])
    match = r"layers \[0, 2\] of 4 gave no record: call the model"
    with pytest.raises(CaptureError, match=match), capture:
        pass
    assert traces(model) == before


def test_calling_another_model_gives_no_record():
    model, other = qwen2(), qwen2(seed=1)
    with pytest.raises(CaptureError, match="gave no record"), capture_attention(model, [0]):
        other(**text_inputs())


def test_a_layer_called_by_hand_gives_no_record():
    model = qwen2()
    hidden = torch.randn(1, 5, 64)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with pytest.raises(CaptureError, match="gave no record"), capture_attention(model, [0]):
        model.model.layers[0](hidden, position_embeddings=rotary)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_captures_of_several_models_close_in_any_order(order, implementation):
    student, teacher, inputs = qwen2(), llama(layers=5, seed=3), text_inputs()
    for model in (student, teacher):
        model.set_attn_implementation(implementation)
    alone = [run(student, inputs, [0, 1])[1], run(teacher, inputs, [2])[2]]
    before = traces(student, teacher)
    captures = [
        capture_attention(student, [1]),
        capture_attention(teacher, [2], stop_after_last=True),
        capture_attention(student, [0]),
    ]
    with torch.no_grad():
        for capture in captures:
            capture.__enter__()
        assert teacher(**inputs) is None
        assert student(**inputs) is not None
        for index in order:
            captures[index].__exit__(None, None, None)
        assert traces(student, teacher) == before
    assert torch.equal(captures[0][1].query, alone[0].query)
    assert torch.equal(captures[1][2].query, alone[1].query)
    assert captures[2].layers == (0,)
    assert captures[2][0].query.shape == (2, 4, 24, 16)


def test_one_capture_can_be_opened_again_but_not_twice_at_once():
    model, inputs = qwen2(), text_inputs()
    capture = capture_attention(model, [0])
    before = traces(model)
    with torch.no_grad():
        with capture:
            model(**inputs)
            with pytest.raises(CaptureError, match="open already"):
                capture.__enter__()
        with capture:
            model(**inputs)
    assert traces(model) == before


def test_something_registered_over_the_wrapper_stays():
    model, inputs = qwen2(), text_inputs()
    original = AttentionInterface._global_mapping["sdpa"]
    calls = []
    try:
        with torch.no_grad(), capture_attention(model, [0]):
            wrapper = AttentionInterface._global_mapping["sdpa"]

            def theirs(*args, **kwargs):
                calls.append(1)
                return wrapper(*args, **kwargs)

            AttentionInterface.register("sdpa", theirs)
            model(**inputs)
        assert AttentionInterface._global_mapping["sdpa"] is theirs
        run(model, inputs)
        assert len(calls) == 8
        assert AttentionInterface._global_mapping["sdpa"] is theirs
    finally:
        AttentionInterface.register("sdpa", original)


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
    refuses(model, blocks, "lets a token see the one after")


def test_a_flex_mask_with_a_bidirectional_block_is_seen():
    from torch.nn.attention.flex_attention import create_block_mask

    group = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 2]])

    def blocks(b, h, q, k):
        return (q >= k) | (group[b, q] == group[b, k])

    mask = create_block_mask(blocks, 2, None, 4, 4, device="cpu")
    assert sees_next_token(mask, 2, 4, group.device)
    causal = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 4, 4, device="cpu")
    assert not sees_next_token(causal, 2, 4, group.device)
    assert not sees_next_token(causal, 2, 1, group.device)


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


# --- imports ------------------------------------------------------------------------------------


def test_import_needs_torch_alone(run_python):
    run_python("import sys, drivekd.capture; assert 'transformers' not in sys.modules")


def test_missing_transformers_is_named_with_the_remedy(monkeypatch):
    model = qwen2()
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", None)
    with pytest.raises(CaptureError, match=r"pip install 'transformers>=5\.17'"):
        capture_attention(model, [0])
