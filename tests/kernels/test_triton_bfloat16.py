"""The attention kernels on bfloat16, as most models are: in the interpreter, with exact products.

test_triton_gpu.py has larger shapes and both 16-bit types on a GPU.
"""

import os

import pytest
import torch

from tests.helpers.attention import TOLERANCES, Heads, assert_close, make_case, run, run_twin

pytest.importorskip("triton")
backend = pytest.importorskip("drivekd.ops.triton_backend.attention_map")

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("few_programs", "exact_bfloat16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def bfloat16_is_not_refused(monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED", False)


def assert_triton_matches(case):
    """The table's bounds of bfloat16, but twice that of a row: W and dS are rounded to it, too."""
    actual, expected = run(case.but(backend="triton"), 2.0**14), run_twin(case, 2.0**14)
    loss, whole, row = TOLERANCES[torch.bfloat16]
    assert_close(actual, expected, torch.bfloat16, (loss, whole, 2 * row))


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_head_dims(dim):
    """Beyond 64 W is packed in pairs; 80 and 96 come in two pieces."""
    case = make_case(
        num_samples=1, num_tokens=140 if dim < 128 else 70, dtype=torch.bfloat16,
        student=Heads(7, 1, dim), teacher=Heads(4, 2, 128),
    )  # fmt: skip
    assert_triton_matches(case)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("dim", [64, 128])
def test_losses_and_regions(loss, region, padding, dim):
    case = make_case(
        num_samples=2, num_tokens=45, dtype=torch.bfloat16, student=Heads(4, 2, dim),
        teacher=Heads(2, 1, 64), loss=loss, region=region, padding=padding,
    )  # fmt: skip
    assert_triton_matches(case)
