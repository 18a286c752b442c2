"""Records to batches: padding, token layout, and the rows that go to each teacher."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import Tensor

from drivekd.data.encode import IGNORE_INDEX, TOKEN_KEYS, Encoder
from drivekd.tokens import TokenLayout, reads_text_alone

if TYPE_CHECKING:
    from drivekd.data.records import Record


class Stored(Protocol):
    """Something of a batch's samples that was computed before; moves with the batch."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self: ...  # noqa: D102
    def pin_memory(self) -> Self: ...  # noqa: D102


class Source(Protocol):
    """Finds what was stored of some samples; called in loader workers too."""

    def __call__(
        self,
        records: Sequence[Record],
        features: Sequence[Mapping[str, Tensor]],
        *,
        length: int,
        padding_side: Literal["left", "right"],
    ) -> tuple[Stored, ...]:
        """What was stored of these records, encoded as given, padded to `length` tokens."""
        ...


@dataclass(frozen=True)
class Route:
    """The samples of a batch that one receiver sees, ready for its forward.

    Attributes:
        rows: (B_route,) int64 sample indices into the batch, ascending.
        inputs: Model inputs of those samples, padded to the batch's length; no labels. Empty for a
            receiver that has a source.
        stored: What the receiver's source gave.
    """

    rows: Tensor
    inputs: dict[str, Tensor]
    stored: tuple[Stored, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to a device."""
        return type(self)(
            self.rows.to(device, non_blocking=non_blocking),
            {k: v.to(device, non_blocking=non_blocking) for k, v in self.inputs.items()},
            tuple(each.to(device, non_blocking=non_blocking) for each in self.stored),
        )

    def pin_memory(self) -> Self:
        """Copy to page-locked memory."""
        return type(self)(
            self.rows.pin_memory(),
            {k: v.pin_memory() for k, v in self.inputs.items()},
            tuple(each.pin_memory() for each in self.stored),
        )


def collate_features(
    features: Sequence[Mapping[str, Tensor]],
    *,
    pad_token_id: int,
    padding_side: Literal["left", "right"] = "right",
    length: int | None = None,
) -> dict[str, Tensor]:
    """Pad encoded records into one batch; also for prompts at generation.

    Args:
        features: What an encoder returned, one mapping per sample. `input_ids`, `labels` and the
            entries of `drivekd.data.encode.TOKEN_KEYS` run over tokens and are padded; all others
            run over images and are concatenated.
        pad_token_id: Id that fills `input_ids`; labels are filled with -100, the rest with 0.
        padding_side: Where padding goes.
        length: Padded length N; None is the longest sample's.

    Returns:
        `input_ids`, `attention_mask` (B, N) int64, `labels` (B, N) int64 where given, and the
        other entries. A key that no sample has (`pixel_values` of a text-only batch) is absent.

    Raises:
        ValueError: There is no sample, `length` is too small, `padding_side` is unknown, a token
            entry has another length than `input_ids`, or image entries do not fit together.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}, wanted 'left' or 'right'")
    if not features:
        raise ValueError("features is empty; a batch needs at least one sample")
    longest = max(len(feature["input_ids"]) for feature in features)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"length is {length} but the longest sample has {longest} tokens")
    keys = dict.fromkeys(key for feature in features for key in feature)
    batch: dict[str, Tensor] = {}
    for key in keys:
        if key in ("input_ids", "labels") or key in TOKEN_KEYS:
            fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}.get(key, 0)
            batch[key] = _pad(features, key, fill, padding_side, length)
        else:
            batch[key] = _concatenate(features, key)
    ones = [{"attention_mask": torch.ones_like(feature["input_ids"])} for feature in features]
    batch["attention_mask"] = _pad(ones, "attention_mask", 0, padding_side, length)
    return batch


def _pad(
    features: Sequence[Mapping[str, Tensor]], key: str, fill: int, side: str, length: int
) -> Tensor:
    """Stack (N_b,) entries into (B, length)."""
    for feature in features:
        if key not in feature:
            raise ValueError(f"{key} is missing in some samples; every sample needs it")
        if "input_ids" in feature and feature[key].shape != feature["input_ids"].shape:
            raise ValueError(
                f"{key} has shape {tuple(feature[key].shape)} but input_ids of that sample has "
                f"{tuple(feature['input_ids'].shape)}; they must agree"
            )
    padded = features[0][key].new_full((len(features), length), fill)
    for row, feature in zip(padded, features, strict=True):
        count = len(feature[key])
        start = length - count if side == "left" else 0
        row[start : start + count] = feature[key]
    return padded


