"""Maps from captured queries and keys are the maps that the model itself would make."""

import pytest
import torch

from drivekd.capture import capture_attention
from tests.helpers.maps import (
    TOLERANCE,
    assert_gradients_equal,
    assert_maps_equal,
    eager_attentions,
    head_mean_map,
    loss_gradients,
    map_loss,
)
from tests.helpers.toy_models import FAMILIES, qwen2, text_inputs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_equal_output_attentions(family, padding, implementation):
    model = FAMILIES[family].model()
    inputs = FAMILIES[family].inputs(padding=padding)
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        reference = eager_attentions(model, inputs)
        model.set_attn_implementation(implementation)
        with capture_attention(model, range(4)) as captured:
            output = model(**inputs, use_cache=False)
    assert_maps_equal(captured, reference.attentions, valid)
    torch.testing.assert_close(output.logits[valid], reference.logits[valid], atol=1e-4, rtol=1e-4)
    assert captured.input_ids is inputs["input_ids"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_sliding_window_layers_give_their_window(padding, implementation):
    model = qwen2(sliding_window=5, first_sliding_layer=2)
    inputs = text_inputs(padding=padding)
    with torch.no_grad():
        reference = eager_attentions(model, inputs)
        model.set_attn_implementation(implementation)
        with capture_attention(model, range(4)) as captured:
            model(**inputs, use_cache=False)
    assert [captured[layer].window for layer in range(4)] == [None, None, 5, 5]
    assert_maps_equal(captured, reference.attentions, inputs["attention_mask"].bool())


def test_packed_sequences_without_cache():
    model = qwen2()
    input_ids = text_inputs(batch=1)["input_ids"]
    position_ids = torch.cat([torch.arange(9), torch.arange(15)])[None]
    segments = torch.tensor([0] * 9 + [1] * 15)[None]
    with torch.no_grad(), capture_attention(model, [0, -1]) as captured:
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        packed = [head_mean_map(captured[i], segments >= 0, segments) for i in (0, -1)]
        for part in (slice(0, 9), slice(9, 24)):
            model(input_ids=input_ids[:, part], use_cache=False)
            for layer, maps in zip((0, -1), packed, strict=True):
                alone = head_mean_map(captured[layer], segments[:, part] >= 0)
                torch.testing.assert_close(maps[:, part, part], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_gradients_equal_output_attentions(family, implementation):
    model = FAMILIES[family].model()
    inputs = FAMILIES[family].inputs(padding="left")
    valid = inputs["attention_mask"].bool()
    attentions = eager_attentions(model, inputs).attentions
    expected = loss_gradients(model, [attentions[i].double().mean(1) for i in (0, 2)], valid)
    model.set_attn_implementation(implementation)
    with capture_attention(model, [0, -2]) as captured:
        model(**inputs, use_cache=False)
    got = loss_gradients(model, [head_mean_map(captured[i], valid) for i in (0, 2)], valid)
    assert_gradients_equal(got, expected)


def test_lora_gradients_equal_output_attentions():
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|k_proj|down_proj)"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(FAMILIES["internvl"].model(), config)
    inputs = FAMILIES["internvl"].inputs(padding="right")
    valid = inputs["attention_mask"].bool()
    attentions = eager_attentions(model, inputs).attentions
    expected = loss_gradients(model, [attentions[i].double().mean(1) for i in (0, 3)], valid)
    model.set_attn_implementation("sdpa")
    with capture_attention(model, [0, 3]) as captured:
        model(**inputs, use_cache=False)
    got = loss_gradients(model, [head_mean_map(captured[i], valid) for i in (0, 3)], valid)
    assert all("lora_" in name for name in got)
    assert_gradients_equal(got, expected)


def test_non_reentrant_checkpointing_gives_the_same_gradients():
    """Recomputation passes the tap a second time and must not replace the record."""
    model = FAMILIES["internvl"].model().train()
    inputs = FAMILIES["internvl"].inputs(padding="right")
    valid = inputs["attention_mask"].bool()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with capture_attention(model, [0, 2]) as captured:
            output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
            before = (captured[0], captured[2])
            maps = [head_mean_map(captured[i], valid) for i in (0, 2)]
            names = [n for n, _ in model.named_parameters()]
            parameters = list(model.parameters())
            # Two backwards, as gradient projection does: two recomputations.
            language = torch.autograd.grad(
                output.loss, parameters, retain_graph=True, allow_unused=True
            )
            grads = loss_gradients(model, maps, valid)
            assert (captured[0], captured[2]) == before
        results.append((dict(zip(names, language, strict=True)), grads))
    (plain_language, plain), (language, grads) = results
    for name, grad in plain.items():
        assert torch.equal(grads[name], grad), name
    for name, grad in plain_language.items():
        assert grad is None or torch.equal(language[name], grad), name


def test_checkpoint_around_the_whole_model_keeps_the_record():
    from torch.utils.checkpoint import checkpoint

    model = qwen2()
    inputs = text_inputs()
    valid = inputs["attention_mask"].bool()
    grads = []
    for wrapped in (False, True):
        with capture_attention(model, [1]) as captured:
            if wrapped:
                logits = checkpoint(lambda: model(**inputs).logits, use_reentrant=False)
            else:
                logits = model(**inputs).logits
            record = captured[1]
            loss = logits.square().mean() + map_loss(head_mean_map(record, valid), valid)
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
            assert captured[1] is record
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)
