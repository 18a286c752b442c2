"""Training from kept targets beside training with live teachers: losses, gradients, weights."""

import functools
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from drivekd.data import Collator, load_records
from drivekd.train import DistillTrainer, cache_targets, distill, load_model, plan_cache
from drivekd.train.cache.store import TargetStore
from drivekd.train.signals import StudentCapture
from tests.helpers import toy_data, toy_models
from tests.helpers.cached_runs import losses_of, weights

WHO = ("student", "teacher")


def relative(got, wanted):
    assert len(got) == len(wanted) > 0
    return max(
        abs(a - b) / abs(b) if b else float(a != 0) for a, b in zip(got, wanted, strict=True)
    )


# float16 rounds a target by 2^-11 of itself, float32 is left with the teacher's own batch.
PRECISION = {"float16": (5e-4, 1e-3), "float32": (1e-5, 2e-5)}  # of losses, of gradients
MIXED = (
    "distill.mixing={sort: {sort: 1, wash: 0.5}, fold: {fold: 2}, wash: {wash: 1}}",
    "training.gradient_accumulation_steps=2",
    "training.eval_strategy=steps",
    "encoder.padding_side=left",
)


@pytest.mark.parametrize(
    ("dtype", "settings"), [("float16", ()), ("float16", MIXED), ("float32", MIXED)]
)
def test_training_is_that_with_live_teachers_within_the_stated_precision(
    write, tmp_path, dtype, settings
):
    """The first losses within the bound; later ones also see weights that have moved."""
    bound, _ = PRECISION[dtype]
    live = distill(write("cache=null", f"training.output_dir={tmp_path / 'live'}", *settings))
    recipe = write(f"cache.dtype={dtype}", *settings)
    cache_targets(recipe)
    cached = distill(recipe)
    got, wanted = losses_of(tmp_path / "run"), losses_of(tmp_path / "live")
    for name in wanted:
        assert relative(got[name][:1], wanted[name][:1]) <= bound, name
        assert relative(got[name], wanted[name]) <= 20 * bound, name
    start = weights(Path(recipe.student))
    a, b = weights(cached), weights(live)
    # Adam's first steps are signs of gradients, so compare what moved as a whole.
    gap = torch.stack([(a[name] - b[name]).norm() for name in b]).norm()
    whole = torch.stack([(b[name] - start[name]).norm() for name in b]).norm()
    assert 0 < gap <= 100 * bound * whole


def losses_and_gradients(recipe, root):
    """Of every signal on all records, by what the trainer itself runs."""
    student = load_model(recipe.student)
    trainer = DistillTrainer(
        student,
        recipe.teachers,
        recipe.distill,
        cache=recipe.cache,
        args=TrainingArguments(**recipe.training),
        data_collator=Collator(toy_data.encoder(root), student.config, pad_token_id=toy_data.PAD),
        train_dataset=load_records(root / "train.json"),
    )
    batch = trainer.data_collator(trainer.train_dataset)
    teachers = trainer.plan.run_teachers(batch["routes"])
    assert bool(teachers) != bool(recipe.cache)
    signals = trainer.plan.present(batch["routes"])
    with StudentCapture(student, signals) as capture:
        inputs = ("input_ids", "attention_mask", "pixel_values")
        student(**{name: batch[name] for name in inputs}, use_cache=False)
    losses = trainer.plan.losses(signals, batch, teachers, capture.output(None))
    results = {}
    for name, loss in losses.items():
        value = loss.layers.mean()
        grads = torch.autograd.grad(
            value, list(student.parameters()), retain_graph=True, allow_unused=True
        )
        flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
        results[name] = (value.detach(), flat)
    return results


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize("loss", ["mse", "cosine", "kl"])
def test_losses_and_gradients_are_those_of_live_teachers(write, tmp_path, dtype, loss):
    settings = [f"distill.signals.{name}.loss={loss}" for name in ("sort", "fold", "wash")]
    recipe = write(f"cache.dtype={dtype}", *settings)
    cache_targets(recipe)
    got = losses_and_gradients(recipe, tmp_path)
    wanted = losses_and_gradients(write("cache=null", *settings), tmp_path)
    of_loss, of_gradient = PRECISION[dtype]
    for name, (value, gradient) in wanted.items():
        assert abs(got[name][0] - value) <= of_loss * value, name
        assert (got[name][1] - gradient).norm() <= of_gradient * gradient.norm(), name


