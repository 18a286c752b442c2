"""Faults of real data sets: odd images and paths, conversations, options, special tokens, twins."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from drivekd.cli import main
from drivekd.data import Message, Record, check_records
from drivekd.data.check import PROBLEM_KINDS, UNUSABLE_KINDS, Checker
from drivekd.data.conversation import load_image
from drivekd.errors import DataError


def _noise(seed=0, size=(20, 12)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _record(question="<image> What?", answer="yes", images=("a.png",), type="reasoning", id=""):
    return Record((Message("user", question), Message("assistant", answer)), images, type, id)


def _kinds(records, root, **options):
    return [(p.index, p.kind) for p in check_records(records, root, **options)]


@pytest.fixture
def root(tmp_path):
    _noise().save(tmp_path / "a.png")
    return tmp_path


def _deep(path):
    Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 99).save(path)


def _turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    _noise().save(path, exif=exif)


MAKERS = {
    "empty.png": (lambda path: path.write_bytes(b""), "image_unreadable"),
    "deep.png": (_deep, "image_unreadable"),
    "turned.jpg": (_turned, "image_orientation"),
    "cmyk.jpg": (lambda path: _noise().convert("CMYK").save(path), "image_colours"),
    "moving.gif": (
        lambda path: _noise().save(path, save_all=True, append_images=[_noise(1)]),
        "image_frames",
    ),
    "pipe.png": (os.mkfifo, "image_unreadable"),
    "broken-link.png": (lambda path: path.symlink_to("gone.png"), "image_missing"),
    "loop.png": (lambda path: path.symlink_to(path), "image_unreadable"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_finds_odd_images(root, name):
    make, kind = MAKERS[name]
    make(root / name)
    assert _kinds([_record(images=(name,))], root) == [(0, kind)]


@pytest.mark.parametrize("name", ["A.PNG", "ü 数据.png", "no-suffix", "b.jpg", "link.png"])
def test_names_of_good_images_do_not_matter(root, name):
    if name == "link.png":
        (root / name).symlink_to(root / "a.png")
    else:
        (root / name).write_bytes((root / "a.png").read_bytes())
    assert _kinds([_record(images=(name,))], root) == []


def test_finds_images_too_large_to_decode(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert _kinds([_record()], root) == [(0, "image_size")]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert _kinds([_record()], root) == [(0, "image_unreadable")]
    monkeypatch.setattr("drivekd.data.pictures._MAX_BYTES", 10)
    assert _kinds([_record()], root) == [(0, "image_unreadable")]


def test_a_deep_image_is_refused_by_check_and_by_training_alike(root):
    _deep(root / "deep.png")
    record = _record(images=("deep.png",))
    with pytest.raises(DataError, match="8 bits"):
        load_image(record, "deep.png", root)
    (problem,) = check_records([record], root)
    assert problem.kind in UNUSABLE_KINDS


def test_finds_paths_that_lead_out_of_the_root(root):
    (root / "in").mkdir()
    names = (str(root / "a.png"), "../a.png", "x/../../a.png")
    assert _kinds([_record(images=names[:1])], root / "in") == [(0, "image_path")]
    assert _kinds([_record(images=names[1:2])], root / "in") == [(0, "image_path")]
    assert (0, "image_path") in _kinds([_record(images=names[2:])], root / "in")
    assert _kinds([_record(images=("in/../a.png",))], root) == []


@pytest.mark.parametrize("name", ["", "http://x/a.png", "data:image/png;base64,AA", "a\0.png"])
def test_finds_paths_that_are_none(root, name):
    assert (0, "image_path") in _kinds([_record(images=(name,))], root)


def test_says_what_is_there_in_place_of_a_missing_image(root):
    (problem,) = check_records([_record(images=("A.png",))], root)
    assert "does not exist; there is 'a.png'" in problem.message


def test_a_problem_is_one_short_line_whatever_the_record_holds(root):
    records = [_record(images=("gone\n\x1b[0m.png",), id="a\nb"), _record(images=("x" * 9999,))]
    for problem in check_records(records, root):
        assert str(problem).isprintable()
        assert len(str(problem)) < 300


@pytest.mark.parametrize(
    ("roles", "kinds"),
    [
        (("assistant", "user", "assistant"), ["turn_order"]),
        (("user", "assistant", "user"), ["turn_order"]),
        (("user", "user", "assistant"), ["role_repeated"]),
        (("user", "assistant", "assistant"), ["role_repeated"]),
        (("user", "system", "assistant"), ["turn_order"]),
        (("system", "user", "assistant", "user", "assistant"), []),
    ],
)
def test_finds_turns_out_of_order(root, roles, kinds):
    record = Record(tuple(Message(role, f"text {i}") for i, role in enumerate(roles)), (), "x")
    assert [kind for _, kind in _kinds([record], root)] == kinds


def test_finds_a_placeholder_in_an_answer(root):
    assert _kinds([_record("What?", "see <image>")], root) == [(0, "placeholder_in_answer")]


@pytest.mark.parametrize("answer", ["\u200b", "\ufeff \n", "nan", "NULL", "N/A", "Final: nan"])
def test_finds_answers_that_say_nothing(root, answer):
    assert _kinds([_record(answer=answer)], root) == [(0, "empty_answer")]


def test_answers_that_say_little_are_answers(root):
    records = [_record(f"<image> {i}", a) for i, a in enumerate(["None.", "0", "A", "no", "ナン"])]
    assert _kinds(records, root) == []


@pytest.mark.parametrize(
    "token",
    [
        "<IMG_CONTEXT>",
        "<img_context>",
        "<img>",
        "<Image>",
        "<image_1>",
        "<image >",
        "<|im_end|>",
        "<|vision_start|>",
        "<s>",
        "<pad>",
        "[INST]",
        "<video>",
    ],
)
def test_finds_special_tokens_in_the_text(root, token):
    assert _kinds([_record(f"<image> What {token} now?")], root) == [(0, "special_token")]
    assert _kinds([_record(answer=f"a {token}")], root) == [(0, "special_token")]


@pytest.mark.parametrize("text", ["<sign>", "<stop>", "a < b > c", "<c1,CAM,0.1,0.2>", "x<|y"])
def test_other_brackets_are_text(root, text):
    assert _kinds([_record(f"<image> What {text} now?")], root) == []


@pytest.mark.parametrize("text", ["a\x00b", "caf\ufffd", "\x1b[0m"])
def test_finds_characters_that_cannot_be_read(root, text):
    assert _kinds([_record(answer=text)], root) == [(0, "garbled_text")]


@pytest.mark.parametrize(
    ("question", "answer", "kinds"),
    [
        ("What? A. left B. right", "Final: A. left", []),
        ("What? (A) left (B) right", "B", []),
        ("What?\nA: left\nB: right", "Final: {B. Right.}", []),
        ("What? A. left B. right", "The car turns left.", []),
        ("What? A. left B. right", "A car turns left.", []),
        ("What does the U.S. A. B. car do?", "yes", []),
        ("What? A. left C. right", "Final: A. left", ["options"]),
        ("What? B. left C. right", "Final: B. left", ["options"]),
        ("What? A. left A. right", "Final: A. left", ["options"]),
        ("What? A. left B. Left.", "Final: A. left", ["options"]),
        ("What? A. left B. right", "Final: C. straight", ["option_answer"]),
        ("What? A. left B. right", "Final: A. right", ["option_answer"]),
    ],
)
def test_finds_options_that_do_not_fit(root, question, answer, kinds):
    assert [k for _, k in _kinds([_record(f"<image> {question}", answer)], root)] == kinds


def test_finds_pixels_and_places_that_two_objects_share(root):
    (problem,) = check_records([_record(answer="<c1,CAM_FRONT,800.5,450>")], root)
    assert "these are pixels" in problem.message
    answer = "<c1,CAM_FRONT,0.5,0.5> and <c2,CAM_FRONT,0.5,0.5>, <c1,CAM_FRONT,0.5,0.5>"
    assert _kinds([_record(answer=answer)], root) == [(0, "coordinate_shared")]
    assert _kinds([_record(answer=answer.replace("<c2,CAM_FRONT", "<c2,CAM_BACK"))], root) == []
    assert _kinds([_record(answer="<c1,CAM_FRONT,1e-3,.5>")], root) == []


def test_finds_unknown_question_types(root):
    def records(*types):
        return [_record(f"<image> {i}", type=type) for i, type in enumerate(types)]

    problems = check_records(records("perception", "planing", "planing"), root)
    assert [(p.index, p.kind) for p in problems] == [(1, "question_type")]
    assert "'planing' (2 records) is unknown" in problems[0].message
    assert _kinds(records("axis", "soup"), root) == []
    assert _kinds(records("read axis", "Read_Axis"), root) == [(1, "question_type")]
    assert _kinds(records("axis", "soup"), root, question_types={"axis"}) == [(1, "question_type")]
    assert _kinds(records("planing", "x"), root, question_types={"planing", "x"}) == []


def test_finds_questions_asked_twice(root):
    twins = [_record(), _record("<image>  what", "Yes."), _record(answer="no"), _record("<image>")]
    assert _kinds(twins, root) == [(1, "duplicate_question"), (2, "answers_differ")]
    _noise(1).save(root / "b.png")
    assert _kinds([_record(), _record(images=("b.png",))], root) == []
    text_only = _record("What?", images=())
    splits = {"train": [text_only], "test": [text_only]}
    assert _kinds(splits, root) == [(0, "question_in_two_splits")]


def test_finds_a_missing_frame_in_two_splits_by_its_path(root):
    gone = [_record(images=("gone.png",))]
    kinds = [kind for _, kind in _kinds({"train": gone, "test": gone}, root)]
    assert kinds == ["image_missing", "image_missing", "frame_in_two_splits"]


def test_finds_texts_longer_than_the_model_reads(root):
    from drivekd.data import Entry, Split

    with pytest.raises(ValueError, match="max_length is 3, which needs count_tokens"):
        Checker(max_length=3)
    checker = Checker(count_tokens=lambda text: len(text.split()), max_length=4)
    records = [_record("<image> What?", "a b"), _record("<image> Why?", "a b c")]
    entries = [Entry(i, record) for i, record in enumerate(records)]
    (problem,) = checker.check([Split("train", entries, root)])
    assert (problem.index, problem.kind) == (1, "too_long")
    assert "5 tokens" in problem.message


def test_a_made_up_file_full_of_faults_is_read_to_its_end(root, capsys):
    good = {
        "messages": [
            {"role": "user", "content": "<image> What?"},
            {"role": "assistant", "content": "yes"},
        ],
        "images": ["a.png"],
        "question_type": "axis",
    }
    missing = [json.dumps({**good, "images": [f"gone{i}.png"], "id": i}) for i in range(8)]
    lines = [json.dumps(good), "{broken", "[]", json.dumps({**good, "messages": "hi"}), *missing]
    (root / "train.jsonl").write_text("\n".join(lines))
    (root / "test.json").write_text(f"[{json.dumps(good)}, ")
    (root / "empty.jsonl").write_text("")
    files = [str(root / name) for name in ("train.jsonl", "test.json", "empty.jsonl")]
    assert main(["data", "check", *files]) == 1
    out = capsys.readouterr().out
    train, test, empty = files
    assert f"  {train}[1]: line 2 is not valid JSON" in out
    assert f"  {train}[2]: is a list" in out
    assert f"  {train}[3]: messages is missing" in out
    assert "image_missing: 8\n" in out and "... and 3 more (--all lists them)" in out
    assert f"  {train}[4] (0): image gone0.png does not exist" in out
    assert f"  {test}: is not valid JSON" in out
    assert f"  {test}[0]: image a.png is also in split {train!r}" in out
    assert f"  {empty}: holds no records" in out
    assert f"{train}: 12 records (axis 9), 9 images, 11 problems" in out
    assert main(["data", "check", "--all", train]) == 1
    assert "gone7.png" in capsys.readouterr().out
    assert main(["data", "check", "--json", *files]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["counts"]["image_missing"] == 8
    assert sum(document["counts"].values()) == len(document["problems"])
    assert {p["kind"] for p in document["problems"]} <= set(PROBLEM_KINDS)


def test_check_takes_types_from_the_command_line_or_a_recipe(root, capsys):
    item = {"question": "What?", "answer": "yes", "image": "a.png", "question_type": "soup"}
    (root / "a.json").write_text(json.dumps([item]))
    recipe = """
