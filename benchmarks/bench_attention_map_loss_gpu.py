"""The fused loss of one layer pair on a GPU, beside what else there is; bfloat16, mse.

Ways: `fused` (triton backend; `fused-lse` is given the log-sum-exp), `eager` maps with autograd,
torch.`compiled` of that, `chunked` rows with checkpointing (the best without a kernel: only rows of
the region, only keys up to the last row), and `sdpa`, flash attention of the same layers: forward
and backward of the student, forward of the teacher. Every other way is timed in the same rounds as
`fused`, so that their ratio does not depend on what the clock did in between. On rectangles with
views, where launches cost as much as the work, all run as CUDA graphs.

`forward`: the loss without gradients. `both`: with gradients in q and k of the student.
Maps of 20480 tokens and more are left to the ways that can have them anyway, and compiling to the
shapes that the targets name: a compiler takes longer than all other ways together.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import DEVICE, DRY, PLAYBACK, measure, memory_bytes, note_out_of_memory
from benchmarks.shapes import GPU_MODELS, GPU_PAIRS, Pair
from drivekd.functional import attention_map_loss
from drivekd.reference import attention_map as reference
from drivekd.tokens import TokenLayout

pytestmark = [
    pytest.mark.benchmark(timer=PLAYBACK),
    pytest.mark.filterwarnings("default"),  # of what is compared with, for example inductor's
    *([] if DRY else [pytest.mark.gpu]),
]

BACKEND = "triton" if not DRY or os.environ.get("TRITON_INTERPRET") == "1" else "torch"
DTYPE = torch.float16 if DRY and BACKEND == "triton" else torch.bfloat16  # see the interpreter
CHUNK = 8 if DRY else 512
# Of loss and gradients, relative: the fused way rounds W and dS to bfloat16, the others every map.
BOUNDS = {"fused": (1e-3, 1e-2), "fused-lse": (1e-3, 1e-2)}
BOUNDS_OF_BASELINES = (5e-2, 1e-1)

# What the targets need comes first, in case time runs out; a compiler takes the longest.
_FIRST = [("both", "fused"), ("both", "sdpa"), ("both", "eager"), ("forward", "fused")]
RUNS = {
    "full-8192": [*_FIRST, ("both", "chunked"), ("both", "compiled")],
    "full-2048": [*_FIRST, ("both", "chunked"), ("both", "compiled")],
    "full-20480": [("both", "fused"), ("both", "sdpa"), ("forward", "fused"), ("both", "chunked")],
    "full-65536": [("both", "fused"), ("both", "sdpa"), ("both", "eager")],
    "t2v-6": [*_FIRST, ("both", "fused-lse"), ("both", "chunked")],
    "t2v-1": [*_FIRST, ("both", "fused-lse"), ("both", "chunked")],
}
CASES = [
    pytest.param(f"{model}/{kind}", mode, way, id=f"{model}/{kind}-{mode}-{way}")
    for model in GPU_MODELS
    for kind, runs in RUNS.items()
    for mode, way in runs
]


def toy(pair: Pair) -> Pair:
    """A pair for dry runs."""
    heads, tokens = (4, 2, 16), 16 + pair.num_tokens // 4096
    return Pair(1, tokens, heads, (2, 1, 32), 7 if pair.num_vision else 0)


class Case:
    """Random queries, keys and values of one pair, as transformers lays them out."""

    def __init__(self, name: str) -> None:
        self.pair = pair = toy(GPU_PAIRS[name]) if DRY else GPU_PAIRS[name]
        generator = torch.Generator(DEVICE).manual_seed(0)

        def heads(count, dim):
            shape = (pair.num_samples, pair.num_tokens, count, dim)
            values = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)
            return values.transpose(1, 2)

        (h_s, kv_s, d_s), (h_t, kv_t, d_t) = pair.student, pair.teacher
        self.student = [heads(h_s, d_s).requires_grad_(), heads(kv_s, d_s).requires_grad_()]
        self.teacher = [heads(h_t, d_t), heads(kv_t, d_t)]
        self.values = heads(kv_s, d_s).requires_grad_(), heads(kv_t, d_t)
        is_vision = torch.zeros(pair.num_samples, pair.num_tokens, dtype=torch.bool)
        is_vision[:, : pair.num_vision] = True
        self.tokens = TokenLayout.from_masks(is_vision).to(DEVICE)
        self.region = "text_to_vision" if pair.num_vision else "full"

    def call(self, way, mode):
        """What is timed: returns the loss, with gradients also dq and dk."""
        if way == "sdpa":
            return lambda: self._sdpa(backward=mode == "both")
        if way == "fused":
            loss = self._fused
        elif way == "fused-lse":
            lses = {
                "lse_student": self._lse(*self.student),
                "lse_teacher": self._lse(*self.teacher),
            }
            loss = functools.partial(self._fused, **lses)
        elif way == "chunked":
            loss = self._chunked
        else:
            rows_loss = _rows_loss if way == "eager" else _compiled()
            loss = functools.partial(self._whole, rows_loss)

        def both():
            value = loss()
            return value.detach(), *torch.autograd.grad(value, self.student)

        return both if mode == "both" else torch.no_grad()(loss)

    @functools.cached_property
    def exact(self):
        """Loss and gradients by row-chunked torch in float32, on the same bfloat16 values."""
        student = [each.detach().float().requires_grad_() for each in self.student]
        teacher = [each.float() for each in self.teacher]
        loss = attention_map_loss(
            *student, *teacher, self.tokens, region=self.region, backend="torch"
        )
        return loss.detach(), *torch.autograd.grad(loss, student)

    def errors(self, results):
        """Relative errors of the loss, and of the gradients where there are any."""
        wanted = self.exact
        errors = {"loss_error": abs(results[0] - wanted[0]) / wanted[0]}
        if len(results) > 1:
            errors["gradient_error"] = max(
                (got.float() - want).norm() / want.norm()
                for got, want in zip(results[1:], wanted[1:], strict=True)
            )
        return {name: float(error) for name, error in errors.items()}

    def scores_bytes(self):
        """The largest tensor that the eager way cannot do without."""
        (h_s, *_), (h_t, *_) = self.pair.student, self.pair.teacher
        return max(h_s, h_t) * self.pair.num_samples * self.pair.num_tokens**2 * DTYPE.itemsize

    def _fused(self, **lses):
        return attention_map_loss(
            *self.student, *self.teacher, self.tokens, region=self.region, backend=BACKEND, **lses
        )

    def _whole(self, rows_loss):
        return rows_loss(*self.student, *self.teacher, *self._all_cells)

    def _chunked(self):
        (q, k), (q_t, k_t), N = self.student, self.teacher, self.pair.num_tokens
        loss = 0.0
        for row in range(self.pair.num_vision, N, CHUNK):
            rows, keys = slice(row, min(row + CHUNK, N)), slice(0, min(row + CHUNK, N))
            loss = loss + checkpoint(
                _rows_loss, q[:, :, rows], k[:, :, keys], q_t[:, :, rows], k_t[:, :, keys],
                *self._cells(rows, keys), use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return loss

    def _sdpa(self, *, backward):
        (q, k), (q_t, k_t) = self.student, self.teacher
        v, v_t = self.values
        flash = SDPBackend.MATH if DRY else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(flash):
            with torch.set_grad_enabled(backward):
                out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            with torch.no_grad():
                scaled_dot_product_attention(q_t, k_t, v_t, is_causal=True, enable_gqa=True)
            if not backward:
                return out
            return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    @torch.no_grad()
    def _lse(self, q, k):
        """Natural log-sum-exp (B, H, N) float32, in chunks of rows."""
        N, parts = self.pair.num_tokens, []
        k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        for row in range(0, N, CHUNK):
            rows = slice(row, row + CHUNK)
            scores = q[:, :, rows].float() @ k.mT * q.shape[-1] ** -0.5
            seen, *_ = self._cells(rows, slice(0, N))
            parts.append(scores.masked_fill_(~seen[:, None], -torch.inf).logsumexp(dim=-1))
        return torch.cat(parts, dim=-1)

    @functools.cached_property
    def _all_cells(self):
        whole = slice(0, self.pair.num_tokens)
        return self._cells(whole, whole)

    def _cells(self, rows, keys):
        """Visible cells, region cells and the denominator of some rows."""
        N = self.pair.num_tokens
        position = torch.arange(N, device=DEVICE)
        seen = (position[None, keys] <= position[rows, None])[None]
        region = torch.ones_like(seen)
        count = torch.full((1,), self.pair.num_samples * N * N, device=DEVICE)
        if self.pair.num_vision:
            text, vision = self.tokens.is_text, self.tokens.is_vision
            region = text[:, rows, None] & vision[:, None, keys]
            count = text.sum(1) * vision.sum(1) * self.pair.num_samples
        return seen, region, count


def _rows_loss(q, k, q_t, k_t, seen, region, count):
    p = reference.attention_map(q, k, seen).float()
    with torch.no_grad():
        target = reference.attention_map(q_t, k_t, seen).float()
    return ((p - target).square() * region).sum(dim=(1, 2)).div(count).sum()


def _compiled():
    """Compiled afresh: after eight shapes torch.compile would silently go on without compiling."""
    torch.compiler.reset()
    return torch.compile(_rows_loss, dynamic=False, backend="aot_eager" if DRY else "inductor")


@functools.lru_cache(maxsize=1)
def case_of(shape: str) -> Case:
    """The inputs of the shape at hand; cases come in order of their shapes."""
    return Case(shape)


@pytest.mark.parametrize(("shape", "mode", "way"), CASES)
def bench_attention_map_loss(benchmark, shape, mode, way):
    case = case_of(shape)
    benchmark.group = f"{shape} {mode}"
    facts = {
        "shape": shape, "mode": mode, "way": way, "loss": "mse", "region": case.region,
        "dtype": str(DTYPE).removeprefix("torch."), "num_tokens": case.pair.num_tokens,
    }  # fmt: skip
    if way in ("eager", "compiled") and case.scores_bytes() > memory_bytes():
        size, room = (f"{each / 2**30:.0f} GiB" for each in (case.scores_bytes(), memory_bytes()))
        note_out_of_memory(benchmark, f"the scores of one layer take {size} of {room}", **facts)
        return
    fused = case.call("fused", mode)
    call = fused if way == "fused" else case.call(way, mode)
    try:
        if way != "sdpa":
            results = call()
            errors = case.errors(results if isinstance(results, tuple) else (results,))
            bounds = BOUNDS.get(way, BOUNDS_OF_BASELINES)
            for (name, error), bound in zip(errors.items(), bounds, strict=False):
                assert error <= bound, f"{way}: {name} {error}"
            facts |= errors
            del results
    except torch.OutOfMemoryError as error:
        note_out_of_memory(benchmark, str(error).split(". ")[0], **facts)
        return
    beside = None if way == "fused" else fused
    measure(benchmark, call, beside=beside, graph=case.pair.num_vision > 0, **facts)
