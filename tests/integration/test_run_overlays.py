"""`drivekd report` draws where teachers and student of a run look."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from drivekd.cli import main
from drivekd.data import Message, Record, save_records
from drivekd.data.encode import ProcessorEncoder
from drivekd.study import run_overlays
from drivekd.study.run_overlays import draw_run_overlays, overlays_of_run
from drivekd.train import distill, load_model, load_recipe
from tests.helpers import toy_data, toy_models
from tests.helpers.runs import recipe_of, save_checkpoints, write_recipe
from tests.helpers.toy_processors import QwenProcessor


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and what it was made of."""
    root = tmp_path_factory.mktemp("trained")
    file = write_recipe(recipe_of(save_checkpoints(root), root), root)
    distill(load_recipe(file))
    return root


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder; its recipe names the models where they are."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def overlays(monkeypatch):
    """What is drawn, by signal."""
    drawn = []
    real = run_overlays.plot_overlays
    monkeypatch.setattr(
        run_overlays, "plot_overlays", lambda rows, title: drawn.append(rows) or real(rows)
    )
    return drawn


def eager_maps(folder, inputs):
    """(layers, N, N) head-mean maps of eager attention."""
    model = load_model(folder, attn_implementation="eager")
    with torch.no_grad():
        found = model(**inputs, output_attentions=True, use_cache=False).attentions
    return torch.stack([layer[0].mean(0) for layer in found])


def test_report_of_a_run_shows_attention_and_stays_self_contained(run, capsys):
    assert main(["report", str(run), "--overlays", "2"]) == 0
    text = (run / "report.html").read_text()
    titles = re.findall(r"<figure><h3>(.*?)</h3>", text)
    assert titles[-2:] == ["Attention of sort", "Attention of fold"]
    assert not re.search(r"https?:|<script|(src|href)=\"(?!data:)", text)
    assert "prefers-color-scheme: dark" in text
    pictures = re.findall(r'src="data:image/png;base64,(.*?)"', text)
    last = Image.open(io.BytesIO(base64.b64decode(pictures[-1]))).convert("RGB")
    assert min(last.size) > 400 and len(last.getcolors(1 << 24)) > 50


def test_maps_are_those_of_eager_attention_over_the_recipes_layers(run, trained, overlays):
    recipe = load_recipe(run / "recipe.yaml")
    done = draw_run_overlays(recipe, run, count=1)
    assert done.notes == () and len(done.plots) == 2
    (first,), (second,) = overlays
    encoder = toy_data.encoder(trained)
    record, other = toy_data.records(trained, ("sort", "fold"))
    for overlay, each, name, layers, own in (
        (first, record, "shallow", [0], [0]),
        # Of two layers 0..-2 is one; its group is all three of the teacher's.
        (second, other, "deep", [0, 1, 2], [0]),
    ):
        inputs = {k: v[None] if k == "input_ids" else v for k, v in encoder(each).items()}
        del inputs["labels"]
        vision = (inputs["input_ids"][0] == toy_models.IMAGE).nonzero()[:, 0]
        asking = slice(int(vision.max()) + 1, None)
        for got, folder, chosen in (
            (overlay.teacher, trained / name, layers),
            (overlay.student, run / "student", own),
        ):
            wanted = eager_maps(folder, inputs)[chosen].mean(0)[asking].mean(0)[vision]
            np.testing.assert_allclose(got.ravel(), wanted.numpy(), atol=1e-6)


def test_unfinished_run_shows_its_newest_checkpoint(run):
    shutil.rmtree(run / "student")
    done = overlays_of_run(run, count=1)
    assert len(done.plots) == 2 and "checkpoint-2" in done.plots[0].caption
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    done = overlays_of_run(run, count=1)
    assert done.plots == () and "no student yet, and no whole checkpoint" in done.notes[0]


def test_what_is_gone_is_said_in_the_page_and_the_rest_is_drawn(run, tmp_path):
    moved = f"teachers.deep={tmp_path / 'gone'}"
    assert main(["report", str(run), "--overlays", "1", moved]) == 0
    text = (run / "report.html").read_text()
    assert "Teacher &#x27;deep&#x27; of fold could not be loaded" in text
    assert "gone is not a folder" in text
    assert "<h3>Attention of sort</h3>" in text and "Attention of fold</h3>" not in text


@pytest.mark.parametrize("place", ["load_model", "prepare_teachers", "_maps"])
def test_whatever_goes_wrong_is_a_note_beside_the_curves(run, monkeypatch, place):
    def fail(*_, **__):
        raise AssertionError("no such device.")

    monkeypatch.setattr(run_overlays, place, fail)
    assert main(["report", str(run), "--overlays", "1"]) == 0
    text = (run / "report.html").read_text()
    assert "AssertionError: no such device." in text and "<h3>Losses</h3>" in text


def test_folder_without_a_recipe_still_gives_its_curves(run, capsys):
    (run / "recipe.yaml").unlink()
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "recipe.yaml does not exist; name a recipe by --recipe" in text
    assert "<h3>Losses</h3>" in text


