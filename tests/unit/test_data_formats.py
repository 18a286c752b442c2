"""Layouts of other projects, written as ours: every field has its place, every fault its name."""

import json
import sys
from types import ModuleType

import pytest
from PIL import Image

from drivekd.cli import main
from drivekd.data import Message, TypeNames, convert_records, load_records, save_records
from drivekd.data.convert import CONVERT_FORMATS
from drivekd.errors import DataError

LLAVA = {
    "id": 7,
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A road."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "It is grey."},
    ],
    "source": "x",
}
SHAREGPT = {
    "system": "Drive.",
    "images": ["a.png", "b.png"],
    "conversations": LLAVA["conversations"][:2],
    "type": "plan",
}
CAMERAS = ["CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"]
CAMERAS += ["CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
DRIVELM = {
    "scene-1": {
        "scene_description": "A street.",
        "key_frames": {
            "frame-1": {
                "key_object_infos": {"<c1,CAM_FRONT,800.0,450.0>": {"Category": "Vehicle"}},
                "image_paths": {c: f"../nuscenes/samples/{c}/x__{c}.jpg" for c in CAMERAS},
                "QA": {
                    "perception": [
                        {
                            "Q": "What is <c1,CAM_FRONT,800.0,450.0>?",
                            "A": "A car, left of <c2,CAM_BACK,0.25,0.5>, <c3,CAM_FR",
                            "C": None,
                            "tag": [0],
                        }
                    ],
                    "prediction": [{"Q": "Will it move?", "A": "No."}],
                    "planning": [{"Q": "What next?", "A": "Brake."}],
                    "behavior": [{"Q": "How does it drive? A. fast B. slow", "A": "B"}],
                },
            }
        },
    }
}
DRIVEBENCH = {
    "scene_token": "s",
    "frame_token": "f",
    "question_type": "behavior",
    "question": "Predict <c1,CAM_BACK,0.5,0.5>.",
    "answer": "B. slow",
    "tag": [0],
    "image_path": {"CAM_BACK": "data/nuscenes/samples/CAM_BACK/y.jpg"},
    "pred": "",
}


def _write(path, value):
    path.write_text(json.dumps(value))
    return path


def _convert(tmp_path, value, *options, code=0):
    out = tmp_path / "out.jsonl"
    source = str(_write(tmp_path / "in.json", value))
    assert main(["data", "convert", source, "--output", str(out), *options]) == code
    return load_records(out) if out.exists() else None


@pytest.mark.parametrize("format", ["auto", "llava", "sharegpt"])
def test_conversations(tmp_path, format):
    options = ["--format", format, "--question-type", "perception"]
    llava, sharegpt = _convert(tmp_path, [LLAVA, SHAREGPT], *options)
    assert [(m.role, m.content) for m in llava.messages] == [
        ("user", "<image>\nWhat?"),
        ("assistant", "A road."),
        ("user", "Why?"),
        ("assistant", "It is grey."),
    ]
    assert (llava.id, llava.images, llava.question_type) == ("7", ("a.png",), "perception")
    assert llava.meta == {"source": "x"}
    assert sharegpt.messages[0] == Message("system", "Drive.")
    assert (sharegpt.images, sharegpt.question_type) == (("a.png", "b.png"), "planning")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "conversations is missing or empty"),
        ({"conversations": ["hello"]}, r"conversations\[0\] must be an object"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, r"conversations\[0\] is from 'tool'"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "is from"),
        ({"conversations": [{"from": "human", "value": 3}]}, "must be strings"),
        ({"image": 3}, "image must be a path"),
        ({"images": ["b.png"]}, "both images and image"),
        ({"system": ["x"]}, "must be strings"),
    ],
)
def test_faulty_conversations_are_named(tmp_path, change, message):
    path = _write(tmp_path / "in.json", [LLAVA, {**LLAVA, **change}])
    with pytest.raises(DataError, match=rf"in\.json, record 1: .*{message}"):
        load_records(path, "llava", question_type="x")


def test_a_conversation_without_an_image_is_text_only(tmp_path):
    item = {**LLAVA, "image": None}
    assert load_records(_write(tmp_path / "a.json", [item]), question_type="x")[0].images == ()


def test_conversations_without_a_type_say_what_to_do(tmp_path, capsys):
    assert _convert(tmp_path, [LLAVA], code=1) is None
    out = capsys.readouterr().out
    assert "in.json[0]: has no question type" in out
    assert "--question-type" in out
    assert "1 item of 1 cannot be converted; nothing was written" in out


