"""TokenLayout: what is refused, what is read from a batch, and where masks live."""

import dataclasses
import types

import pytest
import torch

from drivekd.tokens import TokenLayout


def mask(*rows):
    return torch.tensor([[cell == "1" for cell in row] for row in rows])


def test_text_defaults_to_valid_tokens_that_are_no_vision():
    layout = TokenLayout.from_masks(mask("0110", "0001"), valid=mask("1110", "0011"))
    assert torch.equal(layout.is_text, mask("1000", "0010"))
    assert (layout.batch_size, layout.num_tokens, layout.device.type) == (2, 4, "cpu")
    assert layout.segment_ids is None


def test_valid_defaults_to_every_token():
    assert TokenLayout.from_masks(mask("010")).valid.all()


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenLayout.from_masks(mask("01")).valid = mask("11")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"is_vision": [[True]]}, TypeError, "is_vision is a list"),
        ({"is_vision": torch.ones(1, 3)}, TypeError, "is_vision has dtype torch.float32"),
        ({"is_vision": mask("01")[0]}, ValueError, r"is_vision has shape \(2,\)"),
        ({"is_vision": torch.zeros(0, 3, dtype=torch.bool)}, ValueError, "B, N >= 1"),
        ({"is_vision": torch.zeros(2, 0, dtype=torch.bool)}, ValueError, "B, N >= 1"),
        ({"is_vision": mask("01"), "valid": torch.ones(1, 2)}, TypeError, "valid has dtype"),
        ({"is_vision": mask("01"), "valid": mask("111")}, ValueError, "valid has shape"),
        ({"is_vision": mask("01"), "is_text": mask("1")}, ValueError, "is_text has shape"),
        ({"is_vision": mask("01"), "is_text": mask("1", "1")}, ValueError, "is_text has shape"),
        (
            {"is_vision": mask("01"), "valid": mask("11").to("meta")},
            ValueError,
            "valid is on meta",
        ),
        (
            {"is_vision": mask("01"), "segment_ids": torch.zeros(1, 2)},
            TypeError,
            "segment_ids has dtype",
        ),
        ({"is_vision": mask("01"), "segment_ids": [[0, 0]]}, TypeError, "segment_ids is a list"),
        (
            {"is_vision": mask("01"), "segment_ids": torch.zeros(1, 3, dtype=torch.int64)},
            ValueError,
            "segment_ids has shape",
        ),
        (
            {"is_vision": mask("000", "001"), "is_text": mask("000", "011")},
            ValueError,
            "sample 1, position 2",
        ),
        (
            {"is_vision": mask("010"), "valid": mask("100")},
            ValueError,
            "is_vision is True where valid is False at sample 0, position 1",
        ),
        (
            {"is_vision": mask("000"), "is_text": mask("001"), "valid": mask("110")},
            ValueError,
            "is_text is True where valid is False at sample 0, position 2",
        ),
    ],
)
def test_from_masks_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenLayout.from_masks(**arguments)


def test_select_takes_samples_in_the_order_given():
    segments = torch.tensor([[0, 0], [0, 1], [1, 1]])
    layout = TokenLayout.from_masks(mask("01", "10", "11"), segment_ids=segments)
    for rows in ([2, 0], torch.tensor([2, 0]), (2, 0)):
        chosen = layout.select(rows)
        assert torch.equal(chosen.is_vision, mask("11", "01"))
        assert torch.equal(chosen.segment_ids, segments[[2, 0]])


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], ValueError),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError),
        (mask("01")[0], TypeError),
        ([0.9], TypeError),
        ([True], TypeError),
        ("01", TypeError),
        (None, TypeError),
        ([2], ValueError),
        ([-1], ValueError),
        (torch.tensor([2]), ValueError),
    ],
)
def test_select_refuses(rows, error):
    with pytest.raises(error, match="rows"):
        TokenLayout.from_masks(mask("01", "10")).select(rows)


def test_to_moves_every_mask():
    segments = torch.zeros(1, 2, dtype=torch.int64)
    layout = TokenLayout.from_masks(mask("01"), segment_ids=segments)
    moved = layout.to("meta", non_blocking=True)
    for each in (moved.is_vision, moved.is_text, moved.valid, moved.segment_ids):
        assert each.device.type == "meta"
    assert moved.device.type == "meta"
    assert TokenLayout.from_masks(mask("01")).to("cpu").segment_ids is None


CONFIG = types.SimpleNamespace(image_token_id=9)
IDS = torch.tensor([[9, 9, 4, 5], [9, 4, 5, 0]])


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        types.SimpleNamespace(image_token_index=9),
        types.SimpleNamespace(image_token_id=None, image_token_index=9),
        types.SimpleNamespace(text_config=types.SimpleNamespace(image_token_id=9)),
    ],
)
def test_vision_tokens_are_those_of_the_config(config):
    layout = TokenLayout.from_batch({"input_ids": IDS}, config)
    assert torch.equal(layout.is_vision, mask("1100", "1000"))
    assert layout.valid.all()


