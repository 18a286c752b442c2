"""The main job on its smoke world, and the pieces that a full run rests on."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks import untrained_contrast
from drivekd.cli import main
from drivekd.data import Message, Record
from drivekd.demo import run
from drivekd.demo.data import load_splits, make_world, open_world
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
from drivekd.demo.training import _arguments, distill_config, prepare_teachers
from drivekd.errors import DataError, RunFailedError
from drivekd.study.prestudy.suggest import UNTRAINED


class Clock:
    def watch(self, teacher):
        pass


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of the whole demo: folder, and the page it returned."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder, workers=2, fast=True, device="cpu")


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
    assert all(run["wall_seconds"] > 0 for run in document["runs"])
    assert [run["arm"] for run in document["runs"]] == ["ce", "multi+agp"]  # not as they ended
    assert (folder / "students" / "multi+agp-0" / "student" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_student_of_the_demo_can_be_evaluated_by_command(smoke, capsys):
    folder, _ = smoke
    arguments = [str(folder / "students" / "ce-0" / "student"), str(folder / "data" / "test.json")]
    assert main(["evaluate", *arguments, "--max-new-tokens", "6", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]["by_capability"]
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (ce,) = (run for run in document["runs"] if run["arm"] == "ce")
    for capability in CAPABILITIES:
        tallies = ce["accuracy"][capability].values()
        assert scores[capability]["correct"] == sum(each["correct"] for each in tallies)
        assert scores[capability]["count"] == sum(each["total"] for each in tallies)


@pytest.mark.slow
def test_demo_goes_on_where_it_stopped(smoke, capsys):
    folder, _ = smoke
    files = {file: file.stat().st_mtime_ns for file in folder.glob("students/*/run.json")}
    run(folder, workers=1, fast=True, device="cpu")
    out = capsys.readouterr().out
    assert "step 20/20" not in out
    assert "2 of 2 runs were done before" in out
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
    digest = open_world(folder / "data", SMOKE_WORLD).digest
    job = Job(CE, 0, SMOKE_WORLD, Training(steps=20), folder / "data", digest, output)
    assert read_run(job).steps == 20
    for change, said in (
        ({"training": Training(steps=21)}, "training.steps is 20, wanted 21; remove"),
        ({"device": "cuda"}, "device is 'cpu', wanted 'cuda'; remove"),
        ({"digest": "other"}, f"data is '{digest}', wanted 'other'; remove"),
    ):
        with pytest.raises(DataError, match=re.escape(f"made with other settings: {said}")):
            read_run(replace(job, **change))


@pytest.mark.slow
def test_run_of_another_version_is_refused(smoke, tmp_path):
    folder, _ = smoke
    document = json.loads((folder / "students" / "ce-0" / "run.json").read_text())
    document["settings"] = {"key": "[]"}
    (tmp_path / "run.json").write_text(json.dumps(document))
    job = Job(CE, 0, SMOKE_WORLD, Training(steps=20), folder / "data", "d", tmp_path)
    with pytest.raises(DataError, match="holds a run of another version of drivekd; remove it"):
        read_run(job)


@pytest.mark.slow
def test_the_contrast_of_untrained_teachers_is_measured_on_its_records(smoke, tmp_path):
    file = tmp_path / "contrast.json"
    data = str(smoke[0] / "data")
    code = untrained_contrast.main(
        [data, "--teachers", "2", "--records", "4", "--output", str(file)]
    )
    document = json.loads(file.read_text(encoding="utf-8"))
    assert [row["seed"] for row in document["teachers"]] == [0, 1]
    assert sum(document["evidence"].values()) == 4  # two capabilities each
    assert code == int(document["largest_of_19_in_20"] >= UNTRAINED)


@pytest.fixture
def half(smoke, tmp_path, monkeypatch):
    """Runs the demo on the smoke run's data where one of two students is finished; the other's
    worker does as told."""
    folder, _ = smoke
    shutil.copytree(folder / "students" / "ce-0", tmp_path / "students" / "ce-0")

    def start(run_jobs=None, **settings):
        if run_jobs is not None:
            monkeypatch.setattr("drivekd.demo.main.run_jobs", run_jobs)
        return run(tmp_path, fast=True, data=folder / "data", device="cpu", **settings)

    return tmp_path, start


def document_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_an_interrupted_demo_reports_what_has_finished(half, capsys):
    folder, start = half

    def run_jobs(jobs, workers, work):
        assert [job.name for job in jobs] == ["multi+agp (seed 0)"]
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        start(run_jobs)
    assert "interrupted; 1 of 2 runs are done and kept" in capsys.readouterr().out
    document = document_of(folder)
    assert [arm["name"] for arm in document["arms"]] == ["ce"]
    assert document["notes"][0] == "Not finished: multi+agp (seed 0)."
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "student ce (seed 0)" in page  # in the overlays' captions
    assert "Differences" not in page


@pytest.mark.slow
def test_a_report_of_what_has_finished_trains_nothing(half, tmp_path_factory):
    folder, start = half
    assert start(lambda jobs, *_: iter(jobs), report_only=True) == folder / "report.html"
    assert document_of(folder)["notes"][0] == "Not finished: multi+agp (seed 0)."
    (folder / "students" / "ce-0" / "run.json").unlink()
    with pytest.raises(DataError, match="holds no finished run"):
        start(report_only=True)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_reported(half, capsys):
    """Its result cannot be written: a folder is in the way."""
    folder, start = half
    (folder / "students" / "planning-0" / "run.tmp").mkdir(parents=True)
    with pytest.raises(RunFailedError) as failure:
        start(arms=["ce", "planning"], workers=2)
    said = str(failure.value)
    page, log = folder / "report.html", folder / "students" / "planning-0" / "error.txt"
    start_of = f"1 of 2 runs failed; the report of the others is {page}: planning (seed 0): "
    assert said.startswith(f"{start_of}IsADirectoryError: ")
    assert said.endswith(f"({log})")
    assert "write_text" in log.read_text(encoding="utf-8")
    assert "planning (seed 0) FAILED: IsADirectoryError" in capsys.readouterr().out
    assert [run["arm"] for run in document_of(folder)["runs"]] == ["ce"]


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


def test_cached_encoder_keeps_pixels_on_its_device_and_tokens_on_the_cpu(tmp_path):
    from PIL import Image

    Image.new("RGB", (168, 48), (10, 20, 30)).save(tmp_path / "a.png")
    messages = (Message("user", "<image>\nA. yes"), Message("assistant", "Final: A."))
    record = Record(messages=messages, images=("a.png",), question_type="x", id="0")
    encoder = CachedEncoder(build_tokenizer([record]), tmp_path, device="meta")
    for encoded in (encoder(record), encoder.encode_prompt(record)):
        assert encoded["pixel_values"].device.type == "meta"
        assert encoded["input_ids"].device.type == "cpu"


def test_students_train_on_the_device_of_their_job(tmp_path):
    """On the CPU where asked; a job for a GPU leaves the choice to the trainer, on one GPU."""
    for device, on_cpu in (("cpu", True), ("cuda", False)):
        job = Job(CE, 0, SMOKE_WORLD, Training(steps=4), tmp_path, "d", tmp_path, device)
        arguments = _arguments(job)
        assert arguments.use_cpu == on_cpu
        assert arguments.n_gpu <= 1
