"""Records broken in ways that public data sets are not known for; each is named, none crashes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from drivekd.cli import main
from drivekd.data import Message, Record, check_records, load_records
from drivekd.data.encode import ProcessorEncoder
from drivekd.errors import DataError
from tests.helpers.toy_processors import QwenProcessor

QUESTION = "<image>Go? A. left B. right"


@pytest.fixture
def root(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path


def found(root, question=QUESTION, answer="Final: A. left", image="a.png", **changes):
    """(kind, message) of the problems of one record."""
    messages = (Message("user", question), Message("assistant", answer))
    record = Record(messages, (image,), "planning", "r", **changes)
    return [(problem.kind, problem.message) for problem in check_records([record], root)]


def one(problems, kind, words):
    assert [k for k, _ in problems] == [kind], problems
    assert words in problems[0][1]


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ("<c1,CAM_FROMT,0.5,0.5>", "did you mean the camera CAM_FRONT?"),
        ("<c1,cam_back_left,0.5,0.5>", "did you mean the camera CAM_BACK_LEFT?"),
        ("<C1,CAM_FRONT,0.5,0.5>", "looks like an object tag"),
        ("<c,CAM_FRONT,0.5,0.5>", "looks like an object tag"),
        ("c1,CAM_FRONT,0.5,0.5", "looks like an object tag"),
        ("\uff1cc1,CAM_FRONT,0.5,0.5\uff1e", "looks like an object tag"),
        ("<\u04411,CAM_FRONT,0.5,0.5>", r"<\u04411,CAM_FRONT"),
        ("<c1,CAM_FRONT,50%,20%>", "is not of the form <c1,CAMERA,x,y>"),
        ("<c1,CAM_FRONT,0,5,0,5>", "is not of the form"),
        ("<c1;CAM_FRONT;0.5;0.5>", "is not of the form"),
    ],
)
def test_what_is_almost_a_tag_is_named_once(root, tag, words):
    one(found(root, f"{QUESTION[:10]} {tag} A. left B. right"), "object_tag", words)


@pytest.mark.parametrize("camera", ["CAM_FRONT", "CAM_F0", "CAM_L2", "front", "ring_front_left"])
def test_cameras_of_other_data_sets_are_legal(root, camera):
    assert not found(root, f"<image>Is <c1,{camera},0.5,0.25> near? In CAM_FRONT, 2 cars.", "Yes")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("The answer is C.", "the answer is C, but the options are A, B"),
        ("Answer: d", "the answer is D, but the options are A, B"),
        ("Final: \u0410. left", "is cyrillic capital letter a, which no option has"),
        ("\uff22. right", "is fullwidth latin capital letter b"),
    ],
)
def test_letter_that_no_option_has_is_named_however_it_is_said(root, answer, words):
    one(found(root, answer=answer), "option_answer", words)


@pytest.mark.parametrize("answer", ["The answer is B", "Answer: (a).", "A good answer is to wait"])
def test_letters_that_options_have_are_fine(root, answer):
    assert not found(root, answer=answer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("go\u200bing", "an invisible character stands"),
        ("\u202egnik", "an invisible character stands"),
        ("\u00e2\u20ac\u0153yes", "UTF-8 was read as another encoding"),
        ("caf\u00c3\u00a9", "UTF-8 was read as another encoding"),
        ("left &amp; right", "HTML's escapes"),
        ("c\u0430r", "Latin and Cyrillic letters"),
    ],
)
def test_text_that_is_not_what_it_looks_like_is_named(root, text, words):
    one(found(root, answer=text), "garbled_text", words)


@pytest.mark.parametrize(
    "text", ["\u043c\u0430\u0448\u0438\u043d\u0430 5\u043c", "20 \u03bcm", "caf\u00e9", "AT&T; ok"]
)
def test_other_scripts_are_legal(root, text):
    assert not found(root, answer=text)


def transparent(root):
    image = Image.open(root / "a.png").convert("RGBA")
    image.putpixel((3, 3), (1, 2, 3, 0))
    return image


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (transparent, "image_colours", "has transparent pixels"),
        (lambda root: noise(1, 900), "image_size", "is 900 x 1 pixels"),
        (lambda root: noise(3, 3), "image_size", "is 3 x 3 pixels"),
    ],
)
def test_picture_that_models_see_otherwise_is_named(root, make, kind, words):
    make(root).save(root / "odd.png")
    one(found(root, image="odd.png"), kind, words)


def noise(height, width):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_opaque_and_palette_pictures_are_fine(root):
    image = Image.open(root / "a.png")
    for name, each in (("rgba", image.convert("RGBA")), ("p", image.convert("P"))):
        each.save(root / f"{name}.png")
        assert not found(root, image=f"{name}.png")


def test_pointer_of_git_lfs_says_how_to_get_the_file(root):
    (root / "big.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    one(found(root, image="big.png"), "image_unreadable", "git lfs pull")


def test_splits_may_share_no_moment_and_no_picture_whatever_its_name(root):
    """A copy, one in another lossless format, and another camera of the same moment."""
    shutil.copy(root / "a.png", root / "copy.png")
    Image.open(root / "a.png").save(root / "a.bmp")
    noise(20, 20).save(root / "b.png")
    messages = (Message("user", "<image>x"), Message("assistant", "y"))
    moment = {"frame_token": "f1"}
    splits = {
        "train": [Record(messages, ("a.png",), "planning", "1", moment)],
        "test": [
            Record(messages, ("copy.png",), "planning", "2"),
            Record(messages, ("a.bmp",), "planning", "3"),
            Record(messages, ("b.png",), "planning", "4", moment),
            Record(messages, ("b.png",), "planning", "5", {"frame_token": ["f1"]}),
        ],
    }
    problems = [p for p in check_records(splits, root) if p.kind == "frame_in_two_splits"]
    assert [(problem.split, problem.id) for problem in problems] == [
        ("test", "2"),
        ("test", "3"),
        ("test", "4"),
    ]
    assert "frame 'f1' is also in split 'train'" in problems[2].message


RECORD = '{"question": "x", "answer": "y", "question_type": "planning"}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"[{RECORD},]", "the comma before it is one too many"),
        (f"{RECORD},\n{RECORD}\n", "one a line without commas between them"),
        (f"[{RECORD}, {RECORD[:30]}", "its end is missing"),
        (f"[{RECORD}", "its end is missing"),
        ("[{'question': None}]", "this is Python's notation"),
        (f"[{RECORD}]\0\0", "it holds zero bytes"),
        (f"[{RECORD}, # more\n]", "JSON has no comments"),
        ("", "the file is empty"),
    ],
)
def test_what_is_behind_a_parsers_error_is_said(tmp_path, content, words):
    for name in ("x.json", "x.jsonl")[: 2 if content else 1]:  # empty lines are no records
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=words):
            load_records(tmp_path / name)


def test_null_is_what_is_absent(tmp_path):
    record = json.loads(RECORD) | {"images": None, "image": None, "id": None, "meta": None}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    (read,) = load_records(tmp_path / "x.json")
    assert (read.images, read.id, dict(read.meta)) == ((), "", {})


def test_message_is_named_whose_content_is_no_text(tmp_path):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
    record = {"messages": messages, "question_type": "planning"}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    with pytest.raises(DataError, match=r"record 0: messages\[1\]: .*got str and NoneType"):
        load_records(tmp_path / "x.json")


def test_roles_of_conversations_may_be_in_capitals(tmp_path):
    turns = [{"from": "Human", "value": "x"}, {"from": "GPT", "value": "y"}]
    (tmp_path / "x.json").write_text(
        json.dumps([{"conversations": turns, "question_type": "planning"}])
    )
    (read,) = load_records(tmp_path / "x.json")
    assert [message.role for message in read.messages] == ["user", "assistant"]


def test_damaged_scenes_do_not_hide_the_others(tmp_path, capsys):
    question = {"Q": "Where?", "A": "There."}
    scene = {"key_frames": {"f": {"QA": {"planning": [question]}}}}
    scenes = {"s1": None, "s2": scene, "s3": [1], "s4": {}}
    (tmp_path / "x.json").write_text(json.dumps(scenes))
    assert main(["data", "check", str(tmp_path / "x.json")]) == 1
    out = capsys.readouterr().out
    assert "record: 3" in out and "4 records (planning 1)" in out


def test_misspelt_question_type_gets_its_neighbour(root, tmp_path, capsys):
    rows = [json.loads(RECORD) | {"question_type": name} for name in ("planning", "percpetion")]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert main(["data", "check", str(tmp_path / "x.json")]) == 1
    assert "'percpetion' is unknown; did you mean 'perception'?" in capsys.readouterr().out


def test_picture_that_a_processor_refuses_is_an_error_of_its_record(root):
    noise(1, 900).save(root / "long.png")
    messages = (Message("user", "<image> w7"), Message("assistant", "w8"))
    record = Record(messages, ("long.png",), "planning", "r7")
    with pytest.raises(DataError, match=r"'r7': the processor refuses it .*900 x 1"):
        ProcessorEncoder(QwenProcessor(), root=root)(record)
