"""What a backend of the attention-map ops is given, and how many cells and rows count.

Counting is shared by all backends: it is exact integer arithmetic of O(B N log N) on the layout
alone, so that what counts is a property of the tokens, never of the data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """Post-RoPE queries and keys of one layer of one model."""

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, H_kv, N, D)
    scale: float
    lse: Tensor | None  # (B, H, N), natural log, over all visible keys


@dataclass(frozen=True)
class AttentionLayout:
    """Which keys a query sees, and which cells of the map belong to the region."""

    batch_size: int
    num_tokens: int
    device: torch.device
    causal: bool
    valid: Tensor | None  # (B, N) bool; None: every token is valid
    segment_ids: Tensor | None  # (B, N) int; None: one segment a row
    is_text: Tensor | None  # (B, N) bool, the region's rows; None: every valid row
    is_vision: Tensor | None  # (B, N) bool, the region's keys; None: every valid key

    @property
    def region_rows(self) -> Tensor | None:
        """(B, N) bool, the region's valid rows; None: all."""
        return _both(self.is_text, self.valid)

    @property
    def region_keys(self) -> Tensor | None:
        """(B, N) bool, the region's valid keys; None: all."""
        return _both(self.is_vision, self.valid)

    def segment_ranks(self) -> Tensor | None:
        """(B, N) int64 in [0, N), equal where segments are equal; None: one segment a row."""
        if self.segment_ids is None:
            return None
        ordered = self.segment_ids.sort(dim=-1).values
        return torch.searchsorted(ordered, self.segment_ids.contiguous())

    def count_cells(self, window: int | None, *, visible: bool) -> Tensor:
        """Region cells of each row, (B, N) int64: all of its segment, or only the visible ones."""
        rows, keys = self.region_rows, self.region_keys
        shape = (self.batch_size, self.num_tokens)
        position = torch.arange(self.num_tokens, device=self.device).expand(shape)
        if keys is None:
            keys = torch.ones(shape, dtype=torch.bool, device=self.device)
        lower, upper = torch.zeros_like(position), torch.full_like(position, self.num_tokens - 1)
        if visible:
            lower, upper = visible_span(position, window, causal=self.causal, last=upper)
        counts = self._count_between(keys, lower, upper)
        return counts if rows is None else counts * rows

    def _count_between(self, keys: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """How many chosen keys of a row's own segment lie in [lower, upper], (B, N) int64."""
        ranks = self.segment_ranks()
        if ranks is None:
            before = torch.nn.functional.pad(keys.cumsum(dim=-1), (1, 0))
            return before.gather(-1, upper + 1) - before.gather(-1, lower)
        base = ranks * self.num_tokens
        position = torch.arange(self.num_tokens, device=self.device)
        nowhere = self.num_tokens * self.num_tokens
        places = torch.where(keys, base + position, nowhere).sort(dim=-1).values
        after = torch.searchsorted(places, base + upper, right=True)
        return after - torch.searchsorted(places, base + lower)


@dataclass(frozen=True)
class GivenTarget:
    """The target map of one student layer, given instead of teachers; see drivekd.functional."""

    values: Tensor  # (B, T, V) of the region's rows and keys, or (B, N, K) of the full map's rows
    exponents: Tensor  # (B, T) or (B, N) integers: a row's values are in units of 2^exponent
    indices: Tensor | None  # (B, N, K) integers: which keys, negative for none; None: a rectangle
    rest: Tensor | None  # (B, N): mass of a row's cells that are not given


@dataclass(frozen=True)
class AttentionMapLossInputs:
    """Everything of one call of the layerwise loss; lists are per student or teacher layer."""

    student: tuple[AttentionLayer, ...]
    teacher: tuple[AttentionLayer, ...]
    groups: tuple[tuple[int, ...], ...]  # teacher layers of each student layer
    windows: tuple[int | None, ...]  # of each student layer, for both models
    layout: AttentionLayout
    loss: str  # "mse", "cosine" or "kl"
    needs_dq: tuple[bool, ...]
    needs_dk: tuple[bool, ...]
    dtype: torch.dtype  # of workspaces, sums and gradients: float32 or float64
    given: tuple[GivenTarget, ...] = ()  # one for each student layer, instead of teachers

    def denominators(self, denominator: str) -> Tensor:
        """Cells (mse) or rows (cosine, kl) that count in each layer and sample, (L, B) int64."""
        per_window = {
            window: self._denominator(window, denominator) for window in set(self.windows)
        }
        return torch.stack([per_window[window] for window in self.windows])

    def _denominator(self, window: int | None, denominator: str) -> Tensor:
        if self.loss == "mse":
            visible = denominator == "live"
            return self.layout.count_cells(window, visible=visible).sum(dim=-1)
        return (self.layout.count_cells(window, visible=True) > 0).sum(dim=-1)


def visible_span(
    position: Tensor, window: int | None, *, causal: bool, last: Tensor
) -> tuple[Tensor, Tensor]:
    """First and last key that order and window let a query at `position` see."""
    lower = torch.zeros_like(position)
    upper = position if causal else last
    if window is not None:
        lower = (position - window + 1).clamp(min=0)
        upper = torch.minimum(upper, position + window - 1)
    return lower, upper


def token_ranks(chosen: Tensor) -> Tensor:
    """(B, N) bool -> (B, N) int64: how many chosen tokens stand before each token."""
    return (chosen.cumsum(dim=-1) - chosen.to(torch.int64)).clamp(min=0)


def _both(region: Tensor | None, valid: Tensor | None) -> Tensor | None:
    if region is None or valid is None:
        return valid if region is None else region
    return region & valid