def test_under_autocast_losses_differ_as_those_of_another_batch_do(ready, write, tmp_path):
    """Teachers run in bfloat16, whose products depend on the shapes of a batch."""
    bf16 = "training.bf16=true"
    distill(write("cache=null", f"training.output_dir={tmp_path / 'live'}", bf16))
    assert plan_cache(ready(bf16)).missing == 8
    cache_targets(ready(bf16))
    distill(ready(bf16))
    got, wanted = losses_of(tmp_path / "run"), losses_of(tmp_path / "live")
    for name in wanted:
        assert relative(got[name][:1], wanted[name][:1]) <= 2.0**-6, name  # a few bfloat16 units


def test_left_out_mass_bounds_the_training_loss_of_full_maps(ready, tmp_path):
    """With r left out of a row and m its smallest cell kept, as the cache itself tells."""
    batch = ("training.per_device_train_batch_size=8", "training.max_steps=1")
    distill(ready("cache=null", f"training.output_dir={tmp_path / 'live'}", *batch))
    recipe = ready("cache.top_k=4", f"cache.path={tmp_path / 'few'}", *batch)
    cache_targets(recipe)
    distill(recipe)
    (got,), (live,) = (losses_of(tmp_path / name)["fold"] for name in ("run", "live"))
    cache = TargetStore(tmp_path / "few")
    entries = [cache.read(key) for keys in cache.files().values() for key in keys]
    squares = []
    for targets in (entry for entry in entries if entry[0].region == "full"):
        for target in targets:
            values = torch.ldexp(target.values.float(), target.exponents[..., None].int())
            smallest = values.masked_fill(target.indices < 0, torch.inf).amin(-1)
            rounding = 2.0**-11 * values.norm(dim=-1)
            norms = torch.sqrt(target.rest * torch.minimum(target.rest, smallest)) + rounding
            squares.append(norms.square().sum() / norms.numel() ** 2)
    assert len(squares) == 2 * 2  # records x student layers
    error = float(torch.stack(squares).mean().sqrt())
    assert abs(got - live) > 1e-3 * live  # something is left out
    assert abs(got**0.5 - live**0.5) <= error


class ToyEncoder:
    """Stands for the processor of a family: inputs of any length that depend on the record."""

    def __init__(self, make):
        self.make = make

    def __call__(self, record):
        inputs = self.make(batch=1, seed=sum(record.id.encode()))
        count = 24 - len(record.id) % 5
        per_image = ("pixel_values", "image_grid_thw")
        encoded = {
            key: value if key in per_image else value[0, :count]
            for key, value in inputs.items()
            if key != "attention_mask"
        }
        return encoded | {"labels": encoded["input_ids"].clone()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "sliding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_other_families(write, tmp_path, monkeypatch, family, side):
    """Multi-axis positions and patches; sliding windows, which cover the shorter records."""
    make_model, make_inputs = toy_models.qwen2_5_vl, toy_models.qwen_vl_inputs
    changes = []
    if family == "sliding":
        make_model = functools.partial(toy_models.qwen2, sliding_window=21, first_sliding_layer=1)
        make_inputs = toy_models.text_inputs
        for name in ("sort", "fold", "wash"):
            changes.append(f"distill.signals.{name}.region=full")
            changes += [f"distill.signals.{name}.{who}_layers=0..1" for who in WHO]
    for name, depth, seed in (("student", 3, 1), ("teacher", 4, 2)):
        make_model(layers=depth, seed=seed).save_pretrained(tmp_path / name)
    made = (ToyEncoder(make_inputs), toy_data.tokenizer())
    for module in ("run", "cache.plan"):
        monkeypatch.setattr(f"drivekd.train.{module}.build_encoder", lambda *_: made)
    shared = (
        f"student={tmp_path / 'student'}",
        f"teachers={{shallow: {tmp_path / 'teacher'}, deep: {tmp_path / 'teacher'}}}",
        f"encoder.padding_side={side}",
        "training.max_steps=2",
        *changes,
    )
    distill(write("cache=null", f"training.output_dir={tmp_path / 'live'}", *shared))
    recipe = write(*shared)
    assert cache_targets(recipe).written > 0
    distill(recipe)
    got, wanted = losses_of(tmp_path / "run"), losses_of(tmp_path / "live")
    for name in ("sort", "fold"):
        assert relative(got[name][:1], wanted[name][:1]) <= 5e-4, name
