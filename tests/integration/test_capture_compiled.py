"""Flex attention, compiled models, and the modes that only a GPU has."""

import functools
from dataclasses import replace

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from drivekd.capture import capture_attention
from drivekd.capture.model import find_decoder
from drivekd.study.verify import AGREES, verify
from drivekd.train.config import SignalConfig
from tests.helpers.maps import (
    assert_gradients_equal,
    assert_maps_equal,
    eager_attentions,
    scores,
)
from tests.helpers.modes import fused_and_eager
from tests.helpers.toy_models import FAMILIES, layout_of, qwen2
from tests.helpers.traces import run, traces


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """With the eager compile backend: torch 2.13's CPU code for flex gives random output at times.

    That happens without any capture too, and transformers always compiles flex.
    """
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)


# Transformers has no flex attention for Qwen2.5-VL and Qwen3-VL.
FLEX = sorted(set(FAMILIES) - {"qwen2_5_vl", "qwen3_vl"})


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", FLEX)
def test_flex_attention(family, padding, uncompiled_flex):
    model, inputs = FAMILIES[family].model(layers=3), FAMILIES[family].inputs(padding=padding)
    with torch.no_grad():
        attentions = eager_attentions(model, inputs).attentions
        model.set_attn_implementation("flex_attention")
        with capture_attention(model, range(3)) as captured:
            model(**inputs, use_cache=False)
    assert_maps_equal(captured, attentions, inputs["attention_mask"].bool())


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
def test_flex_attention_trains_on_a_gpu_only(uncompiled_flex):
    """Torch has no backward of it on a CPU and says so; on a GPU the test below compares."""
    model, inputs = FAMILIES["internvl"].model(layers=1), FAMILIES["internvl"].inputs()
    model.set_attn_implementation("flex_attention")
    run(model, inputs)  # transformers notes a thing or two on a model's first forward
    before = traces(model)
    match = "does not support backward on CPU"
    with pytest.raises(NotImplementedError, match=match), capture_attention(model, [0]):
        model(**inputs, use_cache=False)
    assert traces(model) == before


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
def test_flex_attention_with_sliding_windows(uncompiled_flex):
    model = qwen2(layers=3, sliding_window=5, first_sliding_layer=1)
    inputs = FAMILIES["qwen2"].inputs(padding="left")
    with torch.no_grad():
        attentions = eager_attentions(model, inputs).attentions
        model.set_attn_implementation("flex_attention")
        with capture_attention(model, range(3)) as captured:
            model(**inputs, use_cache=False)
    assert [captured[layer].window for layer in range(3)] == [None, 5, 5]
    assert_maps_equal(captured, attentions, inputs["attention_mask"].bool())


def compiled_layers(model):
    for layer in find_decoder(model).layers:
        layer.compile(backend="aot_eager")
    return model


def compiled_whole(model):
    model.compile(backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
@pytest.mark.parametrize(
    ("family", "compiled"),
    [(family, compiled_layers) for family in FAMILIES] + [("internvl3_5", compiled_whole)],
)
def test_compiled_models_give_the_eager_gradients(family, compiled):
    torch._dynamo.reset()
    loss, found, expected, gradients_expected = fused_and_eager(family, compiled)
    torch._dynamo.reset()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    # A compiled layer has zeros where others have no gradient.
    found = {n: g for n, g in found.items() if n in gradients_expected or bool(g.any())}
    assert_gradients_equal(found, gradients_expected)


GPU_IMPLEMENTATIONS = ["sdpa"] + ["flash_attention_2"] * is_flash_attn_2_available()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, name) for family in FAMILIES for name in GPU_IMPLEMENTATIONS]
    + [(family, "flex_attention") for family in FLEX],
)
def test_on_a_gpu_bf16_is_as_exact_as_eager_bf16(family, implementation):
    torch.use_deterministic_algorithms(False)
    make = FAMILIES[family]
    student, teacher = (make.model(layers=n, seed=n).to("cuda", torch.bfloat16) for n in (4, 5))
    for model in (student, teacher):
        model.set_attn_implementation(implementation)
    inputs = {name: tensor.cuda() for name, tensor in make.inputs(padding="left").items()}
    tokens = layout_of(inputs)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    signal = SignalConfig(
        name="s", teacher="t", student_layers="0..-2", teacher_layers="0..-2", region="full"
    )
    (check,) = verify(
        student, teacher.requires_grad_(False), batch, [signal], tokens=tokens, repeats=1
    )
    assert check.verdict == AGREES, check.reasons


@pytest.mark.gpu
@pytest.mark.parametrize("family", FLEX)
def test_on_a_gpu_flex_attention_hands_over_its_log_sum_exp(family):
    torch.use_deterministic_algorithms(False)
    model = FAMILIES[family].model(layers=2).cuda()
    inputs = {k: v.cuda() for k, v in FAMILIES[family].inputs(padding="left").items()}
    with torch.no_grad():
        attentions = eager_attentions(model, inputs).attentions
        model.set_attn_implementation("flex_attention")
        with capture_attention(model, range(2)) as captured:
            model(**inputs, use_cache=False)
    valid = inputs["attention_mask"].bool()
    record = captured[1]
    keys = record.key.repeat_interleave(record.query.shape[1] // record.key.shape[1], 1)
    count = record.query.shape[2]
    seen = torch.ones(count, count, dtype=torch.bool, device="cuda").tril() & valid[:, None, None]
    scores = (record.scale * record.query @ keys.mT).masked_fill(~seen, -torch.inf)
    expected = scores.logsumexp(-1).transpose(1, 2)[valid]
    torch.testing.assert_close(record.lse.transpose(1, 2)[valid], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        scores.softmax(-1).mean(1)[valid], attentions[1].mean(1)[valid], rtol=0, atol=1e-2
    )


@pytest.mark.gpu
@pytest.mark.optional_package
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the package flash-attn")
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", ["qwen2", "internvl", "qwen3_vl"])
def test_on_a_gpu_flash_attention_hands_over_its_log_sum_exp(family, padding):
    torch.use_deterministic_algorithms(False)
    model = FAMILIES[family].model(layers=2).to("cuda", torch.bfloat16)
    model.set_attn_implementation("flash_attention_2")
    inputs = FAMILIES[family].inputs(padding=padding)
    batch = {k: (v.bfloat16() if v.is_floating_point() else v).cuda() for k, v in inputs.items()}
    record = run(model, batch, [1])[1]
    valid = inputs["attention_mask"].bool()
    on_cpu = replace(record, query=record.query.cpu(), key=record.key.cpu())
    expected = scores(on_cpu, valid).logsumexp(-1).transpose(1, 2)[valid]
    got = record.lse.cpu().double().transpose(1, 2)[valid]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)  # float32 sums of bf16 products
