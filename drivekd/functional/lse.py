"""Given log-sum-exps: do they fit the call, and under debug, are they what they should be.

A log-sum-exp of the wrong kind has a legal shape and dtype and gives a plausible, wrong loss.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drivekd.functional.layers import ModelLayers
from drivekd.ops.attention_inputs import visible_span
from drivekd.tokens import TokenLayout
from drivekd.validation import debugging

ROWS = 4  # of each sample, every head of them: the first, the last, and evenly in between
# Probabilities are off by as much as the log-sum-exp: one percent, and what scores of 16-bit or
# TF32 products are off by.
_ABSOLUTE, _RELATIVE = 1e-2, 1e-3


@dataclass(frozen=True)
class SeenBy:
    """What rows see: the settings of one layer, and the region in which they are compared."""

    layout: TokenLayout | None
    causal: bool
    window: int | None
    region: str


def check_log_sum_exps(
    student: ModelLayers,
    teacher: ModelLayers,
    groups: Sequence[tuple[int, ...]],
    windows: Sequence[int | None],
    seen_by: SeenBy,
) -> None:
    """Refuse log-sum-exps that are not the natural ones over all visible keys.

    Under `DRIVEKD_DEBUG=1` some rows are recomputed in float64 and the result is read back. Which
    rows follows from shapes and tokens alone: of each sample the first, the last and two in between
    of those that the region compares (text rows, or all valid ones), with all their heads.

    Args:
        student: The student's layers, with their log-sum-exps and what those are called.
        teacher: The teacher's.
        groups: Teacher layers of each student layer.
        windows: Window of each student layer, and so of its teachers.
        seen_by: What holds for all layers; its window is not read.

    Raises:
        ValueError: A teacher layer with a log-sum-exp, which belongs to one window, serves layers
            of two. Under debug: a row is wrong; the message names the argument, sample, head and
            row, what came and what was wanted, and the mistake if it is one that is known.
    """
    num_tokens = student.queries[0].shape[2]
    widths = [None if each is None or each >= num_tokens else each for each in windows]
    serves: dict[int, int | None] = {}
    for group, width in zip(groups, widths, strict=True):
        for index in group:
            other = serves.setdefault(index, width)
            if other != width and teacher.lses[index] is not None:
                raise ValueError(
                    f"{teacher.lse_names[index]} is given, but its layer serves student layers of "
                    f"windows {other} and {width}; a log-sum-exp belongs to one window: leave it "
                    "out, or give the layer twice"
                )
    if not debugging():
        return
    for i, width in enumerate(widths):
        _check_layer(student, i, replace(seen_by, window=width))
    for i, width in serves.items():
        _check_layer(teacher, i, replace(seen_by, window=width))


def _check_layer(model: ModelLayers, i: int, settings: SeenBy) -> None:
    query, lse, scale = model.queries[i], model.lses[i], model.scales[i]
    if lse is None:
        return
    rows, usable = _chosen_rows(query, settings)
    given = _take(lse[..., None], rows)[..., 0].to(_exact(query))
    raw, seen = _scores(query, model.keys[i], rows), _seen(query, rows, settings)
    wanted = _log_sum_exp(scale * raw, seen)
    wrong = ~_close(given, wanted, scale * raw, seen) & usable[:, None, :]
    if not bool(wrong.any()):
        return
    sample, head, slot = (int(index) for index in wrong.nonzero()[0])
    place = (sample, head, slot)
    raise ValueError(
        f"{model.lse_names[i]} is {float(given[place]):.6g} at sample {sample}, head {head}, row "
        f"{int(rows[sample, slot])}; wanted {float(wanted[place]):.6g}, the natural logarithm of "
        "the sum over all visible keys of exp(scale * q.k) "
        f"({_diagnosis(given, raw, scale, rows, usable, query, settings)}; checked on some rows "
        "under DRIVEKD_DEBUG=1)"
    )


def _diagnosis(
    given: Tensor,
    raw: Tensor,
    scale: float,
    rows: Tensor,
    usable: Tensor,
    query: Tensor,
    settings: SeenBy,
) -> str:
    """Which known mistake all checked rows fit."""
    for name, scores, seen, base in _mistakes(raw, scale, rows, query, settings):
        wanted = _log_sum_exp(scores, seen) / math.log(base)
        if bool((_close(given, wanted, scores, seen) | ~usable[:, None, :]).all()):
            return name
    if not bool(given.isfinite()[usable[:, None, :].expand_as(given)].all()):
        return "it is not finite"
    return "it fits none of the usual mistakes: of another layer, batch or scale?"


def _mistakes(
    raw: Tensor, scale: float, rows: Tensor, query: Tensor, settings: SeenBy
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Names of mistakes, and the scores, visible keys and base of each."""
    layout, causal, window = settings.layout, settings.causal, settings.window
    scaled, seen = scale * raw, _seen(query, rows, settings)
    yield "it is in base 2: multiply it by ln 2 = 0.693147", scaled, seen, 2.0
    yield f"it is of scores without the scale {scale:.6g}", raw, seen, math.e
    if layout is not None:
        vision = seen & layout.is_vision[:, None, :]
        yield "it is over the vision keys only: wanted all visible keys", scaled, vision, math.e
        everything = _seen(query, rows, SeenBy(None, causal, window, settings.region))
        yield "it is over keys of padding or other segments, too", scaled, everything, math.e
    if causal:
        later = _seen(query, rows, SeenBy(layout, False, window, settings.region))
        yield "it is over later keys, too, but causal is True", scaled, later, math.e
    if window is not None:
        far = _seen(query, rows, SeenBy(layout, causal, None, settings.region))
        yield f"it is over keys outside the window of {window} tokens, too", scaled, far, math.e


