"""Families in other shapes: odd head counts, wide and narrow heads, tiles, clips, tied weights."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout
from drivekd.train import load_model, load_teacher, loading_cost
from tests.helpers.maps import assert_maps_equal, eager_attentions
from tests.helpers.modes import assert_like_eager
from tests.helpers.toy_models import FAMILIES, IMAGE, VIDEO, layout_of, llava_onevision, qwen3_vl
from tests.helpers.traces import run

# Head dims that are not the hidden size over the number of heads, but where a family has no other.
SEVEN = {"heads": 7, "kv_heads": 1, "hidden": 56, "head_dim": 24}
ONE = {"heads": 3, "kv_heads": 3, "hidden": 40, "head_dim": 16}
THREE = {"heads": 6, "kv_heads": 2, "hidden": 72, "head_dim": 8}
PLAIN = {"heads": 7, "kv_heads": 1, "hidden": 112}  # Qwen2.5-VL and Llama insist
SHAPES = [
    ("qwen2", SEVEN, ONE),
    ("qwen2", ONE, THREE),
    ("llama", PLAIN, {"heads": 6, "kv_heads": 2, "hidden": 48, "head_dim": 24}),
    ("qwen3", THREE, SEVEN),
    ("internvl", SEVEN, THREE),
    ("internvl", ONE, SEVEN),
    ("internvl3_5", THREE, ONE),
    ("internvl3_5", SEVEN, THREE),
    ("qwen2_5_vl", PLAIN, {"heads": 6, "kv_heads": 2, "hidden": 96}),
    ("qwen3_vl", SEVEN, ONE),
    ("qwen3_vl", THREE, SEVEN),
    ("llava_onevision", SEVEN, ONE),
    ("llava_onevision", THREE, SEVEN),
]


@pytest.mark.parametrize(("family", "own", "other"), SHAPES)
def test_student_and_teacher_of_other_shapes(family, own, other):
    """The student is the deeper one; groups of one teacher layer each."""
    make = FAMILIES[family]
    student, teacher = make.model(layers=5, seed=1, **own), make.model(layers=3, seed=2, **other)
    inputs = make.inputs(padding="left")
    with torch.no_grad():
        captured = run(student, inputs, range(5))
        attentions = eager_attentions(student, inputs).attentions
        assert captured[0].query.shape[1] == own["heads"]
        assert captured[0].key.shape[1] == own["kv_heads"]
    assert_maps_equal(captured, attentions, inputs["attention_mask"].bool())
    student.set_attn_implementation("sdpa")
    settings = AttentionMapLoss(student_layers=range(4), teacher_layers=range(2), region="full")
    teacher.requires_grad_(False)
    assert_like_eager(student, teacher, inputs, layout_of(inputs), settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_are_counted_loaded_and_captured(family, tmp_path):
    model = FAMILIES[family].model(layers=3)
    inputs = FAMILIES[family].inputs(padding="right")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    for layers in ("first", "penultimate", None):
        cost = loading_cost(tmp_path, layers)
        loaded = load_model(tmp_path) if layers is None else load_teacher(tmp_path, layers)
        assert cost.parameters == sum(p.numel() for p in loaded.parameters())
        wanted = 0 if layers == "first" else 1
        got, expected = run(loaded, inputs, [wanted]), run(model, inputs, [wanted])
        assert torch.equal(got[wanted].query, expected[wanted].query)


def row(length, *spans):
    """A row of random text with (token, start, count) in it, and the generator for the pixels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 290, (1, length), generator=generator)
    for token, start, count in spans:
        ids[:, start : start + count] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, generator


# Tokens of a 28 x 28 base view, of the tiles without the padding of their picture, and of newlines.
TILED = [((28, 56), 3, 14), ((56, 28), 3, 16), ((20, 56), 3, 14), ((56, 56), 5, 24)]


@pytest.mark.parametrize(("size", "views", "count"), TILED)
def test_llava_pictures_of_several_tiles_with_newline_tokens(size, views, count):
    grids = ((28, 56), (56, 28), (56, 56))
    student, teacher = (llava_onevision(layers=n, seed=n, grids=grids) for n in (3, 4))
    inputs, generator = row(count + 9, (IMAGE, 3, count))
    inputs |= {
        "pixel_values": torch.randn(1, views, 3, 28, 28, generator=generator),
        "image_sizes": torch.tensor([size]),
        "batch_num_images": torch.ones(1, dtype=torch.int64),
    }
    tokens = TokenLayout.from_batch(inputs, student.config)
    assert tokens.is_vision.sum() == count
    settings = AttentionMapLoss(student_layers=[1], teacher_layers=[2], region="text_to_vision")
    assert_like_eager(student, teacher.requires_grad_(False), inputs, tokens, settings)


def test_llava_clips_of_two_frames_with_their_newline_token():
    student, teacher = (llava_onevision(layers=n, seed=n) for n in (3, 4))
    inputs, generator = row(15, (VIDEO, 4, 3))
    inputs["pixel_values_videos"] = torch.randn(1, 2, 3, 28, 28, generator=generator)
    tokens = TokenLayout.from_batch(inputs, student.config)
    assert tokens.is_vision.sum() == 3
    settings = AttentionMapLoss(student_layers=[1], teacher_layers=[2], region="text_to_vision")
    assert_like_eager(student, teacher.requires_grad_(False), inputs, tokens, settings)


def test_qwen3_vl_clips_are_vision_between_their_time_stamps():
    """Two frames, each behind text of its own; deepstack adds to them in the first layers."""
    student, teacher = (qwen3_vl(layers=n, seed=n) for n in (4, 5))
    inputs, generator = row(24, (VIDEO, 4, 2), (VIDEO, 9, 2), (IMAGE, 14, 4))
    ids = inputs["input_ids"]
    inputs |= {
        "pixel_values_videos": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    tokens = TokenLayout.from_batch(inputs, student.config)
    assert tokens.is_vision.sum() == 8
    settings = AttentionMapLoss(
        student_layers=[0, 2], teacher_layers=[1, 3], region="text_to_vision"
    )
    assert_like_eager(student, teacher.requires_grad_(False), inputs, tokens, settings)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen2_5_vl", "qwen3_vl"}))
def test_a_row_of_padding_alone_counts_for_nothing(family):
    """As the last batch of a loader that fills up; attention of such rows is arbitrary."""
    make = FAMILIES[family]
    student, teacher = make.model(layers=4, seed=1), make.model(layers=4, seed=2)
    inputs = make.inputs(batch=2, padding=None)
    ids = inputs["input_ids"]
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    ids[1], inputs["attention_mask"][1] = 0, 0
    inputs |= {n: t for n, t in alone.items() if n not in ("input_ids", "attention_mask")}
    settings = AttentionMapLoss(student_layers=[0, 2], teacher_layers=[0, 2], region="full")
    values = []
    for batch in (inputs, alone):
        with torch.no_grad(), capture_attention(teacher, [0, 2]) as targets:
            teacher(**batch, use_cache=False)
        with capture_attention(student, [0, 2]) as own:
            student(**batch, use_cache=False)
        loss = settings(own, targets, layout_of(batch))
        weight = student.get_input_embeddings().weight
        values.append((loss, torch.autograd.grad(loss, weight)[0]))
    for both, one in zip(*values, strict=True):
        torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-9)
