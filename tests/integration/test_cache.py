"""`drivekd cache`: what is kept, how large it is, what is a miss, and what survives."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drivekd.cli import main
from drivekd.data import Message, load_records, save_records
from drivekd.errors import CacheError, NonFiniteLossError, RecipeError, TrainingMemoryError
from drivekd.train import (
    SignalConfig,
    cache_targets,
    distill,
    load_model,
    load_recipe,
    plan_cache,
)
from drivekd.train.cache import fill, store
from drivekd.train.cache.store import SHARDS, TargetStore
from tests.helpers import killed_runs
from tests.helpers.cached_runs import losses_of, weights
from tests.helpers.ranks import start_ranks


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / SHARDS).iterdir())


# How large


@pytest.mark.parametrize("setting", [(), ("cache.top_k=3", "cache.dtype=float32")])
def test_size_is_told_beforehand_and_a_dry_run_writes_nothing(write, tmp_path, setting):
    recipe = write(*setting, "cache.shard_mib=0.001")
    plan = plan_cache(recipe)
    assert not (tmp_path / "targets").exists()
    counts = {each.signal: (each.records, each.entries, each.missing) for each in plan.signals}
    assert counts == {"sort": (5, 5, 5), "fold": (2, 2, 2), "wash": (1, 1, 1)}
    assert plan.entries == plan.missing == 8 and plan.written == 0
    done = cache_targets(recipe)
    assert done.written == 8
    written = size_of(tmp_path / "targets")
    assert written == done.written_bytes
    assert plan.missing_bytes <= written <= plan.missing_bytes + plan.overhead_bytes
    tensors = 0
    cache = TargetStore(tmp_path / "targets")
    assert len(list((tmp_path / "targets" / SHARDS).iterdir())) > 1
    for keys in cache.files().values():
        for target in (each for key in keys for each in cache.read(key)):
            parts = (target.values, target.exponents, target.indices, target.rest)
            tensors += 4 + sum(part.nbytes for part in parts if part is not None)
    assert tensors == plan.bytes == sum(each.bytes for each in plan.signals)
    again = cache_targets(recipe)
    assert (again.missing, again.written, again.missing_bytes) == (0, 0, 0)


def test_equal_records_and_equal_maps_share_entries(write, tmp_path):
    records = load_records(tmp_path / "train.json")
    twin = dataclasses.replace(records[0], id="twin")
    save_records([*records, twin], tmp_path / "train.json")
    signals = ("distill.signals.wash.teacher=shallow", "distill.signals.wash.loss=cosine")
    layers = [f"distill.signals.wash.{who}_layers=first" for who in ("student", "teacher")]
    mixing = "distill.mixing={sort: {sort: 1, wash: 2}, fold: {fold: 1}}"
    plan = plan_cache(write(*signals, *layers, mixing))
    assert [(each.records, each.entries) for each in plan.signals] == [(6, 5), (2, 2), (6, 5)]
    assert plan.entries == 7


def test_disk_without_room_is_refused_before_the_work(write, tmp_path, monkeypatch):
    monkeypatch.setattr("drivekd.train.cache.plan._free", lambda folder: 1000)
    monkeypatch.setattr(fill, "load_teacher", None)
    with pytest.raises(CacheError, match=r"needs up to .* but its disk has .*nothing was written"):
        cache_targets(write())
    assert not list((tmp_path / "targets" / SHARDS).iterdir())


# Training from it


def test_no_teacher_is_loaded_and_its_folder_may_be_gone(
    ready, cache_checkpoints, tmp_path, run_python, monkeypatch
):
    """The second run in a process of its own, weights or the whole folder deleted: equal bits."""
    moved = tmp_path / "checkpoints"
    shutil.copytree(cache_checkpoints, moved)
    for file in (tmp_path / "recipe.yaml", tmp_path / "targets" / "teachers.json"):
        file.write_text(file.read_text().replace(str(cache_checkpoints), str(moved)))
    monkeypatch.setattr("drivekd.train.models._load", None)
    distill(ready(f"training.output_dir={tmp_path / 'with'}"))
    (moved / "shallow" / "model.safetensors").unlink()
    shutil.rmtree(moved / "deep")
    run_python(
        "from drivekd.train import distill, load_recipe;"
        f"distill(load_recipe({str(tmp_path / 'recipe.yaml')!r}))"
    )
    a, b = (weights(tmp_path / name / "student") for name in ("with", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses_of(tmp_path / "with") == losses_of(tmp_path / "run")


def test_resumed_training_is_the_same_to_the_bit(ready, tmp_path):
    auto = ("training.resume_from_checkpoint=auto", "training.save_strategy=steps")
    whole = distill(ready(*auto, "training.save_steps=4", f"training.output_dir={tmp_path / 'w'}"))
    distill(ready(*auto, "training.save_steps=2"))
    for leftover in ("student", "checkpoint-4"):
        (tmp_path / "run" / leftover).rename(tmp_path / leftover)
    resumed = distill(ready(*auto, "training.save_steps=2"))
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_targets_are_found_by_loader_workers(ready):
    distill(ready("training.dataloader_num_workers=1", "training.max_steps=2"))


def test_signals_that_are_not_cached_keep_their_teacher(ready, tmp_path):
    """Logits need the teacher in every step; only that one is loaded."""
    recipe = ready("training.max_steps=2", f"teachers.deep={tmp_path / 'gone'}")
    known = tmp_path / "targets" / "teachers.json"
    deep = Path(recipe.teachers["shallow"]).with_name("deep")
    known.write_text(known.read_text().replace(str(deep), str(tmp_path / "gone")))
    words = SignalConfig(name="words", teacher="shallow", kind="logits")
    config = dataclasses.replace(recipe.distill, signals=(*recipe.distill.signals, words))
    distill(dataclasses.replace(recipe, distill=config))
    assert "words/loss" in (tmp_path / "run" / "log.jsonl").read_text()


# What is a miss


def change_image(root, record):
    pixels = np.random.default_rng(5).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / record.images[0])


def change_question(root, record):
    records = load_records(root / "train.json")
    changed = (Message("user", "<image> w250"), record.messages[-1])
    records[3] = dataclasses.replace(record, messages=changed)
    save_records(records, root / "train.json")


@pytest.mark.parametrize("change", [change_image, change_question])
def test_record_that_changed_is_a_miss(ready, tmp_path, change):
    record = load_records(tmp_path / "train.json")[3]
    assert record.question_type == "wash"
    change(tmp_path, record)
    message = rf"signal 'wash', record '{record.id}': .*targets has no target of it.*drivekd cache"
    with pytest.raises(CacheError, match=message):
        distill(ready("training.max_steps=8"))
    assert plan_cache(ready()).missing == 1
    assert cache_targets(ready()).written == 1
    distill(ready("training.max_steps=8"))


def test_record_that_was_never_cached_is_named(ready, tmp_path, caplog):
    records = load_records(tmp_path / "train.json")
    other = (Message("user", "w100 w101"), Message("assistant", "w102"))
    new = dataclasses.replace(records[-1], messages=other, id="new")
    save_records([*records, new], tmp_path / "train.json")
    with pytest.raises(CacheError, match="signal 'sort', record 'new'"):
        distill(ready("training.max_steps=9"))
    assert "5 targets of signal 'sort', which works on 6 records" in caplog.text
    assert "'fold'" not in caplog.text


@pytest.mark.parametrize("large", [False, True])
def test_teacher_that_changed_is_a_miss(write, cache_checkpoints, tmp_path, monkeypatch, large):
    """One weight of one tensor where files are hashed whole; else, a tensor that was trained."""
    if large:
        monkeypatch.setattr("drivekd.train.cache.keys.WHOLE_BYTES", 0)
        monkeypatch.setattr("drivekd.train.cache.keys.BLOCK", 64)
    teacher = tmp_path / "teacher"
    shutil.copytree(cache_checkpoints / "shallow", teacher)
    recipe = write(f"teachers.shallow={teacher}")
    cache_targets(recipe)
    assert plan_cache(recipe).missing == 0
    model = load_model(teacher)
    with torch.no_grad():
        weight = model.model.language_model.layers[1].mlp.up_proj.weight
        if large:
            weight.mul_(1.001)
        else:
            weight[17, 3] += 0.01
    model.save_pretrained(teacher)
    with pytest.raises(CacheError, match=r"signal 'sort': .* has no targets of teacher 'shallow'"):
        distill(recipe)
    assert [each.missing for each in plan_cache(recipe).signals] == [5, 0, 0]


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("distill.signals.sort.teacher_layers=1", [5, 0, 0]),
        ("distill.signals.fold.student_layers=1..-1", [0, 0, 0]),
        ("distill.signals.fold.student_layers=0", [0, 2, 0]),
        ("distill.signals.fold.loss=cosine", [0, 0, 0]),
        ("distill.signals.wash.denominator=live", [0, 0, 0]),
        ("distill.signals.wash.region=full", [0, 0, 1]),
        ("cache.top_k=5", [0, 2, 0]),
        ("cache.dtype=float32", [5, 2, 1]),
        ("teacher_dtype=bfloat16", [5, 2, 1]),
        ("encoder.image_mean=[0.1, 0.5, 0.5]", [4, 2, 1]),
        ("encoder.padding_side=left", [0, 0, 0]),
        ("training.per_device_train_batch_size=1", [0, 0, 0]),
    ],
)
def test_what_decides_a_target_is_in_its_name_and_nothing_else(ready, override, missing):
    """The record without a picture does not see the image's mean."""
    assert [each.missing for each in plan_cache(ready(override)).signals] == missing


