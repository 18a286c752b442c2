"""The demo's data: made once per folder from the simulated world, read back by every process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from drivekd.data import Record, load_records
from drivekd.demo.settings import World
from drivekd.driving import generate_dataset, sample_frames
from drivekd.errors import DataError

BLANK = "blank.png"
_BLANK_FRAMES = 101


@dataclass(frozen=True)
class Splits:
    """Records of every split; image paths are relative to `root`."""

    root: Path
    train: list[Record]
    student: list[Record]
    val: list[Record]
    test: list[Record]


def make_world(
    root: Path, world: World, *, workers: int, progress: Callable[[str, int, int], None]
) -> None:
    """Generate the splits that are not there yet; a folder made with other settings is refused.

    Raises:
        DataError: `root` holds a world made with other settings.
    """
    stamp = root / "world.json"
    if stamp.exists() and json.loads(stamp.read_text()) != asdict(world):
        raise DataError(
            f"{root} holds a world made with other settings; remove it or choose another --output"
        )
    root.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(asdict(world)))
    frames = {"train": world.train_frames, "val": world.val_frames, "test": world.test_frames}
    for split, count in frames.items():
        if not (root / f"{split}.json").exists():  # written last, so its presence means complete
            generate_dataset(
                root,
                frames=count,
                seed=world.seed,
                split=split,
                workers=workers,
                progress=lambda done, total, split=split: progress(split, done, total),  # type: ignore[misc]
            )
    if not (root / BLANK).exists():
        _draw_blank(root)


def _draw_blank(root: Path) -> None:
    """The empty road: the pixelwise median of training frames.

    A picture of one colour would be further from anything a model has seen, and make it babble.
    """
    paths = dict.fromkeys(record.images[0] for record in load_records(root / "train.json"))
    frames = [np.asarray(Image.open(root / path)) for path in list(paths)[:_BLANK_FRAMES]]
    Image.fromarray(np.median(frames, axis=0).astype(np.uint8)).save(root / BLANK)


def blanked(records: Sequence[Record]) -> list[Record]:
    """The same questions about the empty road."""
    return [replace(record, id=f"blank-{record.id}", images=(BLANK,)) for record in records]


def load_splits(root: Path, world: World) -> Splits:
    """Read the splits; the student's is a fixed random share of the training frames."""
    train = load_records(root / "train.json")
    return Splits(
        root=root,
        train=train,
        student=sample_frames(train, world.student_fraction, world.seed),
        val=shuffled(load_records(root / "val.json"), seed=0)[: world.val_questions],
        test=load_records(root / "test.json"),
    )


def shuffled(records: Sequence[Record], *, seed: int) -> list[Record]:
    """The records in a seeded random order."""
    return random.Random(seed).sample(list(records), len(records))
