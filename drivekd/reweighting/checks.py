"""Checks that the reweighting rules share, and host numbers on their way to the device."""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drivekd.functional.projection import on_device


def vector(values: Sequence[float], device: torch.device) -> Tensor:
    """(K,) float64 on `device` from host numbers, without a host sync."""
    return on_device(torch.tensor(values, dtype=torch.float64), device)


def is_finite(value: float) -> bool:
    """Whether it is a number that a float holds: not NaN or infinite, nor an int beyond them."""
    return abs(value) <= sys.float_info.max


def check_number(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    open_below: bool = False,
    below: float = math.inf,
) -> float:
    """`value` as a finite float in [minimum, below), or (minimum, below) with `open_below`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    inside = minimum < value if open_below else minimum <= value
    if not (is_finite(value) and inside and value < below):
        wanted = f"above {minimum}" if open_below else f"at least {minimum}"
        upper = "" if below == math.inf else f" and below {below}"
        bounds = "" if minimum == -math.inf else f", {wanted}{upper}"
        raise ValueError(f"{name} is {value}; wanted a finite number{bounds}")
    return float(value)


def check_numbers(
    name: str, values: object, *, minimum: float = -math.inf, open_below: bool = False
) -> dict[str, float]:
    """`values` as a non-empty dict of names and finite floats."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must map names to numbers, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} is empty; give a number for every loss")
    return {
        key: check_number(f"{name}[{key!r}]", value, minimum=minimum, open_below=open_below)
        for key, value in values.items()
    }


def check_norms(names: Sequence[str], norms: Tensor) -> None:
    """Refuse norms that are not (K,) float64."""
    if not isinstance(norms, Tensor) or norms.dtype != torch.float64:
        came = norms.dtype if isinstance(norms, Tensor) else type(norms).__name__
        raise TypeError(f"norms must be a float64 tensor, got {came}")
    if norms.shape != (len(names),):
        raise ValueError(
            f"norms has shape {tuple(norms.shape)}; wanted ({len(names)},), one per name"
        )


def check_anchor(names: Sequence[str], anchor: str) -> int:
    """The anchor's place among `names`."""
    if anchor not in names:
        raise ValueError(f"anchor {anchor!r} is not among the losses {list(names)}")
    return list(names).index(anchor)


def check_known(argument: str, names: Collection[str], known: Mapping[str, float]) -> None:
    """Refuse names that the setting `argument` says nothing about."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument} has no entry for {unknown}; it has {list(known)}")


def check_keys(state: object, keys: Sequence[str]) -> None:
    """Refuse a state that does not hold exactly `keys`."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping, got {type(state).__name__}")
    wrong: list[Any] = sorted(set(state) ^ set(keys))
    if wrong:
        raise ValueError(
            f"state has the keys {list(state)}; wanted {list(keys)}: it comes from another class "
            "or version"
        )
