"""What families and their batches bring: remote code, tiles, videos, no image, other tokens."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.errors import TokenMismatchError
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout
from tests.helpers.maps import gradients
from tests.helpers.modes import assert_like_eager, captured_loss
from tests.helpers.toy_models import FAMILIES, IMAGE, IMAGE_TOKENS, VIDEO, image_inputs, internvl

PERCEPTION = AttentionMapLoss(student_layers=[0], teacher_layers=[0], region="text_to_vision")
PLANNING = AttentionMapLoss(student_layers=[2], teacher_layers=[3], region="text_to_vision")


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_layout_of_a_processors_batch(family, padding):
    model, inputs = FAMILIES[family].model(layers=1), FAMILIES[family].inputs(padding=padding)
    inputs["input_ids"][0, 20] = VIDEO if family != "internvl" else IMAGE
    tokens = TokenLayout.from_batch(inputs, model.config)
    vision = inputs["input_ids"] == IMAGE
    if family != "internvl":
        vision = vision | (inputs["input_ids"] == VIDEO)
    assert torch.equal(tokens.is_vision, vision)
    assert torch.equal(tokens.valid, inputs["attention_mask"].bool())
    assert torch.equal(tokens.is_text, tokens.valid & ~vision)
    assert tokens.segment_ids is None


@pytest.mark.parametrize("padding", ["left", "right"])
def test_dynamic_tiles_and_several_views(padding):
    """Three tiles of one view and one of another in a sample, one tile in the other sample."""
    inputs = image_inputs(padding=padding)
    ids = inputs["input_ids"]
    ids[0, 5:] = torch.where(ids[0, 5:] == IMAGE, 7, ids[0, 5:])
    for start in (5, 9, 13, 18):  # a caption of one token between the views
        ids[0, start : start + IMAGE_TOKENS] = IMAGE
    inputs["pixel_values"] = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    student, teacher = internvl(layers=4, seed=1), internvl(layers=5, seed=2).requires_grad_(False)
    tokens = TokenLayout.from_batch(inputs, student.config)
    assert tokens.is_vision.sum(1).tolist() == [16, 4]
    assert_like_eager(student, teacher, inputs, tokens, PLANNING)


def test_qwen_images_of_different_size_and_a_video():
    """Two images and a video of two frames in one sample, one image in the other."""
    make = FAMILIES["qwen2_5_vl"]
    generator = torch.Generator().manual_seed(1)
    grids = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4]])
    ids = torch.randint(5, 290, (2, 26), generator=generator)
    ids[0, 2:6], ids[0, 8:10], ids[1, 5:9] = IMAGE, IMAGE, IMAGE
    ids[0, 12:16] = VIDEO
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(40, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": grids,
        "pixel_values_videos": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
        "mm_token_type_ids": kinds,
    }
    student, teacher = make.model(layers=4, seed=1), make.model(layers=5, seed=2)
    tokens = TokenLayout.from_batch(inputs, student.config)
    assert tokens.is_vision.sum(1).tolist() == [10, 4]
    assert_like_eager(student, teacher.requires_grad_(False), inputs, tokens, PLANNING)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_a_batch_without_image_teaches_nothing_about_images(family):
    make = FAMILIES[family]
    inputs = make.inputs(padding="left")
    ids = inputs["input_ids"]
    inputs = {
        "input_ids": torch.where(ids >= 300, 7, ids),
        "attention_mask": inputs["attention_mask"],
    }
    student, teacher = make.model(layers=4, seed=1), make.model(layers=5, seed=2)
    tokens = TokenLayout.from_batch(inputs, student.config)
    loss = captured_loss(student, teacher.requires_grad_(False), inputs, tokens, PLANNING)
    assert loss.item() == 0.0
    assert not any(bool(grad.any()) for grad in gradients(student, loss).values())


def test_a_sample_without_image_is_left_out_of_the_mean():
    student, teacher = internvl(layers=4, seed=1), internvl(layers=5, seed=2).requires_grad_(False)
    inputs = image_inputs()
    ids = inputs["input_ids"]
    ids[1] = torch.where(ids[1] == IMAGE, 7, ids[1])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    tokens = TokenLayout.from_batch(inputs, student.config)
    both = captured_loss(student, teacher, inputs, tokens, PLANNING)
    alone = {k: v[:1] for k, v in inputs.items()}
    first = captured_loss(student, teacher, alone, tokens.select([0]), PLANNING)
    torch.testing.assert_close(both, first, rtol=1e-5, atol=0)


def test_an_image_token_inside_the_answer_is_vision_and_asks_nothing():
    """Its row is no text row; its column is one that text looks at."""
    student, teacher = internvl(layers=4, seed=1), internvl(layers=5, seed=2).requires_grad_(False)
    inputs = image_inputs()
    inputs["input_ids"][0, 18:22] = IMAGE  # the answer's tokens
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], torch.randn(1, 3, 56, 56)])
    tokens = TokenLayout.from_batch(inputs, student.config)
    assert tokens.is_vision[0, 18:22].all() and not tokens.is_text[0, 18:22].any()
    assert_like_eager(student, teacher, inputs, tokens, PLANNING)


# --- mismatches ----------------------------------------------------------------------------------


def test_tokens_that_differ_are_named_by_sample_and_position():
    student, teacher = internvl(layers=4), internvl(layers=4).requires_grad_(False)
    inputs = image_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][1, 20] = 8
    with torch.no_grad(), capture_attention(teacher, [0], stop_after_last=True) as targets:
        teacher(**other)
    with capture_attention(student, [0]) as own:
        student(**inputs)
    with pytest.raises(
        TokenMismatchError, match=r"sample 1, position 20 is .* and 8 for"
    ) as caught:
        PERCEPTION(own, targets, TokenLayout.from_batch(inputs, student.config))
    assert caught.value.sample == 1


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_positions_that_differ_are_named_too(family):
    """One set of tokens, counted in two ways: here by an image grid turned on its side."""
    make = FAMILIES[family]
    student, teacher = (make.model(layers=2, seed=n).requires_grad_(n == 1) for n in (1, 2))
    inputs = make.inputs()
    other = dict(inputs)
    if family == "internvl":
        inputs["position_ids"] = torch.arange(24).expand(2, 24)
        other["position_ids"] = inputs["position_ids"].clone()
        other["position_ids"][1] += 3
    else:
        other["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 2, 8]])
    tokens = TokenLayout.from_batch(make.inputs(), student.config)
    with torch.no_grad(), capture_attention(teacher, [0], stop_after_last=True) as targets:
        teacher(**other, use_cache=False)
    with capture_attention(student, [0]) as own:
        student(**inputs, use_cache=False)
    match = r"saw different positions: sample 1, position .* the same position_ids"
    with pytest.raises(TokenMismatchError, match=match) as caught:
        PERCEPTION(own, targets, tokens)
    assert caught.value.sample == 1
    same = PERCEPTION(own.select([0]), targets.select([0]), tokens.select([0]))
    assert same > 0


def test_positions_of_one_row_stand_for_all_samples():
    student, teacher = internvl(layers=2, seed=1), internvl(layers=2).requires_grad_(False)
    inputs = image_inputs()
    tokens = TokenLayout.from_batch(inputs, student.config)
    whole = {**inputs, "position_ids": torch.arange(24).expand(2, 24)}
    with torch.no_grad(), capture_attention(teacher, [0]) as targets:
        teacher(**inputs, position_ids=torch.arange(24)[None])
    with capture_attention(student, [0]) as own:
        student(**whole)
    assert PERCEPTION(own, targets, tokens) > 0
    assert PERCEPTION(own.select([1]), targets.select([1]), tokens.select([1])) > 0
