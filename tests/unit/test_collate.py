import copy
import pickle

import pytest
import torch

from drivekd.data import Message, Record
from drivekd.data.collate import Collator, Route, collate_features

IMAGE, PAD = 9, 0


class Config:
    image_token_id = IMAGE


class LengthEncoder:
    """A record's id says how many tokens, its images how many image tokens at position 1."""

    def __call__(self, record):
        ids = torch.arange(11, 11 + int(record.id))
        ids[1 : 1 + len(record.images)] = IMAGE
        labels = torch.where(torch.arange(len(ids)) < len(ids) - 2, -100, ids)
        encoded = {"input_ids": ids, "labels": labels}
        if record.images:
            value = float(record.id)
            encoded["pixel_values"] = torch.full((len(record.images), 3, 2, 2), value)
        return encoded

    def encode_prompt(self, record):
        return {key: value for key, value in self(record).items() if key != "labels"}


def make_record(length, images=1, question_type="perception"):
    messages = (Message("user", "q"), Message("assistant", "a"))
    return Record(messages, ("x.png",) * images, question_type, str(length))


def make_collator(**changes):
    return Collator(LengthEncoder(), Config(), **({"pad_token_id": PAD} | changes))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_ids_mask_and_labels(side):
    batch = make_collator(padding_side=side)([make_record(5), make_record(3)])
    content = [11, IMAGE, 13]
    padded = [0, 0, *content] if side == "left" else [*content, 0, 0]
    assert batch["input_ids"].tolist() == [[11, IMAGE, 13, 14, 15], padded]
    assert batch["attention_mask"].tolist()[1] == [int(i != 0) for i in padded]
    labels = [-100, -100, -100, IMAGE, 13] if side == "left" else [-100, IMAGE, 13, -100, -100]
    assert batch["labels"].tolist()[1] == labels
    assert batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_layout_follows_padding_and_image_tokens(side):
    tokens = make_collator(padding_side=side)([make_record(5), make_record(3, images=0)])["tokens"]
    pads = [False, False, True, True, True] if side == "left" else [True, True, True, False, False]
    assert tokens.valid.tolist() == [[True] * 5, pads]
    assert tokens.is_vision.tolist() == [[False, True, False, False, False], [False] * 5]
    assert tokens.device.type == "cpu"


def test_images_are_concatenated_in_order():
    batch = make_collator()([make_record(5, 2), make_record(4, 0), make_record(3, 1)])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5.0, 5.0, 3.0]


def test_batch_without_image_has_no_pixel_values():
    batch = make_collator(routes={"x": {"perception"}})([make_record(5, 0), make_record(3, 0)])
    assert "pixel_values" not in batch
    assert "pixel_values" not in batch["routes"]["x"].inputs


def test_route_holds_its_rows_padded_to_the_batch():
    routes = {"eyes": {"perception"}, "wheel": {"planning"}, "both": {"perception", "planning"}}
    records = [make_record(3, 2), make_record(6, 1, "planning"), make_record(4, 1)]
    batch = make_collator(routes=routes)(records)
    eyes, both = batch["routes"]["eyes"], batch["routes"]["both"]
    assert eyes.rows.tolist() == [0, 2] and eyes.rows.dtype == torch.int64
    torch.testing.assert_close(eyes.inputs["input_ids"], batch["input_ids"][[0, 2]])
    torch.testing.assert_close(eyes.inputs["attention_mask"], batch["attention_mask"][[0, 2]])
    assert eyes.inputs["pixel_values"][:, 0, 0, 0].tolist() == [3.0, 3.0, 4.0]
    assert batch["routes"]["wheel"].inputs["pixel_values"][:, 0, 0, 0].tolist() == [6.0]
    assert both.rows.tolist() == [0, 1, 2]
    assert all(both.inputs[key] is batch[key] for key in both.inputs)
    assert not any("labels" in route.inputs for route in batch["routes"].values())


def test_route_without_rows_is_absent():
    batch = make_collator(routes={"wheel": {"planning"}, "eyes": {"perception"}})([make_record(3)])
    assert set(batch["routes"]) == {"eyes"}


def test_batch_names_types_and_records():
    batch = make_collator()([make_record(3), make_record(5, 1, "planning")])
    assert batch["question_types"] == ["perception", "planning"]
    assert batch["record_ids"] == ["3", "5"]
    assert "routes" not in batch


def test_runs_in_a_loader_worker():
    collator = pickle.loads(pickle.dumps(make_collator(routes={"eyes": {"perception"}})))
    loader = torch.utils.data.DataLoader(
        [make_record(3), make_record(4, 1, "planning")],
        batch_size=2,
        collate_fn=collator,
        num_workers=1,
    )
    (batch,) = list(loader)
    assert batch["routes"]["eyes"].rows.tolist() == [0]
    assert batch["tokens"].num_tokens == 4