def test_cache_of_nothing_is_refused_at_once(write, tmp_path):
    with pytest.raises(CacheError, match=r"signal 'sort': .* run `drivekd cache`"):
        distill(write())
    with pytest.raises(CacheError, match=r"teacher nowhere is not there .* filled from it but"):
        distill(write("teachers.shallow=nowhere"))
    with pytest.raises(OSError, match=r"gone is not a folder of a saved model"):
        cache_targets(write(f"teachers.shallow={tmp_path / 'gone'}"))


def test_settings_that_a_cache_was_not_filled_with_are_named(ready):
    with pytest.raises(CacheError, match=r"signal 'fold'.*cache\.dtype=float16, cache\.top_k=7\)"):
        distill(ready("cache.top_k=7"))


def test_recipe_that_a_run_remembers_finds_the_cache_from_anywhere(ready, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distill(ready("cache.path=targets", "training.max_steps=1"))
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").cache.path == str(tmp_path / "targets")


# What survives


def test_fill_that_is_killed_goes_on_where_it_was(ready, write, tmp_path):
    """SIGKILL before one write after the other; each time what was finished stays."""
    reference = TargetStore(tmp_path / "targets")
    entries = {key: reference.read(key) for keys in reference.files().values() for key in keys}
    recipe = write(f"cache.path={tmp_path / 'killed'}", "cache.shard_mib=0.0001")
    folder = tmp_path / "killed"
    kills = kept = 0
    for number in (2, 7, 9, 11, 16, 1000):

        def work(number=number):
            killed_runs.count_writes(folder, lambda n: n == number and killed_runs.kill_self())
            cache_targets(recipe)

        done = killed_runs.finish(killed_runs.forked(work), may_be_killed=True)
        kills += not done
        now = len(TargetStore(folder))
        assert now >= kept
        kept = now
        if done:
            break
    assert kills >= 3 and done
    assert not (folder / "incomplete").exists()
    cache = TargetStore(folder)
    assert len(cache) == len(entries) == 8
    for key, targets in entries.items():
        for a, b in zip(cache.read(key), targets, strict=True):
            assert torch.equal(a.values, b.values) and torch.equal(a.exponents, b.exponents)


def test_disk_that_fills_up_midway_keeps_what_was_written(write, tmp_path, monkeypatch):
    replace_file, count = store.replace_file, iter(range(100))

    def full(draft, final):
        if final.suffix == ".safetensors" and next(count) >= 2:
            raise OSError(28, "No space left on device", str(final))
        replace_file(draft, final)

    recipe = write("cache.shard_mib=0.0001")
    with monkeypatch.context() as patch:
        patch.setattr(store, "replace_file", full)
        with pytest.raises(CacheError, match=r"No space left.*The (\d) entries written") as error:
            cache_targets(recipe)
    kept = len(TargetStore(tmp_path / "targets"))
    assert 2 <= kept < 8 and f"The {kept} entries written before are kept" in str(error.value)
    assert not (tmp_path / "targets" / "incomplete").exists()
    assert cache_targets(recipe).written == 8 - kept


def test_slow_teachers_lose_minutes_at_most(write, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_FLUSH_SECONDS", -1.0)
    assert cache_targets(write()).written == 8
    assert len(list((tmp_path / "targets" / SHARDS).iterdir())) == 8


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 8")],
)
def test_out_of_memory_says_what_to_change_and_keeps_what_was_made(
    write, tmp_path, monkeypatch, error
):
    capture, calls = fill.capture_attention, iter(range(9))

    def full(*arguments, **settings):
        if next(calls) == 1:
            raise error
        return capture(*arguments, **settings)

    monkeypatch.setattr(fill, "capture_attention", full)
    with pytest.raises(TrainingMemoryError, match=r"cache\.batch_size below 4"):
        cache_targets(write())
    assert len(TargetStore(tmp_path / "targets")) == 4


def test_teacher_without_finite_maps_is_refused(write, cache_checkpoints, tmp_path):
    model = load_model(cache_checkpoints / "shallow")
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteLossError, match="teacher 'shallow', record 'sort-0'"):
        cache_targets(write(f"teachers.shallow={tmp_path / 'broken'}"))


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize("place", [-5, 3])
def test_damaged_shard_is_named_and_made_again(ready, tmp_path, place):
    """A bit of a tensor, and one of the header; the latter is seen at once."""
    (shard,) = (tmp_path / "targets" / SHARDS).iterdir()
    flip(shard, place)
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged.*Delete this file and run"):
        distill(ready("training.max_steps=8"))
    assert plan_cache(ready()).missing == (0 if place < 0 else 8)
    plan = plan_cache(ready(), check=True)
    assert plan.missing == 8 and plan.damaged == (str(shard),)
    assert cache_targets(ready(), check=True).written == 8
    distill(ready("training.max_steps=8"))


