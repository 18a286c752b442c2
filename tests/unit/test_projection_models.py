"""GradientProjector in models that people train: K, orders, ties, adapters, dtypes, scalers."""

import itertools
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivekd.functional.projection import METHODS
from drivekd.projection import GradientProjector
from drivekd.reference import agp as reference
from tests.helpers.gradients import PRESENCE, near_antiparallel, relative_error, task_gradients
from tests.helpers.students import grads_of, student


def linear_losses(parameters, lists):
    """Losses whose gradients are exactly the given ones, by name; the first is the anchor."""
    losses = {}
    for task, own in enumerate(lists):
        terms = [(w * g).sum() for w, g in zip(parameters, own, strict=True) if g is not None]
        losses["ce" if task == 0 else f"task {task}"] = sum(terms)
    return losses


def parameters_for(lists):
    columns = zip(*lists, strict=True)
    first = [next(g for g in column if g is not None) for column in columns]
    return [nn.Parameter(torch.ones_like(grad)) for grad in first]


class Ordered(GradientProjector):
    """Projects in a given order."""

    def __init__(self, *args, order, **settings):
        super().__init__(*args, **settings)
        self.order = order

    def backward(self, losses, **options):
        before = torch.randperm

        def given(count, **_):
            assert count == len(self.order)
            return torch.tensor(self.order)

        torch.randperm = given
        try:
            return super().backward(losses, **options)
        finally:
            torch.randperm = before


def orders(count):
    """Every order of up to four tasks; of more, the first, the last and twenty others."""
    if count <= 4:
        return list(itertools.permutations(range(count)))
    generator = random.Random(count)
    drawn = [tuple(generator.sample(range(count), count)) for _ in range(20)]
    return [tuple(range(count)), tuple(reversed(range(count))), *drawn]


@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("num_tasks", range(1, 9))
def test_one_to_eight_losses_in_every_order(num_tasks, missing):
    presence = [mask + "1111" for mask in PRESENCE["nested followers"]]
    lists = task_gradients(num_tasks, presence=presence, correlation=-0.5)
    for order in orders(num_tasks - 1):
        parameters = parameters_for(lists)
        projector = Ordered(parameters, order=list(order), missing=missing)
        projector.backward(linear_losses(parameters, lists))
        want = reference.agp(lists, order=[own + 1 for own in order], missing=missing)
        assert relative_error([own.grad for own in parameters], want) < 1e-10


@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("epsilon", (0.1, 1e-3))
@pytest.mark.parametrize("scale", (1.0, 1e2, 1e4, 1e6))
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
def test_near_antiparallel_gradients(dtype, bound, scale, epsilon, missing):
    """The whole update, with a loss weight folded in, against float64 on the same gradients."""
    lists = near_antiparallel(scale, epsilon, dtype)
    parameters = parameters_for(lists)
    losses = linear_losses(parameters, lists)
    weights = dict(zip(losses, (1.0, 1.0, 0.5), strict=True))
    GradientProjector(parameters, missing=missing).backward(losses, weights=weights)
    weighted = [[w * g.double() for g in own] for w, own in zip((1, 1, 0.5), lists, strict=True)]
    order = [1 + i for i in torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()]
    want = reference.agp(weighted, order=order, missing=missing)
    assert relative_error([own.grad for own in parameters], want) < bound


