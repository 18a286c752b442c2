"""Files as users have them: containers, encodings, and damage, told by record."""

import gzip
import json

import pytest

from drivekd.data import load_records, read_entries, save_records
from drivekd.errors import DataError

ITEM = {
    "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "yes"}],
    "question_type": "planning",
}
LINE = json.dumps(ITEM)


def _faults(path):
    return [(entry.index, entry.fault) for entry in read_entries(path) if entry.fault]


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", f"[{LINE}, {LINE}]"),
        ("a.JSON", f"[\r\n{LINE},\r\n{LINE}\r\n]\r\n"),
        ("a.json", f"\ufeff[{LINE}, {LINE}]"),
        ("a.json", json.dumps({"data": [ITEM, ITEM]}, indent=1)),
        ("a.json", f"{LINE}\n{LINE}\n"),
        ("a.txt", f"{LINE}\n\n{LINE}"),
        ("a.jsonl", f"\ufeff{LINE}\r\n{LINE}\r\n"),
        ("A.JSONL", f"\n{LINE}\n{LINE}"),
        ("a.jsonl", f"[{LINE},\n{LINE}]"),
        ("a.jsonl", json.dumps([ITEM, ITEM], indent=2)),
        ("a.jsonl.gz", gzip.compress(f"{LINE}\n{LINE}\n".encode())),
        ("a.json", gzip.compress(f"[{LINE},{LINE}]".encode())),
        ("ü 数据.json", f"[{LINE},{LINE}]"),
    ],
)
def test_the_content_says_what_a_file_is(tmp_path, name, content):
    records = load_records(_write(tmp_path / name, content))
    assert [record.answer for record in records] == ["yes", "yes"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_of_one_record_needs_no_list(tmp_path, name):
    assert len(load_records(_write(tmp_path / name, LINE))) == 1


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "is a list; a JSON object is needed"),
        ("3", "is a int"),
        (LINE.replace('"yes"', "NaN"), "the number NaN"),
        (LINE.replace('"yes"', "-Infinity"), "the number -Infinity"),
        (LINE.replace('"yes"', "1e999"), "the number inf"),
        (LINE[:-1] + ', "question_type": "x"}', "the key 'question_type' 2 times"),
        (LINE.replace("yes", "\\ud800"), "half of a surrogate pair"),
        (LINE.replace('"yes"', "[" * 300 + "]" * 300), "content"),
        ("[" * 100000, "recursion"),
        (LINE.encode()[:-2] + b'\xff"}', "line 2 is not UTF-8"),
    ],
    ids=range(11),
)
def test_a_faulty_line_is_named_and_the_rest_is_read(tmp_path, line, fault):
    content = b"\n".join([LINE.encode(), line if isinstance(line, bytes) else line.encode()])
    path = _write(tmp_path / "a.jsonl", content + b"\n" + LINE.encode())
    ((index, text),) = _faults(path)
    assert index == 1
    assert fault in text or fault == "content"
    assert len(list(read_entries(path))) == 3
    with pytest.raises(DataError, match=r"a\.jsonl, record 1: "):
        load_records(path)


def test_a_faulty_item_of_a_document_is_named(tmp_path):
    path = _write(tmp_path / "a.json", f'[{LINE}, {{"x": NaN}}, [], {LINE}]')
    assert [index for index, _ in _faults(path)] == [1, 2]


@pytest.mark.parametrize(
    "content", [f"[{LINE}, {LINE[:30]}", f"[{LINE}, {LINE}", f"[{LINE}, {LINE}] x", f"[{LINE}, "]
)
def test_records_before_the_end_of_a_cut_document_are_read(tmp_path, content):
    entries = read_entries(_write(tmp_path / "a.json", content))
    assert next(entries).record.answer == "yes"
    with pytest.raises(DataError, match=r"a\.json is not valid JSON.*records were read before"):
        list(entries)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "not valid JSON"),
        ("a.json", b" \n ", "not valid JSON"),
        ("a.json", LINE.encode("utf-16"), "UTF-16"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINE.encode() * 99)[:-20], "cannot be read"),
        ("a.json", b"\x1f\x8bnot gzip at all", "cannot be read"),
        ("a.json", b'"text"', "holds a str"),
        ("a.json", b"{}", "0 lists"),
    ],
)
def test_files_that_are_none_are_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load_records(_write(tmp_path / name, content))


def test_an_empty_file_of_lines_holds_no_records(tmp_path):
    assert load_records(_write(tmp_path / "a.jsonl", b"")) == []
    save_records([], tmp_path / "b.jsonl")
    save_records([], tmp_path / "b.json")
    assert load_records(tmp_path / "b.jsonl") == load_records(tmp_path / "b.json") == []


def test_lines_are_read_one_at_a_time(tmp_path):
    path = _write(tmp_path / "a.jsonl", f"{LINE}\n" * 20_000)
    import tracemalloc

    tracemalloc.start()
    count = sum(1 for _ in read_entries(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < path.stat().st_size / 4
