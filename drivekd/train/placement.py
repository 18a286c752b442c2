"""On which device each teacher runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import torch
import transformers

from drivekd.errors import RecipeError
from drivekd.train.config import nearest

AUTO = "auto"
Placement = str | Mapping[str, str] | None


def place_teachers(
    placement: Placement, teachers: Collection[str], student: torch.device
) -> dict[str, torch.device]:
    """Decide where teachers run.

    Args:
        placement: One device for all, such as "cuda:1"; a mapping from teachers to devices, the
            student's for those that it does not name; "auto", which spreads the teachers over the
            GPUs that no process of this machine trains on, every process having its own share of
            them (the student's where there is none to share); None is the student's device.
        teachers: Names of all teachers.
        student: This process' device.

    Returns:
        The device of each teacher.

    Raises:
        TypeError: `placement` is of another kind.
        RecipeError: A teacher or a device does not exist.
    """
    if placement is None:
        return dict.fromkeys(teachers, student)
    if isinstance(placement, str):
        if placement == AUTO:
            return _spread(sorted(teachers), student)
        return dict.fromkeys(teachers, _device("teacher_device", placement))
    if not isinstance(placement, Mapping):
        raise TypeError(
            f"teacher_device is a {type(placement).__name__}, wanted a device such as 'cuda:1', "
            "'auto', or a mapping from teachers to devices"
        )
    for name in placement:
        if name not in teachers:
            raise RecipeError(
                f"teacher_device names the teacher {name!r}, which does not exist; "
                f"{nearest(str(name), teachers)}"
            )
    return {
        name: _device(f"teacher_device[{name!r}]", placement[name])
        if name in placement
        else student
        for name in teachers
    }


def leave_other_gpus(args: transformers.TrainingArguments) -> None:
    """Train on one GPU where Trainer would split batches over all that it sees (DataParallel)."""
    if args.n_gpu > 1:
        args._n_gpu = 1


def _spread(teachers: list[str], student: torch.device) -> dict[str, torch.device]:
    """This process' share of the GPUs on which nobody trains, one teacher after the other."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    free = list(range(_count(student.type)))[processes:]
    own = free[rank::processes]
    if not own:
        return dict.fromkeys(teachers, student)
    return {
        name: torch.device(student.type, own[place % len(own)])
        for place, name in enumerate(teachers)
    }


def _device(where: str, name: object) -> torch.device:
    """The device of a name, which must be there."""
    if not isinstance(name, str):
        raise TypeError(f"{where} is {name!r}, wanted the name of a device such as 'cuda:1'")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            f"{where} is {name!r}, which is no device; wanted one such as 'cuda:1' or 'cpu'"
        ) from error
    if device.type == "cpu":
        return device
    count = _count(device.type)
    if (device.index or 0) >= count:
        seen = f"{count} of that kind (0 to {count - 1})" if count else "none of that kind"
        raise RecipeError(
            f"{where} is {name!r}, but this process sees {seen}; name a device that is there, or "
            "show it more (CUDA_VISIBLE_DEVICES)"
        )
    return device


def _count(kind: str) -> int:
    """How many accelerators of a kind this process sees."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != kind:
        return 0
    return torch.accelerator.device_count()