def _concatenate(features: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    """Join per-image entries along their first dimension."""
    given = [feature for feature in features if key in feature]
    parts = [feature[key] for feature in given]
    for feature, part in zip(given, parts, strict=True):
        if part.dim() == 0 or part.shape == feature["input_ids"].shape:
            raise ValueError(
                f"{key} has shape {tuple(part.shape)}, which could be an entry per token, but is "
                f"not a known one ({', '.join(sorted(TOKEN_KEYS))}); give it a row per image"
            )
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = sorted({tuple(part.shape) for part in parts})
        raise ValueError(f"{key} has shapes {shapes} in one batch; all but the first must agree")
    return torch.cat(parts)


class Collator:
    """Encodes and pads records into a training batch; runs on the CPU, in loader workers too.

    Args:
        encoder: An encoder (drivekd.data.encode).
        config: The student's configuration, read by `TokenLayout.from_batch` for the image
            token; without one every token counts as text.
        pad_token_id: Id that fills `input_ids`.
        routes: For each receiver the question types that go to it; None for none.
        padding_side: Where padding goes.
        sources: For receivers that read what was stored before instead of model inputs, where
            they find it.

    Example:
        >>> collator = Collator(encoder, student.config, pad_token_id=0,
        ...     routes={"perception": {"perception"}})  # doctest: +SKIP
        >>> batch = collator(records)  # doctest: +SKIP
        >>> teacher(**batch["routes"]["perception"].inputs)  # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: Encoder,
        config: Any,
        *,
        pad_token_id: int,
        routes: Mapping[str, Collection[str]] | None = None,
        padding_side: Literal["left", "right"] = "right",
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        if not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(
                f"pad_token_id is {pad_token_id!r}, wanted a token id; set tokenizer.pad_token"
            )
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}, wanted 'left' or 'right'")
        for name, types in (routes or {}).items():
            if isinstance(types, str):
                raise TypeError(
                    f"routes[{name!r}] is the string {types!r}, wanted a set of question types"
                )
        self.encoder = encoder
        self.config = config
        self.pad_token_id = pad_token_id
        self.padding_side: Literal["left", "right"] = padding_side
        self.routes = {name: frozenset(types) for name, types in (routes or {}).items()}
        self.sources = dict(sources or {})

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Make a batch.

        Args:
            records: B records.

        Returns:
            The model inputs of `collate_features` with `labels`; `tokens`, the batch's
            TokenLayout; `question_types` and `record_ids`, B strings each; and, where the
            collator has routes, `routes`: a Route for every receiver with at least one sample.
            A route of all samples holds the batch's own tensors.

        Raises:
            DataError: A record cannot be encoded.
            ValueError: Encoded samples do not fit into one batch.
        """
        return self.collate(records, [self.encoder(record) for record in records])

    def collate(
        self, records: Sequence[Record], features: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Any]:
        """Make a batch of records that are encoded already; see `__call__`."""
        batch: dict[str, Any] = dict(self._collate(features, None))
        types = [record.question_type for record in records]
        layout = self._layout(batch)
        if self.routes:
            batch["routes"] = self._route(batch, features, records)
        batch["tokens"] = layout
        batch["question_types"] = types
        batch["record_ids"] = [record.id for record in records]
        return batch

    def with_routes(
        self,
        routes: Mapping[str, Collection[str]],
        sources: Mapping[str, Source] | None = None,
    ) -> Self:
        """The same collator with other routes and sources."""
        return type(self)(
            self.encoder,
            self.config,
            pad_token_id=self.pad_token_id,
            routes=routes,
            padding_side=self.padding_side,
            sources=sources,
        )

    def _layout(self, batch: Mapping[str, Tensor]) -> TokenLayout:
        """The token layout; for a model without image tokens every token is text."""
        return TokenLayout.from_batch(batch, None if reads_text_alone(self.config) else self.config)

    def _collate(
        self, features: Sequence[Mapping[str, Tensor]], length: int | None
    ) -> dict[str, Tensor]:
        return collate_features(
            features,
            pad_token_id=self.pad_token_id,
            padding_side=self.padding_side,
            length=length,
        )

    def _route(
        self,
        batch: Mapping[str, Tensor],
        features: Sequence[Mapping[str, Tensor]],
        records: Sequence[Record],
    ) -> dict[str, Route]:
        length = batch["input_ids"].shape[1]
        routes: dict[str, Route] = {}
        for name, wanted in self.routes.items():
            rows = [i for i, record in enumerate(records) if record.question_type in wanted]
            if not rows:
                continue
            if name in self.sources:
                stored = self.sources[name](
                    [records[i] for i in rows],
                    [features[i] for i in rows],
                    length=length,
                    padding_side=self.padding_side,
                )
                routes[name] = Route(torch.tensor(rows, dtype=torch.int64), {}, stored)
                continue
            inputs = batch
            if len(rows) < len(features):
                inputs = self._collate([features[i] for i in rows], length)
            routes[name] = Route(
                torch.tensor(rows, dtype=torch.int64),
                {key: value for key, value in inputs.items() if key != "labels"},
            )
        return routes
