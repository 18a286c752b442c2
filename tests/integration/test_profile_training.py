"""`drivekd profile RECIPE`: parts of a step add up, and nothing is saved or left changed."""

import json
import random
import tempfile

import numpy as np
import pytest
import torch
import yaml

from drivekd.cli import main
from drivekd.errors import RecipeError, TrainingMemoryError
from drivekd.phases import listening, phase
from drivekd.study.profile import training as profiling
from drivekd.study.profile.clock import OTHER, PhaseClock
from drivekd.study.profile.report import extra_time, training_document, training_tables
from drivekd.study.profile.training import ONE_BACKWARD, PLAIN, profile_recipe
from drivekd.study.tables import to_text
from drivekd.train import load_recipe
from tests.helpers import toy_data
from tests.helpers.recipes import write_recipe
from tests.helpers.toy_models import internvl

TYPES = ["sort", "fold", "sort", "fold"] * 3
STEPS = 2
PARTS = [
    "data", "teacher of sort", "teacher of fold", "student and cross-entropy", "loss of sort",
    "loss of fold", "backward of sort", "backward of fold", "backward of ce", "projection",
    "optimizer",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with two signals of two teachers, two micro-batches of two records a step."""
    place = tmp_path_factory.mktemp("recipe")
    write_recipe(
        place,
        TYPES,
        layers=("0..-2", "0..-2"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        save_steps=1,
    )
    run = place / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "log.jsonl").write_text("{}\n")
    return place


def files(folder):
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def states():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    """A profile, and what it found and left: files of the recipe, temporary files, generators."""
    temporary = tmp_path_factory.mktemp("temporary")
    before = files(folder), states()
    old, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        profile = profile_recipe(load_recipe(folder / "recipe.yaml"), steps=STEPS, warmup=1)
    finally:
        tempfile.tempdir = old
    return profile, before, (files(folder), states()), list(temporary.iterdir())


def test_parts_add_up_to_the_step(measured):
    profile = measured[0]
    assert len(profile.split_seconds) == STEPS
    assert sorted(each.name for each in profile.phases) == sorted([*PARTS, OTHER])
    assert all(each.seconds > 0 for each in profile.phases)
    whole = sum(profile.split_seconds) / STEPS
    assert sum(each.seconds for each in profile.phases) == pytest.approx(whole, rel=1e-9)
    named = sum(each.seconds for each in profile.phases if each.name != OTHER)
    assert named < whole


def test_nothing_is_left_behind_and_the_run_is_untouched(measured):
    _, before, after, temporary = measured
    assert after[0] == before[0]
    assert temporary == []


def test_random_generators_are_where_they_were(measured):
    assert measured[1][1] == measured[2][1]


def test_tokens_are_those_of_the_records_and_the_same_in_every_what_if(measured, folder):
    profile = measured[0]
    encoder, made = toy_data.encoder(folder), json.loads((folder / "train.json").read_text())
    assert len(made) == len(TYPES)
    from drivekd.data import load_records

    lengths = [len(encoder(each)["input_ids"]) for each in load_records(folder / "train.json")]
    assert profile.records == 4
    expected = tuple(sum(lengths[4 * step : 4 * step + 4]) for step in (1, 2))
    for steps in (profile.steps, *profile.what_if):
        assert steps.tokens == expected
        assert len(steps.seconds) == STEPS
        assert steps.tokens_per_second == sum(expected) / sum(steps.seconds)


def test_memory_is_what_models_and_optimizer_hold_and_what_a_step_takes(measured):
    profile = measured[0]

    def size(layers):
        model = internvl(layers=layers, hidden=32)
        tensors = [*model.parameters(), *model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    held = profile.steps.held_bytes
    assert held["student"] == size(2)
    # No head, no layer behind the deepest wanted, and what both teachers have alike is held once.
    assert 0 < held["teachers"] < size(3) + size(4)
    weights = 4 * sum(p.numel() for p in internvl(layers=2, hidden=32).parameters())
    assert 2 * weights <= held["optimizer"] < 2.1 * weights  # AdamW's two moments
    gradients = weights
    peaks = {each.name: each.peak_bytes for each in profile.phases}
    assert peaks["optimizer"] >= gradients
    assert peaks["projection"] >= 3 * gradients * 0.9  # one gradient a loss
    assert peaks["data"] < peaks["projection"]
    assert profile.steps.peak_bytes == max(peaks.values())


def test_what_if_has_plain_training_and_one_backward(measured):
    profile = measured[0]
    assert [each.name for each in profile.what_if] == [PLAIN, ONE_BACKWARD]
    plain, together = profile.what_if
    assert plain.held_bytes["teachers"] == 0
    assert plain.held_bytes["student"] == profile.steps.held_bytes["student"]
    assert together.held_bytes["teachers"] == profile.steps.held_bytes["teachers"]
    assert plain.peak_bytes < together.peak_bytes < profile.steps.peak_bytes
    assert extra_time(profile.steps, plain) == profile.steps.step_seconds / plain.step_seconds - 1


def test_tables_and_document_say_it_all(measured):
    profile = measured[0]
    where, cost = map(to_text, training_tables(profile))
    assert all(name in where for name in [*PARTS, OTHER, "a step, split"])
    assert PLAIN in cost and "time beside plain" in cost
    document = json.loads(json.dumps(training_document(profile)))
    assert document["steps"]["extra_time"] == extra_time(profile.steps, profile.what_if[0])
    assert document["what_if"][0]["extra_time"] == 0
    assert document["records"] == 4
    assert set(document["steps"]["percentiles"]) == {"p50", "p90"}


def test_command_takes_overrides_and_a_recipe_without_signals(folder, capsys):
    arguments = [str(folder / "recipe.yaml"), "distill.signals=[]", "--steps", "1"]
    code = main(["profile", *arguments, "--warmup", "1", "--json", "training.max_grad_norm=0.5"])
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["what_if"] == []
    names = [each["name"] for each in document["phases"]]
    order = ["data", "student and cross-entropy", "backward of all losses", "optimizer", OTHER]
    assert names == order


def test_static_weights_without_projection_have_one_backward(folder):
    recipe = load_recipe(
        folder / "recipe.yaml",
        ["distill.projection.method=none", "distill.weighting=static", "training.logging_steps=9"],
    )
    profile = profile_recipe(recipe, steps=1, warmup=1, what_if=False)
    names = [each.name for each in profile.phases]
    assert "backward of all losses" in names
    assert "backward of ce" not in names and "projection" not in names
    assert profile.what_if == ()


def test_memory_that_runs_out_in_a_what_if_is_named(measured, folder, monkeypatch):
    def full(recipe, name, *_, **__):
        if name == PLAIN:
            raise TrainingMemoryError("out of memory: 9 GiB. Change one of: everything")
        return measured[0]

    monkeypatch.setattr(profiling, "_run", full)
    profile = profile_recipe(load_recipe(folder / "recipe.yaml"), steps=1, warmup=1)
    assert profile.what_if[0].problem == "out of memory: 9 GiB"
    text = to_text(training_tables(profile)[1])
    assert "plain fine-tuning: out of memory: 9 GiB." in text


def test_memory_that_runs_out_says_what_to_change(folder, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(profiling._ProfiledTrainer, "compute_loss", full)
    before = states()
    assert main(["profile", str(folder / "recipe.yaml"), "--steps", "1"]) == 2
    assert "Change one of: training.per_device_train_batch_size=1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert states() == before
    with phase("nobody listens any more"):
        pass


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process"):
        profile_recipe(load_recipe(folder / "recipe.yaml"))


def test_recipe_may_keep_the_best_checkpoint(folder, tmp_path):
    """Settings of evaluating and saving that go together must not trip over each other."""
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["data"]["eval"] = tree["data"]["train"]
    tree["training"] |= {
        "eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True,
        "eval_steps": 1, "resume_from_checkpoint": "auto", "metric_for_best_model": "loss",
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    profile = profile_recipe(load_recipe(file), steps=1, warmup=1, what_if=False)
    assert len(profile.steps.seconds) == 1


# the clock


def test_time_belongs_to_the_innermost_phase_and_adds_up(monkeypatch):
    moments = iter(range(100))
    monkeypatch.setattr("drivekd.study.profile.clock.time.perf_counter", lambda: next(moments))
    clock = PhaseClock([])
    with listening(clock):
        with phase("before a step"):
            pass
        clock.start()
        with phase("outer"):
            with phase("inner"):
                pass
            with phase("inner"):
                pass
        clock.stop()
        with phase("after"):
            pass
    (step,) = clock.seconds
    assert set(step) == {OTHER, "outer", "inner"}
    assert step["outer"] == 3 and step["inner"] == 2  # stretches between two looks, each of 1
    assert sum(step.values()) == next(moments) - 1  # from the first look to the last


def test_on_gpus_a_phase_has_its_own_time_and_peak(monkeypatch):
    """Two GPUs that are stood in for: each boundary waits for both, peaks are theirs together."""
    place, other = torch.device("cuda:0"), torch.device("cuda:1")
    live, peak, waits = {place: 100, other: 10}, {}, []

    def take(device, count):
        live[device] += count
        peak[device] = max(peak[device], live[device])

    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", live.get)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak.get)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({device: live[device]})
    )
    clock = PhaseClock([place, torch.device("cpu"), other, place])
    with listening(clock):
        for scale in (1, 2):
            clock.start()
            with phase("a"):
                take(place, 50 * scale)
                take(place, -50 * scale)
                take(other, 7)
            with phase("b"):
                take(place, 5)
            take(place, -5)
            take(other, -7)
            clock.stop()
    assert clock.peaks == {"a": 107, "b": 12, OTHER: 12}
    assert len(clock.seconds) == 2
    assert waits == [place, other] * 12  # a step begins, four boundaries, ends


def test_phases_close_behind_an_error():
    clock = PhaseClock([])
    with listening(clock):
        clock.start()
        with pytest.raises(ZeroDivisionError), phase("a"), phase("b"):
            1 / 0  # noqa: B018
        with phase("c"):
            pass
        clock.stop()
    assert set(clock.seconds[0]) == {OTHER, "a", "b", "c"}