@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("scale", (0.0, 1e-30, 1e-12, 1e-9, 1e-6, 1e6))
def test_zero_tiny_and_large_anchors(scale, missing):
    lists = task_gradients(correlation=-0.8)
    lists[0] = [scale * grad for grad in lists[0]]
    parameters = parameters_for(lists)
    projector = Ordered(parameters, order=[0, 1, 2], missing=missing)
    report = projector.backward(linear_losses(parameters, lists))
    want = reference.agp(lists, missing=missing)
    assert relative_error([own.grad for own in parameters], want) < 1e-10
    assert bool(report.finite.all())
    assert bool(report.cosines.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("every", ("microbatch", "step"))
def test_one_loss_alone_is_a_plain_backward(method, every):
    model, other = student(), student()
    projector = GradientProjector(model, method=method, every=every)
    projector.backward({"ce": model.losses()["ce"]})
    if every == "step":
        projector.step()
    other.losses()["ce"].backward()
    assert relative_error(grads_of(model), grads_of(other)) < 1e-15


def test_the_same_loss_twice_and_losses_on_one_graph():
    model, other = student(), student()
    loss = model.losses()["ce"]
    report = GradientProjector(model).backward({"ce": loss, "again": loss, "half": 0.5 * loss})
    torch.testing.assert_close(report.cosines, torch.ones(3, 3, dtype=torch.float64))
    # No conflict: the anchor once per other loss, and each of them.
    (3.5 * other.losses()["ce"]).backward()
    assert relative_error(grads_of(model), grads_of(other)) < 1e-13


class Tied(nn.Module):
    """A language model in small: the head's weight is the embedding's."""

    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.layer = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 11, bias=False, dtype=torch.float64)
        if tied:
            self.head.weight = self.embedding.weight
        else:
            self.head.weight.data.copy_(self.embedding.weight.data)

    def losses(self):
        tokens = torch.tensor([[1, 2, 3, 4], [4, 4, 9, 1]])
        hidden = self.layer(self.embedding(tokens)).tanh()
        logits = self.head(hidden)
        ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return {"ce": ce, "perception": -ce * 0.3 + hidden.square().mean()}


@pytest.mark.parametrize("parameters", ("module", "list with both names"))
def test_tied_weights_have_one_gradient_and_count_once(parameters):
    """Norms included: counted twice, the tie would weigh double in every inner product."""
    model = Tied()
    given = model if parameters == "module" else [*model.parameters(), model.head.weight]
    report = GradientProjector(given).backward(model.losses())
    own = list(model.parameters())
    lists = [
        list(torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True))
        for loss in model.losses().values()
    ]
    assert relative_error([p.grad for p in own], reference.agp(lists)) < 1e-12
    torch.testing.assert_close(report.norms, reference.gram(lists).diagonal().sqrt())
    assert model.head.weight.grad is model.embedding.weight.grad


def test_lora_adapters_are_all_that_gets_gradients():
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    settings = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(base, settings).double()
    projector = GradientProjector(model)
    out = model(torch.randn(4, 5, dtype=torch.float64))
    losses = {
        "ce": out.square().mean(),
        "perception": -out.mean(),
        "planning": (1 - out).abs().mean(),
    }
    adapters = [own for own in model.parameters() if own.requires_grad]
    assert len(adapters) == 4
    lists = [list(torch.autograd.grad(x, adapters, retain_graph=True)) for x in losses.values()]
    projector.backward(losses)
    order = [1 + i for i in torch.randperm(2, generator=torch.Generator().manual_seed(0)).tolist()]
    want = reference.agp(lists, order=order)
    assert relative_error([own.grad for own in adapters], want) < 1e-12
    assert all(own.grad is None for own in model.parameters() if not own.requires_grad)


def test_mixed_dtypes_in_one_model():
    """fp32 norms beside bf16 weights; every gradient in its parameter's dtype."""
    lists = task_gradients(3, shapes=[(63, 3), (129,), (17,)], correlation=-0.6)
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    lists = [[g.to(d) for g, d in zip(own, dtypes, strict=True)] for own in lists]
    parameters = parameters_for(lists)
    losses = {
        name: sum((w.double() * g.double()).sum() for w, g in zip(parameters, own, strict=True))
        for name, own in zip(("ce", "a", "b"), lists, strict=True)
    }
    Ordered(parameters, order=[0, 1]).backward(losses)
    assert tuple(own.grad.dtype for own in parameters) == dtypes
    want = reference.agp([[g.double() for g in own] for own in lists])
    # One set of coefficients for all: products of bf16 gradients are summed in fp32 first.
    for own, wanted, bound in zip(parameters, want, (4e-3, 1e-6, 1e-6), strict=True):
        assert relative_error([own.grad], [wanted]) < bound


