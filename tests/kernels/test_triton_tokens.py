"""The kernel that describes tokens against the same in torch operations."""

import itertools
import os
from dataclasses import fields

import pytest
import torch

from drivekd.ops.attention_inputs import AttentionLayout

pytest.importorskip("triton")
launch = pytest.importorskip("drivekd_kernels.launch")
backend = pytest.importorskip("drivekd.ops.triton_backend.tokens")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

B = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def make_layout(N, padding, region, causal):
    generator = torch.Generator().manual_seed(N)
    valid = None
    if padding == "holes":
        valid = torch.rand(B, N, generator=generator) < 0.7
    elif padding != "none":
        length = torch.tensor([N, N // 2, 0])[:, None]  # one sample is padding only
        place = torch.arange(N).expand(B, N)
        valid = place < length if padding == "right" else place >= N - length
    is_vision = torch.rand(B, N, generator=generator) < 0.5
    is_vision[0] = False
    return AttentionLayout(
        batch_size=B,
        num_tokens=N,
        device=torch.device(DEVICE),
        causal=causal,
        valid=None if valid is None else valid.to(DEVICE),
        segment_ids=None,
        is_text=~is_vision.to(DEVICE) if region else None,
        is_vision=is_vision.to(DEVICE) if region else None,
    )


@pytest.mark.parametrize("N", [1, 37, 150])
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("region", [False, True])
def test_the_kernel_says_what_torch_operations_say(N, padding, region, monkeypatch):
    monkeypatch.setattr(launch, "TOKEN_BLOCK", 32)
    for causal, window, compact in itertools.product((True, False), (None, 5), (True, False)):
        layout = make_layout(N, padding, region, causal)
        got = backend.kernel_tokens(layout, window, compact=compact)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_can_launch", lambda device: False)
            want = backend.kernel_tokens(layout, window, compact=compact)
        for field in fields(want):
            mine, other = getattr(got, field.name), getattr(want, field.name)
            if other is None:
                assert mine is None, field.name
                continue
            assert mine.dtype == other.dtype and mine.shape == other.shape, field.name
            if field.name == "rows":  # what lies behind the last row is nobody's
                behind = torch.arange(N, device=DEVICE) >= want.num_rows[:, None]
                mine, other = mine.masked_fill(behind, 0), other.masked_fill(behind, 0)
            assert torch.equal(mine, other), (field.name, causal, window, compact)