def test_shard_that_is_cut_short_is_damaged(ready, tmp_path):
    (shard,) = (tmp_path / "targets" / SHARDS).iterdir()
    os.truncate(shard, shard.stat().st_size - 3)
    with pytest.raises(CacheError, match=f"{shard.name} is damaged"):
        distill(ready())


def test_one_writer_at_a_time(ready, tmp_path):
    with (
        store.writing(tmp_path / "targets"),
        pytest.raises(CacheError, match="another process is filling"),
    ):
        cache_targets(ready())


@pytest.mark.slow
def test_two_processes_fill_it_together(ready, tmp_path):
    """Half a cache is there; each process makes half of the rest, and it is what one makes."""
    alone = TargetStore(tmp_path / "targets")
    cache_targets(ready(f"cache.path={tmp_path / 'two'}", "distill.signals.fold.student_layers=0"))
    before = len(TargetStore(tmp_path / "two"))
    arguments = ["cache.path=" + str(tmp_path / "two"), "training.ddp_backend=gloo"]
    start_ranks(["-m", "drivekd", "cache", str(tmp_path / "recipe.yaml"), *arguments], 2)
    together = TargetStore(tmp_path / "two")
    assert len(together) == before + 2
    assert len(list((tmp_path / "two" / SHARDS).iterdir())) == 3
    for key in (key for keys in alone.files().values() for key in keys):
        for a, b in zip(together.read(key), alone.read(key), strict=True):
            # Records share a batch with others than before.
            torch.testing.assert_close(a.values, b.values, rtol=2.0**-10, atol=2.0**-24)


