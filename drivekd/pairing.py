"""Which student layer learns from which teacher layers."""

import re
from collections.abc import Sequence

_NAMED = {"first": 0, "penultimate": -2, "last": -1}
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def match_layer_groups(num_student: int, num_teacher: int) -> list[list[int]]:
    """Slide a group of consecutive teacher layers along the student's layers.

    With k student and m teacher layers a group has `g = max(1, m - k + 1)` layers, and group i
    starts at `min(i, m - g)`. With as many teacher as student layers, this is one to one.

    Args:
        num_student: Number of student layers k.
        num_teacher: Number of teacher layers m.

    Returns:
        k lists of indices into the teacher's layers, each of length g.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below 1.

    Source:
        Drive-KD (arXiv 2601.21288), reasoning loss; Colamentos2023/Drive-KD, intern/trainer.py.

    Example:
        >>> match_layer_groups(3, 5)
        [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    """
    for name, number in (("num_student", num_student), ("num_teacher", num_teacher)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is a {type(number).__name__}; wanted a number of layers (int)")
        if number < 1:
            raise ValueError(f"{name} is {number}; wanted at least one layer")
    size = max(1, num_teacher - num_student + 1)
    starts = [min(i, num_teacher - size) for i in range(num_student)]
    return [list(range(start, start + size)) for start in starts]


def resolve_layers(spec: str | int | Sequence[int], num_layers: int) -> list[int]:
    """Turn a recipe's way of naming layers into indices for a decoder of this depth.

    Args:
        spec: `"first"`, `"penultimate"`, `"last"`, an int (negative counts from the end), a
            sequence of ints, or an inclusive range such as `"0..-2"`.
        num_layers: Depth of the model's decoder.

    Returns:
        Non-negative layer indices in the order given.

    Raises:
        TypeError: `spec` is of another kind.
        ValueError: `spec` names a layer that the model does not have, one layer twice, or none.

    Example:
        >>> resolve_layers("0..-2", 4)
        [0, 1, 2]
    """
    check_layers("layers", spec)
    if isinstance(spec, str):
        layers = _named_layers(spec, num_layers)
    else:
        given = [spec] if isinstance(spec, int) else spec
        layers = [_resolve_one(layer, num_layers) for layer in given]
    if not layers:
        raise ValueError(f"layers is {spec!r}, which names no layer of {num_layers}")
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"layers is {spec!r}, which names a layer twice in a model of {num_layers}"
        )
    return layers


def check_layers(name: str, spec: object) -> None:
    """Refuse what names no layer in a model of any depth.

    Args:
        name: What messages call it.
        spec: As for `resolve_layers`.

    Raises:
        TypeError: `spec` is of another kind.
        ValueError: `spec` is empty, or a string of another form.
    """
    if isinstance(spec, str):
        if spec not in _NAMED and _RANGE.fullmatch(spec) is None:
            raise ValueError(f"{name} is {spec!r}; wanted {_FORMS}")
        return
    what, layers = "is", [spec]
    if isinstance(spec, Sequence) and not isinstance(spec, bytes):
        what, layers = "holds", list(spec)
    if not layers:
        raise ValueError(f"{name} is {spec!r}, which names no layer; wanted {_FORMS}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"{name} {what} a {type(layer).__name__}; wanted {_FORMS}")


_FORMS = "'first', 'penultimate', 'last', an int, a list of ints, or a range such as '0..-2'"


def _named_layers(spec: str, num_layers: int) -> list[int]:
    if spec in _NAMED:
        return [_resolve_one(_NAMED[spec], num_layers)]
    first, last = (_resolve_one(int(each), num_layers) for each in spec.split(".."))
    return list(range(first, last + 1))


def _resolve_one(layer: int, num_layers: int) -> int:
    index = layer + num_layers if layer < 0 else layer
    if not 0 <= index < num_layers:
        raise ValueError(f"layer {layer} does not exist in a model of {num_layers} decoder layers")
    return index
