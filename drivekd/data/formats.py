"""Layouts of other projects to records: LLaVA and ShareGPT conversations, DriveLM, DriveBench.

- ``llava`` and ``sharegpt``: ``conversations`` of ``from`` (human, gpt, system) and ``value``,
  ``image`` or ``images``, an optional ``system`` prompt. The two differ only in which of these
  they use, so one reader serves both.
- ``drivelm``: DriveLM-nuScenes v1.x, an object of scenes; each has ``key_frames`` with
  ``image_paths`` by camera and ``QA`` by category (lists of ``Q`` and ``A``).
- ``drivebench``: ``question``, ``answer``, ``question_type``, ``image_path`` by camera.

Every image of a driving record stands behind its camera's name, since object tags name cameras;
paths with a folder ``samples`` start from there, which is the nuScenes folder. Object tags
``<c1,CAM_FRONT,x,y>`` in pixels become shares of ``NUSCENES_SIZE``, as the public Drive-KD records
and DriveBench have them; a tag that is cut off stays as it is, for the check to find. DriveLM's
``scene_description`` and ``key_object_infos`` are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from drivekd.data.files import Item
from drivekd.data.records import (
    IMAGE_PLACEHOLDER,
    Message,
    Record,
    TypeNames,
    identifier,
    image_paths,
    make_message,
    record_from_json,
    require_object,
    with_placeholders,
)
from drivekd.errors import DataError

# Where the public Drive-KD records have DriveLM's categories.
DRIVELM_TYPES: Mapping[str, str] = {"prediction": "reasoning", "behavior": "reasoning"}
NUSCENES_SIZE = (1600, 900)  # (width, height) of every camera, pixels

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+))"
_TAG = re.compile(rf"(<c\d+\s*,\s*[A-Za-z]\w*\s*,)\s*{_NUMBER}\s*,\s*{_NUMBER}\s*>")

# What a reader gives for an item: records, and errors in the place of those that are none.
Parsed = Iterator[Record | DataError]
Reader = Callable[[Item, TypeNames], Parsed]


def read_drivekd(item: Item, names: TypeNames) -> Parsed:
    """Our own layout."""
    yield record_from_json(item.value, names)


def read_conversation(item: Item, names: TypeNames) -> Parsed:
    """LLaVA and ShareGPT conversations."""
    value = require_object(item.value)
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations is missing or empty; a list of from and value is needed")
    messages = []
    if value.get("system"):
        messages.append(make_message("system", value["system"], "system"))
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise DataError(f"conversations[{index}] must be an object with from and value")
        name = turn["from"]
        role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise DataError(
                f"conversations[{index}] is from {turn['from']!r}; {', '.join(_ROLES)} are known"
            )
        messages.append(make_message(role, turn["value"], f"conversations[{index}]"))
    images = image_paths(value, ("images", "image"))
    question_type, type_key = names.of(value)
    known = {"conversations", "system", "image", "images", "id", type_key}
    meta = {key: v for key, v in value.items() if key not in known}
    yield Record(tuple(messages), images, question_type, identifier(value), meta)


def read_drivelm(item: Item, names: TypeNames) -> Parsed:
    """All questions of a DriveLM scene."""
    scene = require_object(item.value)
    frames = scene.get("key_frames")
    if not isinstance(frames, dict):
        raise DataError(f"scene {item.key!r}: key_frames must be an object of frames")
    for token, frame in frames.items():
        where = f"scene {item.key!r}, frame {token!r}"
        categories = frame.get("QA") if isinstance(frame, dict) else None
        if not isinstance(categories, dict):
            yield DataError(f"{where}: QA must be an object of categories")
            continue
        for category, questions in categories.items():
            if not isinstance(questions, list):
                yield DataError(f"{where}: {category} must be a list of questions")
                continue
            for index, question in enumerate(questions):
                try:
                    record = _drivelm_record(frame.get("image_paths"), category, question, names)
                except (DataError, TypeError) as error:
                    yield DataError(f"{where}, {category}[{index}]: {error}")
                else:
                    meta = {"scene_token": item.key, "frame_token": token, **record.meta}
                    yield replace(record, id=f"{token}-{category}-{index}", meta=meta)


def read_drivebench(item: Item, names: TypeNames) -> Parsed:
    """A DriveBench question."""
    value = require_object(item.value)
    question_type, type_key = _driving_names(names).of(value)
    meta = {
        key: v
        for key, v in value.items()
        if key not in {"question", "answer", "image_path", "id", type_key}
    }
    if type_key:
        meta["category"] = value[type_key]
    record = _driving_record(
        value.get("image_path"), question_type, value.get("question"), value.get("answer"), meta
    )
    name = identifier(value)
    if not name and isinstance(value.get("frame_token"), str):
        name = f"{value['frame_token']}-{item.index}"
    yield replace(record, id=name)


def _drivelm_record(images: Any, category: str, question: Any, names: TypeNames) -> Record:
    question = require_object(question)
    meta = {key: v for key, v in question.items() if key not in {"Q", "A"} and v is not None}
    return _driving_record(
        images,
        _driving_names(names).resolve(category),
        question.get("Q"),
        question.get("A"),
        {"category": category, **meta},
    )


def _driving_names(names: TypeNames) -> TypeNames:
    return replace(names, rename={**DRIVELM_TYPES, **names.rename})


def _driving_record(
    images: Any, question_type: str, question: Any, answer: Any, meta: dict[str, Any]
) -> Record:
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str):
            raise DataError(f"the {name} is a {type(text).__name__}; a string is needed")
    if isinstance(images, dict):
        if not all(isinstance(path, str) for path in images.values()):
            raise DataError("the paths of images by camera must be strings")
        paths = tuple(images.values())
        views = "".join(f"{camera}: {IMAGE_PLACEHOLDER}\n" for camera in images)
        prompt = question if IMAGE_PLACEHOLDER in question else views + question
    else:
        paths = image_paths({} if images is None else {"image_path": images}, ("image_path",))
        prompt = with_placeholders(question, len(paths))
    return Record(
        (Message("user", _normalize_tags(prompt)), Message("assistant", _normalize_tags(answer))),
        tuple(_from_samples(path) for path in paths),
        question_type,
        meta=meta,
    )


def _from_samples(path: str) -> str:
    """The part of a nuScenes path that starts at `samples`; any other path as it is."""
    parts = path.replace("\\", "/").split("/")
    return "/".join(parts[parts.index("samples") :]) if "samples" in parts else path


def _normalize_tags(text: str) -> str:
    """Tags in pixels of a nuScenes camera with coordinates from 0 to 1."""

    def share(tag: re.Match[str]) -> str:
        x, y = float(tag[2]), float(tag[3])
        if max(x, y) <= 1.0:
            return tag[0]
        width, height = NUSCENES_SIZE
        return f"{tag[1]}{round(x / width, 4)},{round(y / height, 4)}>"

    return _TAG.sub(share, text)


READERS: Mapping[str, Reader] = {
    "drivekd": read_drivekd,
    "jsonl": read_drivekd,
    "llava": read_conversation,
    "sharegpt": read_conversation,
    "drivelm": read_drivelm,
    "drivebench": read_drivebench,
}


def detect_format(item: Item) -> str:
    """Name the layout of an item by its keys; ``"auto"`` if they say nothing."""
    keys = item.value.keys() if isinstance(item.value, dict) else set()
    if "key_frames" in keys:
        return "drivelm"
    if "messages" in keys:
        return "drivekd"
    if "conversations" in keys:
        return "llava"
    if "question" in keys:
        return "drivebench" if "image_path" in keys else "drivekd"
    return "auto"
