"""Every fault that the checker promises to find is planted and found, and nothing else is."""

import itertools

import numpy as np
import pytest
from PIL import Image

from drivekd.data import Message, Record
from drivekd.data.check import PROBLEM_KINDS, Problem, check_records

_NUMBERS = itertools.count(1)  # so that no two records ask the same


def _picture(path, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def _record(question="<image>\nWhat?", answer="Final: A. this", images=("a.png",), id=""):
    messages = (Message("user", f"{next(_NUMBERS)}. {question}"), Message("assistant", answer))
    return Record(messages, images, "reasoning", id)


def _kinds(records, root):
    return [(problem.index, problem.kind) for problem in check_records(records, root)]


@pytest.fixture
def root(tmp_path):
    _picture(tmp_path / "a.png")
    _picture(tmp_path / "b.jpg", 1)
    return tmp_path


def test_good_records_have_no_problem(root):
    _picture(root / "grey.png", mode="L")
    _picture(root / "palette.png", mode="P")
    records = [
        _record(id="r1"),
        _record(id="r2"),
        _record("<image> <image>", images=("a.png", "b.jpg")),
        _record("<image><image>", images=("grey.png", "palette.png")),
        _record("no picture", images=()),
        _record(answer="<c1,CAM_FRONT,0.5,1>, <c2, CAM_BACK_LEFT, 0.0, .25> and <cat>"),
    ]
    assert check_records(records, root) == []
    assert check_records({"train": records}, str(root)) == []


def test_finds_missing_and_unreadable_images(root):
    (root / "text.png").write_text("hello")
    (root / "empty.png").write_bytes(b"")
    (root / "folder.png").mkdir()
    names = ("gone.png", "text.png", "empty.png", "folder.png", "a.png")
    assert _kinds([_record(images=(name,)) for name in names], root) == [
        (0, "image_missing"),
        (1, "image_unreadable"),
        (2, "image_unreadable"),
        (3, "image_unreadable"),
    ]


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_finds_images_that_are_cut_off_anywhere(root, name, share):
    content = (root / name).read_bytes()
    (root / f"cut-{name}").write_bytes(content[: int(share * len(content))])
    assert _kinds([_record(images=(f"cut-{name}",))], root) == [(0, "image_unreadable")]


def test_finds_damage_inside_a_png(root):
    content = bytearray((root / "a.png").read_bytes())
    content[60:80] = bytes(20)
    (root / "damaged.png").write_bytes(bytes(content))
    assert _kinds([_record(images=("damaged.png",))], root) == [(0, "image_unreadable")]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 20, 30)])
def test_finds_a_picture_of_one_colour(root, colour):
    Image.new("RGB", (9, 7), colour).save(root / "flat.png")
    assert _kinds([_record(images=("flat.png",))], root) == [(0, "image_constant")]


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("none", ("a.png",)),
        ("<image><image>", ("a.png",)),
        ("<image>", ()),
        ("<image>", ("a.png",) * 2),
    ],
)
def test_finds_counts_that_differ(root, question, images):
    assert _kinds([_record(question, images=images)], root) == [(0, "image_count")]


@pytest.mark.parametrize(
    "text",
    [
        "the van <c1,CAM_FRONT,0.4",
        "the van <c1,CAM_FRONT,0.4,",
        "the van <c1,CAM_FRONT",
        "the van <c1",
        "the van <c",
        "<c1,CAM_FRONT,0.4,0.5 and more",
        "<c1,CAM_FRONT,0.4>",
        "<c1,CAM_FRONT,x,y>",
        "<c1,0.4,0.5>",
        "<c1,CAM_FRONT,0.4,<c2,CAM_BACK,0.1,0.2>",
    ],
)
def test_finds_object_tags_that_are_cut_off(root, text):
    assert _kinds([_record(answer=text)], root) == [(0, "object_tag")]
    assert _kinds([_record("<image>" + text)], root) == [(0, "object_tag")]


@pytest.mark.parametrize("tag", ["<c1,CAM_FRONT,4.32,7.96>", "<c1,CAM_FRONT,-0.1,0.5>"])
def test_finds_coordinates_outside_the_picture(root, tag):
    assert _kinds([_record(answer=f"the van {tag} is near")], root) == [(0, "coordinate_range")]


@pytest.mark.parametrize("answer", ["", "  \n", "Final:", "Final: {}", "final answer: ."])
def test_finds_empty_answers(root, answer):
    assert _kinds([_record(answer=answer)], root) == [(0, "empty_answer")]


def test_finds_records_without_an_answer(root):
    record = Record((Message("user", "<image>"),), ("a.png",), "planning")
    assert _kinds([record], root) == [(0, "no_assistant")]


def test_finds_ids_used_twice_in_a_split(root):
    records = [_record(id="x"), _record(id="y"), _record(id="x"), _record(), _record()]
    problems = check_records({"train": records, "test": []}, root)
    assert [(p.index, p.kind, p.split) for p in problems] == [(2, "duplicate_id", "train")]
    assert "record 0" in problems[0].message
    _picture(root / "c.png", 2)
    splits = {"train": [_record(id="x")], "test": [_record(id="x", images=("c.png",))]}
    assert check_records(splits, root) == []


def test_finds_a_picture_in_two_splits_by_its_content(root):
    (root / "other.png").write_bytes((root / "a.png").read_bytes())
    splits = {
        "train": [_record(), _record()],
        "val": [_record(images=("b.jpg",))],
        "test": [_record(images=("other.png",)), _record()],
    }
    problems = check_records(splits, root)
    assert [(p.split, p.index, p.kind) for p in problems] == [
        ("test", 0, "frame_in_two_splits"),
        ("test", 1, "frame_in_two_splits"),
    ]
    assert "'train'" in problems[0].message


def test_reports_everything_in_one_pass_in_the_order_of_the_records(root):
    records = [
        _record("two <image><image>", answer="", images=("gone.png",), id="r1"),
        _record(),
        _record(answer="<c1,CAM_FRONT,2,2> <c2,CAM", images=("gone.png",), id="r1"),
    ]
    problems = check_records(records, root)
    assert [(p.index, p.id, p.kind) for p in problems] == [
        (0, "r1", "image_count"),
        (0, "r1", "empty_answer"),
        (0, "r1", "image_missing"),
        (2, "r1", "coordinate_range"),
        (2, "r1", "object_tag"),
        (2, "r1", "duplicate_id"),
        (2, "r1", "image_missing"),
    ]
    assert {p.kind for p in problems} <= set(PROBLEM_KINDS)


def test_reads_every_image_once(root, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(1) or real(file))
    check_records({"train": [_record()] * 5, "val": [_record(images=("b.jpg",))] * 3}, root)
    assert len(opened) == 2


def test_a_problem_reads_well():
    problem = Problem(3, "r7", "empty_answer", "the answer '' is empty")
    assert str(problem) == "record 3 (r7): the answer '' is empty"
    assert str(Problem(3, "", "empty_answer", "bad", "val")) == "val[3]: bad"


def test_the_generated_world_has_no_problem(tmp_path):
    pytest.importorskip("highway_env")
    from drivekd.driving import generate_dataset

    splits = {
        split: generate_dataset(tmp_path, frames=20, seed=0, split=split)
        for split in ("train", "val", "test")
    }
    assert check_records(splits, tmp_path) == []
