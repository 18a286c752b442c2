"""The simulated world: determinism, balance, layout, and answers that follow from scenes."""

import hashlib
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from drivekd.data import load_records
from drivekd.driving import (
    QUESTIONS,
    Scene,
    VisibleVehicle,
    answer_questions,
    generate_dataset,
    render_scene,
    sample_frames,
    simulate_scene,
)
from drivekd.driving import world as world_module

pytest.importorskip("highway_env")


def _digest(directory):
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    return directory, generate_dataset(directory, frames=150, seed=3)


def test_same_seed_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    calls = []
    generate_dataset(
        tmp_path / "one", frames=30, seed=5, progress=lambda done, all_: calls.append((done, all_))
    )
    generate_dataset(tmp_path / "two", frames=30, seed=5, workers=2)
    digest = _digest(tmp_path / "one")
    assert len(digest) == 31
    assert digest == _digest(tmp_path / "two")
    assert calls == [(25, 30), (30, 30)]


def test_frames_do_not_depend_on_how_many_are_made(world, tmp_path):
    directory, _ = world
    generate_dataset(tmp_path, frames=3, seed=3)
    for frame in range(3):
        name = f"train/{frame:06d}.png"
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_splits_and_seeds_share_no_scene(world, tmp_path):
    directory, _ = world
    generate_dataset(tmp_path, frames=40, seed=3, split="test")
    train = {p.read_bytes() for p in (directory / "train").iterdir()}
    assert len(train) == 150
    assert train.isdisjoint(p.read_bytes() for p in (tmp_path / "test").iterdir())
    scenes = {simulate_scene(s, split, 0) for s in (3, 4) for split in ("train", "val", "test")}
    assert len(scenes) == 6


def test_files_are_the_public_layout(world):
    directory, records = world
    assert load_records(directory / "train.json") == records
    for record in records:
        question = QUESTIONS[record.meta["qid"]]
        user, assistant = record.messages
        assert (user.role, assistant.role) == ("user", "assistant")
        assert user.content.startswith("<image>\n") and user.content.count("<image>") == 1
        label = "ABCDE".index(record.meta["label"])
        assert record.meta["options"] == list(question.options)
        assert assistant.content == f"Final: {'ABCDE'[label]}. {question.options[label]}"
        assert record.question_type == question.capability
        with Image.open(directory / record.images[0]) as picture:
            assert picture.size == (168, 48) and picture.mode == "RGB"
    assert len({record.id for record in records}) == len(records)


def test_pictures_can_be_drawn_again_from_the_records(world):
    directory, records = world
    for record in records[:20]:
        with Image.open(directory / record.images[0]) as picture:
            again = render_scene(Scene.from_meta(record.meta))
            np.testing.assert_array_equal(again, np.asarray(picture))


def test_no_answer_is_more_than_half_as_common_again_as_the_rarest(world):
    _, records = world
    assert {record.meta["qid"] for record in records} == set(QUESTIONS)
    for qid, question in QUESTIONS.items():
        counts = Counter(r.meta["label"] for r in records if r.meta["qid"] == qid)
        assert len(counts) == len(question.options), qid
        assert max(counts.values()) <= 1.5 * min(counts.values()), qid


def test_texts_are_short_and_the_vocabulary_small():
    words = set()
    for question in QUESTIONS.values():
        text = f"{question.text} " + " ".join(f"X. {option}" for option in question.options)
        assert len(text.split()) <= 34
        words |= set(text.replace("?", "").split())
    assert len(words) < 120
    assert not {word for word in words if word.lower() in words and word.lower() != word}


def test_sample_frames_keeps_whole_frames_and_is_fixed(world):
    _, records = world
    sample = sample_frames(records, 0.2, seed=1)
    frames = {r.images for r in sample}
    assert len(frames) == round(0.2 * len({r.images for r in records}))
    assert sample == [r for r in records if r.images in frames]
    assert sample == sample_frames(records, 0.2, seed=1)
    assert sample != sample_frames(records, 0.2, seed=2)
    assert sample_frames(records, 1.0, seed=1) == records


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_sample_frames_rejects_a_fraction_out_of_range(world, fraction):
    with pytest.raises(ValueError, match="fraction"):
        sample_frames(world[1], fraction, seed=0)


