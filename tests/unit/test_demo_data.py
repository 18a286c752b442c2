"""The demo's data set: made once, checked by settings and by content, used without a simulator."""

import json
import shutil
import sys

import pytest

from drivekd import demo
from drivekd.demo.data import CONTENTS, SETTINGS, make_world, open_world
from drivekd.demo.settings import World
from drivekd.errors import BackendUnavailableError, DataError

WORLD = World(train_frames=12, val_frames=2, test_frames=3, val_questions=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("highway_env")
    folder = tmp_path_factory.mktemp("world")
    return folder, make_world(folder, WORLD, workers=1, progress=lambda *_: None)


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the data set, as if it had come from another machine."""
    folder, contents = made
    shutil.copytree(folder, tmp_path / "world")
    return tmp_path / "world", contents


@pytest.fixture
def no_simulator(monkeypatch):
    monkeypatch.setitem(sys.modules, "highway_env.road.road", None)


def test_a_copy_is_used_without_the_simulator(copied, no_simulator):
    folder, contents = copied
    assert open_world(folder, WORLD) == contents
    assert make_world(folder, WORLD, workers=1, progress=lambda *_: None) == contents
    assert contents.digests.keys() == {"train", "val", "test", "blank"}
    assert contents.versions["highway-env"] == "1.12.1"


def test_other_settings_are_refused_by_name(copied):
    folder, _ = copied
    wanted = World(train_frames=13, val_frames=2, test_frames=3, val_questions=4, seed=7)
    message = r"train_frames is 12, wanted 13, seed is 0, wanted 7; choose"
    for check in (open_world, lambda *a: make_world(*a, workers=1, progress=print)):
        with pytest.raises(DataError, match=message):
            check(folder, wanted)


@pytest.mark.parametrize("part", ["test.json", "train/000003.png", "blank.png"])
@pytest.mark.parametrize("harm", ["change", "remove"])
def test_changed_and_missing_files_are_refused(copied, part, harm):
    folder, _ = copied
    file = folder / part
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"#")
    name = part.split("/")[0].split(".")[0]
    with pytest.raises(DataError, match=rf"not the one that was made: files of {name} changed"):
        open_world(folder, WORLD)


def test_a_picture_too_many_is_refused(copied):
    folder, _ = copied
    (folder / "val" / "999999.png").write_bytes(b"")
    with pytest.raises(DataError, match="files of val"):
        open_world(folder, WORLD)


def test_an_unfinished_data_set_is_refused_and_finished_by_prepare(copied, monkeypatch):
    folder, contents = copied
    (folder / CONTENTS).unlink()
    with pytest.raises(DataError, match=r"not complete; `drivekd demo --prepare .*` finishes it"):
        open_world(folder, WORLD)
    (folder / "val.json").unlink()
    monkeypatch.setattr("drivekd.demo.main.SMOKE_WORLD", WORLD)
    assert demo.prepare(folder, workers=1, fast=True) == folder
    assert open_world(folder, WORLD) == contents  # the same bytes again


def test_no_data_set_at_all_is_said(tmp_path):
    with pytest.raises(DataError, match="holds no data set of the demo; `drivekd demo --prepare"):
        demo.run(tmp_path / "out", data=tmp_path / "nowhere")


def test_without_the_simulator_the_demo_names_both_ways_out(tmp_path, no_simulator):
    with pytest.raises(ImportError, match=r"install drivekd\[demo\].*--data .* --prepare DIR"):
        demo.run(tmp_path, fast=True)


def test_a_smoke_world_is_no_data_set_for_the_whole_demo(copied, tmp_path):
    folder, _ = copied
    assert json.loads((folder / SETTINGS).read_text())["train_frames"] == 12
    with pytest.raises(DataError, match="train_frames is 12, wanted 3000"):
        demo.run(tmp_path / "out", data=folder)


def test_unknown_arms_and_devices_are_refused(tmp_path):
    with pytest.raises(DataError, match="arms has cosine; there are ce, multi"):
        demo.run(tmp_path, arms=["ce", "cosine"])
    with pytest.raises(ValueError, match="device is 'tpu'"):
        demo.run(tmp_path, device="tpu")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path):
    with pytest.raises(
        BackendUnavailableError, match=r"device is 'cuda', but torch .* sees no GPU"
    ):
        demo.run(tmp_path, device="cuda")
