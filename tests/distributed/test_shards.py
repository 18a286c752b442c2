"""Two gloo ranks with an FSDP2 model against one process that sees both batches.

The ranks run in `shards.py`, started once for all tests here.
"""

import pytest
import torch

from drivekd.functional.projection import METHODS
from drivekd.projection import GradientProjector
from drivekd.reweighting import BalancedWeights
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
    return run_ranks("tests.distributed.shards", tmp_path_factory.mktemp("shards"))


@pytest.fixture
def both(ranks):
    """Both ranks' results of a case, gradients gathered."""
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


@pytest.mark.parametrize("case", ("without_resharding", "replicated_shards"))
def test_other_ways_to_shard(both, case):
    results = both(case)
    check_same_on_all(results)
    want, report = reference(call={"weights": WEIGHTS})
    assert relative_error(results[0]["grads"], want) < 1e-12
    check_report(results[0]["report"], report)


def test_parameters_that_are_not_sharded_are_averaged_and_count_once(both):
    results = both("parameters_beside_the_shards")
    check_same_on_all(results)
    want, report = reference(missing="official", call={"weights": WEIGHTS})
    model = replica()
    for grad, own in zip(want, model.parameters(), strict=True):
        if own.shape == (7, 7):
            grad += 2.0
    assert relative_error(results[0]["grads"], want) < 1e-12
    check_report(results[0]["report"], report)


def test_frozen_parameters(both):
    results = both("frozen")
    check_same_on_all(results)
    assert results[0]["grads"][1] is None
    model = replica()
    model.first.weight.requires_grad_(False)
    GradientProjector(model.parameters()).backward(mean_losses(model, (1, 2)), weights=WEIGHTS)
    want = [own.grad for own in model.parameters()]
    assert relative_error(results[0]["grads"], want) < 1e-12


def test_mixed_precision_policy(both):
    """bf16 compute, fp32 reduction and shards: the error is that of bf16 activations."""
    results = both("mixed_precision")
    check_same_on_all(results)
    assert all(own is None or own.dtype == torch.float32 for own in results[0]["grads"])
    want, _ = reference(torch.float32, call={"weights": WEIGHTS})
    assert 1e-5 < relative_error(results[0]["grads"], want) < 3e-2


def test_grad_scaler(both):
    results = both("scaler")
    check_same_on_all(results)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    want, report = reference(torch.float32, call={"scaler": scaler})
    assert relative_error(results[0]["grads"], want) < 1e-6
    torch.testing.assert_close(results[0]["report"]["norms"], report.norms, rtol=1e-6, atol=0)


def test_max_norm_bounds_the_global_norm(both):
    results = both("max_norm")
    want, _ = reference(every="step", max_norm=1e-2, call={"weights": WEIGHTS})
    assert relative_error(results[0]["grads"], want) < 1e-12


def test_modules_without_a_common_root(both):
    (first, second), (other, _) = both("modules_without_a_common_root")
    want, _ = reference(method="stage1", call={"weights": WEIGHTS})
    assert relative_error(first, [*want, *[None] * 7]) < 1e-12
    assert relative_error(first, other) == 0.0
    models = [replica(), replica()]
    losses = [mean_losses(own, seeds) for own, seeds in zip(models, ((1, 2), (3, 4)), strict=True)]
    parameters = [p for own in models for p in own.parameters()]
    projector = GradientProjector(parameters, method="stage1")
    projector.backward({name: losses[0][name] + losses[1][name] for name in losses[0]})
    want = [p.grad for p in parameters]
    assert relative_error(second, want) < 1e-12


def test_fewer_losses(both):
    want, report = reference(names=(("ce", "perception"),) * 2)
    results = both("fewer_losses")
    assert relative_error(results[0]["grads"], want) < 1e-12
    check_report(results[0]["report"], report)


def test_a_gradient_that_is_not_finite_on_one_rank_is_reported_on_all(both):
    results = both("not_finite")
    check_same_on_all(results)
    assert results[0]["report"]["names"] == tuple(sorted(NAMES))
    assert results[0]["report"]["finite"].tolist() == [True, True, True, False]
    assert not bool(results[0]["grads"][2].isfinite().all())


def test_training_with_accumulation_and_reweighting(both):
    """Also where somebody has switched FSDP2's gradient synchronisation off in between."""
    first, second = both("training")
    assert relative_error(first["weights"], second["weights"]) == 0.0
    model = replica()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector, weights = GradientProjector(model.parameters()), BalancedWeights(0.1)
    for number in range(6):
        losses = mean_losses(model, (2 * number, 2 * number + 1))
        report = projector.backward(losses, weights=weights, scale=0.5)
        check_report(first["reports"][number], report, 1e-8)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    want = [own.detach() for own in model.parameters()]
    assert relative_error(first["weights"], want) < 1e-10


def test_an_ordinary_backward_works_afterwards(both):
    first, second = both("an_ordinary_backward_afterwards")
    assert relative_error(first["grads"], second["grads"]) == 0.0
    model = replica()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientProjector(model.parameters()).backward(mean_losses(model, (1, 2)))
    optimizer.step()
    optimizer.zero_grad()
    mean_losses(model, (1, 2))["ce"].backward()
    assert relative_error(first["weights"], [own.detach() for own in model.parameters()]) < 1e-12
    assert relative_error(first["grads"], [own.grad for own in model.parameters()]) < 1e-12


def test_parameters_are_gathered_once_for_all_losses(both):
    """Three layers, as often as one backward would; eight times if they were let go in between."""
    for calls in both("gathers"):
        assert calls["gather"] == 3
        assert calls["all_reduce"] == 1
        # Of the layers that a loss reaches: 1 + 2 + 2 + 3.
        assert calls["reduce_scatter"] == 8


@pytest.mark.parametrize(
    "case, kind, parts",
    [
        ("a_loss_on_one_rank", "ValueError", ("['ce', 'reasoning'] on rank 1", "same losses")),
        ("seed_differs", "ValueError", ("seed is (0,", "rank 1", "the same seed")),
        (
            "parameters_without_their_module",
            "NotImplementedError",
            ("DTensor", "give the model itself"),
        ),
        ("made_before_sharding", "ValueError", ("reaches any of the parameters", "fully_shard")),
        ("optimizer_in_backward", "NotImplementedError", ("post-accumulate-grad hook",)),
        ("tensor_parallel", "NotImplementedError", ("no FSDP2 module", "Tensor, context")),
        ("tensor_parallel_beside_fsdp", "NotImplementedError", ("placements", "FSDP2 alone")),
        ("copies_that_fsdp_did_not_make", "NotImplementedError", ("Replicate()",)),
        ("a_group_other_than_the_mesh", "NotImplementedError", ("mesh of 2 ranks", "has 1")),
        (
            "context_parallel_by_the_name_of_its_mesh",
            "NotImplementedError",
            ("context parallel", "dp_cp"),
        ),
        ("a_layer_on_one_rank", "RuntimeError", ("'ce'", "parameters[3] on rank 0 only")),
        ("two_meshes", "NotImplementedError", ("2 device meshes",)),
    ],
)
def test_all_ranks_refuse_together(ranks, case, kind, parts):
    for own in ranks:
        assert isinstance(own[case], Raised), case
        assert own[case].kind == kind, own[case].where
        assert all(part in own[case].message for part in parts), own[case].message
    assert ranks[0][case].message == ranks[1][case].message