def _chosen_rows(query: Tensor, settings: SeenBy) -> tuple[Tensor, Tensor]:
    """(B, R) tokens and whether each is a row that counts: samples may have none."""
    B, _, N, _ = query.shape
    counts = torch.ones(B, N, dtype=torch.bool, device=query.device)
    if settings.layout is not None:
        counts = settings.layout.valid
        if settings.region == "text_to_vision":
            counts = counts & settings.layout.is_text
    order = counts.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    steps = torch.linspace(0, 1, ROWS, dtype=torch.float64, device=query.device)
    number = counts.sum(dim=1, keepdim=True)
    slots = ((number - 1).clamp(min=0) * steps).round().long()
    return order.gather(1, slots), (number > 0).expand(B, ROWS)


def _scores(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """(B, H, R, N) without the scale."""
    exact = _exact(query)
    chosen, key = _take(query, rows).to(exact), key.detach().to(exact)
    B, H, R, D = chosen.shape
    grouped = chosen.reshape(B, key.shape[1], -1, D)  # query heads of a key head, one by one
    return (grouped @ key.mT).reshape(B, H, R, key.shape[2])


def _seen(query: Tensor, rows: Tensor, settings: SeenBy) -> Tensor:
    """(B, R, N) bool."""
    N, layout = query.shape[2], settings.layout
    position = rows[:, :, None]
    last = torch.full_like(position, N - 1)
    low, high = visible_span(position, settings.window, causal=settings.causal, last=last)
    key = torch.arange(N, device=query.device)
    seen = (low <= key) & (key <= high)
    if layout is not None:
        seen = seen & layout.valid[:, None, :]
        if layout.segment_ids is not None:
            own = layout.segment_ids.gather(1, rows)
            seen = seen & (own[:, :, None] == layout.segment_ids[:, None, :])
    return seen


def _log_sum_exp(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(dim=-1)


def _close(given: Tensor, wanted: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
    size = scores.masked_fill(~seen[:, None], 0).abs().amax(dim=-1)
    return (given == wanted) | ((given - wanted).abs() <= _ABSOLUTE + _RELATIVE * size)


def _take(heads: Tensor, rows: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, H, R, D)."""
    index = rows[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3])
    return heads.detach().gather(2, index)


def _exact(like: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
