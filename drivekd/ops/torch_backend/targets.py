"""Where a chunk's target map comes from: a teacher's queries and keys, or maps that are given."""

import math
from collections import Counter

import torch
from torch import Tensor

from drivekd.ops.attention_inputs import AttentionMapLossInputs, GivenTarget, token_ranks
from drivekd.ops.torch_backend.attention_chunks import Chunk, Visibility, Workspace
from drivekd.ops.torch_backend.head_mean import HeadMean


class TeacherTargets:
    """Teacher maps of one chunk, each computed once, and freed after its last group."""

    def __init__(
        self,
        inputs: AttentionMapLossInputs,
        maps: HeadMean,
        chunk: Chunk,
        seen: dict[int | None, Visibility],
        *,
        in_logs: bool,
    ) -> None:
        self._inputs = inputs
        self._maps = maps
        self._chunk = chunk
        self._seen = seen
        self._in_logs = in_logs
        self._ready: dict[tuple[int, int | None], tuple[str, Tensor]] = {}
        self._free: list[str] = []
        self._uses = Counter(
            (teacher, window)
            for group, window in zip(inputs.groups, inputs.windows, strict=True)
            for teacher in group
        )

    def of(self, student: int) -> Tensor:
        """Mean of the maps of one group, (samples, rows, keys), or its logarithm; read only."""
        group, window = self._inputs.groups[student], self._inputs.windows[student]
        members = [self._map(teacher, window) for teacher in group]
        for teacher in group:
            self._release(teacher, window)
        if len(members) == 1:
            return members[0]
        if not self._in_logs:
            total = members[0] + members[1]
            for member in members[2:]:
                total.add_(member)
            return total.div_(len(members))
        total = torch.logaddexp(members[0], members[1])
        for member in members[2:]:
            torch.logaddexp(total, member, out=total)
        return total.sub_(math.log(len(members)))

    def _map(self, teacher: int, window: int | None) -> Tensor:
        if (teacher, window) not in self._ready:
            name = self._free.pop() if self._free else f"teacher {len(self._ready)}"
            layer = self._inputs.teacher[teacher]
            mean = self._maps.mean(
                layer, self._chunk, self._seen[window], name, in_logs=self._in_logs
            )
            self._ready[teacher, window] = (name, mean)
        return self._ready[teacher, window][1]

    def _release(self, teacher: int, window: int | None) -> None:
        self._uses[teacher, window] -= 1
        if self._uses[teacher, window] == 0:
            self._free.append(self._ready[teacher, window][0])


class GivenMaps:
    """Target maps that were given in compact form, spread out chunk by chunk.

    A rectangle holds the region's cells, everything else of a chunk's target is arbitrary and not
    looked at. Of a full map the largest cells of each row are given; the rest of the row's mass is
    spread evenly over its other visible cells, so that a row sums to 1.
    """

    def __init__(self, inputs: AttentionMapLossInputs, work: Workspace, *, in_logs: bool) -> None:
        self._inputs = inputs
        self._work = work
        self._in_logs = in_logs
        self._tiny = torch.finfo(work.dtype).tiny
        layout = inputs.layout
        rows, keys = layout.region_rows, layout.region_keys
        self._row_ranks = None if rows is None else token_ranks(rows)
        self._key_ranks = None if keys is None else token_ranks(keys)
        self._visible: dict[int | None, Tensor] = {}

    def of(self, student: int, chunk: Chunk, seen: Visibility) -> Tensor:
        """P or log P of one student layer's target, (samples, rows, keys); read only."""
        given = self._inputs.given[student]
        if given.indices is None:
            return self._rectangle(given, chunk)
        return self._full(given, self._inputs.windows[student], chunk, seen)

    def _rectangle(self, given: GivenTarget, chunk: Chunk) -> Tensor:
        assert self._row_ranks is not None and self._key_ranks is not None
        num_rows, num_keys = given.values.shape[1:]
        rows = chunk.read(self._row_ranks).clamp(max=num_rows - 1)  # (samples, rows)
        keys = self._key_ranks[chunk.samples, None, chunk.keys].clamp(max=num_keys - 1)
        values = _pick_rows(given.values[chunk.samples], rows).to(self._work.dtype)
        values = values.gather(2, keys.expand(-1, rows.shape[1], -1))
        exponents = given.exponents[chunk.samples].gather(1, rows)[..., None]
        exponents = exponents.to(self._work.dtype)
        if self._in_logs:
            # A cell that was rounded to 0 is a probability too small to count, not log 0.
            return values.clamp_(min=self._tiny).log_().add_(exponents, alpha=math.log(2))
        return values.mul_(torch.exp2(exponents))

    def _full(
        self, given: GivenTarget, window: int | None, chunk: Chunk, seen: Visibility
    ) -> Tensor:
        assert given.indices is not None and given.rest is not None
        dtype, num_keys = self._work.dtype, chunk.shape[2]
        values = _read_rows(chunk, given.values).to(dtype)
        indices = _read_rows(chunk, given.indices).to(torch.int64)
        rest = chunk.read(given.rest).to(dtype).clamp_(0, 1)[..., None]
        is_kept = indices >= 0
        values = values.masked_fill(~is_kept, 0)
        others = chunk.read(self._visible_cells(window))[..., None] - is_kept.sum(-1, keepdim=True)
        total = values.sum(dim=-1, keepdim=True)
        rest = torch.where(others > 0, rest, 0)
        values = values * ((1 - rest) / torch.where(total > 0, total, 1))
        spread = rest / others.clamp(min=1)
        samples, rows, _ = chunk.shape
        # One column more, for what is not there.
        dense = self._work.take("given", samples, rows, num_keys + 1)
        target = dense[..., :num_keys]
        slots = indices - chunk.keys.start
        slots = torch.where(is_kept & (slots >= 0) & (slots < num_keys), slots, num_keys)
        if self._in_logs:
            dense.copy_(spread.clamp_(min=self._tiny).log_().expand_as(dense))
            dense.scatter_(2, slots, values.clamp_(min=self._tiny).log_())
            return seen.hide(target)
        dense.copy_(spread.expand_as(dense))
        if seen.bias is not None:
            target[..., seen.start :].masked_fill_(seen.bias.squeeze(1) < 0, 0)
        dense.scatter_(2, slots, values)
        return target

    def _visible_cells(self, window: int | None) -> Tensor:
        """(B, N) int64, how many keys each query sees."""
        if window not in self._visible:
            self._visible[window] = self._inputs.layout.count_cells(window, visible=True)
        return self._visible[window]


def _read_rows(chunk: Chunk, values: Tensor) -> Tensor:
    """(B, N, width) -> (samples, rows, width)."""
    if isinstance(chunk.rows, slice):
        return values[chunk.samples, chunk.rows]
    return _pick_rows(values[chunk.samples], chunk.rows)


def _pick_rows(values: Tensor, rows: Tensor) -> Tensor:
    """(samples, R, width) at (samples, rows) -> (samples, rows, width)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))
