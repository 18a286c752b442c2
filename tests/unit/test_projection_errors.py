"""What GradientProjector refuses: arguments by name, engines that own gradients, wrong order."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

from drivekd.projection import GradientProjector
from tests.helpers.students import NAMES, WEIGHTS, Recorded, grads_of, student

BAD_PARAMETERS = {
    "a number": (3, TypeError, "module or an iterable of tensors"),
    "a tensor": (torch.ones(1), TypeError, "iterable of tensors"),
    "named parameters": (nn.Linear(1, 1).named_parameters(), TypeError, r"parameters\[0\]"),
    "parameter groups": ([{"params": []}], TypeError, "parameter groups"),
    "nothing": ([], ValueError, "empty"),
    "a non-leaf": ([torch.ones(1, requires_grad=True) * 2], ValueError, "no leaf"),
}


@pytest.mark.parametrize("parameters, error, message", BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_refuses_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        GradientProjector(parameters)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"method": "mgda"}, ValueError, "method"),
        ({"anchor": 0}, TypeError, "anchor"),
        ({"missing": "skip"}, ValueError, "missing"),
        ({"ce_multiplicity": "twice"}, ValueError, "ce_multiplicity"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 2**70}, ValueError, "seed is 1180.* wanted an int of 64 bits"),
        ({"max_norm": 10**400, "every": "step"}, ValueError, "max_norm is inf"),
        ({"every": "epoch"}, ValueError, "every"),
        ({"max_norm": 1.0}, ValueError, "clip_grad_norm_"),
        ({"max_norm": 0.0, "every": "step"}, ValueError, "max_norm"),
        ({"max_norm": "1", "every": "step"}, TypeError, "max_norm"),
        ({"process_group": "gloo"}, TypeError, "process_group must be .* got str"),
    ],
)
def test_refuses_settings(settings, error, message):
    with pytest.raises(error, match=message):
        GradientProjector(student().parameters(), **settings)


def change(**changes):
    return lambda losses: {**losses, **{n: f(losses["ce"]) for n, f in changes.items()}}


BAD_CALLS = {
    "a list of losses": (lambda x: list(x.values()), {}, TypeError, "losses must map"),
    "no loss": (lambda x: {}, {}, ValueError, "losses is empty"),
    "a number": (change(ce=lambda x: 1.0), {}, TypeError, r"losses\['ce'\]"),
    "a vector": (change(ce=lambda x: x.expand(2)), {}, ValueError, "wanted a scalar"),
    "a complex loss": (change(ce=lambda x: x * 1j), {}, TypeError, r"losses\['ce'\] has dtype"),
    "a detached loss": (
        change(perception=lambda x: x.detach()),
        {},
        ValueError,
        r"losses\['perception'\] does not require grad",
    ),
    "no anchor": (lambda x: {"planning": x["planning"]}, {}, ValueError, "no anchor 'ce'"),
    "an anchor of weight 0": (
        lambda x: x,
        {"weights": {**WEIGHTS, "ce": 0}},
        ValueError,
        "no anchor 'ce'",
    ),
    "all weights 0": (lambda x: x, {"weights": dict.fromkeys(NAMES, 0)}, ValueError, "weight 0"),
    "a weight missing": (lambda x: x, {"weights": {"ce": 1.0}}, ValueError, "'perception'"),
    "a negative weight": (
        lambda x: x,
        {"weights": {**WEIGHTS, "ce": -1.0}},
        ValueError,
        r"weights\['ce'\] is -1",
    ),
    "a NaN weight": (
        lambda x: x,
        {"weights": {**WEIGHTS, "ce": float("nan")}},
        ValueError,
        r"weights\['ce'\] is nan",
    ),
    "a vector weight": (
        lambda x: x,
        {"weights": {**WEIGHTS, "ce": torch.ones(2)}},
        ValueError,
        r"weights\['ce'\] has shape",
    ),
    "a weight that is a string": (
        lambda x: x,
        {"weights": {**WEIGHTS, "ce": "1"}},
        TypeError,
        r"weights\['ce'\]",
    ),
    "a weight beyond all floats": (
        lambda x: x,
        {"weights": {**WEIGHTS, "ce": 10**400}},
        ValueError,
        r"weights\['ce'\] is inf",
    ),
    "a weight of no loss that is None": (
        lambda x: {"ce": x["ce"]},
        {"weights": {**WEIGHTS, "planning": None}},
        TypeError,
        r"weights\['planning'\] must be a number or a tensor, got NoneType",
    ),
    "a list of weights": (lambda x: x, {"weights": [1.0] * 4}, TypeError, "weights must be"),
    "scale 0": (lambda x: x, {"scale": 0.0}, ValueError, "scale is 0"),
    "a scale beyond all floats": (lambda x: x, {"scale": 10**400}, ValueError, "scale is inf"),
    "a scale that is a string": (lambda x: x, {"scale": "1"}, TypeError, "scale"),
    "a scaler that is a number": (lambda x: x, {"scaler": 2.0}, TypeError, "scaler"),
}


@pytest.mark.parametrize("make, options, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_refuses_calls_before_touching_grad(make, options, error, message):
    model = student()
    with pytest.raises(error, match=message):
        GradientProjector(model.parameters()).backward(make(model.losses()), **options)
    assert all(grad is None for grad in grads_of(model))


@pytest.mark.parametrize("depth", [1, 3])
def test_refuses_reentrant_checkpointing(depth):
    """Its layers would get no gradient: only .backward() reaches them."""
    inside = [nn.Linear(3, 3) for _ in range(depth)]
    head = nn.Linear(3, 1)
    state = torch.ones(2, 3, requires_grad=True)
    for layer in inside:
        state = checkpoint(layer, state, use_reentrant=True)
    loss = head(state).square().mean()
    projector = GradientProjector(
        [*head.parameters(), *(p for x in inside for p in x.parameters())]
    )
    with pytest.raises(NotImplementedError, match=r"losses\['ce'\].*reentrant.*use_reentrant"):
        projector.backward({"ce": loss})
    assert head.weight.grad is None


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "state is a NoneType"),
        ({}, r"state has the keys \[\]"),
        ({"generator": 1}, r"state\['generator'\] is a int"),
        ({"generator": torch.zeros(3)}, r"is a torch.float32 tensor of shape \(3,\)"),
    ],
)
def test_refuses_a_state_that_is_none(state, message):
    with pytest.raises(ValueError, match=message):
        GradientProjector(student().parameters()).load_state_dict(state)


def test_refuses_a_call_when_everything_is_frozen():
    model = student()
    losses = model.losses()
    projector = GradientProjector(model.parameters())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires grad"):
        projector.backward(losses)


def test_step_needs_its_mode_its_anchor_and_one_kind_of_weights():
    model = student()
    with pytest.raises(RuntimeError, match="every='step'"):
        GradientProjector(model.parameters()).step()
    projector = GradientProjector(model.parameters(), every="step")
    projector.backward({"planning": model.losses()["planning"]})
    with pytest.raises(ValueError, match="anchor 'ce' had no backward"):
        projector.step()
    projector.backward(model.losses(), weights=WEIGHTS)
    with pytest.raises(ValueError, match="weights changed kind"):
        projector.backward(model.losses())
    with pytest.raises(ValueError, match="weights changed kind"):
        projector.backward(model.losses(), weights=Recorded())
    with pytest.raises(ValueError, match="scaler changed"):
        projector.backward(model.losses(), scaler=torch.amp.GradScaler("cpu"), weights=WEIGHTS)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_refuses_dtensors(process_group):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(NotImplementedError, match="DTensor"):
        GradientProjector([distribute_tensor(torch.ones(4, requires_grad=True), mesh)])


def test_refuses_ddp_where_it_leaves_a_mark(process_group):
    model = nn.Linear(3, 2)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    projector = GradientProjector(model.parameters())
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        projector.backward({"ce": wrapped(torch.ones(1, 3)).sum()})
    with wrapped.no_sync():
        projector.backward({"ce": wrapped(torch.ones(1, 3)).sum()})
    assert model.weight.grad is not None


@pytest.mark.parametrize("mark, engine", [("ds_id", "ZeRO-3"), ("_fsdp_flattened", "FSDP1")])
def test_refuses_engines_that_own_gradients(mark, engine):
    model = student()
    projector = GradientProjector(model.parameters())
    losses = model.losses()
    setattr(model.first.weight, mark, 7)
    with pytest.raises(NotImplementedError, match=engine):
        projector.backward(losses)
    with pytest.raises(NotImplementedError, match=engine):
        GradientProjector(model.parameters())


def test_refuses_a_deepspeed_engine():
    class DeepSpeedEngine(nn.Linear):
        pass

    with pytest.raises(NotImplementedError, match="DeepSpeedEngine, which keeps gradients"):
        GradientProjector(DeepSpeedEngine(1, 1))
