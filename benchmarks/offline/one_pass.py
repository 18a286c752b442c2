"""`python -m benchmarks.offline.one_pass`: errors of dq in bfloat16 by how delta is known.

An emulation on the CPU of what the kernel rounds (operands of the products with dS, W) and what
not, against float64; beside it eager attention in bfloat16 with autograd. Rows of dq are compared
one by one, relative to their own norm but at least a thousandth of the mean one.
"""

import itertools
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
H, H_KV = 14, 2


@dataclass(frozen=True)
class Case:
    """Causal maps of random heads; `spread` is the size of queries, `apart` the teacher's noise."""

    num_tokens: int
    head_dim: int
    spread: float
    rectangle: bool  # second half of the rows x first half of the keys
    apart: float | None  # of a teacher that is the student plus noise; None: unrelated


CASES = [
    Case(512, D, spread, rectangle, apart)
    for D, spread, rectangle, apart in itertools.product(
        (64, 128), (1.0, 4.0), (False, True), (None, 0.1)
    )
] + [Case(2048, 64, 1.0, False, None), Case(2048, 128, 4.0, True, None)]


def errors(case: Case) -> dict[str, tuple[float, float]]:
    """Way -> relative error of all of dq, and of its worst row."""
    N, D = case.num_tokens, case.head_dim
    generator = torch.Generator().manual_seed(0)

    def make(heads: int, size: float = 1.0) -> Tensor:
        return (torch.randn(heads, N, D, generator=generator) * size).bfloat16()

    q, k = make(H, case.spread), make(H_KV)
    q_t, k_t = (make(H), make(H_KV)) if case.apart is None else (q + case.apart * make(H), k)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    region = torch.ones(N, N, dtype=torch.bool)
    if case.rectangle:
        region = torch.zeros(N, N, dtype=torch.bool)
        region[N // 2 :, : N // 2] = True
    target = _heads(q_t.double(), k_t.double(), causal).mean(0)

    heads = _heads(q.double(), k.double(), causal)
    g = 2 * (heads.mean(0) - target) * region
    keys = k.double().repeat_interleave(H // H_KV, 0)
    true = (heads * (g - (heads * g).sum(-1, keepdim=True))) @ keys

    p = _heads(q.float(), k.float(), causal)
    w = (2 * (p.mean(0) - target.float())).bfloat16().float() * region
    k32 = keys.float()
    delta = (p * w).sum(-1, keepdim=True)
    centre = (p.mean(0) * w).sum(-1, keepdim=True)
    about = p * (w - centre)
    ways = {
        "two passes": _round(p * (w - delta)) @ k32,
        "one pass": _round(p * w) @ k32 - delta * (_round(p) @ k32),
        "one pass, mean centre": _round(about) @ k32
        - about.sum(-1, keepdim=True) * (_round(p) @ k32),
        "one pass, online centre": _online(p, w, k32),
        "eager": _eager(q, k, q_t, k_t, causal, region) * H * D**0.5,
    }
    rows = slice(N // 2, N) if case.rectangle else slice(0, N)
    result = {}
    for name, got in ways.items():
        gap, size = (got.double() - true)[:, rows].norm(dim=-1), true[:, rows].norm(dim=-1)
        worst = (gap / size.clamp(min=1e-3 * float(size.mean()))).max()
        result[name] = (float(gap.norm() / size.norm()), float(worst))
    return result


def _heads(q: Tensor, k: Tensor, causal: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(H // H_KV, 0).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def _round(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _online(p: Tensor, w: Tensor, keys: Tensor) -> Tensor:
    """As `dq_kernel` with ONE_PASS, tile by tile."""
    a, o = torch.zeros_like(keys), torch.zeros_like(keys)
    moment = mass = delta = torch.zeros(*p.shape[:2], 1)
    for n in range(0, p.shape[-1], TILE):
        part, rw = p[..., n : n + TILE], p[..., n : n + TILE] * w[:, n : n + TILE]
        moment, mass = moment + rw.sum(-1, keepdim=True), mass + part.sum(-1, keepdim=True)
        before, delta = delta, moment / mass.clamp(min=1e-30)
        a = a + (before - delta) * o
        o = o + _round(part) @ keys[:, n : n + TILE]
        a = a + _round(rw - part * delta) @ keys[:, n : n + TILE]
    return a


def _eager(
    q: Tensor, k: Tensor, q_t: Tensor, k_t: Tensor, causal: Tensor, region: Tensor
) -> Tensor:
    def maps(query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.repeat_interleave(H // H_KV, 0).mT * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~causal, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).bfloat16().mean(0).float()

    leaf = q.clone().requires_grad_()
    gap = (maps(leaf, k) - maps(q_t, k_t)) * region
    factor = 2.0**20  # keeps bfloat16's small numbers away from zero
    (grad,) = torch.autograd.grad(gap.square().sum() * factor, leaf)
    return grad.float() / factor


def main() -> int:
    """Print the largest errors over all cases."""
    worst: dict[str, list[float]] = {}
    for case in CASES:
        found = errors(case)
        print(case, {name: tuple(f"{x:.1e}" for x in pair) for name, pair in found.items()})
        for name, pair in found.items():
            known = worst.setdefault(name, [0.0, 0.0])
            worst[name] = [max(old, new) for old, new in zip(known, pair, strict=True)]
    print("\n| way | all of dq | worst row |\n|---|---|---|")
    for name, (total, row) in worst.items():
        print(f"| {name} | {total:.1e} | {row:.1e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
