"""What is measured of one record's maps and logits: plain functions of tensors.

The paper names these measures in a figure's caption and gives no formulas in public: the
definitions here are ours. Positions are normalised, so that records of different lengths can be
compared: token r of n covers the stretch from r/n to (r+1)/n, and what it has is shared out to bins
by overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

VISION_BINS = 64  # of the distribution over vision tokens
MAP_BINS = 8  # of the vision tokens, and as many of the text tokens, of a whole map
MARGIN_BINS = 10  # of an answer
SINK_FRACTION = 64  # one token in so many is looked at as a sink

REGIONS = ("text_to_vision", "full")


def bin_shares(count: int, bins: int) -> Tensor:
    """Which share of each of `count` tokens in a row lies in each of `bins` equal stretches.

    Returns:
        (count, bins) float64; rows sum to 1, columns to count / bins.
    """
    token = torch.arange(count, dtype=torch.float64)[:, None] / count
    edge = torch.arange(bins, dtype=torch.float64)[None, :] / bins
    overlap = torch.minimum(token + 1 / count, edge + 1 / bins) - torch.maximum(token, edge)
    shares = overlap.clamp(min=0) * count
    return shares / shares.sum(1, keepdim=True)


def generalized_margin(logits: Tensor, labels: Tensor, *, tau: float = 1.0) -> Tensor:
    """How far each right token is ahead of all others: `z_y - tau * log sum_{v != y} e^{z_v/tau}`.

    Our definition of the paper's generalized margin. At tau = 1 it is the log-odds of the right
    token, log(p / (1 - p)); for tau towards 0 it becomes its logit minus the best other one.

    Args:
        logits: (A, V) of the positions that predict the tokens of an answer.
        labels: (A,) int64, those tokens.
        tau: Temperature, above 0.

    Returns:
        (A,) in units of logits, float32, float64 for float64 logits.
    """
    if tau <= 0:
        raise ValueError(f"tau is {tau}, wanted a number above 0")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    right = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], -torch.inf)
    return right[:, 0] - tau * torch.logsumexp(others / tau, dim=1)


def along_answer(values: Tensor) -> Tensor:
    """(A,) values of an answer's tokens as (MARGIN_BINS,) means over its stretches."""
    shares = bin_shares(len(values), MARGIN_BINS)
    return (shares.T @ values.double().cpu()) / shares.sum(0)


@dataclass(frozen=True)
class MapFeatures:
    """What is kept of the head-mean maps of one record, by layer.

    "Asking" rows are the text tokens behind the last vision token: they see all of the picture.

    Attributes:
        vision: (L, VISION_BINS) float64, the mean over asking rows of their attention to vision
            tokens, each row normalised to 1; vision tokens in the order of the sequence.
        pooled: (L, (2 MAP_BINS)^2) float64, the whole map: queries and keys are pooled by position
            among the vision tokens, and among the text tokens; mean over a bin's queries of the
            attention that falls into a bin of keys.
        vision_mass: (L,) float64, share of an asking row's attention that falls on vision tokens.
        sink_share: (L,) float64, the share of that which falls on the few vision tokens that all
            asking rows together attend to most: one in SINK_FRACTION, rounded up.
        row_share: (L,) float64, the share that falls on as many tokens if each row has its own:
            never below `sink_share`, and equal to it where all rows look at the same few.
        sink_floor: What `sink_share` is where attention to vision tokens is even.
    """

    vision: Tensor
    pooled: Tensor
    vision_mass: Tensor
    sink_share: Tensor
    row_share: Tensor
    sink_floor: float


