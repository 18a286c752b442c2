"""Data sets of the simulated world: PNG frames and records in the public Drive-KD layout."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from drivekd.data.records import IMAGE_PLACEHOLDER, Message, Record, save_records
from drivekd.driving.picture import render_scene
from drivekd.driving.questions import LETTERS, QUESTIONS, answer_questions
from drivekd.driving.world import Scene, highway_env, simulate_scene
from drivekd.errors import DataError

_MAX_RATIO = 1.5  # most common answer of a question against the rarest
_RARE_SHARE = 0.05  # an answer below this share does not bound the others
_CHUNK = 25  # frames a worker makes at a time


def generate_dataset(
    directory: str | os.PathLike[str],
    *,
    frames: int,
    seed: int,
    split: str = "train",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Make a split of the simulated world: ``<split>.json`` and ``<split>/<frame>.png``.

    Every frame depends on (seed, split, frame index) alone, and the files are the same bytes for
    any number of workers (same versions of highway-env, numpy and pillow). Per question id, answers
    more common than 1.5 times the rarest (of those with a share of 5 % or more) are thinned out, by
    a seeded shuffle over all frames. See ``drivekd.driving.world`` for what the picture gives away.

    Args:
        directory: Folder to write into; it is made if need be. Files of the same name are replaced.
        frames: Number of pictures, >= 1.
        seed: Seed of the data set, >= 0.
        split: A name that can be a file name; two splits share no scene.
        workers: Processes; 1 works in this one. More are spawned, so a script needs its
            ``if __name__ == "__main__"`` guard.
        progress: Called as ``progress(frames_done, frames)``.

    Returns:
        The records, sorted by frame; image paths are relative to ``directory``. ``meta`` holds
        ``qid``, ``label`` (the letter), ``options``, ``frame``, ``split``, ``ego_lane`` and
        ``vehicles`` (``x``, ``lane``, ``dv``, ``previous_x``).

    Raises:
        ImportError: If highway-env is not installed.
        ValueError: If a number is out of range, or ``split`` is no file name.
        DataError: If a frame came out in one colour.

    Example:
        >>> from drivekd.driving import generate_dataset
        >>> records = generate_dataset("runs/world", frames=8, seed=0)  # doctest: +SKIP
    """
    if frames < 1 or workers < 1 or seed < 0:
        raise ValueError(
            f"frames and workers must be >= 1 and seed >= 0, got frames={frames}, "
            f"workers={workers}, seed={seed}"
        )
    if not split or Path(split).name != split or split.startswith("."):
        raise ValueError(f"split is {split!r}; it must be a plain file name such as 'train'")
    highway_env()  # a missing package is reported before anything is written
    root = Path(directory)
    (root / split).mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + _CHUNK, frames)) for start in range(0, frames, _CHUNK)]
    make = partial(_make_frames, root, seed, split)
    records: list[Record] = []
    done = 0
    with _mapper(min(workers, len(chunks))) as run:
        for chunk, made in zip(chunks, run(make, chunks), strict=True):
            records += made
            done += len(chunk)
            if progress is not None:
                progress(done, frames)
    records = _balance(records, np.random.default_rng([seed, frames]))
    save_records(records, root / f"{split}.json")
    return records


def sample_frames(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """Keep all records of a fixed random subset of the frames.

    Args:
        records: Records; a frame is what shares the same images.
        fraction: Share of the frames to keep, in (0, 1]; at least one frame is kept.
        seed: Seed of the choice.

    Returns:
        The records of the chosen frames, in their order.

    Raises:
        ValueError: If ``fraction`` is out of range or there are no records.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1]")
    if not records:
        raise ValueError("records is empty; there is no frame to choose")
    frames = list(dict.fromkeys(record.images for record in records))
    count = max(1, round(fraction * len(frames)))
    chosen = np.random.default_rng(seed).permutation(len(frames))[:count]
    kept = {frames[index] for index in chosen}
    return [record for record in records if record.images in kept]


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[list[Record]]]]:
    """Give an ordered, lazy map over this process or over a pool of spawned ones."""
    if workers == 1:
        yield map
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield pool.imap


def _make_frames(root: Path, seed: int, split: str, frames: range) -> list[Record]:
    """Write the pictures of some frames and give all their records."""
    records: list[Record] = []
    for frame in frames:
        scene = simulate_scene(seed, split, frame)
        picture = render_scene(scene)
        if (picture == picture[0, 0]).all():
            raise DataError(f"frame {frame} of {split!r} came out in one colour")
        name = f"{split}/{frame:06d}.png"
        Image.fromarray(picture).save(root / name, compress_level=6)
        records += _records(scene, split, frame, name)
    return records


def _records(scene: Scene, split: str, frame: int, image: str) -> Iterator[Record]:
    for qid, answer in answer_questions(scene).items():
        question = QUESTIONS[qid]
        listed = [
            f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)
        ]
        label = question.options.index(answer)
        user = f"{IMAGE_PLACEHOLDER}\n{question.text} {' '.join(listed)}"
        yield Record(
            messages=(Message("user", user), Message("assistant", f"Final: {listed[label]}")),
            images=(image,),
            question_type=question.capability,
            id=f"{split}-{frame:06d}-{qid}",
            meta={
                "qid": qid,
                "label": LETTERS[label],
                "options": list(question.options),
                "frame": frame,
                "split": split,
                **scene.to_meta(),
            },
        )


def _balance(records: list[Record], rng: np.random.Generator) -> list[Record]:
    """Thin out common answers; the order of the records stays."""
    counts: dict[object, Counter[object]] = {}
    for record in records:
        counts.setdefault(record.meta["qid"], Counter())[record.meta["label"]] += 1
    left = {}
    for qid, labels in counts.items():
        common = [n for n in labels.values() if n >= _RARE_SHARE * labels.total()]
        most = max(1, int(_MAX_RATIO * min(common)))
        left.update({(qid, label): most for label in labels})
    kept = []
    for index in rng.permutation(len(records)):
        key = (records[index].meta["qid"], records[index].meta["label"])
        if left[key] > 0:
            left[key] -= 1
            kept.append(index)
    return [records[index] for index in sorted(kept)]
