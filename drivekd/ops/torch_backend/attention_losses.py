"""The losses on one chunk of maps: each row's value, and the gradient with respect to the map.

Maps come as probabilities P or as logarithms of P. In the log domain the gradient is
U = dL/dlog P = P * dL/dP, which exists where P itself underflows.
"""

import math

import torch
from torch import Tensor

from drivekd.ops.torch_backend.attention_chunks import Visibility


def mse_rows(p_s: Tensor, p_t: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    """Sum of (P_s - P_t)^2 over each row's region cells, and dL/dP_s; overwrites p_s."""
    difference = p_s.sub_(p_t)
    if seen.cells is not None:
        difference.mul_(seen.cells)
    rows = torch.linalg.vecdot(difference, difference)
    return rows, difference.mul_(2)


def cosine_rows(p_s: Tensor, p_t: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    """1 - cos(P_s, P_t) of each row, and dL/dP_s, where no row of P underflows as a whole."""
    if seen.cells is not None:
        p_s, p_t = p_s * seen.cells, p_t * seen.cells
    top = p_s.amax(dim=-1, keepdim=True)
    # A row of padding is all zero here; whatever it is divided by, it must stay finite.
    top.masked_fill_(top == 0, 1)
    top_t = p_t.amax(dim=-1, keepdim=True)
    top_t.masked_fill_(top_t == 0, 1)
    rows, grad = _cosine(p_s / top, p_t / top_t)
    return _count(rows, grad.div_(top), seen)


def log_cosine_rows(log_s: Tensor, log_t: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    """1 - cos(P_s, P_t) of each row over the region, and dL/dlog P_s."""
    if seen.outside is not None:
        log_s, log_t = log_s + seen.outside, log_t + seen.outside
    p_s = exp_(log_s - log_s.amax(dim=-1, keepdim=True))
    p_t = exp_(log_t - log_t.amax(dim=-1, keepdim=True))
    rows, grad = _cosine(p_s, p_t)
    return _count(rows, grad.mul_(p_s), seen)


def log_kl_rows(log_s: Tensor, log_t: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    """KL(P_t || P_s) of each row, both renormalised over the region, and dL/dlog P_s."""
    if seen.outside is not None:
        log_s, log_t = log_s + seen.outside, log_t + seen.outside
        log_s, log_t = log_s.log_softmax(dim=-1), log_t.log_softmax(dim=-1)
    gap = log_t - log_s
    p_t = exp_(log_t.clone())
    grad = exp_(log_s.clone()).sub_(p_t)
    # Both maps sum to 1, so adding P_s - P_t to each cell's term changes nothing but its sign:
    # every term is then >= 0 and an error of log P enters in second order only.
    rows = torch.addcmul(grad, p_t, gap).sum(dim=-1)
    return _count(rows, grad, seen)


def exp_(logs: Tensor) -> Tensor:
    """In-place exp that never goes below the smallest normal number.

    Results under it change no sum, and a CPU's vector library is 10 to 50 times slower there.
    """
    return logs.clamp_(min=math.log(torch.finfo(logs.dtype).tiny) + 1).exp_()


def _cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos of rows whose maximum is 1, and its derivative with respect to a."""
    norm_a = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp_(min=1)
    norm_b = torch.linalg.vector_norm(b, dim=-1, keepdim=True).clamp_(min=1)
    a = a / norm_a
    # 1 - cos = |a/|a| - b/|b||^2 / 2 does not cancel when the rows are nearly parallel.
    gap = (b / norm_b).sub_(a)
    rows = torch.linalg.vecdot(gap, gap).mul_(0.5)
    grad = gap.addcmul_(a, rows[..., None]).div_(-norm_a)
    return rows, grad


def _count(rows: Tensor, grad: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    if seen.counted is None:
        return rows, grad
    return rows * seen.counted, grad.mul_(seen.counted[..., None])
