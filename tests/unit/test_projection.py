"""GradientProjector: the update, what it leaves alone, accumulation, scaling, clipping, errors."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from drivekd.functional import gradient_gram
from drivekd.functional.projection import METHODS
from drivekd.projection import GradientProjector, agp_weights
from drivekd.projection import local as engine_module
from drivekd.reference import agp as reference
from tests.helpers.gradients import relative_error
from tests.helpers.host_reads import NoHostRead
from tests.helpers.students import NAMES, WEIGHTS, Recorded, grads_of, student


def task_grads(model, losses, weights=None):
    parameters = list(model.parameters())
    lists = []
    for name, loss in losses.items():
        factor = 1.0 if weights is None else weights[name]
        found = torch.autograd.grad(factor * loss, parameters, retain_graph=True, allow_unused=True)
        lists.append(list(found))
    return lists


def drawn_order(tasks, seed=0):
    permutation = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed))
    return [tasks[i] for i in permutation.tolist()]


def expected_update(lists, method, order, **rules):
    if method == "none":
        return reference.combine(lists, [1.0] * len(lists))
    if method == "pcgrad":
        return reference.pcgrad(lists, order=order)
    stages = {"agp": (1, 2), "stage1": (1,), "stage2": (2,)}[method]
    return reference.agp(lists, order=order, stages=stages, **rules)


@pytest.mark.parametrize("seed", (0, 5))
@pytest.mark.parametrize("ce_multiplicity", ("official", "once"))
@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("method", METHODS)
def test_update_matches_plain_vectors(method, missing, ce_multiplicity, seed):
    model = student()
    rules = {"missing": missing, "ce_multiplicity": ce_multiplicity}
    lists = task_grads(model, model.losses(), WEIGHTS)
    tasks = [0, 1, 2, 3] if method == "pcgrad" else [1, 2, 3]
    want = expected_update(lists, method, drawn_order(tasks, seed), **rules)
    projector = GradientProjector(model.parameters(), method=method, seed=seed, **rules)
    projector.backward(model.losses(), weights=WEIGHTS)
    assert relative_error(grads_of(model), want) < 1e-10


def test_conflicts_in_the_example_are_real():
    model = student()
    report = GradientProjector(model.parameters()).backward(model.losses())
    assert bool(report.conflicts.any())
    assert not bool(report.conflicts.all())


def test_one_loss_is_a_plain_backward():
    model, other = student(), student()
    GradientProjector(model.parameters()).backward({"ce": model.losses()["ce"]})
    other.losses()["ce"].backward()
    assert relative_error(grads_of(model), grads_of(other)) < 1e-15


def test_none_adds_up_like_one_backward_of_the_sum():
    model, other = student(), student()
    projector = GradientProjector(model.parameters(), method="none", anchor="absent")
    projector.backward(model.losses(), weights=WEIGHTS)
    sum(WEIGHTS[name] * loss for name, loss in other.losses().items()).backward()
    assert relative_error(grads_of(model), grads_of(other)) < 1e-14


def test_adds_into_grad_in_place_and_scales_the_update_only():
    model, plain = student(), student()
    GradientProjector(plain.parameters()).backward(plain.losses())
    projector = GradientProjector(model.parameters())
    before = [torch.randn_like(parameter) for parameter in model.parameters()]
    for parameter, grad in zip(model.parameters(), before, strict=True):
        parameter.grad = grad.clone()
    kept = grads_of(model)
    report = projector.backward(model.losses(), scale=0.25)
    for now, own, start, update in zip(grads_of(model), kept, before, grads_of(plain), strict=True):
        assert now is own
        added = torch.zeros_like(start) if update is None else 0.25 * update
        torch.testing.assert_close(now, start + added, rtol=1e-13, atol=1e-13)
    lists = task_grads(model, model.losses())
    got = reference.combine(lists, report.weights.tolist())
    assert relative_error(got, [None if g is None else 0.25 * g for g in grads_of(plain)]) < 1e-12


def test_absent_frozen_and_tied_parameters():
    model = student()
    model.head.weight.requires_grad_(False)
    tied = [*model.parameters(), model.first.weight]
    GradientProjector(tied).backward(model.losses())
    assert model.unused.grad is None
    assert model.head.weight.grad is None
    model2 = student()
    model2.head.weight.requires_grad_(False)
    GradientProjector(model2.parameters()).backward(model2.losses())
    assert relative_error(grads_of(model), grads_of(model2)) == 0.0


def test_freezing_between_steps_is_respected():
    model = student()
    projector = GradientProjector(model.parameters())
    projector.backward(model.losses())
    before = model.first.weight.grad.clone()
    model.first.weight.requires_grad_(False)
    projector.backward(model.losses())
    assert torch.equal(model.first.weight.grad, before)


def test_bf16_parameters_get_bf16_gradients():
    model = student(torch.bfloat16)
    lists = task_grads(model, model.losses(), WEIGHTS)
    want = reference.agp(lists, order=drawn_order([1, 2, 3]))
    GradientProjector(model.parameters()).backward(model.losses(), weights=WEIGHTS)
    assert all(g is None or g.dtype == torch.bfloat16 for g in grads_of(model))
    # The twin is given weighted gradients that were rounded to bf16; ours are weighted exactly.
    assert relative_error(grads_of(model), want) < 1e-2


def test_the_last_loss_frees_the_graph():
    model = student()
    losses = model.losses()
    GradientProjector(model.parameters()).backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses["ce"].backward()


def test_the_order_of_the_losses_does_not_matter():
    model, other = student(), student()
    GradientProjector(model.parameters(), method="stage1").backward(model.losses())
    reverse = dict(reversed(other.losses().items()))
    report = GradientProjector(other.parameters(), method="stage1").backward(reverse)
    assert report.names == NAMES[::-1]
    assert relative_error(grads_of(model), grads_of(other)) < 1e-13


def test_every_call_draws_another_order_from_its_own_generator():
    model = student()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    projector = GradientProjector(model.parameters(), method="pcgrad")
    results = []
    for _ in range(12):
        model.zero_grad()
        projector.backward(model.losses())
        results.append(model.second.weight.grad.clone())
    assert len({tuple(result.flatten().tolist()) for result in results}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_projector_draws_the_same_orders():
    model = student()
    first = GradientProjector(model.parameters(), seed=4)
    for _ in range(3):
        first.backward(model.losses())
    state = first.state_dict()
    second = GradientProjector(model.parameters(), seed=9)
    second.load_state_dict(state)
    for _ in range(6):
        updates = []
        for projector in (first, second):
            model.zero_grad()
            projector.backward(model.losses())
            updates.append(grads_of(model))
        assert relative_error(*updates) == 0.0
    with pytest.raises(ValueError, match="generator"):
        second.load_state_dict({})


class CountedLoss(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CountedLoss.calls += 1
        return grad


def test_a_loss_with_weight_zero_is_not_differentiated():
    model = student()
    losses = model.losses()
    losses["planning"] = CountedLoss.apply(losses["planning"])
    CountedLoss.calls = 0
    projector = GradientProjector(model.parameters())
    report = projector.backward(losses, weights={**WEIGHTS, "planning": 0})
    assert CountedLoss.calls == 0
    assert report.names == NAMES[:3]
    others = {name: loss for name, loss in model.losses().items() if name != "planning"}
    want = reference.agp(task_grads(model, others, WEIGHTS), order=drawn_order([1, 2]))
    assert relative_error(grads_of(model), want) < 1e-12


def test_tensor_weights_are_folded_in():
    model, other = student(), student()
    tensors = {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}
    GradientProjector(model.parameters()).backward(model.losses(), weights=tensors)
    rounded = {name: float(weight) for name, weight in tensors.items()}
    GradientProjector(other.parameters()).backward(other.losses(), weights=rounded)
    assert relative_error(grads_of(model), grads_of(other)) < 1e-14


def test_a_reweighting_sees_this_steps_raw_norms_and_sets_its_weights():
    model, other = student(), student()
    rule = Recorded()
    report = GradientProjector(model.parameters()).backward(model.losses(), weights=rule, scale=0.5)
    ((names, norms, anchor),) = rule.calls
    assert names == NAMES
    assert anchor == "ce"
    expected = reference.gram(task_grads(model, model.losses())).diagonal().sqrt()
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(report.norms, expected, rtol=1e-12, atol=0)
    assert report.loss_weights.tolist() == list(WEIGHTS.values())
    (observed,) = rule.observed
    assert not any(loss.requires_grad for loss in observed.values())
    GradientProjector(other.parameters()).backward(other.losses(), weights=WEIGHTS, scale=0.5)
    assert relative_error(grads_of(model), grads_of(other)) < 1e-14


def test_a_reweighting_observes_the_mean_losses_of_a_step():
    """Once per projection; a loss that a micro-batch lacks is zero there, as its gradient is."""
    model = student()
    rule = Recorded()
    projector = GradientProjector(model.parameters(), every="step")
    batches = [model.losses(seed) for seed in (1, 2)]
    del batches[1]["planning"]
    want = {n: sum(own[n].item() for own in batches if n in own) / 2 for n in NAMES}
    for losses in batches:
        projector.backward(losses, weights=rule, scale=0.5)
        assert not rule.observed
    projector.step()
    (observed,) = rule.observed
    assert {name: value.item() for name, value in observed.items()} == pytest.approx(want)


@pytest.mark.parametrize("missing", ("zero", "official"))
def test_the_report_says_what_was_done(missing):
    model = student()
    lists = task_grads(model, model.losses())
    gram = reference.gram(lists)
    projector = GradientProjector(model.parameters(), missing=missing)
    report = projector.backward(model.losses(), weights=WEIGHTS, scale=2.0)
    norms = gram.diagonal().sqrt()
    torch.testing.assert_close(report.cosines, gram / torch.outer(norms, norms))
    assert torch.equal(report.conflicts, (gram < 0) & ~torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(report.norms, norms)
    assert report.finite.tolist() == [True] * 4
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    pattern_gram = gradient_gram(lists)
    final = agp_weights(pattern_gram.scaled(weights), order=drawn_order([1, 2, 3]), missing=missing)
    final = 2.0 * weights * final
    if missing == "official":
        counts = [sum(k in own for own in pattern_gram.patterns) for k in range(4)]
        final = final.sum(0) / torch.tensor(counts)
    torch.testing.assert_close(report.weights, final)
    if missing == "zero":
        assert relative_error(grads_of(model), reference.combine(lists, final.tolist())) < 1e-12


def test_a_zero_gradient_has_cosine_zero():
    model = student()
    losses = {"ce": model.losses()["ce"], "perception": 0.0 * model.losses()["perception"]}
    report = GradientProjector(model.parameters()).backward(losses)
    assert report.cosines[0, 1] == 0.0
    assert report.cosines[1, 1] == 0.0


def test_a_non_finite_gradient_is_reported_and_not_hidden():
    model = student()
    losses = model.losses()
    losses["reasoning"] = losses["reasoning"] * float("nan")
    report = GradientProjector(model.parameters()).backward(losses)
    assert report.finite.tolist() == [True, True, False, True]
    assert not bool(model.second.weight.grad.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("missing", ("zero", "official"))
def test_reads_nothing_back_to_the_host(method, missing):
    model = student()
    projector = GradientProjector(model.parameters(), method=method, missing=missing)
    stepwise = GradientProjector(
        model.parameters(), method=method, missing=missing, every="step", max_norm=1.0
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with NoHostRead():
        projector.backward(model.losses(), weights=WEIGHTS, scaler=scaler)
        stepwise.backward(model.losses(), weights=WEIGHTS)
        stepwise.step()


def test_a_grad_scaler_sees_scaled_gradients_and_the_report_unscaled_ones():
    model, other = student(torch.float32), student(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = GradientProjector(model.parameters()).backward(model.losses(), scaler=scaler)
    plain = GradientProjector(other.parameters()).backward(other.losses())
    torch.testing.assert_close(report.norms, plain.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(report.weights, plain.weights, rtol=1e-4, atol=1e-5)
    scaled = [None if grad is None else 65536.0 * grad for grad in grads_of(other)]
    assert relative_error(grads_of(model), scaled) < 1e-5
    scaler.unscale_(optimizer)
    assert relative_error(grads_of(model), grads_of(other)) < 1e-5


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("max_norm", (1e-2, 1e3))
@pytest.mark.parametrize("missing", ("zero", "official"))
def test_max_norm_clips_as_clip_grad_norm_does(missing, max_norm, scaled):
    model, other = student(), student()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    projector = GradientProjector(
        model.parameters(), every="step", max_norm=max_norm, missing=missing
    )
    projector.backward(model.losses(), weights=WEIGHTS, scaler=scaler)
    projector.step()
    GradientProjector(other.parameters(), missing=missing).backward(other.losses(), weights=WEIGHTS)
    nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    got = [None if g is None else g / (1024.0 if scaled else 1.0) for g in grads_of(model)]
    assert relative_error(got, grads_of(other)) < 1e-10


def test_every_step_projects_the_sum_over_micro_batches():
    model = student()
    batches = [model.losses(seed) for seed in (1, 2, 3)]
    del batches[1]["planning"]
    lists = [[None] * 7 for _ in NAMES]
    for losses in batches:
        for name, own in zip(losses, task_grads(model, losses, WEIGHTS), strict=True):
            row = lists[NAMES.index(name)]
            for i, grad in enumerate(own):
                if grad is not None:
                    row[i] = grad / 3 if row[i] is None else row[i] + grad / 3
    want = reference.agp(lists, order=drawn_order([1, 2, 3]))
    projector = GradientProjector(model.parameters(), every="step")
    for losses in batches:
        assert projector.backward(losses, weights=WEIGHTS, scale=1 / 3) is None
        assert all(grad is None for grad in grads_of(model))
    report = projector.step()
    assert relative_error(grads_of(model), want) < 1e-10
    assert report.names == NAMES
    with pytest.raises(RuntimeError, match="nothing to project"):
        projector.step()


def test_accumulation_survives_gradients_that_share_memory():
    """autograd hands out one tensor as the gradient of both terms of a sum."""
    a, b = (torch.randn(4, requires_grad=True) for _ in range(2))
    projector = GradientProjector([a, b], every="step")
    for _ in range(3):
        projector.backward({"ce": (a + b).square().sum()})
    projector.step()
    want = 3 * 2 * (a + b).detach()
    torch.testing.assert_close(a.grad, want)
    torch.testing.assert_close(b.grad, want)
    a.grad.zero_()
    assert bool((b.grad != 0).all())


def test_reset_drops_what_was_added_up():
    model = student()
    projector = GradientProjector(model.parameters(), every="step")
    projector.backward(model.losses())
    with pytest.raises(RuntimeError, match="call step"):
        projector.state_dict()
    projector.reset()
    projector.state_dict()
    with pytest.raises(RuntimeError, match="nothing to project"):
        projector.step()


@pytest.mark.parametrize("every", ("microbatch", "step"))
def test_at_most_one_buffer_beyond_the_gradients(every):
    """K gradients and .grad; the official code makes 7 to 12 more of the parameters' size."""
    size, parts = 400_000, 10  # above the chunk buffers of the torch backend
    weights = [nn.Parameter(torch.randn(size)) for _ in range(parts)]
    alive = WeakIdKeyDictionary()
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                alive[result] = True
            storages = [tensor.untyped_storage() for tensor in alive]
            large = {own.data_ptr() for own in storages if own.nbytes() >= 4 * size}
            most = max(most, len(large - {weight.data_ptr() for weight in weights}))
            return result

    projector = GradientProjector(weights, every=every)
    for _ in range(2):
        terms = [sum((w * (i + 1)).sum() for w in weights) for i in range(3)]
        with Watch():
            projector.backward(dict(zip(NAMES, terms, strict=False)))
    if every == "step":
        with Watch():
            projector.step()
    # Beyond the K + 1 lists there are a few single tensors: in autograd, and in the combination.
    assert 3 * parts <= most <= (3 + 1) * parts + 3


def test_reads_each_gradient_once_for_all_of_it(monkeypatch):
    """Norms, cosines, reweighting, projection and clipping share one Gram matrix."""
    calls = {"gram": 0, "combine": 0}

    def counted(kind, function):
        def call(*args, **kwargs):
            calls[kind] += 1
            return function(*args, **kwargs)

        return call

    for kind, name in (("gram", "gradient_gram"), ("combine", "combine_gradients")):
        function = getattr(engine_module, name)
        monkeypatch.setattr(engine_module, name, counted(kind, function))
    model = student()
    projector = GradientProjector(model.parameters(), every="step", max_norm=1.0)
    projector.backward(model.losses(), weights=Recorded())
    projector.step()
    assert calls == {"gram": 1, "combine": 1}
