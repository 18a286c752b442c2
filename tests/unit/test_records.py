"""Reading and writing of records in the public layout."""

import json
import os
import pickle

import pytest

from drivekd.data import Message, Record, load_records, save_records
from drivekd.data.records import normalize_question_type
from drivekd.errors import DataError

ITEM = {
    "messages": [
        {"role": "user", "content": "<image>\nWhat? A. this B. that"},
        {"role": "assistant", "content": "Final: {A. this}"},
    ],
    "images": ["a.png"],
    "question_type": "perception",
}


def _write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def _without(key, **extra):
    return {k: v for k, v in ITEM.items() if k != key} | extra


@pytest.fixture
def records():
    turns = (
        Message("system", "Drive."),
        Message("user", "<image><image>\nWhat?"),
        Message("assistant", "Final: über \u2013 \u2028 done"),
        Message("user", "Why?"),
        Message("assistant", "Because."),
    )
    return [
        Record(turns, ("a.png", "b/c.jpg"), "planning", "r1", {"x": [1, {"y": None}], "z": 0.1}),
        Record(turns[1:3], (), "something else"),
    ]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.ndjson", "new/folder/data.json"])
def test_records_survive_a_round_trip(tmp_path, records, name):
    save_records(records, tmp_path / name)
    assert load_records(tmp_path / name) == records
    assert load_records(str(tmp_path / name)) == records


def test_saved_files_are_the_public_layout(tmp_path, records):
    save_records(records, tmp_path / "data.json")
    items = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert items[1] == {
        "messages": [
            {"role": "user", "content": "<image><image>\nWhat?"},
            {"role": "assistant", "content": "Final: über \u2013 \u2028 done"},
        ],
        "images": [],
        "question_type": "something else",
    }
    assert set(items[0]) == {"messages", "images", "question_type", "id", "meta"}


def test_records_can_be_pickled(records):
    assert pickle.loads(pickle.dumps(records)) == records


def test_question_and_answer_are_the_first_user_and_the_last_assistant_message(records):
    assert records[0].question == "<image><image>\nWhat?"
    assert records[0].answer == "Because."
    assert Record((), (), "x").question == Record((), (), "x").answer == ""


@pytest.mark.parametrize("key", ["data", "items", "samples", "dataset", "records"])
def test_reads_a_list_under_a_known_key(tmp_path, key):
    path = _write(tmp_path / "d.json", {"info": "x", key: [ITEM, ITEM]})
    assert len(load_records(path)) == 2


def test_reads_lines_and_skips_blank_ones(tmp_path):
    path = _write(tmp_path / "d.jsonl", f"{json.dumps(ITEM)}\n\n{json.dumps(ITEM)}")
    assert len(load_records(path)) == 2


def test_one_image_may_be_a_string_and_is_not_taken_letter_by_letter(tmp_path):
    path = _write(tmp_path / "d.json", [_without("images", images="front.png"), _without("images")])
    assert [r.images for r in load_records(path)] == [("front.png",), ()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("perception", "perception"),
        ("Perception", "perception"),
        (" PERCEPTION ", "perception"),
        ("percep", "perception"),
        ("perceptual", "perception"),
        ("Reasoning", "reasoning"),
        ("reason", "reasoning"),
        ("plan", "planning"),
        ("PLANNING", "planning"),
        # Could mean several things, or is somebody's own capability: kept.
        ("p", "p"),
        ("decision", "decision"),
        ("behavior", "behavior"),
        ("prediction", "prediction"),
        ("My Capability", "My Capability"),
        ("planning_speed", "planning_speed"),
        ("Planner", "Planner"),
        ("percepton", "percepton"),
    ],
)
def test_only_unambiguous_spellings_are_normalised(tmp_path, name, expected):
    assert normalize_question_type(name) == expected
    path = _write(tmp_path / "d.json", [{**ITEM, "question_type": name}])
    assert load_records(path)[0].question_type == expected


