"""Drive-KD's own losses, written down from its public code, on tiny InternVLs.

One sample at a time, eager attention, every map in memory, whole layers as the public code has
them; ours is one padded batch under sdpa. Read: Colamentos2023/Drive-KD 7589a0c, intern/trainer.py
and intern/model.py.
"""

import math

import pytest
import torch

from benchmarks.baselines.public_losses import (
    PUBLIC_LOSSES,
    perception,
    planning,
    reasoning,
)
from drivekd.capture import capture_attention
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout
from tests.helpers.maps import assert_gradients_equal, gradients
from tests.helpers.remote_code import TILE, InternVLChat
from tests.helpers.toy_models import IMAGE, IMAGE_TOKENS, internvl

LENGTHS = (24, 17, 20)


def samples(seed=0):
    """Three samples of different length, an image of four tokens each, one tile an image."""
    generator = torch.Generator().manual_seed(seed)
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(6, 290, (1, length), generator=generator)
        ids[:, 3 + index : 3 + index + IMAGE_TOKENS] = IMAGE
        yield {"input_ids": ids, "pixel_values": torch.randn(1, 3, TILE, TILE, generator=generator)}


def padded(side):
    """The same samples as one batch."""
    rows = list(samples())
    ids = torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        count = row["input_ids"].shape[1]
        place = slice(0, count) if side == "right" else slice(-count, None)
        ids[i, place], mask[i, place] = row["input_ids"][0], 1
    pixels = torch.cat([row["pixel_values"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


# --- the public procedure ------------------------------------------------------------------------


def maps_of(model, sample):
    model.set_attn_implementation("eager")
    return [a.double() for a in model(**sample, output_attentions=True, use_cache=False).attentions]


# --- ours ----------------------------------------------------------------------------------------


def ours(name, student_depth, teacher_depth):
    layers = {
        "perception": ([0], [0]),
        "reasoning": (list(range(student_depth - 1)), list(range(teacher_depth - 1))),
        "planning": ([-2], [-2]),
    }[name]
    region = "full" if name == "reasoning" else "text_to_vision"
    return AttentionMapLoss(student_layers=layers[0], teacher_layers=layers[1], region=region)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("depths", [(4, 6), (3, 3), (6, 4)], ids=["deeper", "equal", "shallower"])
@pytest.mark.parametrize("name", PUBLIC_LOSSES)
def test_losses_and_gradients_are_those_of_the_public_procedure(name, depths, side):
    """Also where the student has more layers than its teacher."""
    student = internvl(layers=depths[0], seed=1)
    teacher = internvl(layers=depths[1], hidden=96, heads=6, kv_heads=3, seed=2)
    total = 0.0
    for sample in samples():
        with torch.no_grad():
            targets = maps_of(teacher, sample)
        is_image = sample["input_ids"][0] == IMAGE
        total = total + PUBLIC_LOSSES[name](maps_of(student, sample), targets, is_image)
    expected = total / len(LENGTHS)
    gradients_expected = gradients(student, expected)

    batch = padded(side)
    settings = ours(name, *depths)
    for model in (student, teacher):
        model.set_attn_implementation("sdpa")
    tokens = TokenLayout.from_batch(batch, student.config)
    with (
        torch.no_grad(),
        capture_attention(teacher, settings.teacher_layers, stop_after_last=True) as targets,
    ):
        teacher(**batch, use_cache=False)
    with capture_attention(student, settings.student_layers) as own:
        student(**batch, use_cache=False)
    loss = settings(own, targets, tokens)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_equal(gradients(student, loss), gradients_expected)


def live_cells(student, teacher, is_image):
    """Causally dead cells left out of the denominator."""
    count = len(is_image)
    cells = ((~is_image)[:, None] & is_image[None, :]).sum()
    live = ((~is_image)[:, None] & is_image[None, :] & torch.ones(count, count).tril().bool()).sum()
    return planning(student, teacher, is_image) * cells / live


def last_layer_too(student, teacher, is_image):
    """As if -2 were not the last of the range."""
    return reasoning([*student, student[-1]], [*teacher, teacher[-1]], is_image)


def first_against_first(student, teacher, is_image):
    """Pairs instead of groups."""
    k = len(student) - 1
    errors = [(student[i] - teacher[i]).mean(1).square().mean() for i in range(k)]
    return sum(errors) / k


def image_rows_too(student, teacher, is_image):
    squares = (student[-2].mean(1)[0] - teacher[-2].mean(1)[0]).square()
    return squares[:, is_image].mean()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (planning, live_cells),
        (planning, image_rows_too),
        (planning, perception),
        (reasoning, last_layer_too),
        (reasoning, first_against_first),
    ],
)
def test_plausible_mistakes_would_show(right, wrong):
    """What is written down above is far from its misreadings, against the 1e-5 that is allowed."""
    student, teacher = internvl(layers=4, seed=1), internvl(layers=6, seed=2)
    (sample, *_) = samples()
    with torch.no_grad():
        maps = [maps_of(model, sample) for model in (student, teacher)]
    is_image = sample["input_ids"][0] == IMAGE
    values = [float(loss(*maps, is_image)) for loss in (right, wrong)]
    assert abs(values[1] / values[0] - 1) > 0.05


@pytest.mark.parametrize("name", PUBLIC_LOSSES)
def test_remote_code_container_with_its_images_as_the_public_code_embeds_them(name):
    """Tiles are summed over the root of their number, and the language model is called alone."""
    student, teacher = InternVLChat(layers=4, seed=1), InternVLChat(layers=6, seed=2)
    teacher.requires_grad_(False)
    (sample, *_) = samples()
    tiles = torch.randn(3, 3, TILE, TILE, generator=torch.Generator().manual_seed(3))
    ids = sample["input_ids"]
    is_image = ids == IMAGE

    def embeds(model):
        image = model.extract_feature(tiles).sum(0, keepdim=True) / math.sqrt(len(tiles))
        text = model.language_model.get_input_embeddings()(ids)
        return torch.cat([text[:, :3], image, text[:, 3 + IMAGE_TOKENS :]], dim=1)

    def maps(model):
        model.language_model.set_attn_implementation("eager")
        return maps_of(model.language_model, {"inputs_embeds": embeds(model)})

    with torch.no_grad():
        targets = maps(teacher)
    expected = PUBLIC_LOSSES[name](maps(student), targets, is_image[0])
    gradients_expected = gradients(student, expected)
    assert "mlp1.1.weight" in gradients_expected

    settings = ours(name, 4, 6)
    for model in (student, teacher):
        model.language_model.set_attn_implementation("sdpa")
    with (
        torch.no_grad(),
        capture_attention(teacher, settings.teacher_layers, stop_after_last=True) as captured,
    ):
        teacher.language_model(inputs_embeds=embeds(teacher), use_cache=False)
    with capture_attention(student, settings.student_layers) as own:
        student.language_model(inputs_embeds=embeds(student), use_cache=False)
    loss = settings(own, captured, TokenLayout.from_masks(is_image))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert_gradients_equal(gradients(student, loss), gradients_expected, more_than=10)
