"""Teachers given as checkpoints: loaded in part, once, and with the same result as whole ones."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import TrainingArguments

from drivekd.data import Collator
from drivekd.errors import TokenMismatchError, UnsupportedEngineError
from drivekd.train import DistillConfig, DistillTrainer, ProjectionConfig, SignalConfig
from tests.helpers import toy_data
from tests.helpers.toy_models import internvl

TYPES = ("sort", "fold", "wash", "sort", "fold", "wash")


def signal(name, teacher, layers, region="text_to_vision"):
    return SignalConfig(
        name=name, teacher=teacher, student_layers=layers, teacher_layers=layers, region=region
    )


SIGNALS = (
    signal("sort", "a", "first"),
    signal("fold", "b", "0..-3", "full"),
    signal("wash", "c", "penultimate"),
)


@pytest.fixture(scope="module")
def whole():
    return {"small": internvl(layers=4, seed=2), "large": internvl(layers=6, hidden=96, seed=3)}


@pytest.fixture(scope="module")
def folders(whole, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in whole.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in whole}


@pytest.fixture
def make(tmp_path):
    def make(teachers, *, signals=SIGNALS, use_cpu=True, arguments=None, config=None, **options):
        student = internvl(layers=4, hidden=32, heads=4, kv_heads=2, seed=1)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 3,
            "max_steps": 2,
            "learning_rate": 0.05,
            "optim": "sgd",
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": use_cpu,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential",
        }
        args = TrainingArguments(**settings | (arguments or {}))
        return DistillTrainer(
            student,
            teachers,
            DistillConfig(signals=signals, **(config or {})),
            args=args,
            data_collator=Collator(
                toy_data.encoder(tmp_path), student.config, pad_token_id=toy_data.PAD
            ),
            train_dataset=toy_data.records(tmp_path, TYPES),
            **options,
        )

    return make


def test_a_student_learns_the_same_from_parts_as_from_whole_models(make, whole, folders):
    weights = []
    for source in (whole, folders):
        models = {name: copy.copy(source[name]) for name in source}
        teachers = {"a": models["small"], "b": models["large"], "c": models["large"]}
        trainer = make(teachers)
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_parts_are_as_deep_as_the_signals_read_and_no_deeper(make, folders):
    trainer = make({"a": folders["small"], "b": folders["large"], "c": str(folders["large"])})
    held = {
        route: (len(forward.teacher.language_model.layers), forward.layers)
        for route, forward in trainer.plan._forwards.items()
    }
    assert held == {"a(sort)": (1, (0,)), "b(fold)": (5, (0, 1, 2, 3)), "b(wash)": (5, (4,))}
    teachers = {id(forward.teacher) for forward in trainer.plan._forwards.values()}
    assert len(teachers) == 2


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("image_token_id", 7, "image_token_id 7 but the student 300"),
        ("image_seq_length", 16, "image_seq_length 16 but the student 4"),
        ("downsample_ratio", 0.25, "downsample_ratio 0.25 but the student 0.5"),
        ("vision_config.patch_size", (28, 28), "vision_config.patch_size 28 but the student 14"),
        ("vision_config.image_size", [56, 28], r"image_size \(56, 28\) but the student 56"),
    ],
)
def test_a_teacher_that_makes_other_tokens_of_an_image_is_refused(
    make, whole, setting, value, message
):
    teacher = copy.deepcopy(whole["small"])
    place, _, name = setting.rpartition(".")
    setattr(teacher.config.vision_config if place else teacher.config, name, value)
    teachers = {"a": teacher, "b": whole["large"], "c": whole["large"]}
    with pytest.raises(TokenMismatchError, match=f"teacher 'a' has .*{message}"):
        make(teachers)


def test_place_of_teachers(make, folders):
    teachers = {"a": folders["small"], "b": folders["large"], "c": folders["large"]}
    trainer = make(teachers, teacher_device="cpu")
    for forward in trainer.plan._forwards.values():
        assert {p.device.type for p in forward.teacher.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="teacher_device is 'moon', which is no device"):
        make(teachers, teacher_device="moon")


def test_a_checkpoint_is_loaded_once_on_each_device(make, folders, whole):
    """ "cpu" and "cpu:0" are two names, as two GPUs are."""
    teachers = {"a": folders["small"], "b": folders["large"], "c": folders["large"]}
    apart = {"b": "cpu", "c": "cpu:0"}
    trainer, together = make(teachers, teacher_device=apart), make(teachers)
    assert len({id(own.teacher) for own in trainer.plan._forwards.values()}) == 3
    assert len({id(own.teacher) for own in together.plan._forwards.values()}) == 2
    for own in (trainer, together):
        own.train()
    got, wanted = trainer.model.state_dict(), together.model.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="'b' and 'c' are one model, which cannot be on cpu and"):
        models = {"a": whole["small"], "b": whole["large"], "c": whole["large"]}
        make(models, teacher_device=apart)


def test_gpus_that_are_not_the_students_are_left_to_teachers(make, folders, monkeypatch):
    """Trainer alone would split every batch over all GPUs that one process sees."""
    teachers = {"a": folders["small"], "b": folders["large"], "c": folders["large"]}
    setup = TrainingArguments.__post_init__

    def with_two_gpus(args):
        setup(args)
        args._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two_gpus)
    with pytest.raises(UnsupportedEngineError, match=r"sees 2 GPUs.*teacher_device=auto"):
        make(teachers)
    trainer = make(teachers, teacher_device="auto")
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 3
    trainer.train()


@pytest.mark.several_gpus
def test_each_teacher_on_a_gpu_of_its_own(make, folders):
    """Maps, hidden states and logits, teachers apart from the student and from each other."""
    kinds = (
        signal("sort", "a", "first"),
        SignalConfig(name="fold", teacher="b", kind="hidden", student_layers=0, teacher_layers=1),
        SignalConfig(name="wash", teacher="c", kind="logits"),
    )
    teachers, weights = {"a": folders["small"], "b": folders["large"], "c": folders["large"]}, []
    for places in ({"a": "cuda:1", "b": "cpu", "c": "cuda:1"}, None):
        torch.manual_seed(0)
        trainer = make(teachers, signals=kinds, use_cpu=False, teacher_device=places)
        trainer.train()
        weights.append({k: v.cpu() for k, v in trainer.model.state_dict().items()})
    for name, own in weights[1].items():
        # Sums in other orders on a CPU than on a GPU, in float32.
        torch.testing.assert_close(weights[0][name], own, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("weighting", ["static", "balance", "online"])
def test_a_run_on_a_gpu_learns_what_one_on_the_cpu_learns(make, folders, weighting):
    """Maps, hidden states and logits; every step is logged, as most runs log."""
    kinds = (
        *SIGNALS,
        SignalConfig(name="state", teacher="b", kind="hidden", student_layers=0, teacher_layers=1),
        SignalConfig(name="words", teacher="c", kind="logits"),
    )
    teachers, weights = {"a": folders["small"], "b": folders["large"], "c": folders["large"]}, []
    for use_cpu in (True, False):
        torch.manual_seed(0)
        trainer = make(
            teachers, signals=kinds, use_cpu=use_cpu, config={"weighting": weighting},
            arguments={"logging_steps": 1},
        )  # fmt: skip
        trainer.train()
        assert trainer.args.device.type == ("cpu" if use_cpu else "cuda")
        weights.append({k: v.cpu() for k, v in trainer.model.state_dict().items()})
    for name, own in weights[1].items():
        # Sums in other orders on a CPU than on a GPU, in float32.
        torch.testing.assert_close(weights[0][name], own, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_on_a_gpu_in_16_bits(make, folders, precision):
    """Pinned batches, a loss scale with fp16 (it may skip the first steps), projection per step."""
    teachers = {"a": folders["small"], "b": folders["large"], "c": folders["large"]}
    trainer = make(
        teachers, use_cpu=False, config={"projection": ProjectionConfig(every="step")},
        arguments={
            precision: True, "dataloader_pin_memory": True, "gradient_accumulation_steps": 2,
            "logging_steps": 1, "max_steps": 6,
        },
    )  # fmt: skip
    before = {k: v.cpu().clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "sort/loss" in row]
    assert rows and all(math.isfinite(row["ce"]) for row in rows)
    after = trainer.model.state_dict()
    moved = [k for k, v in after.items() if not torch.equal(v.cpu(), before[k])]
    assert len(moved) > len(before) / 2 and all(bool(v.isfinite().all()) for v in after.values())


@pytest.mark.gpu
def test_teachers_on_the_host_and_a_student_on_a_gpu(make, folders):
    trainer = make({"a": folders["small"], "b": folders["large"], "c": folders["large"]})
    routes = trainer.data_collator([trainer.train_dataset[0]])["routes"]
    outputs = trainer.plan.run_teachers({name: r.to("cuda") for name, r in routes.items()})
    assert {o.capture[o.capture.layers[0]].query.device.type for o in outputs.values()} == {"cpu"}


def test_a_mismatch_names_signal_and_record(make, whole, monkeypatch):
    trainer = make({"a": whole["small"], "b": whole["large"], "c": whole["large"]})
    run = trainer.plan.run_teachers

    def tampered(routes):
        changed = {}
        for name, route in routes.items():
            ids = route.inputs["input_ids"].clone()
            ids[-1, 0] += 1
            inputs = {**route.inputs, "input_ids": ids}
            changed[name] = dataclasses.replace(route, inputs=inputs)
        return run(changed)

    monkeypatch.setattr(trainer.plan, "run_teachers", tampered)
    record = trainer.train_dataset[0]
    assert record.question_type == "sort"
    match = f"signal 'sort', record '{record.id}': student and teacher saw different tokens"
    with pytest.raises(TokenMismatchError, match=match):
        trainer.train()
