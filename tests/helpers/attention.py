"""Seeded inputs of the attention-map losses, their float64 twin, and how close is close."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drivekd.functional import attention_map_loss
from drivekd.reference import attention_map as reference
from drivekd.tokens import TokenLayout


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and head dim of one model."""

    queries: int
    keys: int
    dim: int


@dataclass(frozen=True)
class Case:
    """Inputs (in float64, already rounded to `dtype`) and settings of one call."""

    student: tuple[Tensor, Tensor]
    teachers: list[tuple[Tensor, Tensor]]
    tokens: TokenLayout
    dtype: torch.dtype
    settings: dict = field(default_factory=dict)
    sample_weight: Tensor | None = None

    def but(self, **settings) -> "Case":
        return replace(self, settings={**self.settings, **settings})

    def with_tokens(self, tokens: TokenLayout) -> "Case":
        return replace(self, tokens=tokens)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Case":
        """The same values in another memory order."""
        pairs = [tuple(change(each) for each in pair) for pair in (self.student, *self.teachers)]
        return replace(self, student=pairs[0], teachers=pairs[1:])


def make_case(
    *,
    num_samples=2,
    num_tokens=33,
    student=Heads(4, 2, 16),
    teacher=Heads(6, 3, 24),
    num_teachers=1,
    dtype=torch.float64,
    padding=None,
    segments=None,
    vision=(0.25, 0.6),
    weighted=False,
    spread=1.0,
    seed=0,
    **settings,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def pair(heads):
        def make(count):
            shape = (num_samples, num_tokens, count, heads.dim)  # as transformers lays them out
            values = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).double().transpose(1, 2)

        return make(heads.queries), make(heads.keys)

    valid = torch.ones(num_samples, num_tokens, dtype=torch.bool)
    for sample in range(num_samples):
        length = (sample + 1) * num_tokens // (2 * num_samples)
        if padding == "left":
            valid[sample, :length] = False
        elif padding == "right":
            valid[sample, num_tokens - length :] = False
    first, last = (int(share * num_tokens) for share in vision)
    is_vision = torch.zeros_like(valid)
    is_vision[:, first:last] = True
    segment_ids = None
    if segments is not None:
        segment_ids = (torch.arange(num_tokens) * segments // num_tokens).expand(num_samples, -1)
    tokens = TokenLayout.from_masks(is_vision & valid, valid=valid, segment_ids=segment_ids)
    weight = torch.rand(num_samples, generator=generator) + 0.5 if weighted else None
    teachers = [pair(teacher) for _ in range(num_teachers)]
    return Case(pair(student), teachers, tokens, dtype, settings, weight)


def run(
    case: Case, upstream: float = 1.7, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dq and dk (on the CPU) of the functional under test, upstream gradient not 1."""
    q, k = (each.to(device, case.dtype, copy=True).requires_grad_() for each in case.student)
    weight = case.sample_weight
    loss = attention_map_loss(
        q,
        k,
        [each.to(device, case.dtype) for each, _ in case.teachers],
        [each.to(device, case.dtype) for _, each in case.teachers],
        case.tokens.to(device),
        sample_weight=None if weight is None else weight.to(device),
        **case.settings,
    )
    dq, dk = torch.autograd.grad(upstream * loss, (q, k))
    return loss.detach().cpu(), dq.cpu(), dk.cpu()


NOT_OF_THE_TWIN = ("backend", "lse_student", "lse_teacher")


def run_twin(case: Case, upstream: float = 1.7) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the float64 twin."""
    q, k = (each.clone().requires_grad_() for each in case.student)
    settings = {name: each for name, each in case.settings.items() if name not in NOT_OF_THE_TWIN}
    inside = settings.pop("region", "full") == "text_to_vision"
    loss = reference.attention_map_loss(
        q,
        k,
        case.teachers,
        valid=case.tokens.valid,
        segment_ids=case.tokens.segment_ids,
        is_text=case.tokens.is_text if inside else None,
        is_vision=case.tokens.is_vision if inside else None,
        sample_weight=case.sample_weight,
        **settings,
    )
    return loss, *torch.autograd.grad(upstream * loss, (q, k))


# dtype -> (loss, gradient as a whole, each row's gradient), all relative. float64: a few hundred
# roundings. float32: the project's promise. 16 bit: the inputs are the twin's, so what is left is
# the rounding of the gradient to 8 (bfloat16) or 11 bits (float16).
TOLERANCES = {
    torch.float64: (1e-10, 1e-10, 1e-8),
    torch.float32: (5e-6, 2e-5, 5e-4),
    torch.bfloat16: (5e-6, 4e-3, 8e-3),
    torch.float16: (5e-6, 5e-4, 5e-3),
}
# A row is compared relative to itself, but not below this share of the largest row: a row whose
# terms cancel exactly in theory is left with their rounding error.
ROW_FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def assert_matches_twin(case: Case) -> None:
    """Loss, gradients and every single row of them within the table's bounds."""
    assert_close(run(case), run_twin(case), case.dtype)


def assert_close(
    actual: tuple[Tensor, Tensor, Tensor],
    expected: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    bounds: tuple[float, float, float] | None = None,
) -> None:
    """The same of given results; `bounds` instead of the table's."""
    loss_bound, whole_bound, row_bound = bounds or TOLERANCES[dtype]
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # What is 0 in theory may be a rounding error of terms of the size of 1.
    tiny = torch.finfo(actual[0].dtype).eps
    assert abs(actual[0].double() - expected[0]) <= loss_bound * expected[0].abs() + tiny**1.5
    for name, got, want in zip(("dq", "dk"), actual[1:], expected[1:], strict=True):
        assert got.dtype == dtype
        assert torch.isfinite(got).all(), name
        error = (got.double() - want).norm()
        assert error <= whole_bound * want.norm() + tiny**1.5, f"{name}: {error / want.norm()}"
        rows, sizes = (got.double() - want).norm(dim=-1), want.norm(dim=-1)
        floor = ROW_FLOOR[dtype] * sizes.max()
        worst = (rows / (sizes + floor + tiny**1.5)).max()
        assert worst <= row_bound, f"{name}, worst row: {worst}"