def test_gradients_of_every_layout():
    """Expanded, transposed and empty gradients, and a parameter that is no dense block."""
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(4, 3, dtype=torch.float64)),
        nn.Parameter(torch.randn(3, 4, dtype=torch.float64).t()),
        nn.Parameter(torch.randn(0, 4, dtype=torch.float64)),
        nn.Parameter(
            torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
        ),
    ]
    a, b, empty, c = parameters

    def losses():
        return {
            "ce": a.sum() + (b * a).sum() + empty.sum() + c.sum(),
            "perception": -a.t().reshape(-1)[:5].sum() - c.square().sum(),
        }

    lists = [list(torch.autograd.grad(x, parameters, allow_unused=True)) for x in losses().values()]
    GradientProjector(parameters).backward(losses())
    assert relative_error([own.grad for own in parameters], reference.agp(lists)) < 1e-12


def test_activation_checkpointing():
    model, other = student(), student()
    losses = other.losses()
    GradientProjector(other).backward(losses)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
    shallow = checkpoint(lambda own: model.first(own).tanh(), x, use_reentrant=False)
    deep = checkpoint(lambda own: model.second(own).tanh(), shallow, use_reentrant=False)
    GradientProjector(model).backward(
        {
            "ce": model.head(deep).square().mean() + deep.mean(),
            "perception": (1.5 - shallow).square().mean(),
            "reasoning": (0.5 + deep).square().mean(),
            "planning": (0.3 - deep).abs().mean(),
        }
    )
    assert relative_error(grads_of(model), grads_of(other)) < 1e-14


@pytest.mark.parametrize("every", ("microbatch", "step"))
def test_a_scaler_skips_the_step_that_overflows_and_goes_on(every):
    """fp16 activations overflow at the first scale; the report says in which loss."""
    weight = nn.Parameter(torch.full((4,), 0.5))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=100)
    projector = GradientProjector([weight], every=every)
    finite, steps = [], []
    for _ in range(4):
        before = weight.detach().clone()
        losses = {"ce": weight.square().sum(), "planning": (weight.half() * 8.0).sum().float()}
        report = projector.backward(losses, scaler=scaler)
        if every == "step":
            report = projector.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        finite.append(report.finite.tolist())
        steps.append(not torch.equal(before, weight.detach()))
    # 8 * 2^14 and 8 * 2^13 are beyond 65504.
    assert finite == [[True, False], [True, False], [True, True], [True, True]]
    assert steps == [False, False, True, True]
    assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_named_and_reaches_grad(method, value):
    """Also where the loss has the weight 0 as a tensor: 0 * inf is not 0."""
    for weights in (None, {"ce": 1.0, "a": torch.tensor(0.0), "b": 1.0}):
        parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
        bad = torch.tensor([1.0, value, 1.0], dtype=torch.float64)
        losses = {"ce": parameter.sum(), "a": (parameter * bad).sum(), "b": -parameter[0]}
        report = GradientProjector([parameter], method=method).backward(losses, weights=weights)
        assert report.finite.tolist() == [True, False, True]
        assert not bool(parameter.grad[1].isfinite())


def test_an_error_in_one_backward_does_not_leak_into_the_next():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory, say")

    model, other = student(), student()
    projector = GradientProjector(model)
    losses = model.losses()
    losses["planning"] = Breaks.apply(losses["planning"])
    with pytest.raises(RuntimeError, match="say"):
        projector.backward(losses)
    assert all(grad is None for grad in grads_of(model))
    projector.backward(model.losses())
    GradientProjector(other).backward(other.losses())
    assert relative_error(grads_of(model), grads_of(other)) == 0.0


def test_a_loss_that_reaches_no_parameter_is_a_mistake():
    other = nn.Parameter(torch.ones(2))
    model = student()
    with pytest.raises(ValueError, match=r"none of the losses \['ce'\] reaches"):
        GradientProjector(model).backward({"ce": other.sum()})