# The command


def test_command(write, tmp_path, capsys):
    file = str(tmp_path / "recipe.yaml")
    assert main(["cache", file, "--dry-run"]) == 0
    text = capsys.readouterr().out
    plan = plan_cache(write())
    assert f"{plan.missing_bytes:,} bytes" in text and "together" in text
    assert main(["cache", file]) == 0
    text = capsys.readouterr().out
    assert "wrote 8 entries" in text and f"{plan.missing_bytes:,} bytes" in text
    assert main(["cache", file, "--check"]) == 0
    assert "wrote 0 entries" in capsys.readouterr().out
    assert main(["distill", file, "training.max_steps=1"]) == 0
    assert main(["distill", file, "cache.path=" + str(tmp_path / "none")]) == 2
    assert "drivekd cache" in capsys.readouterr().err


def test_recipes_that_cannot_be_cached(write):
    with pytest.raises(RecipeError, match=r"cache\.path is missing"):
        plan_cache(write("cache=null"))
    with pytest.raises(RecipeError, match="nothing to cache"):
        plan_cache(write("distill.signals=[]"))
    with pytest.raises(RecipeError, match="top_k is 0, wanted at least 1"):
        write("cache.top_k=0")
    with pytest.raises(RecipeError, match=r"unknown key cache\.topk; did you mean 'top_k'"):
        write("cache.topk=5")
