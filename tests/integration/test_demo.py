"""The main job on its smoke world, and the pieces that a full run rests on."""

import json

import pytest
import torch

from drivekd.data import Message, Record
from drivekd.demo import run
from drivekd.demo.data import load_splits, make_world
from drivekd.demo.evaluation import tally_majority
from drivekd.demo.jobs import Job, read_run
from drivekd.demo.models import (
    STUDENT,
    TEACHER,
    CachedEncoder,
    build_model,
    build_tokenizer,
)
from drivekd.demo.settings import (
    CAPABILITIES,
    CE,
    COMPARISONS,
    FULL_ARMS,
    SMOKE_WORLD,
    Training,
    World,
)
from drivekd.demo.teachers import ASSETS, load_teacher, load_tokenizer, read_facts
from drivekd.demo.training import distill_config, prepare_teachers
from drivekd.errors import DataError


class Clock:
    def watch(self, teacher):
        pass


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of the whole demo: folder, and the page it returned."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder, workers=2, fast=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_demo_leaves_report_plots_and_students(smoke):
    folder, page = smoke
    assert page == folder / "report.html"
    html = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in document["arms"]] == ["ce", "multi+agp"]
    assert all(run["blank"] for run in document["runs"])
    assert {p.stem for p in folder.glob("overlay_*.png")} == {f"overlay_{c}" for c in CAPABILITIES}
    distilled = next(run for run in document["runs"] if run["arm"] == "multi+agp")
    assert distilled["projection_log"][0]["signals"].keys() == set(CAPABILITIES)
    assert distilled["teacher_cpu_seconds"] > 0
    assert (folder / "students" / "multi+agp-0" / "student" / "model.safetensors").exists()


@pytest.mark.slow
def test_demo_goes_on_where_it_stopped(smoke, capsys):
    folder, _ = smoke
    files = {file: file.stat().st_mtime_ns for file in folder.glob("students/*/run.json")}
    run(folder, workers=1, fast=True)
    assert " step " not in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in files} == files


@pytest.mark.slow
def test_world_of_other_settings_is_refused(smoke):
    folder, _ = smoke
    with pytest.raises(DataError, match="other settings"):
        make_world(folder / "data", World(), workers=1, progress=lambda *_: None)


@pytest.mark.slow
def test_run_of_other_settings_is_refused(smoke):
    folder, _ = smoke
    output = folder / "students" / "ce-0"
    job = Job(CE, 0, SMOKE_WORLD, Training(steps=21), folder / "data", output)
    with pytest.raises(DataError, match="other settings"):
        read_run(job)


@pytest.mark.slow
def test_student_sees_its_share_of_the_frames(smoke):
    folder, _ = smoke
    splits = load_splits(folder / "data", SMOKE_WORLD)
    frames = {record.images for record in splits.train}
    seen = {record.images for record in splits.student}
    assert seen < frames
    assert len(seen) == round(SMOKE_WORLD.student_fraction * len(frames))
    majority = tally_majority(splits.test, splits.train)
    assert set(majority) == set(CAPABILITIES)


def test_student_is_at_least_three_times_smaller_than_a_teacher():
    tokenizer = load_tokenizer()
    sizes = [
        sum(p.numel() for p in build_model(size, tokenizer, seed=0).parameters())
        for size in (TEACHER, STUDENT)
    ]
    assert sizes[0] >= 3 * sizes[1]


def test_shipped_teachers_are_small_and_know_their_capability():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 10e6
    facts = read_facts()
    assert [teacher.name for teacher in facts.teachers] == list(CAPABILITIES)
    for teacher in facts.teachers:
        own = teacher.accuracy[teacher.name].values()
        blank = teacher.blank[teacher.name].values()
        right, questions = sum(t.correct for t in own), sum(t.total for t in own)
        assert right / questions > sum(t.correct for t in blank) / questions + 0.2
        model = load_teacher(teacher.name)
        assert sum(p.numel() for p in model.parameters()) == teacher.parameters
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_blank_and_random_teachers_differ_from_the_shipped_ones():
    tokenizer = load_tokenizer()
    arms = {arm.teachers: arm for arm in FULL_ARMS if arm.signals == CAPABILITIES}
    batch = {
        "input_ids": torch.tensor([[0] * 2 + [tokenizer.convert_tokens_to_ids("<image>")] * 36]),
        "pixel_values": torch.ones(1, 3, 48, 168),
    }
    outputs = {}
    for kind in ("capability", "random", "blank"):
        teacher = prepare_teachers(arms[kind], tokenizer, torch.zeros(1, 3, 48, 168), Clock())[
            "planning"
        ]
        with torch.no_grad():
            outputs[kind] = teacher(**batch).logits
            unseen = teacher(**{**batch, "pixel_values": 2 * batch["pixel_values"]}).logits
        assert torch.equal(unseen, outputs[kind]) == (kind == "blank")
    assert not torch.allclose(outputs["capability"], outputs["random"])


def test_every_arm_has_valid_settings_and_every_comparison_its_arms():
    names = [arm.name for arm in FULL_ARMS]
    assert len(set(names)) == len(names)
    assert {name for pair in COMPARISONS for name in pair} <= set(names)
    for arm in FULL_ARMS:
        config = distill_config(arm, seed=0)
        assert config.names == arm.signals
        assert all(signal.share == arm.share > 0 for signal in config.signals)


def test_tokenizer_keeps_option_letters_and_says_words_back():
    content = "<image>\nIs it safe? A. yes B. no"
    record = Record(
        messages=(Message("user", content), Message("assistant", "Final: B. no")),
        images=("a.png",),
        question_type="reasoning",
    )
    tokenizer = build_tokenizer([record])
    text = tokenizer.decode(tokenizer("Final: B. no <end>")["input_ids"], skip_special_tokens=True)
    assert text == "Final : B. no"
    assert tokenizer.tokenize("A. yes") == ["A.", "yes"]


def test_cached_encoder_shares_pixels_between_questions_about_a_frame(tmp_path):
    from PIL import Image

    Image.new("RGB", (168, 48), (10, 20, 30)).save(tmp_path / "a.png")
    records = [
        Record(
            messages=(Message("user", f"<image>\nA. yes {i}"), Message("assistant", "Final: A.")),
            images=("a.png",),
            question_type="x",
            id=str(i),
        )
        for i in range(2)
    ]
    encoder = CachedEncoder(build_tokenizer(records), tmp_path)
    first, second = (encoder(record)["pixel_values"] for record in records)
    assert first.data_ptr() == second.data_ptr()
    assert encoder.encode_prompt(records[0])["pixel_values"].data_ptr() == first.data_ptr()
