"""A recipe file over tiny checkpoints and records."""

import yaml

from drivekd.data import save_records
from tests.helpers import toy_data, toy_models


def write_recipe(folder, types, *, layers, **training):
    """Two signals, "sort" and "fold", of the teachers "a" and "b"; returns the file.

    Args:
        folder: Where everything goes.
        types: A record for each of these question types.
        layers: (student layers, teacher layers) of the signals.
        training: Changes of TrainingArguments.
    """
    for name, depth in (("student", 2), ("a", 3), ("b", 4)):
        toy_models.internvl(layers=depth, hidden=32, seed=depth).save_pretrained(folder / name)
        toy_data.tokenizer().save_pretrained(folder / name)
    save_records(toy_data.records(folder, types), folder / "train.json")
    signal = {"region": "full", "student_layers": layers[0], "teacher_layers": layers[1]}
    tree = {
        "student": str(folder / "student"),
        "teachers": {name: str(folder / name) for name in ("a", "b")},
        "data": {"train": str(folder / "train.json")},
        "encoder": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]},
        "distill": {
            "signals": [
                {"name": name, "teacher": teacher, **signal}
                for name, teacher in (("sort", "a"), ("fold", "b"))
            ]
        },
        "training": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **training,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file
