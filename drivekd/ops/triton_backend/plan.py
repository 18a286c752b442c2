"""How a call is cut into chunks of rows, and which workspace holds which teacher map when."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from drivekd_kernels.launch import MAX_MAPS, Chunk, map_shape, rows_per_wave

from drivekd.ops.attention_inputs import AttentionMapLossInputs

# Bytes that one chunk's workspaces may take before it gets fewer rows, and the rows that it has at
# least. Many rows matter more than staying in the L2 cache: every launch ends with idle processors.
_CHUNK_BYTES = 288 * 2**20
_MIN_ROWS = 1024
_ROW_STEP = 64
HALVED = 4096  # tokens from which on no workspace holds as many cells as one map


@dataclass(frozen=True)
class TeacherMap:
    """A teacher layer's map under one window; `copy` counts repetitions within one group."""

    index: int
    window: int | None
    copy: int = 0


@dataclass(frozen=True)
class Step:
    """One student layer of a chunk: maps to make first, as (map, slot), and its group's slots."""

    student: int
    new: tuple[tuple[TeacherMap, int], ...]
    members: tuple[int, ...]


class Plan:
    """The order of work, from shapes and groups alone.

    Raises:
        NotImplementedError: more than `MAX_MAPS` teacher maps would be needed at once.
    """

    def __init__(self, inputs: AttentionMapLossInputs) -> None:
        self.in_logs = inputs.loss == "kl" or (
            inputs.loss == "cosine" and inputs.layout.is_text is not None
        )
        self.steps, self.num_slots = _schedule(inputs)
        if self.num_slots > MAX_MAPS:
            raise NotImplementedError(
                f"groups need {self.num_slots} teacher maps at once; the triton backend holds "
                f"{MAX_MAPS}; use smaller groups or backend='torch'"
            )
        self.maps = {each for step in self.steps for each, _ in step.new}
        N = inputs.layout.num_tokens
        self.rows = _rows(inputs, self.num_slots + (inputs.loss != "mse"))
        self.chunks = [Chunk(first, self.rows) for first in range(0, N, self.rows)]


def _rows(inputs: AttentionMapLossInputs, num_maps: int) -> int:
    """Rows of a chunk: all, half of them, or what is affordable in whole waves of dq's programs."""
    layout = inputs.layout
    cell_bytes = 4 * num_maps + min(4, inputs.student[0].query.element_size())
    limit = layout.num_tokens if layout.num_tokens < HALVED else layout.num_tokens // 2
    row_bytes = layout.batch_size * map_shape(1, layout.num_tokens)[1] * cell_bytes
    affordable = max(_CHUNK_BYTES // row_bytes, _MIN_ROWS)
    if affordable >= limit:
        return limit
    wave = rows_per_wave(inputs.student[0].query, inputs.student[0].key)
    rows = affordable // wave * wave or min(wave, 2 * affordable)
    return min(limit, max(rows // _ROW_STEP, 1) * _ROW_STEP)


def _schedule(inputs: AttentionMapLossInputs) -> tuple[list[Step], int]:
    """Student layers in order; a slot is free again after the last group that reads it."""
    groups = [_members(inputs, i) for i in range(len(inputs.student))]
    left = Counter(each for group in groups for each in group)
    place: dict[TeacherMap, int] = {}
    free: list[int] = []
    steps, num_slots = [], 0
    for i, group in enumerate(groups):
        new = []
        for each in group:
            if each not in place:
                if not free:
                    free.append(num_slots)
                    num_slots += 1
                place[each] = free.pop()
                new.append((each, place[each]))
        steps.append(Step(i, tuple(new), tuple(place[each] for each in group)))
        for each in group:
            left[each] -= 1
            if left[each] == 0:
                free.append(place[each])
    return steps, num_slots


def _members(inputs: AttentionMapLossInputs, student: int) -> list[TeacherMap]:
    return list(_with_copies(inputs.groups[student], inputs.windows[student]))


def _with_copies(group: tuple[int, ...], window: int | None) -> Iterator[TeacherMap]:
    seen: Counter[int] = Counter()
    for index in group:
        yield TeacherMap(index, window, seen[index])
        seen[index] += 1
