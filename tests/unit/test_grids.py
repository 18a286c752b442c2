"""Where vision tokens lie: a changed spot of a picture changes the token that is put there."""

import numpy as np
import pytest
import torch
from PIL import Image

from drivekd.data import Message, Record
from drivekd.data.encode import ProcessorEncoder
from drivekd.study.grids import find_views
from tests.helpers import toy_data, toy_models
from tests.helpers.toy_processors import QwenProcessor, TilesProcessor

FAMILIES = {
    "single tile": (toy_models.internvl, toy_data.encoder),
    "tiles": (
        toy_models.internvl,
        lambda root: ProcessorEncoder(TilesProcessor(), root=root),
    ),
    "qwen2_5_vl": (
        toy_models.qwen2_5_vl,
        lambda root: ProcessorEncoder(QwenProcessor(), root=root),
    ),
    "qwen3_vl": (toy_models.qwen3_vl, lambda root: ProcessorEncoder(QwenProcessor(), root=root)),
}
SIZES = ((168, 112), (56, 56), (56, 140))  # width, height of the record's pictures


def make_record(root, *, spot=None):
    """Three pictures; `spot` (image, x, y) in shares of its sides is painted over."""
    names = []
    for index, (width, height) in enumerate(SIZES):
        pixels = np.full((height, width, 3), 90, dtype=np.uint8)
        if spot is not None and spot[0] == index:
            x, y = int(spot[1] * width), int(spot[2] * height)
            pixels[max(0, y - 5) : y + 5, max(0, x - 5) : x + 5] = 255
        Image.fromarray(pixels).save(root / f"{index}.png")
        names.append(f"{index}.png")
    text = "w7 <image> w8 <image> <image> w9"
    return Record((Message("user", text), Message("assistant", "w6")), tuple(names), "any")


@torch.no_grad()
def vision_features(model, encoded):
    """(tokens, width) features that stand for the pictures, in order."""
    inputs = {"pixel_values": encoded["pixel_values"]}
    if "image_grid_thw" in encoded:
        inputs["image_grid_thw"] = encoded["image_grid_thw"]
    found = model.model.get_image_features(**inputs)
    found = getattr(found, "pooler_output", found)
    if isinstance(found, tuple | list):
        found = torch.cat(list(found))
    return found.reshape(-1, found.shape[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spot_changes_the_token_that_the_view_puts_there(family, tmp_path):
    make, encode = FAMILIES[family]
    model, encoder = make(layers=1), encode(tmp_path)
    encoded = encoder(make_record(tmp_path))
    sizes = [(height, width) for width, height in SIZES]
    views = find_views(encoder, model.config, encoded, sizes)
    vision = (encoded["input_ids"] == toy_models.IMAGE).nonzero()[:, 0].tolist()
    used = sorted(token for view in views for row in view.tokens for token in row)
    assert used == vision, "every vision token is in exactly one view"
    before = vision_features(model, encoded)
    assert len(before) == len(vision)
    for view in views:
        rows, columns = len(view.tokens), len(view.tokens[0])
        for row in range(rows):
            for column in range(columns):
                spot = (view.image, (column + 0.5) / columns, (row + 0.5) / rows)
                after = vision_features(model, encoder(make_record(tmp_path, spot=spot)))
                moved = (after - before).norm(dim=1)
                own = [vision.index(token) for line in view.tokens for token in line]
                most = own[int(moved[own].argmax())]
                assert vision[most] == view.tokens[row][column], (view, row, column)
                others = [i for i in range(len(vision)) if i not in own]
                same_image = [v for v in views if v.image == view.image]
                if len(same_image) == 1 and others:
                    assert moved[others].max() < moved[most]


def test_tiles_and_thumbnail_are_two_views(tmp_path):
    encoder = ProcessorEncoder(TilesProcessor(), root=tmp_path)
    encoded = encoder(make_record(tmp_path))
    config = toy_models.internvl(layers=1).config
    views = find_views(encoder, config, encoded, [(height, width) for width, height in SIZES])
    shapes = [(v.image, v.name, len(v.tokens), len(v.tokens[0])) for v in views]
    # 168 x 112 becomes 3 x 2 tiles of 2 x 2 tokens, 56 x 56 one, 56 x 140 a column of three.
    assert shapes == [
        (0, "tiles", 4, 6),
        (0, "thumbnail", 2, 2),
        (1, "", 2, 2),
        (2, "tiles", 6, 2),
        (2, "thumbnail", 2, 2),
    ]


def test_what_does_not_fit_is_refused(tmp_path):
    encoder = ProcessorEncoder(TilesProcessor(), root=tmp_path)
    encoded = encoder(make_record(tmp_path))
    config = toy_models.internvl(layers=1).config
    sizes = [(height, width) for width, height in SIZES]
    with pytest.raises(ValueError, match="7 tiles, which are no 2 x 1"):
        find_views(encoder, config, encoded, [(112, 56), *sizes[1:]])
    with pytest.raises(ValueError, match="in 3 stretches do not fit 2 images"):
        find_views(encoder, config, encoded, sizes[:2])
    config.image_seq_length = 5
    with pytest.raises(ValueError, match=r"do not fit 3 images of 5 tokens"):
        find_views(encoder, config, encoded, sizes)


def test_unknown_family_is_named(tmp_path):
    encoder = toy_data.encoder(tmp_path)
    config = toy_models.llava_onevision(layers=1).config
    with pytest.raises(NotImplementedError, match=r"llava_onevision .* is not known; InternVL and"):
        find_views(encoder, config, {"input_ids": torch.tensor([1])}, [])
