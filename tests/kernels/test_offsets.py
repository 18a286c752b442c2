"""What kernels multiply in 32 bits stays within them, and grids within what a GPU launches.

Launches are recorded on tensors without data, at 65,536 tokens and beyond. Kernels multiply sample
numbers (and heads of q, k and log-sum-exps, where they loop over them) in 64 bits; the rest of an
offset within one sample is 32 bit: rows and keys times their stride, slots times a workspace's.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from drivekd.ops.attention_inputs import AttentionLayer, AttentionLayout, AttentionMapLossInputs
from drivekd.ops.triton_backend import attention_map as backend

LARGEST = 2**31 - 1
WHOLE = 128  # workspaces and tiles end at multiples of it
META = torch.device("meta")


@pytest.fixture
def launches(monkeypatch):
    """(kernel, arguments by name, grid) of what is launched; nothing runs."""
    noted = []

    def run(self, *args, grid, warmup=False, **options):
        noted.append((self.__name__, dict(zip(self.arg_names, args, strict=False)) | options, grid))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    return noted


def call(num_samples, num_tokens, loss, *, num_vision=0, wide=0, dims=(64, 128)):
    """Loss and gradients of one layer; `wide` elements lie between the heads of a token."""
    B, N = num_samples, num_tokens

    def layer(heads, kv_heads, dim):
        q, k = (
            torch.empty(B, N, h, dim + wide, dtype=torch.float16, device=META)[..., :dim]
            for h in (heads, kv_heads)
        )
        return AttentionLayer(q.transpose(1, 2), k.transpose(1, 2), dim**-0.5, None)

    mask = torch.empty(B, N, dtype=torch.bool, device=META) if num_vision else None
    inputs = AttentionMapLossInputs(
        student=(layer(14, 2, dims[0]),),
        teacher=(layer(28, 4, dims[1]),),
        groups=((0,),),
        windows=(None,),
        layout=AttentionLayout(B, N, META, True, mask, None, mask, mask),
        loss=loss,
        needs_dq=(True,),
        needs_dk=(True,),
        dtype=torch.float32,
    )
    backend.attention_map_loss(inputs)


def rounded(count):
    return -(-count // WHOLE) * WHOLE


def largest_offset(values):
    """The largest 32-bit offset of each kind that a launch computes."""
    N, offsets = values.get("N", 0), {}
    for name in ("q", "k"):
        if f"stride_{name}_n" in values:
            align, D = values[f"ALIGN_{name.upper()}"], values["D"]
            heads = values["H"] if name == "q" else values["H"] // values["GROUP"]
            # dq and delta take the heads of q in 32 bits, too: the strictest holds for all.
            rows = (N - 1) * values[f"stride_{name}_n"] + (heads - 1) * values[f"stride_{name}_h"]
            offsets[name] = rows * align + D
    if "stride_dq_n" in values:
        rows = (N - 1) * values["stride_dq_n"] + (values["H"] - 1) * values["stride_dq_h"]
        offsets["dq"] = rows + values["D"]
    if "stride_map_s" in values:
        slots = rounded(values["num_slots"])
        offsets["map"] = (slots - 1) * values["stride_map_s"] * values["ALIGN_MAP"] + rounded(N) - 1
    if "lse2_ptr" in values:
        offsets["log-sum-exps"] = values["H"] * N
    if "planes_ptr" in values:
        offsets["a plane's head"] = rounded(N) * values["D"]
        offsets["pairs of a group"] = 2 * values["GROUP"] * values["num_slots"]
    return offsets


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize(
    ("num_samples", "num_tokens", "num_vision", "wide"),
    [(2, 65_536, 0, 0), (1, 131_072, 0, 0), (2, 65_536, 40_000, 0), (2, 65_536, 0, 1000),
     (300, 4096, 0, 0)],
)  # fmt: skip
def test_offsets_within_a_sample_fit_32_bits(
    launches, loss, num_samples, num_tokens, num_vision, wide
):
    call(num_samples, num_tokens, loss, num_vision=num_vision, wide=wide)
    seen = {}
    for name, values, grid in launches:
        x, y, z = (*grid, 1, 1)[:3]
        assert 0 < x <= LARGEST and 0 < y < 2**16 and 0 < z < 2**16, (name, grid)
        for what, offset in largest_offset(values).items():
            assert offset <= LARGEST, (name, what, offset)
            seen[what] = max(seen.get(what, 0), offset)
        for argument, value in values.items():  # an argument of 64 bits compiles another kernel
            assert not isinstance(value, int) or abs(value) <= LARGEST, (name, argument, value)
    kinds = {"q", "k", "dq", "map", "log-sum-exps", "a plane's head", "pairs of a group"}
    assert set(seen) == kinds
    assert num_tokens < 65_536 or max(seen.values()) > 2**26  # or nothing here is near to it


def test_a_sample_that_reaches_beyond_32_bits_is_copied_or_refused(launches):
    """Rows 28 x 1,200 elements apart reach beyond; their own elements do not."""
    call(1, 65_536, "mse", wide=1072)
    queries = [values["q_ptr"] for name, values, _ in launches if name == "map_kernel"]
    assert queries and all(each.is_contiguous() for each in queries)
    with pytest.raises(NotImplementedError, match=r"28 x 600000 x 128 elements"):
        call(1, 600_000, "mse")


@pytest.mark.parametrize("num_tokens", [65_536, 131_072, 150_001])
def test_a_whole_map_is_written_in_parts_that_fit(launches, num_tokens):
    q = torch.empty(1, 14, num_tokens, 64, dtype=torch.float16, device=META)
    layout = AttentionLayout(1, num_tokens, META, True, None, None, None, None)
    backend.attention_map(AttentionLayer(q, q[:, :2], 0.125, None), layout, None)
    maps = [values for name, values, _ in launches if name == "map_kernel"]
    assert sum(values["num_slots"] for values in maps) == num_tokens
    assert len(maps) <= 2 + num_tokens // 16_384 or num_tokens > 131_072
    for values in maps:
        assert largest_offset(values)["map"] <= LARGEST
