"""How a call is cut into chunks of rows, and which workspace holds which teacher map when."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from drivekd_kernels.operands import MAX_MAPS

from drivekd.ops.attention_inputs import AttentionMapLossInputs
from drivekd.ops.triton_backend.chunks import cut


@dataclass(frozen=True)
class TeacherMap:
    """A teacher layer's map under one window; `copy` counts repetitions within one group."""

    index: int
    window: int | None
    copy: int = 0


@dataclass(frozen=True)
class Step:
    """One student layer of a chunk: maps to make first, as (map, slot), and its group's slots.

    Where targets are to be made it is one of these.
    """

    student: int
    new: tuple[tuple[TeacherMap, int], ...]
    members: tuple[int, ...]


class Plan:
    """The order of work, from shapes and groups alone.

    With given targets there are no teacher maps, and the one workspace is each layer's in turn.
    Without student layers (targets are to be made) there are only teacher maps.

    Raises:
        NotImplementedError: more than `MAX_MAPS` teacher maps would be needed at once.
    """

    def __init__(self, inputs: AttentionMapLossInputs) -> None:
        region = inputs.layout.is_text is not None
        self.in_logs = inputs.loss == "kl" or (inputs.loss == "cosine" and region)
        self.steps, self.num_slots = _schedule(inputs)
        if self.num_slots > MAX_MAPS:
            raise NotImplementedError(
                f"groups need {self.num_slots} teacher maps at once; the triton backend holds "
                f"{MAX_MAPS}; use smaller groups or backend='torch'"
            )
        self.maps = {each for step in self.steps for each, _ in step.new}
        self.chunks = cut(
            [(each[0].query, each[0].key) for each in (inputs.student, inputs.teacher) if each],
            learns=bool(inputs.student),
            num_maps=self.num_slots + (inputs.loss != "mse"),
            region=region,
            grows=inputs.layout.causal and not region,
        )


def _schedule(inputs: AttentionMapLossInputs) -> tuple[list[Step], int]:
    """Student layers in order; a slot is free again after the last group that reads it."""
    if inputs.given:
        return [Step(i, (), (0,)) for i in range(len(inputs.student))], 1
    groups = [
        list(_with_copies(group, window))
        for group, window in zip(inputs.groups, inputs.windows, strict=True)
    ]
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


def _with_copies(group: tuple[int, ...], window: int | None) -> Iterator[TeacherMap]:
    seen: Counter[int] = Counter()
    for index in group:
        yield TeacherMap(index, window, seen[index])
        seen[index] += 1
