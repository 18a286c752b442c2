"""`drivekd cache` and a training from it through the triton backend, beside the torch backend."""

import os
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from drivekd.ops import dispatch
from drivekd.train import cache_targets, distill
from tests.helpers import cached_runs

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# The interpreter's own: masked cells may be inf - inf, and numpy would have it read scalars anew.
pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.fixture
def calls(monkeypatch):
    """How often each implementation was fetched, by op and backend."""
    counts, original = Counter(), dispatch.get

    def get(op, backend):
        counts[op, backend] += 1
        return original(op, backend)

    monkeypatch.setattr(dispatch, "get", get)
    return counts


@pytest.mark.interpreter  # it trains on the CPU
def test_training_from_a_cache_is_that_of_the_torch_backend(tmp_path, monkeypatch, calls):
    cached_runs.save_checkpoints(tmp_path / "checkpoints")
    losses, weights = {}, {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("DRIVEKD_BACKEND", backend)
        root = tmp_path / backend
        root.mkdir()
        recipe = cached_runs.write_recipe(root, tmp_path / "checkpoints")(
            "training.max_steps=2", "training.per_device_train_batch_size=4"
        )
        cache_targets(recipe)
        student = distill(recipe)
        losses[backend] = cached_runs.losses_of(root / "run")
        weights[backend] = cached_runs.weights(student)
        for op in ("attention_map_targets", "attention_map_target_loss"):
            assert calls[op, backend] > 0
        assert not calls["attention_map_loss", backend]
    assert all(losses["torch"].values())  # rectangles by mse and kl, full maps
    for name, wanted in losses["torch"].items():
        assert losses["triton"][name] == pytest.approx(wanted, rel=1e-4)  # float32, two steps
    # Adam's first steps are signs of gradients: where one is 0 but for rounding, any step is taken.
    gap = torch.cat([(weights["triton"][n] - w).flatten() for n, w in weights["torch"].items()])
    assert (gap.abs() > 1e-5).float().mean() < 0.01
