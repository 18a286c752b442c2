"""`drivekd evaluate` from a saved model to a table, with a toy InternVL."""

import json
import shutil

import pytest
import torch
from PIL import Image

from drivekd.cli import main
from drivekd.data import Message, Record, save_records
from drivekd.demo.models import STUDENT, build_model, build_tokenizer

QUESTION = "<image>Is a vehicle ahead? A. yes B. no"


def make_record(index, answer):
    return Record(
        messages=(Message("user", QUESTION), Message("assistant", f"Final: {answer}")),
        images=(f"{index}.png",),
        question_type="planning" if index % 2 else "perception",
        id=f"r{index}",
        meta={"qid": "ahead" if index % 2 else "left"},
    )


def always_answer_a(model, tokenizer):
    """Set weights so that <assistant> is followed by "A." and that by <end>."""
    for layer in model.get_decoder().layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding = model.get_input_embeddings().weight.zero_()
    prompt, answer, end = (
        tokenizer.convert_tokens_to_ids(t) for t in ("<assistant>", "A.", "<end>")
    )
    embedding[prompt, 0] = 1.0
    embedding[answer, 0], embedding[answer, 1] = 2.0, 3.0
    embedding[end, 1] = 5.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a saved toy model, records, and their images."""
    folder = tmp_path_factory.mktemp("saved")
    answers = ["A. yes", "B. no", "A. yes", "A. yes", "A. yes", "B. no"]
    records = [make_record(i, answer) for i, answer in enumerate(answers)]
    for i in range(len(records)):
        Image.new("RGB", (168, 48), (40 * i, 0, 0)).save(folder / f"{i}.png")
    save_records(records, folder / "test.json")
    tokenizer = build_tokenizer(records)
    model = build_model(STUDENT, tokenizer, seed=0)
    with torch.no_grad():
        always_answer_a(model, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_prints_accuracy_by_capability_and_question_with_its_baselines(saved, capsys):
    test = str(saved / "test.json")
    assert main(["evaluate", str(saved / "model"), test, "--blank", "--reference", test]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Error of 1 / 3 right in 3: sqrt(1/3 * 2/3 / 3) = 27.2 points.
    assert ["perception", "3", "100.0", "+-", "0.0", "100.0", "100.0", "0"] in lines
    assert ["planning", "3", "33.3", "+-", "27.2", "66.7", "33.3", "0"] in lines
    assert ["ahead", "3", "33.3", "+-", "27.2", "66.7", "33.3", "0"] in lines


def test_records_that_name_no_kinds_have_one_row_a_capability(saved, capsys):
    records = json.loads((saved / "test.json").read_text())
    for record in records:
        del record["meta"]["qid"]
    plain = saved / "plain.json"
    plain.write_text(json.dumps(records))
    assert main(["evaluate", str(saved / "model"), str(plain)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if " +- " in line and "Percent" not in line]
    assert names == ["perception", "planning"]


def test_gives_json_and_the_answers(saved, capsys, tmp_path):
    answers = tmp_path / "answers.jsonl"
    line = ["evaluate", str(saved / "model"), str(saved / "test.json"), "--json"]
    assert main([*line, "--answers", str(answers), "--batch-size", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["blank"] is None
    assert document["scores"]["total"]["correct"] == 4
    rows = [json.loads(row) for row in answers.read_text().splitlines()]
    assert rows == [{"id": f"r{i}", "answer": "A."} for i in range(6)]


def test_takes_images_from_root(saved, capsys, tmp_path):
    moved = tmp_path / "elsewhere.json"
    moved.write_bytes((saved / "test.json").read_bytes())
    line = ["evaluate", str(saved / "model"), str(moved), "--json"]
    assert main(line) == 2
    assert "0.png" in capsys.readouterr().err
    assert main([*line, "--root", str(saved)]) == 0


def test_takes_encoder_settings_from_a_recipe(saved, capsys, tmp_path):
    model = tmp_path / "bare"
    shutil.copytree(saved / "model", model, ignore=lambda *_: ["preprocessor_config.json"])
    line = ["evaluate", str(model), str(saved / "test.json"), "--json"]
    assert main(line) == 2
    assert "image_mean" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "student: x\ndata: {train: y}\ntraining: {output_dir: z}\n"
        "encoder: {image_mean: [0.4, 0.4, 0.4], image_std: [0.3, 0.3, 0.3]}\n"
    )
    assert main([*line, "--recipe", str(recipe)]) == 0


def test_a_model_that_is_not_there_is_one_line_and_code_2(saved, capsys):
    assert main(["evaluate", "no/such/model", str(saved / "test.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("drivekd evaluate: error: no/such/model is not a folder")
    assert err.count("\n") == 1