def test_scenes_are_in_the_window_sorted_and_never_empty():
    for frame in range(60):
        scene = simulate_scene(0, "train", frame)
        assert scene.vehicles
        assert all(-30.0 <= v.x < 50.0 and 0 <= v.lane < 4 for v in scene.vehicles)
        assert list(scene.vehicles) == sorted(scene.vehicles, key=lambda v: (v.x, v.lane))
        by_lane = {}
        for v in (*scene.vehicles, VisibleVehicle(0.0, scene.ego_lane, 0.0, 0.0)):
            by_lane.setdefault(v.lane, []).append(v.x)
        for positions in by_lane.values():
            assert all(b - a > 5.0 for a, b in pairwise(sorted(positions)))  # nobody crashed


def test_a_scene_with_any_crash_is_replaced_by_the_next_attempt(monkeypatch):
    """Frames 13, 26 and 31 of this seed crash at first; without a crash rule they would be kept."""
    outcomes = []
    attempt = world_module._attempt
    monkeypatch.setattr(
        world_module, "_attempt", lambda rng: outcomes.append(attempt(rng)) or outcomes[-1]
    )
    for frame in (13, 26, 31):
        outcomes.clear()
        scene = simulate_scene(0, "train", frame)
        assert outcomes[0] is None
        assert scene == outcomes[-1] is not None


def _scene(ego_lane, *vehicles):
    return Scene(ego_lane, tuple(VisibleVehicle(x, lane, dv, x - dv) for x, lane, dv in vehicles))


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (
            _scene(1, (20.0, 2, 0.0)),
            {
                "count": "one",
                "nearest": "right",
                "egolane": "second",
                "leftocc": "no",
                "rightocc": "yes",
                "safe_left": "safe",
                "safe_right": "safe",
                "action": "accelerate",
                "speed": "speed up",
            },
        ),
        (_scene(0, (-12.0, 0, 1.5)), {"count": "zero", "egolane": "first", "follow": "faster"}),
        (_scene(3, (12.0, 3, 0.9), (-12.0, 3, -2.0)), {"lead": "same speed", "follow": "slower"}),
        (_scene(3, (12.0, 3, -1.1)), {"lead": "slower", "nearest": "same lane"}),
        (_scene(1, (9.9, 0, 5.0), (-9.9, 2, -5.0)), {"safe_left": "unsafe ahead"}),
        (_scene(1, (9.9, 0, 5.0), (-9.9, 2, -5.0)), {"safe_right": "unsafe behind"}),
        # Time to collision: (25 - 5) m at 7 m/s is under 3 s, at 6.5 m/s it is over.
        (_scene(1, (25.0, 0, -7.0)), {"safe_left": "unsafe ahead"}),
        (_scene(1, (25.0, 0, -6.5)), {"safe_left": "safe"}),
        (_scene(1, (-25.0, 2, 7.0)), {"safe_right": "unsafe behind"}),
        (_scene(1, (-25.0, 2, 6.5)), {"safe_right": "safe"}),
        # Slow lead, both sides blocked by close vehicles.
        (
            _scene(1, (15.0, 1, -4.0), (3.0, 0, 0.0), (3.0, 2, 0.0)),
            {"action": "brake", "speed": "brake hard", "lead": "slower"},
        ),
        (_scene(1, (15.0, 1, -4.0)), {"action": "change left"}),
        (_scene(0, (15.0, 0, -4.0)), {"action": "change right"}),
        (_scene(1, (15.0, 1, -4.0), (3.0, 0, 0.0)), {"action": "change right"}),
        # Safe by gap and time, but MOBIL sees no gain, or too hard braking behind.
        (
            _scene(0, (20.0, 0, -4.0), (20.0, 1, -4.0)),
            {"action": "brake", "safe_right": "safe"},
        ),
        (
            _scene(0, (20.0, 0, -4.0), (-25.0, 1, 6.0)),
            {"action": "brake", "safe_right": "safe"},
        ),
        # Beside, but behind.
        (_scene(1, (-1.0, 3, 0.0)), {"count": "zero"}),
        (
            _scene(2, (1.0, 0, 0.0), (2.0, 0, 0.0), (3.0, 1, 0), (4.0, 3, 0)),
            {"count": "four or more"},
        ),
    ],
)
def test_answers_follow_from_the_scene(scene, expected):
    answers = answer_questions(scene)
    assert {qid: answers[qid] for qid in expected} == expected