class Noted:
    """A source that keeps what it was asked for, and something stored that moves."""

    def __init__(self):
        self.asked = []

    def __call__(self, records, features, *, length, padding_side):
        counts = [len(feature["input_ids"]) for feature in features]
        self.asked.append(([record.id for record in records], counts, length, padding_side))
        return (torch.ones(len(records)),)


def test_source_is_asked_for_its_rows_and_no_model_inputs_are_made():
    source, records = (
        Noted(),
        [make_record(5), make_record(3, question_type="planning"), make_record(4)],
    )
    routes = {"eyes": {"perception"}, "kept": {"perception"}, "absent": {"other"}}
    plain = make_collator(padding_side="left")
    batch = plain.with_routes(routes, {"kept": source, "absent": source})(records)
    route = batch["routes"]["kept"]
    wanted = [records[0], records[2]]
    lengths = [len(plain.encoder(record)["input_ids"]) for record in wanted]
    length = batch["input_ids"].shape[1]
    assert source.asked == [([record.id for record in wanted], lengths, length, "left")]
    assert route.rows.tolist() == [0, 2] and route.inputs == {}
    assert "absent" not in batch["routes"] and batch["routes"]["eyes"].stored == ()
    assert route.to("meta").stored[0].device.type == "meta"


def test_route_moves_as_a_whole():
    route = Route(torch.tensor([1]), {"input_ids": torch.tensor([[1, 2]])})
    moved = route.to("meta")
    assert moved.rows.device.type == moved.inputs["input_ids"].device.type == "meta"


def test_processor_entries_are_padded_by_token_or_joined_by_image():
    def sample(length, images):
        return {
            "input_ids": torch.ones(length, dtype=torch.int64),
            "mm_token_type_ids": torch.ones(length, dtype=torch.int32),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
            "batch_num_images": torch.tensor([images]),
        }

    batch = collate_features([sample(2, 1), sample(4, 2)], pad_token_id=7, length=5)
    assert batch["input_ids"].tolist()[0] == [1, 1, 7, 7, 7]
    assert batch["mm_token_type_ids"].tolist()[0] == [1, 1, 0, 0, 0]
    assert batch["image_grid_thw"].shape == (3, 3)
    assert batch["batch_num_images"].tolist() == [1, 2]
    assert "labels" not in batch


def test_samples_that_do_not_fit_are_refused():
    ids = torch.ones(3, dtype=torch.int64)
    cases = [
        ([], {}, "features is empty"),
        ([{"input_ids": ids}], {"length": 2}, "length is 2 but the longest sample has 3"),
        ([{"input_ids": ids}], {"padding_side": "top"}, "padding_side is 'top'"),
        ([{"input_ids": ids, "labels": ids}, {"input_ids": ids}], {}, "labels is missing"),
        ([{"input_ids": ids, "labels": ids[:2]}], {}, r"labels has shape \(2,\)"),
        (
            [{"input_ids": ids, "sizes": ids}],
            {},
            r"sizes has shape \(3,\), which could be an entry per token",
        ),
        (
            [{"input_ids": ids, "p": torch.ones(1, n)} for n in (2, 3)],
            {},
            r"p has shapes \[\(1, 2\), \(1, 3\)\]",
        ),
    ]
    for features, options, message in cases:
        with pytest.raises(ValueError, match=message):
            collate_features(features, **({"pad_token_id": 0} | options))


def test_unusable_settings_are_refused():
    with pytest.raises(ValueError, match="pad_token_id is None"):
        make_collator(pad_token_id=None)
    with pytest.raises(ValueError, match="padding_side"):
        make_collator(padding_side="both")
    with pytest.raises(TypeError, match=r"routes\['eyes'\] is the string"):
        make_collator(routes={"eyes": "perception"})


def test_records_are_not_changed():
    records = [make_record(3), make_record(4)]
    kept = copy.deepcopy(records)
    make_collator(routes={"eyes": {"perception"}})(records)
    assert records == kept


def test_model_without_image_tokens_has_a_text_layout():
    collator = Collator(LengthEncoder(), object(), pad_token_id=PAD)
    tokens = collator([make_record(4, 0), make_record(2, 0)])["tokens"]
    assert not tokens.is_vision.any()
    assert (
        tokens.is_text.tolist() == tokens.valid.tolist() == [[True] * 4, [True] * 2 + [False] * 2]
    )


def test_other_routes_make_another_collator():
    plain = make_collator(padding_side="left")
    routed = plain.with_routes({"eyes": {"perception"}})
    assert not plain.routes and routed.padding_side == "left"
    assert set(routed([make_record(3)])["routes"]) == {"eyes"}
