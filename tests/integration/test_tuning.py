"""Frozen parts and low-rank adapters, by recipe alone."""

import json
import shutil

import pytest
import torch
import transformers

from drivekd.errors import RecipeError
from drivekd.study.run_overlays import overlays_of_run
from drivekd.train import distill, load_model, load_recipe
from drivekd.train.tuning import LoraConfig, add_adapters, freeze
from tests.helpers import toy_models
from tests.helpers.runs import recipe_of, save_checkpoints, write_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models, tmp_path):
    file = write_recipe(recipe_of(models, tmp_path, learning_rate=0.01), tmp_path)
    return lambda *overrides: load_recipe(file, overrides)


LORA = "lora={rank: 4, alpha: 8}"
AUTO = "training.resume_from_checkpoint=auto"


def changed(folder, models):
    """Names of the weights of a saved student that are not those of its start."""
    before = load_model(models / "student").state_dict()
    after = load_model(folder).state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_frozen_parts_stay_and_all_else_learns(recipe, models):
    names = changed(distill(recipe("freeze=[vision, projector, embed_tokens]")), models)
    assert names and not [
        n for n in names if not n.startswith(("model.language_model.", "lm_head"))
    ]
    assert "model.language_model.embed_tokens.weight" not in names
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in names


def test_adapters_are_trained_alone_and_merged_into_a_plain_student(recipe, models, tmp_path):
    folder = distill(recipe(LORA))
    assert not (folder / "adapter_config.json").exists()
    transformers.AutoModelForImageTextToText.from_pretrained(folder)
    names = changed(folder, models)
    assert names and all(
        name.startswith("model.language_model.layers.") and name.endswith("proj.weight")
        for name in names
    )
    # Checkpoints hold adapters, which are a fraction of the student.
    saved = {file.name for file in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert row["sort/loss"] > 0 and row["grad_norm"] > 0
    assert "student" not in {p.name for p in (tmp_path / "run").glob("teacher*")}


def test_run_with_adapters_resumes_to_the_bit(recipe, tmp_path):
    other = f"training.output_dir={tmp_path / 'whole'}"
    whole = load_model(distill(recipe(LORA, other))).state_dict()
    distill(recipe(LORA))
    for name in ("student", "checkpoint-2"):
        shutil.rmtree(tmp_path / "run" / name)
    resumed = load_model(distill(recipe(LORA, AUTO))).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(RecipeError, match=r"lora is None, was absent|lora\.rank is absent, was 4"):
        distill(recipe(AUTO))


def test_overlays_of_a_run_with_adapters_are_of_its_checkpoint(recipe, tmp_path):
    distill(recipe(LORA))
    shutil.rmtree(tmp_path / "run" / "student")
    done = overlays_of_run(tmp_path / "run", count=1)
    assert len(done.plots) == 2 and "checkpoint-2" in done.plots[0].caption


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "freeze=[vison]",
            "freeze names 'vison', which is no part of Intern.*did you mean 'vision",
        ),
        ("freeze=[model, lm_head]", r"leaves nothing to train"),
        ("lora={rank: 0}", "lora: rank is 0, wanted 1 or more"),
        ("lora={rnk: 2}", "unknown key lora.rnk; did you mean 'rank'"),
        ("lora={dropout: 1.0}", "dropout is 1.0"),
        ("lora={targets: [q_prj]}", "targets names 'q_prj', .*did you mean 'q_proj'"),
    ],
)
def test_mistake_is_named(recipe, change, message):
    with pytest.raises(RecipeError, match=message):
        distill(recipe(change))


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_vision_is_frozen_in_every_family_and_adapters_are_the_decoders(family):
    model = toy_models.FAMILIES[family].model(layers=2)
    freeze(model, ["vision"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name in trained if "vision_tower" in name or "visual.blocks" in name]
    assert [n for n in trained if "projector" in n or "merger" in n], "projectors still learn"
    adapted = add_adapters(model, LoraConfig(targets=("q_proj", "down_proj")))
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2 and all(".language_model.layers." in name for name in names)
