"""The YAML trees of recipes: reading, extending one by another, and overriding single values."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from drivekd.errors import RecipeError
from drivekd.train.config import nearest

BASE = "base"
_LONG = 256  # bits of an int that no message spells out


def read_tree(file: Path) -> dict[str, Any]:
    """Read a recipe and the ones that it extends.

    Raises:
        RecipeError: A file cannot be read, holds no mapping, or extends itself.
    """
    return _read(file, ())


def _read(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in above:
        raise RecipeError(f"{file} is its own base: {' -> '.join(each.name for each in above)}")
    try:
        tree = _parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{file} holds {kind_of(tree)}, wanted a mapping with the keys of a recipe"
        )
    bases = tree.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{file}: {BASE} is {kind_of(bases)}, wanted a path or a list of paths")
    merged: Any = {}
    for base in bases:
        merged = _merge(merged, _read(file.parent / base, (*above, file.resolve())), str(file))
    whole: dict[str, Any] = _merge(merged, tree, str(file))
    return whole


def _merge(below: Any, above: Any, where: str) -> Any:
    """`below` as changed by `above`; neither is modified."""
    if not isinstance(above, dict):
        return above
    if isinstance(below, list):
        entries = list(below)
        for key, value in above.items():
            index = _list_index(entries, str(key), where)
            entries[index] = _merge(entries[index], value, f"{where}.{key}")
        return entries
    if not isinstance(below, dict):
        return above
    merged = dict(below)
    for key, value in above.items():
        inner = f"{where}: {key}" if ":" not in where else f"{where}.{key}"
        merged[key] = _merge(below[key], value, inner) if key in below else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number, no and off as words, and refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = [(loader.construct_object(k, deep=True), k) for k, _ in node.value]
    seen: set[Any] = set()
    for key, key_node in pairs:
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key is {kind_of(key)}, wanted a name", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # a date that is none, thousands of digits
        raise yaml.YAMLError(f"{error}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Apply "a.b=c" to the parsed file."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r} is not of the form KEY.KEY=VALUE")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error
    node: Any = tree
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        if isinstance(node, dict):
            if is_last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        elif isinstance(node, list):
            index = _list_index(node, key, f"override {override!r}")
            if is_last:
                node[index] = value
            else:
                node = node[index]
        else:
            raise RecipeError(
                f"override {override!r}: {'.'.join(keys[:depth])} is {kind_of(node)} and has no "
                f"{key!r}"
            )


def _list_index(entries: list[Any], key: str, where: str) -> int:
    """Index of a list entry given by number or by its `name`."""
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if key in names:
        return names.index(key)
    hint = nearest(key, [name for name in names if isinstance(name, str)])
    raise RecipeError(f"{where}: there is no entry {key!r} among {len(entries)}; {hint}")


def kind_of(value: Any) -> str:
    """What a value is, for error messages."""
    names = {dict: "a mapping", list: "a list", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, int) and value.bit_length() > _LONG:
        return f"an int of {value.bit_length()} bits"
    return f"the {'string' if isinstance(value, str) else type(value).__name__} {value!r}"
