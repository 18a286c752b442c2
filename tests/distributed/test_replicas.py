"""Two gloo ranks with whole models (DDP) against one process that sees both batches.

The reference is the rule itself: every loss is the mean over the ranks (zero where a rank has
none), projected once. The ranks run in `replicas.py`, started once for all tests here.
"""

import pytest
import torch

from drivekd.functional.projection import METHODS
from drivekd.projection import GradientProjector
from drivekd.reweighting import BalancedWeights, OnlineWeights
from tests.distributed.reference import (
    check_report,
    check_same_on_all,
    mean_losses,
    reference,
    returned,
)
from tests.distributed.replicas import replica
from tests.helpers.gradients import relative_error
from tests.helpers.ranks import Raised, run_ranks
from tests.helpers.students import NAMES, WEIGHTS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("tests.distributed.replicas", tmp_path_factory.mktemp("replicas"))


@pytest.fixture
def both(ranks):
    """Both ranks' results of a case."""
    return lambda case: returned(ranks, case)


@pytest.mark.parametrize("every", ("microbatch", "step"))
@pytest.mark.parametrize("missing", ("zero", "official"))
@pytest.mark.parametrize("method", METHODS)
def test_update_and_report_are_those_of_one_process(both, method, missing, every):
    results = [own[method, missing, every] for own in both("methods")]
    check_same_on_all(results)
    want, report = reference(
        method=method, missing=missing, every=every, seed=5, call={"weights": WEIGHTS}
    )
    assert relative_error(results[0]["grads"], want) < 1e-12
    check_report(results[0]["report"], report)


def test_fp32_update_agrees_to_rounding(both):
    results = both("fp32")
    check_same_on_all(results)
    want, _ = reference(torch.float32, call={"weights": WEIGHTS})
    assert relative_error(results[0]["grads"], want) < 1e-6


def test_bf16_update_agrees_to_its_rounding(both):
    """Averages are rounded to bf16, as DDP's are; so are the reference's summed gradients."""
    results = both("bf16")
    check_same_on_all(results)
    assert all(own is None or own.dtype == torch.bfloat16 for own in results[0]["grads"])
    want, _ = reference(torch.bfloat16, call={"weights": WEIGHTS})
    assert relative_error(results[0]["grads"], want) < 2e-2


def test_mixed_dtypes(both):
    first, second = both("mixed_dtypes")
    assert [own.dtype for own in first if own is not None] == [torch.float32] * 2 + [
        torch.float64
    ] * 4
    assert relative_error(first, second) == 0.0


@pytest.mark.parametrize(
    "case, names",
    [
        ("loss_on_one_rank", (("ce", "perception", "planning"), ("ce", "reasoning"))),
        ("anchor_on_one_rank", (("perception",), ("ce", "reasoning"))),
    ],
)
def test_a_loss_that_a_rank_lacks_is_zero_there(both, case, names):
    results = both(case)
    check_same_on_all(results)
    want, report = reference(names=names)
    assert relative_error(results[0]["grads"], want) < 1e-12
    check_report(results[0]["report"], report)


def test_a_rank_without_any_loss_takes_part(both):
    results = both("rank_without_losses")
    check_same_on_all(results)
    want, _ = reference(names=(NAMES, ()), call={"weights": WEIGHTS})
    assert relative_error(results[0]["grads"], want) < 1e-12


def test_a_gradient_that_a_rank_lacks_is_zero_there(both):
    """missing="official" must take the union of the ranks' patterns."""
    first, second = both("different_reach")
    assert relative_error(first, second) == 0.0
    model = replica()
    zero, one = model.losses(1), model.losses(2)
    zero["ce"] = zero["reasoning"] + zero["planning"]
    losses = {name: (zero[name] + one[name]) / 2 for name in sorted(NAMES)}
    GradientProjector(model.parameters(), missing="official").backward(losses)
    assert relative_error(first, [own.grad for own in model.parameters()]) < 1e-12


