"""The fused loss of one layer pair on a GPU, beside what else there is; bfloat16, mse.

Ways: `fused` (triton backend), `eager` maps with autograd, torch.`compiled` of that, `chunked` rows
with checkpointing (the best without a kernel), and `sdpa`, the attention of the same layers:
forward and backward of the student, forward of the teacher. On rectangles with views, where
launches cost as much as the work, all run as CUDA graphs; `fused-lse` is given the log-sum-exp.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import captured, timed
from benchmarks.shapes import GPU_PAIRS
from drivekd.functional import attention_map_loss
from drivekd.reference import attention_map as reference
from drivekd.tokens import TokenLayout

pytestmark = pytest.mark.gpu

CHUNK = 512
LARGEST_EAGER = 8192  # tokens; at more, one map with heads outgrows the memory


class Case:
    """Random queries, keys and values of one pair, as transformers lays them out."""

    def __init__(self, name: str) -> None:
        self.pair = pair = GPU_PAIRS[name]
        generator = torch.Generator("cuda").manual_seed(0)

        def heads(count, dim):
            shape = (pair.num_samples, pair.num_tokens, count, dim)
            values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            return values.transpose(1, 2)

        (h_s, kv_s, d_s), (h_t, kv_t, d_t) = pair.student, pair.teacher
        self.student = [heads(h_s, d_s).requires_grad_(), heads(kv_s, d_s).requires_grad_()]
        self.teacher = [heads(h_t, d_t), heads(kv_t, d_t)]
        self.values = heads(kv_s, d_s).requires_grad_(), heads(kv_t, d_t)
        is_vision = torch.zeros(pair.num_samples, pair.num_tokens, dtype=torch.bool)
        is_vision[:, : pair.num_vision] = True
        self.tokens = TokenLayout.from_masks(is_vision).to("cuda")
        self.region = "text_to_vision" if pair.num_vision else "full"

    def fused(self, **settings):
        loss = attention_map_loss(
            *self.student, *self.teacher, self.tokens, region=self.region, backend="triton",
            **settings,
        )  # fmt: skip
        return loss, torch.autograd.grad(loss, self.student)

    def forward_only(self):
        with torch.no_grad():
            return attention_map_loss(
                *self.student, *self.teacher, self.tokens, region=self.region, backend="triton"
            )

    def eager(self):
        loss = _rows_loss(*self.student, *self.teacher, *self._cells(slice(None)))
        return loss, torch.autograd.grad(loss, self.student)

    def compiled(self):
        loss = _compiled_rows_loss(*self.student, *self.teacher, *self._cells(slice(None)))
        return loss, torch.autograd.grad(loss, self.student)

    def chunked(self):
        (q, k), (q_t, k_t) = self.student, self.teacher
        loss = 0.0
        for row in range(0, self.pair.num_tokens, CHUNK):
            rows = slice(row, row + CHUNK)
            loss = loss + checkpoint(
                _rows_loss, q[:, :, rows], k, q_t[:, :, rows], k_t, *self._cells(rows),
                use_reentrant=False,
            )  # fmt: skip
        return loss, torch.autograd.grad(loss, self.student)

    def sdpa(self):
        (q, k), (q_t, k_t) = self.student, self.teacher
        v, v_t = self.values
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with torch.no_grad():
            scaled_dot_product_attention(q_t, k_t, v_t, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    def _cells(self, rows):
        """Visible cells, region cells and the denominator of some rows."""
        N = self.pair.num_tokens
        position = torch.arange(N, device="cuda")
        seen = (position[None, :] <= position[rows, None])[None]
        region = torch.ones_like(seen)
        count = self.pair.num_samples * N * N
        if self.pair.num_vision:
            text, vision = self.tokens.is_text, self.tokens.is_vision
            region = text[:, rows, None] & vision[:, None, :]
            count = text.sum(1) * vision.sum(1) * self.pair.num_samples
        return seen, region, count


def _rows_loss(q, k, q_t, k_t, seen, region, count):
    p = reference.attention_map(q, k, seen).float()
    with torch.no_grad():
        target = reference.attention_map(q_t, k_t, seen).float()
    return ((p - target).square() * region).sum(dim=(1, 2)).div(count).sum()


_compiled_rows_loss = torch.compile(_rows_loss, dynamic=False)


def assert_right(case: Case) -> None:
    """Fused against row-chunked torch in float32, on the same bfloat16 values."""
    loss, gradients = case.fused()
    student = [each.detach().float().requires_grad_() for each in case.student]
    teacher = [each.float() for each in case.teacher]
    wanted = attention_map_loss(
        *student, *teacher, case.tokens, region=case.region, backend="torch"
    )
    assert abs(loss - wanted) <= 1e-3 * wanted
    for got, want in zip(gradients, torch.autograd.grad(wanted, student), strict=True):
        assert (got.float() - want).norm() <= 1e-2 * want.norm()


def measure(benchmark, case, call):
    call = captured(call) if case.pair.num_vision else call
    try:
        timed(benchmark, call)
    except torch.cuda.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {error}")


@pytest.mark.parametrize("way", ["fused", "eager", "compiled", "chunked", "sdpa"])
@pytest.mark.parametrize("shape", GPU_PAIRS)
def bench_forward_and_backward(benchmark, shape, way):
    case = Case(shape)
    if way in ("eager", "compiled") and case.pair.num_tokens > LARGEST_EAGER:
        pytest.skip(f"one map with heads of {case.pair.num_tokens} tokens does not fit")
    if way == "fused":
        assert_right(case)
    benchmark.group = f"{shape} forward and backward"
    measure(benchmark, case, getattr(case, way))


@pytest.mark.parametrize("shape", GPU_PAIRS)
def bench_forward_only(benchmark, shape):
    case = Case(shape)
    benchmark.group = f"{shape} forward"
    measure(benchmark, case, case.forward_only)


@pytest.mark.parametrize("shape", [name for name, pair in GPU_PAIRS.items() if pair.num_vision])
def bench_with_lse_given(benchmark, shape):
    case = Case(shape)
    lses = []
    for q, k in (case.student, case.teacher):
        scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        scores = scores * q.shape[-1] ** -0.5
        hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").tril()
        lses.append(scores.masked_fill(hidden, -torch.inf).logsumexp(-1).detach())
    benchmark.group = f"{shape} forward and backward"
    measure(benchmark, case, lambda: case.fused(lse_student=lses[0], lse_teacher=lses[1]))
