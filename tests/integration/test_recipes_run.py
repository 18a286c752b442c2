"""Shipped recipes train a step on tiny models, changed by overrides alone."""

import json
from pathlib import Path

import pytest

from drivekd.data import save_records
from drivekd.train import distill, load_recipe
from tests.helpers import toy_data, toy_models

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
# One of each kind; that all are valid and build their signals is in test_recipe.py.
RECIPES = {
    "multi": {"perception", "reasoning", "planning"},
    "table3/ce": set(),
    "table3/cosine_middle": {"reasoning"},
    "table3/hidden_planning": {"planning"},
    "table3/logit_kl_reasoning": {"reasoning"},
    "table3/multi_agp": {"perception", "reasoning", "planning"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    for name, layers, hidden in (("student", 4, 32), ("large", 6, 48)):
        toy_models.internvl(layers=layers, hidden=hidden).save_pretrained(root / name)
        toy_data.tokenizer().save_pretrained(root / name)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (root / "student" / "preprocessor_config.json").write_text(json.dumps(settings))
    types = ("perception", "reasoning", "planning", "reasoning")
    save_records(toy_data.records(root, types), root / "train.json")
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_a_step_on_models_of_ones_own(name, place, tmp_path):
    file = FOLDER / f"{name}.yaml"
    recipe = load_recipe(
        file,
        [
            f"student={place / 'student'}",
            f"data.train={place / 'train.json'}",
            *(f"teachers.{role}={place / 'large'}" for role in load_recipe(file).teachers),
            f"training.output_dir={tmp_path / 'run'}",
            "training.max_steps=1",
            # The four records are one step's, so that every capability has one in it.
            "training.gradient_accumulation_steps=4",
            "training.per_device_train_batch_size=1",
            "training.logging_steps=1",
            "training.use_cpu=true",
            "training.dataloader_num_workers=0",
            "training.disable_tqdm=true",
            "training.dataloader_pin_memory=false",
        ],
    )
    assert (distill(recipe) / "model.safetensors").is_file()
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    found = {key.removesuffix("/loss"): value for key, value in row.items() if "/loss" in key}
    assert found.keys() == RECIPES[name]
    assert all(value > 0 for value in found.values()) and row["ce"] > 0
