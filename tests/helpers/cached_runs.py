"""Recipes over toy checkpoints whose teachers' targets are kept."""

import json
from pathlib import Path

import yaml

from drivekd.data import Message, Record, save_records
from drivekd.train import load_model, load_recipe
from tests.helpers import toy_data, toy_models

TYPES = ("sort", "fold", "sort", "wash", "fold", "sort")
SIZES = {"student": (3, 32, 1), "shallow": (3, 48, 2), "deep": (5, 32, 3)}


def save_checkpoints(folder: Path) -> None:
    """A student and two teachers with their tokenizer, as from_pretrained wants them."""
    for name, (layers, hidden, seed) in SIZES.items():
        toy_models.internvl(layers=layers, hidden=hidden, seed=seed).save_pretrained(folder / name)
        toy_data.tokenizer().save_pretrained(folder / name)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "student" / "preprocessor_config.json").write_text(json.dumps(settings))


def make_records(root: Path) -> list[Record]:
    """Six records with a picture, one with two, one with none."""
    records = toy_data.records(root, TYPES)
    pictures = (records[0].images[0], records[1].images[0])
    two = (Message("user", "<image> <image> w9 w10"), Message("assistant", "w11"))
    none = (Message("user", "w20 w21 w22"), Message("assistant", "w23 w24"))
    return [
        *records,
        Record(two, pictures, "sort", "two-pictures"),
        Record(none, (), "sort", "no-picture"),
    ]


def write_recipe(root: Path, checkpoints: Path):
    """Three signals, two of one teacher; returns load_recipe of the file with overrides."""
    save_records(make_records(root), root / "train.json")
    save_records(toy_data.records(root, ("sort",), seed=7), root / "eval.json")
    part = {"region": "text_to_vision"}
    tree = {
        "student": str(checkpoints / "student"),
        "teachers": {name: str(checkpoints / name) for name in ("shallow", "deep")},
        "data": {"train": str(root / "train.json"), "eval": str(root / "eval.json")},
        "cache": {"path": str(root / "targets"), "top_k": 1000},
        "distill": {
            "signals": [
                {
                    "name": "sort", "teacher": "shallow", **part,
                    "student_layers": "first", "teacher_layers": "first",
                },
                {
                    "name": "fold", "teacher": "deep", "region": "full",
                    "student_layers": "0..-2", "teacher_layers": "0..-2",
                },
                {
                    "name": "wash", "teacher": "deep", **part, "loss": "kl",
                    "student_layers": "penultimate", "teacher_layers": "penultimate",
                },
            ]
        },
        "training": {
            "output_dir": str(root / "run"),
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        },
    }  # fmt: skip
    file = root / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return lambda *overrides: load_recipe(file, overrides)


def losses_of(run: Path) -> dict[str, list[float]]:
    """Losses by signal, one a step in which it had samples."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = ("sort", "fold", "wash")
    return {n: [row[f"{n}/loss"] for row in rows if f"{n}/loss" in row] for n in names}


def weights(folder: Path) -> dict:
    return load_model(folder).state_dict()
