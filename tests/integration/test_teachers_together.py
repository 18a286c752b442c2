"""Several teachers: loaded once, shared where equal, on another device than the student."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout
from drivekd.train import load_teacher, share_equal_weights
from drivekd.train import models as loading_models
from drivekd.train.config import DistillConfig, SignalConfig
from drivekd.train.models import prepare_teachers
from tests.helpers.maps import same_records
from tests.helpers.toy_models import image_inputs, internvl, qwen2
from tests.helpers.traces import run

CPU = torch.device("cpu")


def test_one_checkpoint_under_two_names_is_loaded_once_and_as_deep_as_needed(checkpoint, read):
    folder = checkpoint("internvl")
    link = folder.parent / "link"
    link.symlink_to(folder)
    needs = {"perception": ["first"], "planning": ["penultimate"], "reasoning": [(0, 2)]}
    paths = {"perception": folder, "planning": str(link), "reasoning": f"{folder}/"}
    ready = prepare_teachers(paths, needs, internvl(), CPU)
    link.unlink()
    assert len(read) == 1
    assert ready["perception"] is ready["planning"] is ready["reasoning"]
    assert len(ready["planning"].language_model.layers) == 4


def test_a_role_that_needs_logits_gets_the_whole_model(checkpoint):
    paths = {"perception": checkpoint("internvl"), "answers": checkpoint("internvl")}
    ready = prepare_teachers(paths, {"perception": ["first"], "answers": None}, internvl(), CPU)
    assert ready["answers"] is ready["perception"]
    assert ready["answers"](**image_inputs()).logits.shape == (2, 24, 320)


def test_layers_that_a_configuration_needs():
    attention = {"kind": "attention", "region": "full", "student_layers": 0}
    config = DistillConfig(
        signals=(
            SignalConfig(name="a", teacher="x", teacher_layers="first", **attention),
            SignalConfig(name="b", teacher="x", teacher_layers=-2, **attention),
            SignalConfig(name="c", teacher="y", teacher_layers=-2, **attention),
            SignalConfig(name="d", teacher="y", kind="logits"),
        )
    )
    assert config.teacher_layers() == {"x": ["first", -2], "y": None}


def test_equal_weights_of_two_teachers_are_held_once(tmp_path):
    """One vision tower, two language models: what tuning left alone is shared."""
    first = internvl(layers=2)
    second = internvl(layers=2)
    with torch.no_grad():
        for parameter in second.model.language_model.layers.parameters():
            parameter.add_(0.01)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    paths = {"a": tmp_path / "first", "b": tmp_path / "second"}
    ready = prepare_teachers(paths, {"a": ["first"], "b": ["first"]}, internvl(seed=9), CPU)
    one, two = ready["a"], ready["b"]
    for name in ("vision_tower", "multi_modal_projector", "language_model.embed_tokens"):
        pairs = zip(
            one.get_submodule(name).parameters(), two.get_submodule(name).parameters(), strict=True
        )
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs), name
    layers = [each.language_model.layers.parameters() for each in (one, two)]
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(*layers, strict=True))
    inputs = image_inputs()
    assert same_records(run(two, inputs, [0]), run(second, inputs, [0]), [0])
    assert share_equal_weights([one, two]) == 0


def test_what_teachers_share_is_let_go_before_the_next_is_loaded(tmp_path, monkeypatch):
    """Or three teachers of one family would hold three vision towers at the peak."""
    for name in "abc":
        internvl(layers=2).save_pretrained(tmp_path / name)
    paths = {name: tmp_path / name for name in "abc"}
    loaded, load = [], loading_models.load_teacher

    def noted(*args, **options):
        towers = {next(each.vision_tower.parameters()).data_ptr() for each in loaded}
        assert len(towers) == min(len(loaded), 1)
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(loading_models, "load_teacher", noted)
    prepare_teachers(paths, {name: ["first"] for name in "abc"}, internvl(seed=9), CPU)
    assert len(loaded) == 3


def test_weights_that_train_are_never_shared():
    one, two = qwen2(), qwen2()
    two.requires_grad_(False)
    assert share_equal_weights([one, two]) == 0


def test_a_truncated_teacher_trains_a_student_like_the_whole_one(checkpoint):
    inputs = image_inputs(padding="right")
    tokens = TokenLayout.from_batch(inputs, internvl().config)
    loss = AttentionMapLoss(student_layers=[-2], teacher_layers=[-2], region="text_to_vision")
    values = []
    for teacher in (internvl(layers=5), load_teacher(checkpoint("internvl"), -2)):
        captured = run(teacher, inputs, [-2], stop_after_last=True)
        student = internvl(layers=3, seed=4)
        with capture_attention(student, [-2]) as own:
            student(**inputs)
        values.append(loss(own, captured, tokens))
    assert torch.equal(*values)


@pytest.mark.gpu
@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")])
def test_student_and_teacher_may_sit_on_two_devices(checkpoint, places):
    batch = image_inputs(padding="right")
    loss = AttentionMapLoss(student_layers=[-2], teacher_layers=[-2], region="text_to_vision")
    values = []
    for student_place, teacher_place in (("cpu", "cpu"), places):
        teacher = load_teacher(checkpoint("internvl"), -2, device=teacher_place)
        student = internvl(layers=3, seed=4).to(student_place)
        inputs = {name: tensor.to(teacher_place) for name, tensor in batch.items()}
        captured = run(teacher, inputs, [-2], stop_after_last=True)
        inputs = {name: tensor.to(student_place) for name, tensor in batch.items()}
        tokens = TokenLayout.from_batch(inputs, student.config)
        with capture_attention(student, [-2]) as own:
            student(**inputs)
        values.append(loss(own, captured, tokens).cpu())
    torch.testing.assert_close(values[1], values[0], rtol=2e-2, atol=0)  # TF32 on a GPU