student: small
teachers: {cook: large}
data: {train: a.json}
distill:
  signals: [{name: taste, teacher: cook, kind: logits}]
  mixing: {TYPE: {taste: 1}}
training: {output_dir: out}
"""
    file = str(root / "a.json")
    for name, code in (("soup", 0), ("axis", 1)):
        (root / "r.yaml").write_text(recipe.replace("TYPE", name))
        assert main(["data", "check", file, "--types", name]) == code
        assert main(["data", "check", file, "--recipe", str(root / "r.yaml")]) == code
    assert "question type 'soup' is unknown; known are axis" in capsys.readouterr().out
    assert main(["data", "check", file, file]) == 2
    assert main(["data", "check", file, str(root / "gone.json")]) == 2
    assert "gone.json: No such file" in capsys.readouterr().err


def test_check_knows_a_models_tokens_and_length(root, tmp_path, capsys):
    from tests.helpers.toy_data import tokenizer
    from tests.helpers.toy_models import internvl

    internvl(layers=1).config.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    long = "w7 " * 600
    rows = [("w7 <IMG>", "w8"), ("w8", long), ("w9 <user> x", "w8")]
    items = [{"question": q, "answer": a, "question_type": "soup"} for q, a in rows]
    (root / "a.json").write_text(json.dumps(items))
    command = ["data", "check", str(root / "a.json"), "--model", str(tmp_path / "model"), "--json"]
    assert main(command) == 1
    document = json.loads(capsys.readouterr().out)
    found = [(p["index"], p["kind"]) for p in document["problems"]]
    assert found == [(0, "special_token"), (2, "special_token"), (1, "too_long")]