def test_questions_without_an_unambiguous_answer_are_left_out():
    answers = answer_questions(_scene(0, (-5.0, 1, 0.0), (8.0, 1, 0.0)))
    absent = {"leftocc", "safe_left", "safe_right", "lead", "follow"}
    assert absent.isdisjoint(answers)
    assert "nearest" not in answer_questions(_scene(0, (-5.0, 1, 0.0)))


def test_idm_thresholds_match_the_closed_form():
    """a = 3 (1 - (16/19)^4) - 3 (d*/d)^2 with d* = 10 + 1.5 * 16 - 16 dv / (2 sqrt(15))."""
    for dv in (-6.0, 0.0, 4.0):
        for x in (12.0, 30.0, 44.0, 49.0):
            gap = 10 + 24 - 16 * dv / (2 * np.sqrt(15))
            a = 3 * (1 - (16 / 19) ** 4) - 3 * (gap / x) ** 2
            names = ("speed up", "hold speed", "slow down", "brake hard")
            expected = names[int(a < 0.6) + int(a < -0.5) + int(a < -3)]
            assert answer_questions(_scene(0, (x, 0, dv)))["speed"] == expected


def test_picture_shows_lanes_ego_tint_and_trail():
    picture = render_scene(Scene(1, (VisibleVehicle(20.0, 2, -6.0, 26.0),)))
    assert picture.shape == (48, 168, 3)
    assert picture[20, 63].tolist() == [255, 255, 255]  # ego: 30 m * 2.1, middle of row 2
    assert picture[28, 105].tolist() == [255, 100, 120]  # full red, lane 2 is rows 24-31
    trail = np.flatnonzero((picture[28] == [255, 160, 0]).all(axis=1))
    assert trail.min() == 110 and trail.max() == 122  # 6 m = 12.6 pixels ahead of the body
    assert picture[2, 50].tolist() == picture[45, 50].tolist() == [60, 110, 60]
    assert picture[7, 50].tolist() == picture[40, 50].tolist() == [200, 200, 200]


def test_each_vehicle_stays_in_its_own_patch_row():
    for lane in range(4):
        scene = Scene(3 - lane if lane != 3 - lane else 0, (VisibleVehicle(20.0, lane, 4.0, 16.0),))
        without = render_scene(Scene(scene.ego_lane, ()))
        rows = np.flatnonzero((render_scene(scene) != without).any(axis=(1, 2)))
        assert rows.min() >= 8 * (lane + 1) and rows.max() < 8 * (lane + 2)


def test_larger_pictures_show_the_same_scene():
    scene = simulate_scene(0, "val", 1)
    large = render_scene(scene, scale=4)
    assert large.shape == (192, 672, 3)
    # Edges may fall on another fine pixel; the inside of everything must agree.
    differ = (large[2::4, 2::4] != render_scene(scene)).any(axis=2).mean()
    assert differ < 0.03
    with pytest.raises(ValueError, match="scale"):
        render_scene(scene, scale=0)


def test_constant_colour_frame_is_an_error(monkeypatch, tmp_path):
    black = np.zeros((48, 168, 3), np.uint8)
    monkeypatch.setattr("drivekd.driving.dataset.render_scene", lambda scene: black)
    with pytest.raises(ValueError, match="one colour"):
        generate_dataset(tmp_path, frames=1, seed=0)


def test_missing_highway_env_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "highway_env.road.road", None)
    with pytest.raises(ImportError, match=r"pip install drivekd\[demo\]"):
        generate_dataset(tmp_path / "none", frames=1, seed=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "bad", [{"frames": 0}, {"workers": 0}, {"seed": -1}, {"split": "a/b"}, {"split": ""}]
)
def test_generate_dataset_rejects_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate_dataset(tmp_path, **{"frames": 1, "seed": 0, **bad})
