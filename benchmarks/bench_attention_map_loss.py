"""Loss and gradients of one layer pair: the torch backend beside eager maps with autograd.

`kept` reads a text-to-vision target that was made before, as training from a cache does.
"""

import pytest
import torch

from benchmarks.shapes import CPU_PAIRS
from drivekd.functional import (
    attention_map_loss,
    attention_map_target_loss,
    attention_map_targets,
)
from drivekd.reference import attention_map as reference
from drivekd.tokens import TokenLayout


def make(pair, region):
    generator = torch.Generator().manual_seed(0)

    def layer(heads, kv_heads, dim):
        shapes = [(pair.num_samples, pair.num_tokens, h, dim) for h in (heads, kv_heads)]
        return [torch.randn(s, generator=generator).transpose(1, 2) for s in shapes]

    student = [x.requires_grad_() for x in layer(*pair.student)]
    is_vision = torch.zeros(pair.num_samples, pair.num_tokens, dtype=torch.bool)
    is_vision[:, 2 : 2 + pair.num_vision] = True
    tokens = TokenLayout.from_masks(is_vision)
    return student, layer(*pair.teacher), tokens, region


def fused(student, teacher, tokens, region):
    loss = attention_map_loss(*student, *teacher, tokens, region=region)
    return loss, torch.autograd.grad(loss, student)


def kept(student, target, tokens, region):
    loss = attention_map_target_loss(*student, target, tokens)
    return loss, torch.autograd.grad(loss, student)


def eager(student, teacher, tokens, region):
    num_tokens = student[0].shape[2]
    seen = (
        torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        .tril()
        .expand(student[0].shape[0], -1, -1)
    )
    p_s = reference.attention_map(*student, seen)
    with torch.no_grad():
        p_t = reference.attention_map(*teacher, seen)
    cells = torch.ones_like(seen)
    if region == "text_to_vision":
        cells = tokens.is_text[:, :, None] & tokens.is_vision[:, None, :]
    per_sample = ((p_s - p_t).square() * cells).sum((1, 2)) / cells.sum((1, 2))
    loss = per_sample.mean()
    return loss, torch.autograd.grad(loss, student)


@pytest.mark.parametrize("way", [fused, kept, eager], ids=["fused", "kept", "eager"])
@pytest.mark.parametrize("region", ["full", "text_to_vision"])
@pytest.mark.parametrize("shape", CPU_PAIRS)
def bench_attention_map_loss(benchmark, shape, region, way):
    pair = CPU_PAIRS[shape]
    if region == "text_to_vision" and not pair.num_vision:
        pytest.skip("this shape has no vision tokens")
    if way is kept and region == "full":
        pytest.skip("of a full map only the largest cells are kept: another loss")
    case = make(pair, region)
    wanted, wanted_gradients = eager(*case)
    if way is kept:
        student, teacher, tokens, _ = case
        (target,) = attention_map_targets([teacher], [[0]], tokens, region=region)
        case = (student, target, tokens, region)
    loss, gradients = way(*case)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()  # both are float32, sums differ in order
    benchmark.group = f"{shape} {region}"
    benchmark(way, *case)
