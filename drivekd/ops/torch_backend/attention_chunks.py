"""How the torch backend cuts a map into chunks of rows, and what each chunk's rows see."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionLayout, visible_span

# Added to the score of an invisible key. Finite, so that no difference of two of them is NaN, and
# so large that exp of it is an exact 0 in every dtype and a visible score vanishes beside it.
HIDDEN = -1e30

# Bytes of one chunk's (B, H, rows, N) stack. On a CPU the passes over it should stay in the
# cache; elsewhere a launch should have work.
_STACK_BYTES = {"cpu": 4 * 2**20}
_STACK_BYTES_ELSEWHERE = 64 * 2**20
_MIN_ROWS = 16
READABLE = frozenset({"cpu"})  # devices whose values are read: elsewhere that would synchronise
WHOLE_MAP_COUNTS = 512  # tokens from which on no stack may hold as many cells as one map


@dataclass(frozen=True)
class Chunk:
    """Some rows of some samples: one slice for all of them, or an index for each sample."""

    samples: slice
    rows: slice | Tensor  # Tensor: (samples, rows) int64
    keys: slice  # no row of the chunk sees a key outside
    slots: slice  # where the rows stand in their samples' order of rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, rows, keys."""
        samples, rows = self.samples.stop - self.samples.start, self.slots.stop - self.slots.start
        return samples, rows, self.keys.stop - self.keys.start

    def read(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (samples, rows)."""
        if isinstance(self.rows, slice):
            return tokens[self.samples, self.rows]
        return tokens[self.samples].gather(1, self.rows)

    def gather(self, heads: Tensor) -> Tensor:
        """(B, H, N, ...) -> (samples, H, rows, ...)."""
        if isinstance(self.rows, slice):
            return heads[self.samples, :, self.rows]
        heads = heads[self.samples]
        return heads.gather(2, _spread(self.rows, heads))

    def scatter(self, heads: Tensor, values: Tensor) -> None:
        """Write (samples, H, rows, D) into (B, H, N, D)."""
        if isinstance(self.rows, slice):
            heads[self.samples, :, self.rows] = values
        else:
            heads[self.samples].scatter_(2, _spread(self.rows, values), values)


@dataclass(frozen=True)
class Visibility:
    """What the rows of a chunk see (for scores) and which of their cells count (for losses)."""

    bias: Tensor | None  # (samples or 1, 1, rows, keys - start): 0 where visible, else HIDDEN
    start: int  # first key that the bias is about; all before it are visible
    dead: Tensor | None  # (samples, rows) bool: padding; None: no row is
    cells: Tensor | None  # (samples, rows, keys or 1) 0 or 1: the region; None: all
    outside: Tensor | None  # (samples, rows, keys): 0 in the region and visible, else HIDDEN
    counted: Tensor | None  # (samples, rows) 0 or 1: rows with a visible region cell; None: all

    def hide(self, scores: Tensor) -> Tensor:
        """Add HIDDEN in place where (samples, ..., rows, keys) is invisible."""
        if self.bias is not None:
            bias = self.bias if scores.ndim == 4 else self.bias.squeeze(1)
            scores[..., self.start :].add_(bias)
        return scores

    def raised(self, p: Tensor) -> Tensor:
        """A copy of (samples, rows, keys) that is huge where invisible."""
        p = p.clone()
        if self.bias is not None:
            p[..., self.start :].sub_(self.bias.squeeze(1))
        return p


class Plan:
    """The chunks of one call, and what it takes to say what their rows see.

    Values of the layout are read on the CPU only, where that costs nothing; elsewhere the plan
    follows from shapes alone.
    """

    def __init__(self, layout: AttentionLayout, num_heads: int, dtype: torch.dtype) -> None:
        self._layout = layout
        self._num_heads = num_heads
        self._dtype = dtype
        self.readable = layout.device.type in READABLE
        self._valid = layout.valid
        if self.readable and self._valid is not None and bool(self._valid.all()):
            self._valid = None
        self._ranks = layout.segment_ranks()
        self._rows = layout.region_rows if layout.is_text is not None else self._valid
        self._keys = layout.region_keys if layout.is_vision is not None else None
        shape = (layout.batch_size, layout.num_tokens)
        self._position = torch.arange(layout.num_tokens, device=layout.device).expand(shape)
        self._first, self._last = self._segment_span()
        self._counted: dict[int | None, Tensor] = {}

    @property
    def valid(self) -> Tensor | None:
        """(B, N) bool, or None when every token is known to be valid."""
        return self._valid

    def chunks(self, window: int | None) -> Iterator[Chunk]:
        """Chunks whose rows see no key outside `Chunk.keys` under any window up to `window`."""
        batch_size, num_tokens = self._layout.batch_size, self._layout.num_tokens
        order, lengths = self._row_order()
        longest = max(lengths) if lengths is not None else num_tokens
        if longest == 0:
            return
        row_bytes = self._num_heads * num_tokens * self._dtype.itemsize
        budget = _STACK_BYTES.get(self._layout.device.type, _STACK_BYTES_ELSEWHERE)
        # Under a causal mask two halves see a quarter less than the whole.
        pieces = 2 if self._layout.causal and longest > 2 * _MIN_ROWS else 1
        num_samples = max(1, min(batch_size, pieces * budget // (longest * row_bytes)))
        for first in range(0, batch_size, num_samples):
            samples = slice(first, min(first + num_samples, batch_size))
            length = max(lengths[samples]) if lengths is not None else num_tokens
            num_rows = self._rows_per_chunk(budget // ((samples.stop - first) * row_bytes))
            num_chunks = max(pieces, math.ceil(length / num_rows))
            num_rows = max(1, math.ceil(length / num_chunks))
            for row in range(0, length, num_rows):
                slots = slice(row, min(row + num_rows, length))
                rows = slots if order is None else order[samples, slots]
                yield Chunk(samples, rows, self._key_range(samples, rows, window), slots)

    def visibility(self, chunk: Chunk, window: int | None, *, in_logs: bool) -> Visibility:
        """Masks of one chunk under one window."""
        layout, samples, keys = self._layout, chunk.samples, chunk.keys
        row = chunk.read(self._position)[:, :, None]  # (samples, rows, 1)
        if isinstance(chunk.rows, slice):
            row = row[:1]
        start = 0
        plain = self._valid is None and self._ranks is None and window is None
        if plain and isinstance(chunk.rows, slice) and layout.causal:
            start = max(chunk.rows.start - keys.start, 0)
        key = torch.arange(keys.start + start, keys.stop, device=layout.device)
        lower, upper = visible_span(
            row, window, causal=layout.causal, last=torch.full_like(row, layout.num_tokens)
        )
        hidden = (key > upper) if layout.causal or window is not None else None
        if window is not None:
            hidden = _either(hidden, key < lower)
        if self._valid is not None:
            hidden = _either(hidden, ~self._valid[samples, None, keys])
        if self._ranks is not None:
            ranks = chunk.read(self._ranks)[:, :, None]
            hidden = _either(hidden, ranks != self._ranks[samples, None, keys])
        dead = None if self._valid is None else ~chunk.read(self._valid)
        bias = None
        if hidden is not None:
            bias = self._penalty(hidden)[:, None]
        cells, outside, counted = self._region(chunk, window, bias, in_logs=in_logs)
        return Visibility(bias, start, dead, cells, outside, counted)

    def _region(
        self, chunk: Chunk, window: int | None, bias: Tensor | None, *, in_logs: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._rows is None:
            return None, None, None
        rows = chunk.read(self._rows)
        if self._keys is None:
            live = rows.to(self._dtype)
            return live[:, :, None], None, live
        region = rows[:, :, None] & self._keys[chunk.samples, None, chunk.keys]
        outside = None
        if in_logs:
            outside = self._penalty(~region)
            if bias is not None:
                outside[..., outside.shape[-1] - bias.shape[-1] :] += bias.squeeze(1)
        if window not in self._counted:
            self._counted[window] = self._layout.count_cells(window, visible=True) > 0
        return region.to(self._dtype), outside, chunk.read(self._counted[window]).to(self._dtype)

    def _penalty(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._dtype).mul_(HIDDEN)

    def _rows_per_chunk(self, affordable: int) -> int:
        """Rows of one chunk: what the budget allows, and no stack as large as a whole map."""
        num_tokens = self._layout.num_tokens
        if num_tokens >= WHOLE_MAP_COUNTS:
            affordable = min(affordable, num_tokens // (2 * self._num_heads))
        return max(_MIN_ROWS, affordable)

    def _row_order(self) -> tuple[Tensor | None, list[int] | None]:
        """Rows worth computing, first in each sample's order, and how many there are."""
        rows = None if self._layout.is_text is None else self._layout.region_rows
        if not self.readable or rows is None:
            return None, None
        order = torch.argsort(rows.logical_not().to(torch.int8), dim=-1, stable=True)
        return order, [int(length) for length in rows.sum(dim=-1).tolist()]

    def _segment_span(self) -> tuple[Tensor | None, Tensor | None]:
        """First and last valid key of each token's segment, where reading them is free."""
        if not self.readable or (self._valid is None and self._ranks is None):
            return None, None
        ranks = torch.zeros_like(self._position) if self._ranks is None else self._ranks
        num_tokens = self._layout.num_tokens
        first, last = self._position, self._position
        if self._valid is not None:
            first = first.masked_fill(~self._valid, num_tokens - 1)
            last = last.masked_fill(~self._valid, 0)
        base = torch.full_like(ranks, num_tokens - 1)
        first = base.scatter_reduce(1, ranks, first, "amin").gather(1, ranks)
        base = torch.zeros_like(ranks)
        last = base.scatter_reduce(1, ranks, last, "amax").gather(1, ranks)
        return first, last

    def _key_range(self, samples: slice, rows: slice | Tensor, window: int | None) -> slice:
        """The keys that at least one of these rows may see."""
        last_key = self._layout.num_tokens - 1
        if isinstance(rows, slice):
            low, high = rows.start, rows.stop - 1
        else:
            low, high = int(rows.min()), int(rows.max())
        start, stop = 0, high if self._layout.causal else last_key
        if window is not None:
            start, stop = max(0, low - window + 1), min(stop, high + window - 1)
        if self._first is not None and self._last is not None:
            chunk = Chunk(samples, rows, slice(0, 0), slice(0, 0))
            start = max(start, int(chunk.read(self._first).min()))
            stop = min(stop, int(chunk.read(self._last).max()))
        # Rows of padding may claim an empty range; one key keeps shapes legal there.
        return slice(min(start, last_key), min(max(start, stop), last_key) + 1)


class Workspace:
    """Named scratch memory, reused from chunk to chunk: fresh pages cost more than the maths."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of this shape with arbitrary contents; the name's last one dies."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = torch.empty(size, dtype=self.dtype, device=self._device)
            self._flat[name] = flat
        return flat[:size].view(shape)


def _spread(rows: Tensor, heads: Tensor) -> Tensor:
    """(samples, rows) -> an index for dimension 2 of (samples, H, rows, ...)."""
    index = rows.view(rows.shape[0], 1, rows.shape[1], *[1] * (heads.ndim - 3))
    return index.expand(-1, heads.shape[1], -1, *heads.shape[3:])


def _either(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first | second