@pytest.mark.parametrize("format", ["auto", "drivelm"])
def test_drivelm(tmp_path, format):
    records = _convert(tmp_path, DRIVELM, "--format", format)
    types = ["perception", "reasoning", "planning", "reasoning"]
    assert [record.question_type for record in records] == types
    first = records[0]
    assert first.id == "frame-1-perception-0"
    assert first.images == tuple(f"samples/{c}/x__{c}.jpg" for c in CAMERAS)
    views = "".join(f"{c}: <image>\n" for c in CAMERAS)
    assert first.question == views + "What is <c1,CAM_FRONT,0.5,0.5>?"
    # A tag that is in shares already and one that is cut off stay.
    assert first.answer == "A car, left of <c2,CAM_BACK,0.25,0.5>, <c3,CAM_FR"
    wanted = {"scene_token": "scene-1", "frame_token": "frame-1", "category": "perception"}
    assert first.meta == wanted | {"tag": [0]}
    assert len({record.id for record in records}) == 4


def test_drivelm_categories_can_be_named_otherwise(tmp_path):
    records = _convert(tmp_path, DRIVELM, "--map", "behavior=planning", "prediction=foresight")
    types = ["perception", "foresight", "planning", "planning"]
    assert [record.question_type for record in records] == types


def test_drivelm_faults_name_scene_frame_and_question(tmp_path, capsys):
    broken = json.loads(json.dumps(DRIVELM))
    frame = broken["scene-1"]["key_frames"]["frame-1"]
    frame["QA"]["planning"].append({"Q": "Why?"})
    frame["QA"]["perception"].append("text")
    broken["scene-1"]["key_frames"]["frame-2"] = {"image_paths": {}}
    broken["scene-2"] = {"key_frames": []}
    assert _convert(tmp_path, broken, code=1) is None
    out = capsys.readouterr().out
    assert "[1]: scene 'scene-1', frame 'frame-1', perception[1]: is a str" in out
    assert "frame 'frame-1', planning[1]: the answer is a NoneType" in out
    assert "frame 'frame-2': QA must be an object" in out
    assert "scene 'scene-2': key_frames must be" in out
    assert len(_convert(tmp_path, broken, "--skip-bad", code=1)) == 4


@pytest.mark.parametrize("format", ["auto", "drivebench"])
def test_drivebench(tmp_path, format):
    (record,) = _convert(tmp_path, [DRIVEBENCH], "--format", format)
    assert record.question == "CAM_BACK: <image>\nPredict <c1,CAM_BACK,0.5,0.5>."
    assert (record.answer, record.question_type, record.id) == ("B. slow", "reasoning", "f-0")
    assert record.images == ("samples/CAM_BACK/y.jpg",)
    assert record.meta["category"] == "behavior" and record.meta["tag"] == [0]


def test_flat_questions_and_typed_parts_are_read(tmp_path):
    flat = {"question": "What?", "answer": "A car.", "image": "a.png", "question_type": "x"}
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    typed = {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "A car."}]},
        ],
        "images": ["a.png"],
        "question_type": "x",
    }
    first, second = load_records(_write(tmp_path / "a.json", [flat, typed]))
    assert first.question == "<image>\nWhat?" and first.answer == second.answer == "A car."
    assert second.question == "<image>What?" and first.meta == {}


@pytest.mark.parametrize("format", ["auto", "drivekd", "jsonl"])
def test_our_own_lines_come_out_as_they_are(tmp_path, format):
    for value in ([LLAVA, SHAREGPT], DRIVELM, [DRIVEBENCH]):
        source, once, twice = (tmp_path / name for name in ("in.json", "1.jsonl", "2.jsonl"))
        names = TypeNames("perception", {"perception": "über"})
        convert_records(str(_write(source, value)), once, names=names, force=True)
        convert_records(str(once), twice, format=format, force=True)
        assert once.read_bytes() == twice.read_bytes()
        save_records(load_records(once), twice)
        assert once.read_bytes() == twice.read_bytes()


