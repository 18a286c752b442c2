"""Copies made of a model while it is captured: ordinary models, with weights of their own.

A deep copy took the gate's function along, bound to the original: with all its weights at zero the
copy still gave the original's logits, also after the `with`.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from drivekd.capture import capture_attention
from drivekd.errors import CaptureError
from tests.helpers.toy_models import image_inputs, internvl, qwen2, text_inputs
from tests.helpers.traces import Container, run, traces


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def averaged(model):
    return AveragedModel(model).module


def in_a_container(model):
    return copy.deepcopy(Container(model)).language_model


COPIES = [copy.deepcopy, through_pickle, saved_and_loaded, averaged, in_a_container]


def zero(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_copy_is_an_ordinary_model(make, implementation):
    model, inputs = internvl(), image_inputs(padding="left")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(**inputs).logits
    plain = traces(make(model))
    before = traces(model)
    with torch.no_grad(), capture_attention(model, [0, 2]) as captured:
        model(**inputs)
        during, record = traces(model), captured[0]
        other = make(model)
        assert traces(other)[1:] == plain[1:]
        assert traces(model) == during
        assert torch.equal(other(**inputs).logits, logits)
        zero(other)
        assert not other(**inputs).logits.any()
        assert captured[0] is record
        assert torch.equal(model(**inputs).logits, logits)
    assert traces(model) == before
    assert traces(other) == plain
    assert not other(**inputs).logits.any()
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_can_be_captured_by_itself(make):
    model, inputs = qwen2(), text_inputs()
    want = run(model, inputs, [1])[1].query
    with torch.no_grad(), capture_attention(model, [1]) as captured:
        other = make(model)
        with capture_attention(other, [1], stop_after_last=True) as own:
            assert other(**inputs) is None
            assert model(**inputs) is not None
        assert torch.equal(own[1].query, captured[1].query)
    assert torch.equal(run(other, inputs, [1])[1].query, want)
    zero(other)
    assert not run(other, inputs, [1])[1].query.any()
    assert torch.equal(run(model, inputs, [1])[1].query, want)


def test_a_copy_of_a_student_with_its_graph_learns_by_itself():
    model, inputs = qwen2().train(), text_inputs()
    with capture_attention(model, [0]):
        model(**inputs)  # records with a graph, which no deep copy can take along
        other = copy.deepcopy(model)
    other(**inputs).logits.sum().backward()
    assert all(each.grad is None for each in model.parameters())
    assert other.model.layers[0].self_attn.q_proj.weight.grad.any()


def test_a_shallow_copy_shares_the_decoder_and_so_its_capture():
    model, inputs = qwen2(), text_inputs()
    before = traces(model)
    with torch.no_grad(), capture_attention(model, [0]) as captured:
        other = copy.copy(model)
        assert "forward" not in other.__dict__
        other(**inputs)
        assert captured.input_ids is inputs["input_ids"]
    assert traces(model) == before == traces(other)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_a_copy_keeps_a_forward_that_was_put_on_the_module_before():
    model, inputs = qwen2(), text_inputs()
    inner = model.forward  # a bound method, which a deep copy binds anew
    model.forward = inner
    with torch.no_grad(), capture_attention(model, [0]):
        other = copy.deepcopy(model)
        model(**inputs)
    assert other.forward.__self__ is other
    assert model.__dict__["forward"] is inner


def test_a_copy_of_a_model_that_a_hook_wrapped_meanwhile():
    """As accelerate's hooks do: the gate then lies under another name, also after the `with`."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = qwen2(), text_inputs()
    with torch.no_grad(), capture_attention(model, [0]):
        hooks.add_hook_to_module(model, hooks.ModelHook())
        inside = copy.deepcopy(model)
        model(**inputs)
    after = copy.deepcopy(model)
    for other in (inside, after):
        zero(other)
        assert not other(**inputs).logits.any()
    assert model(**inputs).logits.any()


def test_a_class_that_copies_itself_in_its_own_way_is_refused():
    class Own(Container):
        def __deepcopy__(self, memo):
            other = self.__class__.__new__(self.__class__)
            other.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return other

    model, inputs = Own(qwen2()), text_inputs()["input_ids"]
    with torch.no_grad(), capture_attention(model, [0]):
        model(inputs)
        with pytest.raises(CaptureError, match="Own cannot be copied or pickled while"):
            copy.deepcopy(model)
    assert copy.deepcopy(model)(inputs).shape == (2, 24, 320)
