import json
import logging
import math

import pytest
import torch
import transformers
import yaml

from drivekd.cli import main
from drivekd.data import save_records
from drivekd.errors import DataError, RecipeError, TokenMismatchError
from drivekd.train import JsonlLogger, distill, load_model, load_recipe
from tests.helpers import toy_data, toy_models
from tests.helpers.runs import save_checkpoints

TYPES = ("sort", "fold", "sort", "fold")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A student and two deeper teachers with their tokenizer, as from_pretrained wants them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoints(folder)


@pytest.fixture
def write(checkpoints, tmp_path):
    """A recipe of two signals, written to a file; returns load_recipe of it with overrides."""
    save_records(toy_data.records(tmp_path, TYPES), tmp_path / "train.json")
    save_records(toy_data.records(tmp_path, ("sort",), seed=7), tmp_path / "eval.json")
    signal = {"region": "full", "student_layers": "0..-2", "teacher_layers": "0..-2"}
    tree = {
        "student": str(checkpoints / "student"),
        "teachers": {name: str(checkpoints / name) for name in ("shallow", "deep")},
        "data": {"train": str(tmp_path / "train.json"), "eval": str(tmp_path / "eval.json")},
        "distill": {
            "signals": [
                {"name": "sort", "teacher": "shallow", **signal},
                {"name": "fold", "teacher": "deep", **signal},
            ]
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return lambda *overrides: load_recipe(file, overrides)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_recipe_gives_a_student_that_loads_plainly(write, checkpoints, tmp_path):
    folder = distill(write())
    assert folder == tmp_path / "run" / "student"
    student = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    start = load_model(checkpoints / "student")
    assert type(student) is type(start) and student.dtype == torch.float32
    assert any(
        not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == toy_data.tokenizer().get_vocab()
    assert tokenizer.chat_template == toy_data.TEMPLATE
    # It can be the student of the next recipe, image settings included.
    other = f"training.output_dir={tmp_path / 'next'}"
    distill(write(f"student={folder}", "training.max_steps=1", other))


def test_log_holds_training_and_evaluation(write, tmp_path):
    distill(write())
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(row["eval_loss"] > 0 for row in rows if "eval_loss" in row)
    assert sum("eval_loss" in row for row in rows) == 1
    assert {"sort/share", "fold/share"} <= set().union(*rows)


def test_resume_auto_goes_on_from_the_newest_checkpoint(write, tmp_path):
    auto = ("training.resume_from_checkpoint=auto", "training.eval_strategy=no")
    whole = distill(write("training.max_steps=3", *auto, f"training.output_dir={tmp_path / 'w'}"))
    distill(write("training.max_steps=3", "training.save_steps=2", *auto))
    for leftover in ("student", "checkpoint-3"):
        (tmp_path / "run" / leftover).rename(tmp_path / leftover)
    resumed = distill(write("training.max_steps=3", "training.save_steps=2", *auto))
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == [1, 2, 3]
    first, second = (load_model(folder).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_last_needs_a_checkpoint(write):
    with pytest.raises(ValueError, match=r"is 'last' but .* has no checkpoint"):
        distill(write("training.resume_from_checkpoint=last"))


def test_without_signals_no_teacher_is_needed(write):
    folder = distill(write("distill={}", "teachers.deep=nowhere", "training.eval_strategy=no"))
    assert (folder / "model.safetensors").exists()


def test_unusable_records_are_refused_before_training(write, tmp_path):
    (tmp_path / "0-1.png").unlink()
    with pytest.raises(DataError, match=r"1 unusable records.*\n.*fold-1.*0-1\.png"):
        distill(write())
    assert not (tmp_path / "run").exists()


def test_doubtful_records_are_warnings(write, tmp_path, caplog):
    records = toy_data.records(tmp_path, TYPES)
    save_records([records[0], *records], tmp_path / "train.json")
    with caplog.at_level(logging.WARNING, logger="drivekd"):
        distill(write("training.max_steps=1", "training.eval_strategy=no"))
    assert "1 doubtful records" in caplog.text


def test_teacher_with_another_tokenizer_is_refused(write, tmp_path, checkpoints):
    other = toy_data.tokenizer()
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["w7"], words["w8"] = words["w8"], words["w7"]
    folder = tmp_path / "other"
    toy_models.internvl(layers=3).save_pretrained(folder)
    other.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["vocab"] = words
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(TokenMismatchError, match=r"teacher 'deep' .* 'w[78]' the id [78]"):
        distill(write(f"teachers.deep={folder}"))


def test_checkpoint_without_its_head_is_refused(tmp_path):
    config = toy_models.qwen2(layers=2).config
    config.tie_word_embeddings = False
    transformers.Qwen2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights \['lm_head.weight'\]"):
        load_model(tmp_path)


def test_image_settings_are_asked_for(write, checkpoints):
    deep = f"student={checkpoints / 'deep'}"
    with pytest.raises(RecipeError, match=r"no preprocessor_config\.json; give encoder.image_mean"):
        distill(write(deep))
    given = ("encoder.image_mean=[0.5, 0.5, 0.5]", "encoder.image_std=[0.25, 0.25, 0.25]")
    plain = ("distill={}", "training.max_steps=1", "training.eval_strategy=no")
    trained = distill(write(deep, *given, *plain))
    saved = json.loads((trained / "preprocessor_config.json").read_text())
    assert saved == {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    distill(write(f"student={trained}", *plain, f"training.output_dir={trained.parent}-again"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there bf16 is no mistake")
def test_bf16_without_a_gpu_is_refused_in_words_of_the_recipe(write):
    with pytest.raises(RecipeError, match=r"training\.bf16 is true.*give training\.bf16=false"):
        distill(write("training.bf16=true", "training.use_cpu=false"))


def test_tile_settings_of_a_processor_are_refused(write):
    with pytest.raises(RecipeError, match="image_size belongs to kind 'single_tile'"):
        distill(write("encoder.kind=processor", "encoder.image_size=[56, 56]"))


def test_fresh_run_moves_an_older_log_aside(tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = transformers.TrainerState(is_world_process_zero=True)
    control = transformers.TrainerControl()
    for _ in range(3):
        logger = JsonlLogger()
        logger.on_train_begin(args, state, control)
        logger.on_log(args, state, control, {"loss": math.nan, "step_time": 1.5})
    assert rows_of(tmp_path) == [{"step": 0, "loss": None, "step_time": 1.5}]
    assert sorted(file.name for file in tmp_path.glob("log*")) == [
        "log.1.jsonl",
        "log.2.jsonl",
        "log.jsonl",
    ]


def test_resumed_log_drops_rows_after_the_checkpoint(tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = transformers.TrainerState(is_world_process_zero=True, global_step=2)
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    JsonlLogger().on_train_begin(args, state, transformers.TrainerControl())
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]


KITCHEN = """
base: kitchen_models.yaml
distill:
  signals:
    - {name: smell, teacher: nose, student_layers: first, teacher_layers: first, region: full}
    - name: taste
      teacher: tongue
      student_layers: penultimate
      teacher_layers: penultimate
      region: text_to_vision
      loss: cosine
  mixing:
    soup: {smell: 1.0, taste: 0.5}
    cake: {taste: 1.0}
"""


def test_another_domain_works_by_recipe_alone(checkpoints, tmp_path):
    """Two capabilities that nobody thought of, one teacher each; nothing but files and the CLI."""
    records = toy_data.records(tmp_path, ("soup", "cake", "soup", "cake"))
    save_records(records, tmp_path / "kitchen.json")
    models = {
        "student": str(checkpoints / "student"),
        "teachers": {"nose": str(checkpoints / "shallow"), "tongue": str(checkpoints / "deep")},
        "data": {"train": str(tmp_path / "kitchen.json")},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }
    (tmp_path / "kitchen_models.yaml").write_text(yaml.safe_dump(models))
    (tmp_path / "kitchen.yaml").write_text(KITCHEN)
    assert main(["distill", str(tmp_path / "kitchen.yaml"), "training.learning_rate=1e-3"]) == 0
    load_model(tmp_path / "run" / "student")
    rows = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"smell/share", "taste/share", "cosine/smell/taste"} <= set().union(*rows)
