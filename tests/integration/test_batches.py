"""Batches of several images, text-only samples and padding, through real (tiny) models."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from drivekd.data import Collator, Message, Record, load_records, save_records
from tests.helpers import toy_data
from tests.helpers.toy_models import IMAGE_TOKENS, internvl

IMAGES_OF = (2, 0, 1, 3)  # how many images each record has
WORDS_OF = (9, 3, 6, 2)


@pytest.fixture
def records(tmp_path):
    generator = np.random.default_rng(0)
    made = []
    for index, (count, words) in enumerate(zip(IMAGES_OF, WORDS_OF, strict=True)):
        names = tuple(f"{index}-{image}.png" for image in range(count))
        for name in names:
            pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        text = " ".join(f"w{i}" for i in generator.integers(6, 300, words))
        question = Message("user", " ".join(["<image>"] * count + [text]))
        answer = Message("assistant", f"w{20 + index} w{30 + index}")
        question_type = "axis" if index % 2 else "soup"
        made.append(Record((question, answer), names, question_type, f"r{index}"))
    save_records(made, tmp_path / "train.jsonl")
    return load_records(tmp_path / "train.jsonl")


def _model_inputs(batch):
    return {key: batch[key] for key in batch if isinstance(batch[key], torch.Tensor)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mixed_batch_gives_what_its_samples_give_alone(records, tmp_path, side):
    model = internvl(layers=2).double()
    collator = Collator(
        toy_data.encoder(tmp_path), model.config, pad_token_id=toy_data.PAD, padding_side=side
    )
    batch = collator(records)
    assert len(batch["pixel_values"]) == sum(IMAGES_OF)
    counts = batch["tokens"].is_vision.sum(1).tolist()
    assert counts == [count * IMAGE_TOKENS for count in IMAGES_OF]
    with torch.no_grad():
        together = model(**_as_double(_model_inputs(batch))).logits
        for row, record in enumerate(records):
            alone = model(**_as_double(_model_inputs(collator([record])))).logits[0]
            kept = together[row, batch["attention_mask"][row] != 0]
            # Rotary angles are float32: positions that padding shifts differ by their rounding.
            tolerance = 1e-9 if side == "right" else 1e-4
            torch.testing.assert_close(kept, alone, rtol=tolerance, atol=tolerance)


def _as_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def test_a_batch_without_any_image_trains(records, tmp_path):
    model = internvl(layers=2).train()
    text_only = [record for record in records if not record.images] * 2
    collator = Collator(
        toy_data.encoder(tmp_path),
        model.config,
        pad_token_id=toy_data.PAD,
        routes={"eyes": {"axis"}},
    )
    batch = collator(text_only)
    assert "pixel_values" not in batch
    assert "pixel_values" not in batch["routes"]["eyes"].inputs
    assert not batch["tokens"].is_vision.any()
    loss = model(**_model_inputs(batch)).loss
    loss.backward()
    assert torch.isfinite(loss) and loss > 0


def test_images_are_opened_when_a_batch_is_made_and_closed_after(records, tmp_path, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or real(file))
    dataset = load_records(tmp_path / "train.jsonl")
    collator = Collator(toy_data.encoder(tmp_path), internvl(layers=1).config, pad_token_id=0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collator)
    assert opened == []
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    batches = iter(loader)
    next(batches)
    assert len(opened) == sum(IMAGES_OF[:2])
    next(batches)
    assert len(opened) == sum(IMAGES_OF)
    if files:
        assert len(os.listdir("/proc/self/fd")) == files


def test_workers_open_the_images_and_this_process_none(records, tmp_path):
    collator = Collator(toy_data.encoder(tmp_path), internvl(layers=1).config, pad_token_id=0)
    here = list(torch.utils.data.DataLoader(records, batch_size=2, collate_fn=collator))
    loader = torch.utils.data.DataLoader(
        records, batch_size=2, collate_fn=_Elsewhere(collator, os.getpid()), num_workers=2
    )
    for mine, theirs in zip(here, loader, strict=True):
        torch.testing.assert_close(mine["input_ids"], theirs["input_ids"])
        torch.testing.assert_close(mine["pixel_values"], theirs["pixel_values"])


class _Elsewhere:
    """A collator that must not run in the main process."""

    def __init__(self, collator, main):
        self.collator, self.main = collator, main

    def __call__(self, records):
        assert os.getpid() != self.main
        return self.collator(records)


def test_a_converted_file_of_a_made_up_domain_makes_batches(records, tmp_path):
    from drivekd.cli import main

    rows = [
        {
            "conversations": [
                {"from": "human" if m.role == "user" else "gpt", "value": m.content}
                for m in record.messages
            ],
            "images": list(record.images),
            "type": record.question_type,
        }
        for record in records
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    out = tmp_path / "ours.jsonl"
    assert main(["data", "convert", str(tmp_path / "llava.json"), "--output", str(out)]) == 0
    assert main(["data", "check", str(out), "--types", "axis", "soup"]) == 0
    model = internvl(layers=1)
    collator = Collator(toy_data.encoder(tmp_path), model.config, pad_token_id=0)
    ours, originals = collator(load_records(out)), collator(records)
    torch.testing.assert_close(ours["input_ids"], originals["input_ids"])
    torch.testing.assert_close(ours["pixel_values"], originals["pixel_values"])
    assert ours["question_types"] == originals["question_types"]