def test_convert_prints_counts_and_where_images_start(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    source = _write(tmp_path / "in.json", [SHAREGPT])
    out = tmp_path / "new" / "out.jsonl"
    assert main(["data", "convert", str(source), "--output", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 record (planning 1)",
        f"2 images under {tmp_path}, of which 1 are not there",
        f"give that folder as data.root of a recipe, or as --root {tmp_path}",
    ]
    assert main(["data", "convert", str(source), "--output", str(out), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == {"planning": 1}


def test_convert_refuses_to_replace_a_file(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    source = str(_write(tmp_path / "in.json", [SHAREGPT]))
    assert main(["data", "convert", source, "--output", str(out)]) == 2
    assert "out.jsonl exists; --force replaces it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    # A source with faults leaves the old file even with --force.
    faulty = str(_write(tmp_path / "faulty.json", [SHAREGPT, {}]))
    assert main(["data", "convert", faulty, "--output", str(out), "--force"]) == 1
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faulty.json", "in.json", "out.jsonl"]


def test_a_file_can_be_converted_onto_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(SHAREGPT))
    convert_records(str(path), path, force=True)
    assert load_records(path)[0].question_type == "planning"


def test_absolute_paths_below_the_root_become_relative(tmp_path):
    item = {**SHAREGPT, "images": [str(tmp_path / "p" / "ü.png"), "/elsewhere/b.png", "c.png"]}
    (record,) = _convert(tmp_path, [item], "--images", str(tmp_path))
    assert record.images == ("p/ü.png", "/elsewhere/b.png", "c.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.txt"], "wanted a name that ends in .jsonl"),
        (["--output", "out.jsonl", "--map", "behavior"], "wanted FROM=TO"),
        (["--output", "out.jsonl", "--split", "train"], "only data sets have splits"),
    ],
)
def test_unusable_options_are_one_line(tmp_path, capsys, options, message):
    source = str(_write(tmp_path / "in.json", [SHAREGPT]))
    assert main(["data", "convert", source, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_source_is_named(tmp_path, capsys):
    out = str(tmp_path / "o.jsonl")
    assert main(["data", "convert", str(tmp_path / "gone.json"), "--output", out]) == 2
    assert "gone.json cannot be read" in capsys.readouterr().err


def test_formats_of_the_command_are_those_of_the_reader():
    from drivekd.cli.data import _FORMATS

    assert (*_FORMATS, "hf") == CONVERT_FORMATS


def test_data_sets_without_their_library_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    out = str(tmp_path / "o.jsonl")
    assert main(["data", "convert", "some/name", "--format", "hf", "--output", out]) == 2
    assert "pip install 'drivekd[datasets]'" in capsys.readouterr().err


def test_data_sets_of_the_real_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "red")]
    data = datasets.Dataset.from_dict(
        {
            "question": ["What?", "Why?", "How?"],
            "answer": ["a", "b", "c"],
            "images": [[pictures[0]], [], [pictures[1], pictures[2]]],
            "question_type": [0, 1, 0],
            "empty": [None, None, "x"],
        },
        features=datasets.Features(
            {
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "question_type": datasets.ClassLabel(names=["perception", "planning"]),
                "empty": datasets.Value("string"),
            }
        ),
    )
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "data.parquet")
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="name one of train, test"):
        convert_records(str(tmp_path / "saved"), out)
    with pytest.raises(DataError, match="cannot be loaded"):
        convert_records(str(tmp_path / "saved" / "gone"), out, format="hf")
    for source, split in (("saved", "test"), ("data.parquet", None)):
        done = convert_records(str(tmp_path / source), out, split=split, force=True)
        records = load_records(out)
        assert [r.question_type for r in records] == ["perception", "planning", "perception"]
        assert [len(r.images) for r in records] == [1, 0, 2]
        assert records[2].question == "<image>\n<image>\nHow?"
        assert records[2].meta == {"empty": "x"}
        assert len(done.images) == 2 and done.missing == 0
        with Image.open(tmp_path / records[0].images[0]) as image:
            assert image.getpixel((0, 0)) == (255, 0, 0)


class _Table:
    """Stands for an arrow table of a data set."""

    def __init__(self, rows):
        self.rows = rows

    def to_pylist(self):
        return self.rows


class _Dataset:
    """The few methods of `datasets.Dataset` that are used."""

    def __init__(self, rows):
        self.rows = rows
        self.features = {}

    def with_format(self, name):
        assert name == "arrow"
        return self

    def iter(self, batch_size):
        assert batch_size > 0
        yield _Table(self.rows)


def test_rows_of_a_data_set_become_records(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    row = {"question": "What?", "answer": "a", "question_type": "x", "none": None}
    rows = [
        {**row, "image": {"bytes": content, "path": "p.png"}},
        {**row, "image": {"bytes": None, "path": "a.png"}},
        {**row, "image": {"bytes": b"no image", "path": None}},
        {**row, "when": b"bytes"},
    ]
    library = ModuleType("datasets")
    library.load_dataset = lambda source: {"train": _Dataset(rows)}
    monkeypatch.setitem(sys.modules, "datasets", library)
    out, root = tmp_path / "out.jsonl", tmp_path / "pictures"
    done = convert_records("a/name", out, format="hf", images=root, skip_faulty=True)
    first, second = load_records(out)
    assert (root / first.images[0]).read_bytes() == content
    assert second.images == ("a.png",) and second.meta == {}
    assert [index for index, _ in done.faults] == [2, 3]
