"""What a model will load and compute, told before it is loaded."""

import json
import shutil

import pytest
import torch

from drivekd.cli import main
from drivekd.study.costs import quantity
from drivekd.train import load_model, load_teacher
from drivekd.train import teachers as loading
from drivekd.train.cost import ROLES, loading_cost
from drivekd.train.weights import Checkpoint
from tests.helpers.toy_models import internvl, qwen2, qwen2_5_vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    internvl(layers=6).save_pretrained(path, max_shard_size="100KB")
    return path


def never(*_, **__):
    raise AssertionError("weights were read")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_foretold_is_what_loading_then_reads_and_holds(folder, role, dtype, monkeypatch):
    opened = []
    monkeypatch.setattr(Checkpoint, "read", never)
    cost = loading_cost(folder, ROLES[role], role=role, dtype=dtype)
    monkeypatch.undo()

    class Noted(Checkpoint):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(loading, "Checkpoint", Noted)
    if ROLES[role] is None:
        model = load_model(folder, dtype=dtype)
        assert cost.bytes_read == cost.bytes_on_disk
    else:
        model = load_teacher(folder, ROLES[role], dtype=dtype)
        assert cost.bytes_read == sum(opened[0].bytes_read.values())
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.bytes == sum(p.nbytes for p in model.parameters())
    assert (cost.layers, cost.depth) == ({"perception": 1, "whole model": 6}.get(role, 5), 6)


def test_what_a_stopped_forward_runs(folder):
    """Norm, queries, keys and values of the deepest layer, everything of those above it."""
    text = internvl(layers=6).config.text_config
    hidden, head, inner = text.hidden_size, 16, text.intermediate_size
    queries = hidden * 4 * head + 4 * head
    keys = hidden * 2 * head + 2 * head
    before = hidden + queries + 2 * keys
    layer = before + 4 * head * hidden + hidden + 3 * hidden * inner
    assert loading_cost(folder, "first").run_per_token == before
    assert loading_cost(folder, [0, 2]).run_per_token == 2 * layer + before
    assert loading_cost(folder, None).run_per_token == 6 * layer


def test_files_that_are_not_opened_are_counted(folder):
    first, whole = loading_cost(folder, "first"), loading_cost(folder, None)
    assert first.files == whole.files == whole.files_read > first.files_read


def test_tied_weights_count_once(tmp_path):
    model = qwen2(layers=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    cost = loading_cost(tmp_path, None)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.bytes_read == cost.bytes_on_disk


def test_command_shows_the_roles(folder, capsys):
    assert main(["doctor", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for role, layers in (("perception", "1 of 6"), ("planning", "5 of 6"), ("whole", "6 of 6")):
        (line,) = [line for line in out.splitlines() if line.startswith(role)]
        assert layers in line
    assert max(len(line) for line in out.splitlines()[:8]) <= 100


def test_command_with_layers_as_json(folder, capsys):
    command = ["doctor", str(folder), "--layers", "first", "-3", "--dtype", "bfloat16", "--json"]
    assert main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["layers"], row["depth"]) == (4, 6)
    assert 2 * row["bytes"] == row["bytes_read"]


def test_command_with_a_recipe(folder, tmp_path, capsys):
    attention = {"region": "full", "student_layers": "first"}
    signals = [
        {"name": "perception", "teacher": "a", "teacher_layers": "first", **attention},
        {"name": "planning", "teacher": "b", "teacher_layers": "penultimate", **attention},
    ]
    recipe = {
        "student": str(folder),
        "teachers": {"a": str(folder), "b": str(folder)},
        "data": {"train": "none.json"},
        "distill": {"signals": signals},
        "teacher_dtype": "bfloat16",
        "training": {"output_dir": "runs"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["doctor", "--recipe", str(file), "--json"]) == 0
    student, teachers = json.loads(capsys.readouterr().out)
    assert (student["role"], student["layers"]) == ("student", 6)
    assert (teachers["role"], teachers["layers"]) == ("a, b", 5)
    assert teachers["bytes_read"] == 2 * teachers["bytes"]


def test_command_with_a_teacher_that_makes_other_image_tokens(folder, tmp_path, capsys):
    qwen2_5_vl(layers=2).save_pretrained(tmp_path / "other")
    layers = {"student_layers": "first", "teacher_layers": "first"}
    recipe = {
        "student": str(folder),
        "teachers": {"a": str(tmp_path / "other")},
        "data": {"train": "none.json"},
        "distill": {"signals": [{"name": "s", "teacher": "a", "region": "full", **layers}]},
        "training": {"output_dir": "runs"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert main(["doctor", "--recipe", str(file)]) == 2
    assert "teacher 'a' has video_token_id 301 but the student None" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "9"], "layer 9 does not exist in a model of 6"),
        (["--layers", "middle"], "'middle'; wanted"),
    ],
)
def test_command_says_what_is_wrong(folder, arguments, message, capsys):
    assert main(["doctor", str(folder), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_command_without_a_checkpoint(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert "none is not a folder of a saved model" in capsys.readouterr().err
    assert main(["doctor", "no-such-model"]) == 2
    assert "no-such-model is no folder here, and no model of that name" in capsys.readouterr().err
    assert main(["doctor", "--layers", "0"]) == 2
    assert "--layers needs a MODEL" in capsys.readouterr().err


def test_command_names_a_lacking_file_and_weight(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (name,) = [n for n in index if n.endswith("layers.0.self_attn.q_proj.weight")]
    (tmp_path / "copy" / index[name]).unlink()
    assert main(["doctor", str(tmp_path / "copy"), "--layers", "first"]) == 2
    assert index[name] in capsys.readouterr().err


def test_numbers_for_people():
    assert [quantity(n) for n in (7, 999, 1000, 8_114_000_000)] == [
        "7 ",
        "999 ",
        "1 k",
        "8.11 G",
    ]


def test_a_model_that_could_not_fit_is_weighed_without_making_it(tmp_path):
    """A 72-billion-parameter shape from a config and headers; a real load would need 145 GB."""
    config = qwen2_5_vl(layers=1).config
    text = config.text_config
    text.hidden_size, text.intermediate_size = 8192, 29568
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 80, 64, 8
    text.layer_types = ["full_attention"] * 80
    text.vocab_size, config.dtype = 152064, torch.bfloat16
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    config.vision_config.out_hidden_size = 8192
    config.save_pretrained(tmp_path)
    write_headers(config, tmp_path)
    whole, first = loading_cost(tmp_path, None), loading_cost(tmp_path, "first")
    assert whole.bytes == whole.bytes_read > 140e9
    assert first.layers == 1
    assert first.bytes < 0.05 * whole.bytes


def write_headers(config, folder):
    """A sparse file with the header of a checkpoint of this config."""
    import transformers

    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        size = 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]
        }  # fmt: skip
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("x.json", "x.json is not a folder of a saved model"),
        (".", "has a config.json that holds no JSON object"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(model, says, tmp_path, capsys, monkeypatch):
    for name in ("x.json", "config.json"):
        (tmp_path / name).write_text("[1, 2]")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", model]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drivekd doctor: error: {model} ") and says in line