@pytest.mark.parametrize("key", ["type", "capability"])
def test_the_capability_may_stand_under_another_key(tmp_path, key):
    path = _write(tmp_path / "d.json", [_without("question_type", **{key: "Percep."})])
    record = load_records(path)[0]
    assert (record.question_type, dict(record.meta)) == ("perception", {})


def test_question_type_wins_and_the_other_keys_are_kept(tmp_path):
    path = _write(tmp_path / "d.json", [{**ITEM, "type": "mcq", "tag": [0], "meta": {"a": 1}}])
    record = load_records(path)[0]
    assert record.question_type == "perception"
    assert record.meta == {"type": "mcq", "tag": [0], "a": 1}


def test_number_ids_become_text(tmp_path):
    assert load_records(_write(tmp_path / "d.json", [{**ITEM, "id": 7}]))[0].id == "7"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("text", "is a str"),
        (None, "is a NoneType"),
        (_without("messages"), "messages is missing"),
        (_without("messages", question=["Q"], answer="A"), "messages is missing"),
        (_without("messages", question="Q"), "answer is a NoneType"),
        ({**ITEM, "image": "b.png"}, "both images and image"),
        ({**ITEM, "id": True}, "id is a bool"),
        ({**ITEM, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
        (
            {**ITEM, "messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]},
            "names its own image",
        ),
        ({**ITEM, "messages": []}, "messages is missing or empty"),
        ({**ITEM, "messages": ["hello"]}, r"messages\[0\]"),
        ({**ITEM, "messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({**ITEM, "messages": [{"role": "robot", "content": "x"}]}, "role is 'robot'"),
        ({**ITEM, "messages": [{"role": "user", "content": ["x"]}]}, "must be strings"),
        ({**ITEM, "images": [1]}, "images must be"),
        ({**ITEM, "images": {"front": "a.png"}}, "images must be"),
        (_without("question_type"), "no question type"),
        ({**ITEM, "question_type": " "}, "question_type must be a string"),
        ({**ITEM, "question_type": 3}, "question_type must be a string"),
        (_without("question_type", type="plan", capability="reason"), "disagree"),
        ({**ITEM, "id": [1]}, "id is a list"),
        ({**ITEM, "meta": []}, "meta is a list"),
        ({**ITEM, "tag": 1, "meta": {"tag": 2}}, "tag appears both"),
    ],
)
def test_errors_name_file_and_record(tmp_path, item, message):
    path = _write(tmp_path / "broken.json", [ITEM, item])
    with pytest.raises(DataError, match=rf"broken\.json, record 1: .*{message}"):
        load_records(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", "{", "not valid JSON"),
        ("d.json", "3", "holds a int"),
        ("d.json", '{"a": []}', "0 lists"),
        ("d.json", '{"data": [], "items": []}', "2 lists"),
        ("d.jsonl", json.dumps(ITEM) + "\n{", "record 1: line 2 is not valid JSON"),
    ],
)
def test_errors_name_the_file(tmp_path, name, text, message):
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        load_records(_write(tmp_path / name, text))


def test_a_missing_file_or_one_that_is_no_text_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        load_records(tmp_path / "nowhere.json")
    (tmp_path / "d.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_records(tmp_path / "d.json")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, records, monkeypatch):
    path = tmp_path / "data.json"
    save_records(records, path)
    old = path.read_bytes()
    with pytest.raises(TypeError):
        save_records([Record((), (), "x", meta={"bad": object()})], path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_records(records[:1], path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_saved_files_have_ordinary_permissions(tmp_path, records):
    save_records(records, tmp_path / "data.json")
    plain = _write(tmp_path / "plain", "x")
    assert (tmp_path / "data.json").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("fields", [(1, "x"), ("user", None), ("user", ["x"])])
def test_messages_are_text(fields):
    with pytest.raises(TypeError, match="must be strings"):
        Message(*fields)
