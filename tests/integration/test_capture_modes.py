"""Maps, losses and gradients in every mode of training are those of eager `outputs.attentions`."""

import functools

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from drivekd.capture import capture_attention
from drivekd.losses import AttentionMapLoss
from drivekd.study.eager import eager_loss
from drivekd.study.verify import AGREES, verify
from drivekd.tokens import TokenLayout
from drivekd.train.config import SignalConfig
from tests.helpers.flash import flash_attention
from tests.helpers.maps import (
    assert_gradients_equal,
    assert_maps_equal,
    eager_attentions,
    gradients,
    head_mean_map,
)
from tests.helpers.toy_models import FAMILIES, IMAGE, VISION_END, VISION_START, layout_of, qwen2

VISION_LANGUAGE = sorted(set(FAMILIES) - {"qwen2", "llama", "qwen3"})


def fused_and_eager(family, prepare, padding="left"):
    """Loss and gradients of a prepared student the fused way, and of a plain one the eager way."""
    make = FAMILIES[family]
    inputs = make.inputs(padding=padding)
    tokens = layout_of(inputs)
    region = "text_to_vision" if bool(tokens.is_vision.any()) else "full"
    settings = AttentionMapLoss(
        student_layers=[0, 2], teacher_layers=[0, 1, 3], region=region, groups=[[0], [1, 2]]
    )
    teacher = make.model(layers=5, seed=5).requires_grad_(False)
    with torch.no_grad(), capture_attention(teacher, settings.teacher_layers) as targets:
        teacher(**inputs, use_cache=False)
    student = prepare(make.model(layers=4, seed=1))
    with capture_attention(student, settings.student_layers) as own:
        student(**inputs, use_cache=False)
    loss = settings(own, targets, tokens)
    found = gradients(student, loss)
    plain = prepare_names(prepare, make.model(layers=4, seed=1))
    for model in (plain, teacher):
        model.set_attn_implementation("eager")
    expected = eager_loss(plain, teacher, inputs, tokens, settings)
    return loss, found, expected, gradients(plain, expected)


def prepare_names(prepare, model):
    """Adapters change which parameters there are; every other mode leaves the plain model."""
    return prepare(model) if prepare is lora else model


def plainly(model):
    return model


def checkpointed(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    names = ("q_proj", "k_proj", "down_proj")
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(names) and "vis" not in name
    ]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("prepare", [plainly, checkpointed, lora])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_loss_and_gradients_are_the_eager_ones(family, prepare):
    loss, found, expected, gradients_expected = fused_and_eager(family, prepare)
    assert expected > 1e-4
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    if prepare is lora:
        assert all("lora_" in name for name in found)
        assert found.keys() == gradients_expected.keys()
        for name, grad in gradients_expected.items():
            atol = 2e-5 * grad.abs().max().item() + 1e-9
            torch.testing.assert_close(found[name], grad, atol=atol, rtol=0)
        return
    assert_gradients_equal(found, gradients_expected)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_exact_as_eager_bf16(family, mode):
    make = FAMILIES[family]
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    student, teacher = (make.model(layers=n, seed=n).to(dtype) for n in (4, 5))
    inputs = make.inputs(padding="right")
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    signals = [
        SignalConfig(
            name=region, teacher="t", student_layers=layers, teacher_layers=layers, region=region
        )
        for region, layers in (("full", "0..-2"), ("text_to_vision", "penultimate"))
    ]
    signals = signals if family in VISION_LANGUAGE else signals[:1]
    checks = verify(
        student,
        teacher.requires_grad_(False),
        batch,
        signals,
        tokens=layout_of(inputs),
        autocast=torch.bfloat16 if mode == "autocast" else None,
        repeats=1,
    )
    for check in checks:
        assert check.verdict == AGREES, (check.signal, check.reasons)
        assert check.dtype == "bfloat16"


# An offloaded LLaVA-OneVision runs in no way: its image_newline stays behind.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llava_onevision"}))
def test_offloaded_models_give_the_same_maps(family):
    """Weights that accelerate's hooks bring in layer by layer, in a whole and a stopped forward."""
    from accelerate import cpu_offload

    make = FAMILIES[family]
    inputs = make.inputs(padding="left")
    with torch.no_grad():
        attentions = eager_attentions(make.model(), inputs).attentions
        model = cpu_offload(make.model(), execution_device=torch.device("cpu"))
        for stop in (False, True):
            with capture_attention(model, [0, -2], stop_after_last=stop) as captured:
                model(**inputs, use_cache=False)
            assert_maps_equal(captured, attentions, inputs["attention_mask"].bool())
            assert {p.device.type for p in model.parameters()} == {"meta"}