def test_damaged_recipe_of_the_folder_is_a_note_and_a_wrong_override_an_error(run, capsys):
    assert main(["report", str(run), "studnt=x"]) == 2
    assert "did you mean 'student'" in capsys.readouterr().err
    (run / "recipe.yaml").write_text("student: [")
    assert main(["report", str(run)]) == 0
    assert "No overlays: " in (run / "report.html").read_text()


def test_no_models_are_loaded_for_zero_overlays(run, monkeypatch):
    monkeypatch.setattr(run_overlays, "load_model", None)
    assert main(["report", str(run), "--overlays", "0"]) == 0
    assert "Attention of" not in (run / "report.html").read_text()


def test_qwen_is_drawn_on_its_own_grid(trained, tmp_path, overlays, monkeypatch):
    torch.manual_seed(0)
    for name, layers in (("student", 2), ("large", 3)):
        toy_models.qwen2_5_vl(layers=layers, seed=layers).save_pretrained(tmp_path / name)
    Image.new("RGB", (112, 56), (90, 20, 10)).save(tmp_path / "wide.png")
    Image.new("RGB", (28, 84), (90, 20, 10)).save(tmp_path / "high.png")
    text = "<image> w8 <image> w9 w10"
    messages = (Message("user", text), Message("assistant", "w6"))
    no_picture = (Message("user", "w7"), Message("assistant", "w6"))
    records = [
        Record(no_picture, (), "fold", "none"),
        Record(messages, ("wide.png", "high.png"), "fold", "two"),
    ]
    save_records(records, tmp_path / "train.json")
    signal = {"name": "fold", "teacher": "large", "region": "text_to_vision"}
    tree = {
        "student": str(tmp_path / "student"),
        "teachers": {"large": str(tmp_path / "large")},
        "data": {"train": str(tmp_path / "train.json")},
        "distill": {"signals": [signal | {"student_layers": -1, "teacher_layers": -1}]},
        "training": {"output_dir": str(tmp_path / "run")},
    }
    shutil.copytree(tmp_path / "student", tmp_path / "run" / "student")
    recipe = load_recipe(write_recipe(tree, tmp_path))
    processor = QwenProcessor()
    monkeypatch.setattr(
        run_overlays,
        "build_encoder",
        lambda *_: (ProcessorEncoder(processor, root=tmp_path), processor),
    )
    done = draw_run_overlays(recipe, tmp_path / "run", count=5)
    assert done.notes == () and len(overlays[0]) == 2, done
    assert [overlay.teacher.shape for overlay in overlays[0]] == [(2, 4), (3, 1)]
    assert [overlay.title for overlay in overlays[0]] == [
        "two, image 1: w8 w9 w10",
        "two, image 2: w8 w9 w10",
    ]
    # The first picture is seen by all text behind it, also by that between the two.
    assert all(0 < overlay.teacher.sum() < 1 for overlay in overlays[0])


def test_records_that_cannot_be_drawn_are_named(run, trained, tmp_path):
    records = toy_data.records(tmp_path, ("sort", "sort", "fold"))
    (tmp_path / records[0].images[0]).unlink()
    save_records(records, tmp_path / "moved.json")
    done = overlays_of_run(run, overrides=[f"data.train={tmp_path / 'moved.json'}"], count=1)
    assert len(done.plots) == 2
    assert "'sort-0'" in done.notes[0] and "does not exist" in done.notes[0]


def test_evaluation_records_come_first_and_training_records_fill_up(run, trained, tmp_path):
    held_out = toy_data.records(trained, ("sort",), seed=9)
    save_records(held_out, tmp_path / "eval.json")
    changes = [
        f"data.eval={tmp_path / 'eval.json'}",
        f"data.root={trained}",
        "distill.mixing={sort: {sort: 1}, fold: {fold: 1}}",
    ]
    done = overlays_of_run(run, overrides=changes, count=2)
    first, second = (plot.alt for plot in done.plots)
    own, train = (
        records[0].question.split()[1]
        for records in (held_out, toy_data.records(trained, ("sort",)))
    )
    assert done.notes == () and first.index(own) < first.index(train)
    assert "fold-1" in second and "fold-3" in second


def test_run_without_attention_signals_says_so(run):
    done = overlays_of_run(run, overrides=["distill={}"])
    assert done.plots == () and "No signal of the recipe compares attention maps" in done.notes[0]


def test_a_picture_of_any_shape_gets_a_frame():
    view = run_overlays.View(0, "", ((1, 2, 3), (4, 5, 6)))
    for size in ((1, 1), (20000, 1), (1, 3000), (1600, 900)):
        frame = run_overlays._frame(Image.new("RGB", size), view)
        height, width, channels = frame.shape
        assert channels == 3 and height >= 2 and width >= 3 and max(height, width) <= 480 * 4


def test_saved_recipe_is_the_one_that_ran(run, trained):
    recipe = load_recipe(trained / "recipe.yaml")
    assert load_recipe(run / "recipe.yaml") == recipe
    facts = json.loads((run / "run.json").read_text())
    assert (facts["records"], facts["batch"]) == (4, 2)
