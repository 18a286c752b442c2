"""Random calls of the layerwise attention-map loss, drawn from a seed, with their float64 twin.

A drawn call mixes what single tests vary one by one: heads, head dims, dtypes and memory orders of
both models, groups, windows, padding with holes, interleaved segments, scattered or empty regions,
given log-sum-exps, scales and weights.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd.functional import layerwise_attention_map_loss
from drivekd.reference import attention_map as reference
from drivekd.tokens import TokenLayout
from tests.helpers.attention import ROW_FLOOR, TOLERANCES

_NOTHING = 1e-7  # gradients below come from terms that cancel in every digit of a float32
DIMS = (1, 7, 16, 32, 33, 64, 80, 96, 128, 256)
ORDERS = ("transposed", "contiguous", "sliced", "expanded", "scattered")


@dataclass(frozen=True)
class Layer:
    """Queries and keys in float64, the same values as the call gets them, and their settings."""

    exact: tuple[Tensor, Tensor]
    given: tuple[Tensor, Tensor]
    scale: float | None
    has_lse: bool
    order: str

    @property
    def dtype(self) -> torch.dtype:
        return self.given[0].dtype

    def scores(self) -> Tensor:
        """(B, H, N, N) float64, scaled."""
        q, k = self.exact
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def lse(self, seen: Tensor) -> Tensor | None:
        """Natural log-sum-exp over what is seen, as a flash forward leaves it: -inf for nothing."""
        if not self.has_lse:
            return None
        return self.scores().masked_fill(~seen[:, None], -torch.inf).logsumexp(dim=-1).float()


@dataclass(frozen=True)
class Call:
    """One call of `layerwise_attention_map_loss`."""

    student: list[Layer]
    teacher: list[Layer]
    groups: list[list[int]]
    windows: list[int | None]
    tokens: TokenLayout
    region: str
    loss: str
    denominator: str
    causal: bool
    sample_weight: Tensor | None
    upstream: Tensor  # (L,) float64

    def __str__(self) -> str:
        def show(layer):
            (_, H, _, D), keys = layer.given[0].shape, layer.given[1].shape[1]
            return f"{H}/{keys}x{D} {layer.dtype} {layer.order} scale {layer.scale}"

        B, N = self.tokens.valid.shape
        return (
            f"{self.loss} {self.region} {self.denominator} B={B} N={N} causal={self.causal} "
            f"student {[show(x) for x in self.student]} teacher {[show(x) for x in self.teacher]} "
            f"groups {self.groups} windows {self.windows} "
            f"segments {self.tokens.segment_ids is not None} "
            f"valid {self.tokens.valid.sum(1).tolist()} text {self.tokens.is_text.sum(1).tolist()} "
            f"vision {self.tokens.is_vision.sum(1).tolist()} "
            f"lse {[x.has_lse for x in (*self.student, *self.teacher)]}"
        )

    @property
    def largest_score(self) -> float:
        """In units of log 2, as the exponents are."""
        return max(x.scores().abs().max().item() for x in (*self.student, *self.teacher)) * 1.4427

    def run(self, backend: str, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
        """Losses (L,) and the gradients in every q and k of the student, on the CPU."""
        leaves = [
            tuple(_moved(x, device).detach().requires_grad_() for x in layer.given)
            for layer in self.student
        ]
        teacher = [tuple(_moved(x, device) for x in layer.given) for layer in self.teacher]
        weight = self.sample_weight
        window_of_teacher = {
            index: window
            for group, window in zip(self.groups, self.windows, strict=True)
            for index in group
        }

        def lse(layer, window):
            result = layer.lse(self._seen(window))
            return None if result is None else result.to(device)

        losses = layerwise_attention_map_loss(
            leaves,
            teacher,
            self.groups,
            self.tokens.to(device),
            reduction="none",
            region=self.region,
            loss=self.loss,
            denominator=self.denominator,
            causal=self.causal,
            window=self.windows,
            sample_weight=None if weight is None else weight.to(device),
            scale_student=[layer.scale for layer in self.student],
            scale_teacher=[layer.scale for layer in self.teacher],
            lse_student=[lse(x, w) for x, w in zip(self.student, self.windows, strict=True)],
            lse_teacher=[lse(x, window_of_teacher[i]) for i, x in enumerate(self.teacher)],
            backend=backend,
        )
        grads = torch.autograd.grad(
            (losses * self.upstream.to(losses)).sum(), [x for pair in leaves for x in pair]
        )
        return losses.detach().cpu(), [grad.cpu() for grad in grads]

    def run_twin(self) -> tuple[Tensor, list[Tensor]]:
        """The same in float64, from the definition."""
        inside = self.region == "text_to_vision"
        losses, grads = [], []
        for i, layer in enumerate(self.student):
            q, k = (x.clone().requires_grad_() for x in layer.exact)
            group = [self.teacher[index] for index in self.groups[i]]
            loss = reference.attention_map_loss(
                q,
                k,
                [each.exact for each in group],
                loss=self.loss,
                denominator=self.denominator,
                is_text=self.tokens.is_text if inside else None,
                is_vision=self.tokens.is_vision if inside else None,
                valid=self.tokens.valid,
                segment_ids=self.tokens.segment_ids,
                causal=self.causal,
                window=self.windows[i],
                sample_weight=self.sample_weight,
                scale_student=layer.scale,
                scale_teacher=[each.scale for each in group],
            )
            losses.append(loss.detach())
            grads += torch.autograd.grad(self.upstream[i] * loss, (q, k))
        return torch.stack(losses), grads

    def _seen(self, window: int | None) -> Tensor:
        return reference.visible_cells(
            self.tokens.num_tokens,
            valid=self.tokens.valid,
            segment_ids=self.tokens.segment_ids,
            causal=self.causal,
            window=window,
        )


def excess(call: Call, losses: Tensor, grads: list[Tensor]) -> dict[str, float]:
    """Worst errors against the twin in units of what is allowed: losses, gradients, rows of them.

    Allowed is what `tests.helpers.attention` allows, and what rounding the scores brings: exponents
    of size S are float32 numbers, good to S 2^-24, and so is every probability, relatively. Where a
    row's terms cancel (nearly all of the softmax on one key), that stands beside the largest row.
    """
    wanted, wanted_grads = call.run_twin()
    rounding = 2 * call.largest_score * 2**-24
    unit = torch.finfo(torch.float32).eps
    error = (losses.double() - wanted).abs()
    # What is 0 in theory (equal maps): errors of the exponents enter in second order, but with a
    # given log-sum-exp a P of nearly 1 and its logarithm are rounded one by one.
    allowed = (5e-6 + rounding) * wanted.abs() + unit**1.5 + rounding**2
    if call.loss == "kl" and any(layer.has_lse for layer in (*call.student, *call.teacher)):
        allowed = allowed + unit
    worst = {"loss": (error / allowed).max().item()}
    worst["gradient"] = worst["row"] = 0.0
    for i, (got, want) in enumerate(zip(grads, wanted_grads, strict=True)):
        layer, upstream = call.student[i // 2], call.upstream[i // 2].abs()
        _, whole_bound, row_bound = TOLERANCES[got.dtype]
        if not torch.isfinite(got).all():
            return {**worst, "gradient": math.inf}
        error, sizes = (got.double() - want).norm(dim=-1), want.norm(dim=-1)
        unit = torch.finfo(torch.float32).eps
        if want.abs().max() <= _NOTHING * upstream:
            unit = (unit + rounding) * upstream * max(x.norm(dim=-1).max() for x in layer.exact)
        whole = error.norm() / ((whole_bound + rounding) * want.norm() + unit)
        floor = (ROW_FLOOR[got.dtype] * row_bound + rounding) * sizes.max()
        rows = error / (row_bound * sizes + floor + unit)
        worst["gradient"] = max(worst["gradient"], whole.item())
        worst["row"] = max(worst["row"], rows.max().item())
    return worst


def draw_call(seed: int, *, max_tokens: int = 150, max_spread: float = 4.0) -> Call:
    """A random call; the same seed gives the same call. One in ten may have nothing to count."""
    pick = random.Random(seed)
    trivial = pick.random() < 0.1
    generator = torch.Generator().manual_seed(seed)
    while True:
        call = _draw(pick, generator, max_tokens, max_spread)
        _, grads = call.run_twin()
        if trivial or all(grad.abs().max() > _NOTHING for grad in grads):
            return _with_upstream(call, grads)


def _draw(pick, generator, max_tokens, max_spread) -> Call:
    B, N = pick.choice((1, 1, 2, 3)), pick.choice((1, 2, 15, 17, 33, 48, 63, 65, 90, 129, 150))
    N = min(N, max_tokens)
    tokens = _draw_tokens(pick, B, N)

    def layers(count, heads, dims, dtypes, spreads):
        return [
            _draw_layer(
                pick,
                generator,
                (B, N),
                pick.choice(heads),
                pick.choice(dims),
                pick.choice(dtypes),
                pick.choice(spreads),
            )
            for _ in range(count)
        ]

    spreads = (1.0, 1.0, min(2.0, max_spread), max_spread)
    dims = DIMS if N <= 65 else DIMS[:6]
    heads = ((1, 1), (2, 1), (3, 3), (4, 2), (7, 1)) if N <= 33 else ((1, 1), (2, 1), (2, 2))
    dtypes = (torch.float32, torch.float16)
    num_student, num_teacher = pick.choice((1, 1, 2)), pick.choice((1, 2, 3))
    student = layers(num_student, heads, dims, dtypes, spreads)
    teacher = layers(num_teacher, heads, dims, dtypes, spreads)
    groups = [
        [pick.randrange(num_teacher) for _ in range(pick.choice((1, 1, 2, 3)))]
        for _ in range(num_student)
    ]
    windows = [pick.choice((None, None, None, 1, 5, 20, N)) for _ in range(num_student)]
    # A teacher's log-sum-exp belongs to one window.
    if len(set(windows)) > 1:
        teacher = [Layer(x.exact, x.given, x.scale, False, x.order) for x in teacher]
    used = sorted({index for group in groups for index in group})
    teacher = [teacher[index] for index in used]
    groups = [[used.index(index) for index in group] for group in groups]
    weight = None
    if pick.random() < 0.4:
        weight = torch.rand(B, generator=generator) + 0.25
        weight[pick.randrange(B)] = pick.choice((0.0, 1.0))
    return Call(
        student,
        teacher,
        groups,
        windows,
        tokens,
        region=pick.choice(("full", "text_to_vision")),
        loss=pick.choice(("mse", "cosine", "kl")),
        denominator=pick.choice(("official", "live")),
        causal=pick.random() < 0.75,
        sample_weight=weight,
        upstream=torch.ones(num_student, dtype=torch.float64),
    )


def _with_upstream(call: Call, grads: list[Tensor]) -> Call:
    """Upstream gradients that bring each layer's largest gradient to a few dozen.

    As a loss scale does in training: most gradients are below the smallest number of float16.
    """
    upstream = []
    for i in range(len(call.student)):
        largest = max(grad.abs().max().item() for grad in grads[2 * i : 2 * i + 2])
        exponent = 5 - math.floor(math.log2(largest)) if largest > _NOTHING else 0
        upstream.append((-1) ** i * 1.37 * 2.0**exponent)
    return Call(**{**vars(call), "upstream": torch.tensor(upstream, dtype=torch.float64)})


def _draw_layer(pick, generator, shape, heads, dim, dtype, spread) -> Layer:
    (B, N), (num_heads, num_keys) = shape, heads
    order = pick.choice(ORDERS)
    q = spread * torch.randn(B, N, num_heads, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(B, N, num_keys, dim, generator=generator, dtype=torch.float64)
    if order == "expanded":
        q, k = q[:1].expand_as(q), k[:1].expand_as(k)
    given = tuple(_ordered(x.to(dtype), order) for x in (q, k))
    exact = tuple(x.double().contiguous() for x in given)
    scale = pick.choice((None, None, 0.5 * dim**-0.5, 1.3 * dim**-0.5))
    return Layer(exact, given, scale, pick.random() < 0.3, order)


def _moved(x: Tensor, device: str) -> Tensor:
    """The same on a device, its strides and the place in its memory too, which `to` gives up."""
    whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _ordered(x: Tensor, order: str) -> Tensor:
    """(B, N, heads, D) as (B, heads, N, D) in one of several memory orders."""
    if order == "transposed":
        return x.contiguous().transpose(1, 2)
    if order == "contiguous":
        return x.transpose(1, 2).contiguous()
    if order == "expanded":
        return x[:1].contiguous().transpose(1, 2).expand(x.shape[0], -1, -1, -1)
    B, N, heads, D = x.shape
    if order == "sliced":  # a part of a wider projection, starting at an odd address
        wide = torch.full((B, N, heads + 2, D + 3), torch.nan, dtype=x.dtype)
        wide[:, :, 1:-1, 1 : D + 1] = x
        return wide[:, :, 1:-1, 1 : D + 1].transpose(1, 2)
    return x.permute(2, 0, 3, 1).contiguous().permute(1, 0, 3, 2)


def _draw_tokens(pick, B: int, N: int) -> TokenLayout:
    valid = torch.ones(B, N, dtype=torch.bool)
    padding = pick.choice(("none", "left", "right", "holes", "whole sample"))
    for b in range(B):
        length = pick.randrange((N + 1) // 2)
        if padding == "left":
            valid[b, :length] = False
        elif padding == "right":
            valid[b, N - length :] = False
        elif padding == "holes":
            for _ in range(pick.choice((1, 2, 5))):
                start = pick.randrange(N)
                valid[b, start : start + pick.choice((1, 3, 20))] = False
    if padding == "whole sample":
        valid[pick.randrange(B)] = False
    segment_ids = None
    kind = pick.choice(("none", "none", "none", "runs", "runs", "interleaved", "one each"))
    position = torch.arange(N)
    if kind == "runs":
        cuts = torch.tensor(sorted(pick.randrange(N + 1) for _ in range(3)))
        segment_ids = torch.searchsorted(cuts, position, right=True)
        segment_ids = (7 - 10 * segment_ids).expand(B, N)
    elif kind == "interleaved":
        segment_ids = (position // pick.choice((1, 3, 11)) % 2).expand(B, N)
    elif kind == "one each":
        segment_ids = position.expand(B, N)
    is_vision = torch.zeros_like(valid)
    is_text = torch.zeros_like(valid)
    layout = pick.choice(("block",) * 5 + ("scattered",) * 3 + ("no vision", "no text"))
    for b in range(B):
        if layout == "scattered":
            kinds = torch.tensor([pick.randrange(3) for _ in range(N)])
            is_vision[b], is_text[b] = kinds == 0, kinds == 1
        else:
            start = pick.randrange((N + 2) // 3)
            stop = start + 1 + pick.randrange((N + 1) // 2)
            is_vision[b, start:stop] = layout != "no vision"
            is_text[b] = ~is_vision[b] if layout != "no text" else False
    is_vision, is_text = is_vision & valid, is_text & valid
    return TokenLayout.from_masks(is_vision, is_text=is_text, valid=valid, segment_ids=segment_ids)
