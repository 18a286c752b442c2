"""Maps, losses and gradients in every mode of training are those of eager `outputs.attentions`."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.errors import CaptureError
from drivekd.losses import AttentionMapLoss
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
from tests.helpers.modes import checkpointed, fused_and_eager, lora, plainly
from tests.helpers.toy_models import FAMILIES, IMAGE, VISION_END, VISION_START, layout_of
from tests.helpers.traces import traces

VISION_LANGUAGE = sorted(set(FAMILIES) - {"qwen2", "llama", "qwen3"})


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_whose_weights_are_offloaded_is_refused(family):
    """Its weights come as copies for each call: backward finds gradients for those alone."""
    from accelerate import cpu_offload

    make = FAMILIES[family]
    model, inputs = make.model(layers=2), make.inputs()
    if family == "llava_onevision":
        cpu_offload(model.model.language_model, execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    before = traces(model)
    match = "weights of the decoder are offloaded.*a teacher under torch.no_grad"
    with pytest.raises(CaptureError, match=match), capture_attention(model, [1]):
        model(**inputs, use_cache=False)
    assert traces(model)[0] == before[0]
    with torch.no_grad(), capture_attention(model, [1]):
        model(**inputs, use_cache=False)
    with capture_attention(model.requires_grad_(False), [1]):
        model(**inputs, use_cache=False)


def test_weights_that_hooks_move_but_do_not_offload_train():
    from accelerate import dispatch_model

    make, inputs = FAMILIES["internvl"], FAMILIES["internvl"].inputs(padding="left")
    tokens = layout_of(inputs)
    results = []
    for dispatched in (False, True):
        model = make.model(layers=3)
        if dispatched:
            model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
        with capture_attention(model, [0, 2]) as captured:
            model(**inputs, use_cache=False)
        targets = FAMILIES["internvl"].model(layers=3, seed=7).requires_grad_(False)
        with capture_attention(targets, [0, 2], stop_after_last=True) as wanted:
            targets(**inputs, use_cache=False)
        loss = AttentionMapLoss(student_layers=[0, 2], teacher_layers=[0, 2], region="full")
        results.append(gradients(model, loss(captured, wanted, tokens)))
    plain, moved = results
    assert plain.keys() == moved.keys() and len(plain) > 20
    assert all(torch.equal(plain[name], moved[name]) for name in plain)


@pytest.mark.parametrize("loss", ["mse", "cosine", "kl"])
@pytest.mark.parametrize("region", ["full", "text_to_vision"])
def test_a_teacher_on_another_device_is_copied_to_the_students(region, loss, flash):
    """The student's device has no memory here: shapes, devices and graphs are all that it has."""
    student, teacher = student_of(FAMILIES["internvl"]).to("meta"), FAMILIES["internvl"].model()
    inputs = FAMILIES["internvl"].inputs()
    tokens = layout_of(inputs)
    settings = AttentionMapLoss(
        student_layers=[0, 1], teacher_layers=[0, 1, 2], groups=[[0], [1, 2]],
        region=region, loss=loss,
    )  # fmt: skip
    teacher.requires_grad_(False).set_attn_implementation("flash_attention_2")
    with torch.no_grad(), capture_attention(teacher, [0, 1, 2]) as targets:
        teacher(**inputs, use_cache=False)
    assert targets[2].lse is not None and targets[2].query.device.type == "cpu"
    with capture_attention(student, [0, 1]) as own:
        student.model.language_model(inputs_embeds=torch.empty(2, 24, 64, device="meta"))
    value = settings(own, targets, tokens.to("meta"))
    assert (value.device.type, value.shape) == ("meta", ())
    assert len(gradients(student.model.language_model, value)) == 17  # all up to layer 1's q and k


def test_a_teacher_in_inference_mode_teaches_the_same():
    inputs = FAMILIES["internvl"].inputs(padding="left")
    student, teacher = student_of(FAMILIES["internvl"]), FAMILIES["internvl"].model(seed=5)
    settings = AttentionMapLoss(student_layers=[0, 2], teacher_layers=[1, 3], region="full")
    results = []
    for without_grad in (torch.no_grad, torch.inference_mode):
        with without_grad(), capture_attention(teacher, [1, 3], stop_after_last=True) as targets:
            teacher(**inputs)
        with capture_attention(student, [0, 2]) as own:
            student(**inputs)
        results.append(gradients(student, settings(own, targets, layout_of(inputs))))
    assert all(torch.equal(results[1][name], grad) for name, grad in results[0].items())


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
