"""One process that sees the batches of both ranks, and how results are compared with it."""

import torch

from drivekd.projection import GradientProjector
from tests.distributed.replicas import replica
from tests.helpers.ranks import Raised
from tests.helpers.students import NAMES

REPORTED = ("cosines", "conflicts", "weights", "norms", "loss_weights", "finite")


def returned(ranks, case):
    """The results of a case, by rank; fails with the traceback of a rank that raised."""
    results = [own[case] for own in ranks]
    for result in results:
        assert not isinstance(result, Raised), result.where
    return results


def mean_losses(model, batches, names=(NAMES, NAMES)):
    """Every loss's mean over the batches, sorted by name as the ranks do."""
    total = {}
    for batch, present in zip(batches, names, strict=True):
        for name, loss in model.losses(batch).items():
            if name in present:
                total[name] = total.get(name, 0.0) + loss / len(batches)
    return dict(sorted(total.items()))


def reference(dtype=torch.float64, names=(NAMES, NAMES), call=None, **settings):
    model = replica(dtype)
    projector = GradientProjector(model.parameters(), **settings)
    report = projector.backward(mean_losses(model, (1, 2), names), **(call or {}))
    if settings.get("every") == "step":
        report = projector.step()
    return [own.grad for own in model.parameters()], report


def check_same_on_all(results):
    first, *others = results
    for other in others:
        for x, y in zip(first["grads"], other["grads"], strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x.nan_to_num(), y.nan_to_num())
        assert first["report"]["names"] == other["report"]["names"]
        for field in REPORTED:
            x, y = first["report"][field], other["report"][field]
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), field


def check_report(report, wanted, bound=1e-10):
    assert report["names"] == wanted.names
    for field in REPORTED:
        torch.testing.assert_close(
            report[field], getattr(wanted, field), rtol=bound, atol=bound, msg=field
        )