def test_frozen_parameters_and_present_gradients(both):
    first, second = both("frozen_and_present_grads")
    assert relative_error(first, second) == 0.0
    model = replica()
    model.head.requires_grad_(False)
    model.first.weight.grad = torch.full_like(model.first.weight, 2.0)
    GradientProjector(model.parameters()).backward(mean_losses(model, (1, 2)), scale=0.25)
    assert relative_error(first, [own.grad for own in model.parameters()]) < 1e-12


def test_tensor_weights_are_averaged(both):
    results = both("tensor_weights_are_averaged")
    check_same_on_all(results)
    weights = {name: torch.tensor(1.5 * weight) for name, weight in WEIGHTS.items()}
    want, _ = reference(call={"weights": weights})
    assert relative_error(results[0]["grads"], want) < 1e-6


def test_grad_scaler(both):
    results = both("scaler")
    check_same_on_all(results)
    want, report = reference(
        torch.float32, call={"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)}
    )
    assert relative_error(results[0]["grads"], want) < 1e-6
    torch.testing.assert_close(results[0]["report"]["norms"], report.norms, rtol=1e-6, atol=0)


def test_max_norm_bounds_the_global_norm(both):
    results = both("max_norm")
    check_same_on_all(results)
    want, _ = reference(every="step", max_norm=1e-2, call={"weights": WEIGHTS})
    assert relative_error(results[0]["grads"], want) < 1e-12
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in want if g is not None]))
    assert float(norm) == pytest.approx(1e-2, rel=1e-3)


def test_a_gradient_that_is_not_finite_on_one_rank_is_reported_on_all(both):
    results = both("not_finite")
    check_same_on_all(results)
    names, finite = results[0]["report"]["names"], results[0]["report"]["finite"]
    assert [name for name, is_finite in zip(names, finite, strict=True) if not is_finite] == [
        "reasoning"
    ]
    assert not bool(results[0]["grads"][2].isfinite().all())


@pytest.mark.parametrize(
    "case, make, every",
    [
        ("training_balanced", lambda: BalancedWeights(0.1), "microbatch"),
        (
            "training_online",
            lambda: OnlineWeights(WEIGHTS, learning_rate=0.05, alpha=1.0),
            "step",
        ),
    ],
)
def test_training_with_reweighting_stays_in_step_with_one_process(both, case, make, every):
    first, second = both(case)
    assert all(torch.equal(x, y) for x, y in zip(first["weights"], second["weights"], strict=True))
    model = replica()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector, weights = GradientProjector(model.parameters(), every=every), make()
    for step in range(4):
        names = (("ce", "reasoning"), ("ce", "perception")) if step == 2 else (NAMES, NAMES)
        losses = mean_losses(model, (2 * step, 2 * step + 1), names)
        report = projector.backward(losses, weights=weights)
        if every == "step":
            report = projector.step()
        check_report(first["reports"][step], report, 1e-8)
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(first["weights"], [own.detach() for own in model.parameters()]) < 1e-10


def test_accumulation_communicates_once_and_projects_the_mean(both):
    results = both("accumulation")
    check_same_on_all(results)
    model = replica()
    projector = GradientProjector(model.parameters(), every="step")
    for number in range(3):
        names = (NAMES, NAMES[:3]) if number == 1 else (NAMES, NAMES)
        losses = mean_losses(model, (2 * number, 2 * number + 1), names)
        projector.backward(losses, weights=WEIGHTS, scale=1 / 3)
    report = projector.step()
    want = [own.grad for own in model.parameters()]
    assert relative_error(results[0]["grads"], want) < 1e-12
    check_report(results[0]["report"], report)


def test_a_resumed_projector_draws_the_same_orders(both):
    for going_on, resumed in both("a_resumed_projector"):
        assert relative_error(going_on, resumed) == 0.0