def test_video_tokens_are_vision_too():
    config = types.SimpleNamespace(image_token_id=9, video_token_id=5)
    layout = TokenLayout.from_batch({"input_ids": IDS}, config)
    assert torch.equal(layout.is_vision, mask("1101", "1010"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_is_read_from_the_attention_mask(dtype):
    padding = mask("1111", "1110")
    batch = {"input_ids": IDS, "attention_mask": padding.to(dtype)}
    layout = TokenLayout.from_batch(batch, CONFIG)
    assert torch.equal(layout.valid, padding)
    assert torch.equal(layout.is_text, mask("0011", "0110"))


def test_a_batch_without_vision_tokens_is_legal():
    layout = TokenLayout.from_batch({"input_ids": torch.tensor([[1, 2]])}, CONFIG)
    assert not layout.is_vision.any()


def test_segments_are_read_from_jumps_of_the_positions():
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    layout = TokenLayout.from_batch({"input_ids": IDS, "position_ids": positions}, CONFIG)
    assert layout.segment_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    shared = TokenLayout.from_batch({"input_ids": IDS, "position_ids": positions[:1]}, CONFIG)
    assert shared.segment_ids.tolist() == [[0, 0, 1, 1]] * 2


def test_segments_of_multimodal_positions_are_read_from_the_texts_row():
    text = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    axes = torch.zeros(3, 2, 4, dtype=torch.int64)
    batch = {"input_ids": IDS, "position_ids": torch.cat([text[None], axes])}
    assert TokenLayout.from_batch(batch, CONFIG).segment_ids.tolist() == [[0, 0, 1, 1], [0] * 4]
    with pytest.raises(ValueError, match=r"sample 0, position 2.*drop the attention_mask"):
        TokenLayout.from_batch(batch | {"attention_mask": torch.ones_like(IDS)}, CONFIG)


def test_positions_without_a_jump_are_one_segment():
    batch = {"input_ids": IDS, "position_ids": torch.arange(4).expand(2, 4)}
    assert TokenLayout.from_batch(batch, CONFIG).segment_ids is None


def test_positions_of_left_padding_are_no_packing():
    batch = {
        "input_ids": torch.tensor([[0, 0, 9, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
        "position_ids": torch.tensor([[1, 1, 0, 1]]),
    }
    assert TokenLayout.from_batch(batch, CONFIG).segment_ids is None


def test_packing_that_the_model_would_ignore_is_refused():
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.ones_like(IDS),
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]),
    }
    with pytest.raises(ValueError, match=r"sample 1, position 2.*drop the attention_mask"):
        TokenLayout.from_batch(batch, CONFIG)


def test_multimodal_positions_with_a_mask_are_ignored():
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.ones_like(IDS),
        "position_ids": torch.zeros(3, 2, 4, dtype=torch.int64),
    }
    assert TokenLayout.from_batch(batch, CONFIG).segment_ids is None


@pytest.mark.parametrize(
    ("batch", "config", "error", "message"),
    [
        ({"input_ids": IDS}, types.SimpleNamespace(), ValueError, "image_token_id"),
        ({}, CONFIG, ValueError, "no input_ids.*from_masks"),
        ([IDS], CONFIG, TypeError, "batch is a list"),
        ({"input_ids": [[1]]}, CONFIG, TypeError, "input_ids"),
        ({"input_ids": IDS.float()}, CONFIG, TypeError, "input_ids has dtype"),
        ({"input_ids": IDS[0]}, CONFIG, ValueError, "input_ids has shape"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)},
            CONFIG,
            NotImplementedError,
            "from_masks",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 3, dtype=torch.int64)},
            CONFIG,
            ValueError,
            "attention_mask has shape",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 4)},
            CONFIG,
            TypeError,
            "attention_mask has dtype",
        ),
        (
            {"input_ids": IDS, "attention_mask": mask("0111", "1111")},
            CONFIG,
            ValueError,
            "is_vision is True where valid is False at sample 0, position 0",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.zeros(3, 2, 4, dtype=torch.int64)},
            CONFIG,
            NotImplementedError,
            "from_masks",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.zeros(2, 3, dtype=torch.int64)},
            CONFIG,
            ValueError,
            "position_ids has shape",
        ),
        *(
            (
                {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32)},
                CONFIG,
                ValueError,
                "cu_seq_lens_q is .*; wanted 0, the end of each sequence in order",
            )
            for ends in ([], [0], [0, 3], [1, 4], [0, 3, 1, 4], [0, -2, 4], [0, 9, 4])
        ),
    ],
)
def test_from_batch_refuses(batch, config, error, message):
    with pytest.raises(error, match=message):
        TokenLayout.from_batch(batch, config)
