"""Checkpoints of tiny models on disk, and runs of `drivekd distill` over them."""

import json

import yaml

from drivekd.data import save_records
from tests.helpers import toy_data, toy_models

SIGNALS = [
    {
        "name": "sort",
        "teacher": "shallow",
        "region": "text_to_vision",
        "student_layers": "first",
        "teacher_layers": "first",
    },
    {
        "name": "fold",
        "teacher": "deep",
        "region": "full",
        "student_layers": "0..-2",
        "teacher_layers": "0..-2",
    },
]


def save_checkpoints(folder):
    """A student and two deeper teachers with their tokenizer, as from_pretrained wants them."""
    sizes = {"student": (2, 32, 1), "shallow": (3, 48, 2), "deep": (4, 32, 3)}
    for name, (layers, hidden, seed) in sizes.items():
        toy_models.internvl(layers=layers, hidden=hidden, seed=seed).save_pretrained(folder / name)
        toy_data.tokenizer().save_pretrained(folder / name)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "student" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def recipe_of(checkpoints, folder, *, types=("sort", "fold", "sort", "fold"), **training):
    """A recipe of two signals over records in a folder, as a tree."""
    save_records(toy_data.records(folder, types), folder / "train.json")
    return {
        "student": str(checkpoints / "student"),
        "teachers": {name: str(checkpoints / name) for name in ("shallow", "deep")},
        "data": {"train": str(folder / "train.json")},
        "distill": {"signals": SIGNALS},
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "report_to": "none",
        }
        | training,
    }


def write_recipe(tree, folder):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file
