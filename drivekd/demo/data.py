"""The demo's data: made once per folder from the simulated world, read back by every process.

`world.json` holds the settings, `contents.json`, written last, what came out: a digest of each
split's records and pictures, and the versions that made them. A data set is used only if both fit.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drivekd.data import Record, load_records
from drivekd.demo.settings import World
from drivekd.driving import generate_dataset, sample_frames
from drivekd.errors import DataError

SETTINGS, CONTENTS = "world.json", "contents.json"
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


@dataclass(frozen=True)
class Contents:
    """What a complete data set holds.

    Attributes:
        digests: SHA-256 over a split's file of records and its pictures; `blank` is the empty road.
        versions: the packages that made it.
    """

    digests: dict[str, str]
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """Of everything, short."""
        text = json.dumps(self.digests, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_world(
    root: Path, world: World, *, workers: int, progress: Callable[[str, int, int], None]
) -> Contents:
    """Generate the splits that are not there yet, then check everything.

    Raises:
        DataError: `root` holds a data set made with other settings, or whose files have changed.
        ImportError: something is to be generated and highway-env is not installed.
    """
    _check_settings(root, world)
    if (root / CONTENTS).exists():
        return open_world(root, world)
    root.mkdir(parents=True, exist_ok=True)
    (root / SETTINGS).write_text(json.dumps(asdict(world)))
    for split, count in _frames(world).items():
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
    versions = {name: version(name) for name in ("highway-env", "numpy", "pillow")}
    contents = Contents(_digests(root, world), versions)
    (root / CONTENTS).write_text(json.dumps(asdict(contents), indent=1) + "\n")
    return contents


def open_world(root: Path, world: World) -> Contents:
    """Check a data set that was made before; generates nothing.

    Raises:
        DataError: it is not there or not complete, was made with other settings (the message names
            them), or its files are not those that were made.
    """
    make = f"`drivekd demo --prepare {root}`"
    if not (root / SETTINGS).exists():
        raise DataError(f"{root} holds no data set of the demo; {make} makes one")
    _check_settings(root, world)
    if not (root / CONTENTS).exists():
        raise DataError(f"the data set in {root} is not complete; {make} finishes it")
    contents = Contents(**json.loads((root / CONTENTS).read_text()))
    found = _digests(root, world)
    changed = [name for name, digest in found.items() if contents.digests.get(name) != digest]
    if changed:
        raise DataError(
            f"the data set in {root} is not the one that was made: files of {', '.join(changed)} "
            f"changed or are missing; copy it again, or remove it and let {make} make it anew"
        )
    return contents


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What two settings differ in, as "steps is 20, wanted 600"; empty if in nothing."""
    return ", ".join(
        f"{name} is {found.get(name)!r}, wanted {wanted.get(name)!r}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    )


def _check_settings(root: Path, world: World) -> None:
    file = root / SETTINGS
    if file.exists() and (unlike := differences(json.loads(file.read_text()), asdict(world))):
        raise DataError(
            f"{root} holds a data set made with other settings: {unlike}; choose another folder, "
            "or remove this one"
        )


def _frames(world: World) -> dict[str, int]:
    """Frames by split."""
    return {"train": world.train_frames, "val": world.val_frames, "test": world.test_frames}


def _digests(root: Path, world: World) -> dict[str, str]:
    files = {"blank": [root / BLANK]}
    for split in _frames(world):
        files[split] = [root / f"{split}.json", *sorted((root / split).glob("*.png"))]
    return {name: _digest(root, paths) for name, paths in files.items()}


def _digest(root: Path, paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents; a file that is missing counts as empty."""
    digest = hashlib.sha256()
    for path in paths:
        data = path.read_bytes() if path.exists() else b""
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


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