class MapSums:
    """`MapFeatures` of one record, from chunks of rows; no map is kept.

    Args:
        is_vision: (N,) bool.
        is_text: (N,) bool, at least one of them behind the last vision token.
        num_layers: L.
    """

    def __init__(self, is_vision: Tensor, is_text: Tensor, num_layers: int) -> None:
        place = is_vision.device
        num_tokens, self._num_vision = len(is_vision), int(is_vision.sum())
        self._vision = is_vision
        self._asking = is_text.clone()
        self._asking[: int(is_vision.nonzero().max()) + 1] = False
        self._bins = torch.zeros(num_tokens, 2 * MAP_BINS, dtype=torch.float64, device=place)
        for first, mask in ((0, is_vision), (MAP_BINS, is_text)):
            shares = bin_shares(int(mask.sum()), MAP_BINS).to(place)
            self._bins[mask, first : first + MAP_BINS] = shares
        self._few = math.ceil(self._num_vision / SINK_FRACTION)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_layers, *shape, dtype=torch.float64, device=place)

        self._pooled = zeros(2 * MAP_BINS, 2 * MAP_BINS)
        self._columns = zeros(self._num_vision)
        self._mass, self._own, self._count, self._seeing = zeros(), zeros(), zeros(), zeros()

    def add(self, rows: slice, maps: Tensor) -> None:
        """Add (L, R, N) rows of the layers' head-mean maps."""
        keys = (maps @ self._bins.to(maps.dtype)).double()
        self._pooled += torch.einsum("rb,lrc->lbc", self._bins[rows], keys)
        asking = self._asking[rows]
        seen = maps[:, asking][:, :, self._vision].double()  # (L, asking, V)
        mass = seen.sum(-1)
        is_seeing = mass > 0  # behind a window's end there may be nothing to see
        shares = seen / mass.where(is_seeing, 1)[..., None]
        self._columns += shares.sum(1)
        self._own += shares.topk(self._few, dim=-1).values.sum((1, 2))
        self._mass += mass.sum(1)
        self._seeing += is_seeing.sum(1)
        self._count += int(asking.sum())

    def result(self) -> MapFeatures:
        """The features, on the CPU; NaN where no row of a layer sees a vision token."""
        per_row = self._columns / self._seeing[:, None]
        vision = per_row.cpu() @ bin_shares(self._num_vision, VISION_BINS)
        weights = self._bins.sum(0)  # how many queries a bin has
        pooled = self._pooled / weights[:, None].clamp(min=1e-12)
        return MapFeatures(
            vision,
            pooled.flatten(1).cpu(),
            (self._mass / self._count).cpu(),
            per_row.topk(self._few, dim=-1).values.sum(-1).cpu(),
            (self._own / self._seeing).cpu(),
            self._few / self._num_vision,
        )


class PairCosines:
    """Cosine between the maps of every student layer and every teacher layer, row by row.

    The mean over a region's rows of the cosine of the two rows over the region's keys: 1 minus
    the loss "cosine" of `drivekd.functional.attention_map_loss` on that pair. Rows in which either
    layer has no attention to the region are left out.

    Args:
        is_vision: (N,) bool.
        is_text: (N,) bool.
        shape: (L_s, L_t).
    """

    def __init__(self, is_vision: Tensor, is_text: Tensor, shape: tuple[int, int]) -> None:
        self._vision, self._text = is_vision, is_text
        self._sums = {
            region: torch.zeros(2, *shape, dtype=torch.float64, device=is_vision.device)
            for region in REGIONS
        }

    def add(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        """Add (L_s, R, N) and (L_t, R, N) rows of head-mean maps."""
        self._add("full", student, teacher)
        text = self._text[rows]
        self._add("text_to_vision", *(m[:, text][:, :, self._vision] for m in (student, teacher)))

    def _add(self, region: str, student: Tensor, teacher: Tensor) -> None:
        (own, own_alive), (other, other_alive) = (_unit_rows(maps) for maps in (student, teacher))
        self._sums[region][0] += torch.einsum("srn,trn->st", own, other).double()
        self._sums[region][1] += own_alive @ other_alive.T

    def result(self) -> dict[str, Tensor]:
        """(L_s, L_t) float64 on the CPU by region; NaN where no row has anything to compare."""
        return {region: (total / count).cpu() for region, (total, count) in self._sums.items()}


def _unit_rows(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, or zeros; and (L, R) float64, which are not zeros."""
    top = maps.amax(-1, keepdim=True)
    scaled = maps / top.where(top > 0, 1)  # first, so that no square underflows
    norm = scaled.norm(dim=-1, keepdim=True)
    return scaled / norm.where(norm > 0, 1), (norm > 0).squeeze(-1).double()