PACKED = [9, 15]


@pytest.fixture
def flash():
    with flash_attention():
        yield


def student_of(make):
    return make.model(layers=4, seed=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_their_sequences_one_by_one(family, implementation, flash):
    """Maps, loss and gradients; the image lies in the second of the two sequences."""
    make = FAMILIES[family]
    inputs = make.inputs(batch=1)
    inputs.pop("attention_mask")
    ids = inputs["input_ids"]
    if family in VISION_LANGUAGE:
        ids[:] = torch.where(ids == IMAGE, 7, ids)
        count = 10 if family == "llava_onevision" else 4
        ids[:, 11 : 11 + count] = IMAGE
    segments = torch.tensor([0] * PACKED[0] + [1] * PACKED[1])[None]
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    if "mm_token_type_ids" in inputs:  # text positions in the first row, then three rotary axes
        ids[:, 10], ids[:, 15] = VISION_START, VISION_END
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        axes = []
        for part in (slice(0, PACKED[0]), slice(PACKED[0], None)):
            grid = inputs["image_grid_thw"] if bool((ids[:, part] == IMAGE).any()) else None
            kinds = inputs["mm_token_type_ids"][:, part]
            axes.append(student_of(make).model.get_rope_index(ids[:, part], kinds, grid)[0])
        positions = torch.cat([positions[None], torch.cat(axes, dim=-1)])
    tokens = TokenLayout.from_masks(ids == IMAGE, segment_ids=segments)
    if family in VISION_LANGUAGE:
        batch = {"input_ids": ids, "position_ids": positions}
        tokens = TokenLayout.from_batch(batch, student_of(make).config)
        assert torch.equal(tokens.segment_ids, segments)
    teacher = make.model(layers=4, seed=5).requires_grad_(False)
    student = student_of(make)
    for model in (teacher, student):
        model.set_attn_implementation(implementation)
    loss = AttentionMapLoss(student_layers=[0, 2], teacher_layers=[0, 2], region="full")

    def run(inputs, tokens):
        with torch.no_grad(), capture_attention(teacher, [0, 2]) as targets:
            teacher(**inputs, use_cache=False)
        with capture_attention(student, [0, 2]) as own:
            student(**inputs, use_cache=False)
        return loss(own, targets, tokens), own

    packed, own = run(inputs | {"position_ids": positions}, tokens)
    sums = []
    for part in (slice(0, PACKED[0]), slice(PACKED[0], None)):
        alone = {"input_ids": ids[:, part]}
        if bool((ids[:, part] == IMAGE).any()):
            alone |= {k: v for k, v in inputs.items() if k != "input_ids"}
            if "mm_token_type_ids" in alone:
                alone["mm_token_type_ids"] = alone["mm_token_type_ids"][:, part]
        single, record = run(alone, TokenLayout.from_masks(ids[:, part] == IMAGE))
        sums.append(single * record[0].query.shape[2] ** 2)
        for layer in (0, 2):
            whole = head_mean_map(own[layer], segments >= 0, segments)[:, part, part]
            expected = head_mean_map(record[layer], segments[:, part] >= 0)
            torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)
    expected = sum(sums) / sum(n * n for n in PACKED)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=0)
    assert_gradients_equal(gradients(student, packed), gradients(student, expected))


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
FLEX = ["qwen2", "llama", "internvl", "llava_onevision"]


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_compiled_layers_give_the_eager_gradients(family):
    def compiled(model):
        for layer in model.model.language_model.layers:
            layer.compile(backend="aot_eager")
        return model

    torch._dynamo.reset()
    loss, found, expected, gradients_expected = fused_and_eager(family, compiled)
    torch._dynamo.reset()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    # A compiled layer has zeros where others have no gradient.
    found = {n: g for n, g in found.items() if n in gradients_expected or bool(g.any())}
    assert_gradients_equal(found, gradients_expected)


GPU_IMPLEMENTATIONS = ["sdpa"] + ["flash_attention_2"] * is_flash_attn_2_available()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
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