def test_a_group_of_one_rank_trains_alone(both):
    for rank, result in enumerate(both("a_group_of_one_rank_trains_alone")):
        model = replica()
        report = GradientProjector(model.parameters()).backward(model.losses(rank + 1))
        assert relative_error(result["grads"], [own.grad for own in model.parameters()]) == 0.0
        check_report(result["report"], report)


def test_ddp_with_unused_parameters_works_under_no_sync(both):
    first, second = both("per_task_syncing_works_under_no_sync")
    assert relative_error(first, second) == 0.0
    want, _ = reference()
    assert relative_error(first, want) < 1e-12


def test_an_ordinary_backward_between(both):
    first, second = both("an_ordinary_backward_between")
    assert relative_error(first, second) == 0.0
    model = replica()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector = GradientProjector(model, seed=2)
    for step in range(5):
        losses = mean_losses(model, (2 * step, 2 * step + 1))
        if step % 2:
            losses["ce"].backward()
        else:
            projector.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(first, [own.detach() for own in model.parameters()]) < 1e-12


def test_fsdp1_is_refused_when_the_projector_is_made(both):
    for result in both("fsdp1_is_refused"):
        for at_once, message in result:
            assert at_once
            assert "FSDP1" in message


@pytest.mark.parametrize(
    "case, kind, parts",
    [
        ("seed_differs", "ValueError", ("seed is (0,", "rank 1", "the same seed")),
        ("state_differs", "ValueError", ("seed is (1,", "rank 1", "same state")),
        ("settings_differ", "ValueError", ("settings", "'agp'", "'stage1'", "rank 1")),
        ("scale_differs", "ValueError", ("scale is 1.0 on rank 0 but 2.0 on rank 1",)),
        ("weights_differ", "ValueError", ("weights['planning'] is 0.1 on rank 0 but 1.1",)),
        ("kinds_of_weights_differ", "ValueError", ("weighting", "NoneType", "dict")),
        ("parameters_differ", "ValueError", ("parameters is 7 tensors", "6 tensors")),
        ("anchor_nowhere", "ValueError", ("anchor 'ce'",)),
        ("no_losses_anywhere", "ValueError", ("no rank",)),
        ("per_task_syncing_is_refused", "NotImplementedError", ("no_sync()", "averages")),
        ("a_static_graph_is_refused", "NotImplementedError", ("static_graph", "no_sync()")),
        ("sparse_gradients", "NotImplementedError", ("sparse", "parameters[0]")),
        ("wrong_parameters", "ValueError", ("reaches any of the parameters",)),
    ],
)
def test_all_ranks_refuse_together(ranks, case, kind, parts):
    """None waits for another: the same error on every rank."""
    for own in ranks:
        assert isinstance(own[case], Raised), case
        assert own[case].kind == kind, own[case].where
        assert all(part in own[case].message for part in parts), own[case].message
    assert ranks[0][case].message == ranks[1][case].message


def test_a_group_without_this_rank_is_refused(ranks):
    assert ranks[0]["a_group_without_this_rank"] is None
    assert "process_group" in ranks[1]["a_group_without_this_rank"].message


def test_traffic_is_at_most_that_of_so_many_all_reduces(both):
    """(K + 1) / 2 all-reduces of the parameters, and a few hundred bytes of agreement."""
    for result in both("traffic"):
        for number, (sent, calls) in result["sent"].items():
            # The agreement, a pickled statement, takes up to 450 bytes here.
            assert sent <= (number + 1) / 2 * result["all_reduce"] + 600, number
            assert calls["all_reduce"] == 1
            assert calls["reduce_scatter"] == number
            assert calls["gather"] == 1


def test_at_most_one_buffer_beyond_the_gradients(both):
    for first, second in both("memory"):
        # K gradients of 20 equal tensors; a bucket, its shard and autograd's own hold single ones.
        assert first <= 4 + 4 / 20
        assert second <= 4 + 4 / 20
