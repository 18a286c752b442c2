"""The README's loops: few lines change, and they do what they say."""

import copy
import itertools

import pytest
import torch
import transformers

import drivekd
from tests.helpers import toy_data, toy_models
from tests.helpers.gradients import relative_error
from tests.helpers.loops import Net, Plain, run_loop
from tests.helpers.readme import loops
from tests.helpers.trainers import SETTINGS, make_collator

NAMES = ("plain", "accelerate", "trainer")


@pytest.mark.parametrize(("name", "most"), [*((name, 5) for name in NAMES), ("signals", 8)])
def test_few_lines_are_added(name, most):
    assert 2 <= loops()[name].added <= most


def test_trainer_with_signals_learns_from_its_teacher(tmp_path):
    student, teacher = toy_models.internvl(layers=2), toy_models.internvl(layers=3, seed=4)
    names = {
        "drivekd": drivekd,
        "transformers": transformers,
        "teacher": teacher,
        "records": toy_data.records(tmp_path, ("any",) * 4),
        "collate": tensors_of(make_collator(tmp_path, student.config)),
        "arguments": transformers.TrainingArguments(
            **SETTINGS,
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
        ),
    }
    trained = {}
    for which in ("before", "after"):
        own = names | {"student": copy.deepcopy(student)}
        code = compile(getattr(loops()["signals"], which), f"README.md ({which})", "exec")
        exec(code, own)
        trained[which] = own["trainer"]
    rows = [row for row in trained["after"].state.log_history if "loss" in row]
    assert len(rows) == 2 and all(row["perception/loss"] > 0 for row in rows)
    assert not torch.equal(*(trained[w].model.lm_head.weight for w in ("before", "after")))


def test_trainer_with_losses_has_one_gradient_at_any_accumulation_and_evaluates(tmp_path):
    """Cross-entropy is over the labels of the optimizer step, however it is cut."""
    student = toy_models.internvl(layers=2)
    found = {}
    for which, steps in itertools.product(("before", "after"), (1, 4)):
        names = {
            "drivekd": drivekd,
            "transformers": transformers,
            "losses_of": lambda model, batch: {"ce": model(**batch).loss},
            "records": toy_data.records(tmp_path, ("any",) * 4),
            "collate": tensors_of(make_collator(tmp_path, student.config)),
            "student": copy.deepcopy(student),
            "arguments": transformers.TrainingArguments(
                **SETTINGS
                | {
                    "output_dir": str(tmp_path),
                    "max_steps": 1,
                    "per_device_train_batch_size": 4 // steps,
                    "gradient_accumulation_steps": steps,
                    "max_grad_norm": 1e9,
                    "remove_unused_columns": False,
                }
            ),
        }
        source = getattr(loops()["trainer"], which)
        source = source.replace("=records)", "=records, data_collator=collate)")
        exec(compile(source, f"README.md ({which})", "exec"), names)
        trainer = names["trainer"]
        row = next(row for row in trainer.state.log_history if "loss" in row)
        found[which, steps] = torch.tensor([row["loss"], row["grad_norm"]])
        assert trainer.evaluate(names["records"])["eval_loss"] > 0
    for own in found.values():
        torch.testing.assert_close(own, found["before", 1], rtol=1e-3, atol=0)


def tensors_of(collate):
    """A collator whose batches are plain model inputs."""
    return lambda records: {k: v for k, v in collate(records).items() if torch.is_tensor(v)}


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("name", NAMES)
def test_without_projection_the_loop_trains_as_before(name, accumulation, tmp_path):
    """Same steps, same scaling: only what joins the gradients is new."""
    options = {"accumulation": accumulation if name != "plain" else 1}
    before = run_loop(name, tmp_path, which="before", **options)
    after = run_loop(name, tmp_path, library=Plain, **options)
    assert relative_error(after, before) < 1e-12
    start = [own.detach() for own in Net().parameters()]
    assert relative_error(before, start) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_with_projection_all_loops_agree(name, tmp_path):
    projected = run_loop(name, tmp_path)
    assert relative_error(projected, run_loop("plain", tmp_path)) < 1e-12
    assert relative_error(projected, run_loop(name, tmp_path, which="before")) > 1e-4
