"""One forward of a record, and what is kept of it: a few numbers a layer."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from drivekd.capture import CapturedAttention, capture_attention
from drivekd.capture.model import decoder_layers, find_decoder
from drivekd.data.encode import IGNORE_INDEX
from drivekd.errors import DataError
from drivekd.functional import attention_map_targets
from drivekd.study.prestudy.measures import (
    MapFeatures,
    MapSums,
    PairCosines,
    along_answer,
    generalized_margin,
)
from drivekd.study.prestudy.resampling import Array
from drivekd.tokens import TokenLayout

# Of each layer (B,) adjacent, (B,) vision_text and (B, D) hidden of an `Observation`.
_HiddenMeasures = tuple[list[Array], list[Array], list[Array]]
_CHUNK_BYTES = 128 * 2**20  # of rows of all layers' maps that are held at once


@dataclass(frozen=True)
class Margin:
    """An answer's margins (`drivekd.study.prestudy.measures.generalized_margin`).

    Attributes:
        record: Id of the record.
        picture: What its picture is told from others by.
        along: (MARGIN_BINS,) float64.
        mean: Over the answer's tokens.
        tokens: How many it has.
    """

    record: str
    picture: Hashable
    along: Array
    mean: float
    tokens: int


@dataclass(frozen=True)
class Observation:
    """What one record makes a teacher do, by layer.

    Attributes:
        capability: Its question type.
        num_tokens: Of the record, with answer.
        words: (T,) int64, its text tokens.
        margin: Of its answer.
        adjacent: (L,) mean over tokens of the cosine between what goes into a layer and what comes
            out of it.
        vision_text: (L,) cosine between the mean hidden state of vision tokens and of text tokens,
            behind the layer.
        hidden: (L, D) float32, mean hidden state of the text behind the last vision token.
        vision: As in `MapFeatures`, like the next four.
        pooled: Likewise.
        vision_mass: Likewise.
        sink_share: Likewise.
        row_share: Likewise.
        sink_floor: Likewise.
        alignment: (L_s, L_t) by region, as `PairCosines` gives it; empty without a student.
    """

    capability: str
    num_tokens: int
    words: npt.NDArray[np.int64]
    margin: Margin
    adjacent: Array
    vision_text: Array
    hidden: Array
    vision: Array
    pooled: Array
    vision_mass: Array
    sink_share: Array
    row_share: Array
    sink_floor: float
    alignment: dict[str, Array]


@torch.no_grad()
def observe(
    teacher: nn.Module, batch: Mapping[str, Any], *, student: nn.Module | None, tau: float
) -> list[Observation]:
    """Run a batch of records through a teacher, and a student.

    Args:
        teacher: Whole model, with its head.
        batch: Of `drivekd.data.Collator`; `pictures`, one for each record, say which of them show
            the same; default: none.
        student: Model that sees the same tokens, or None.
        tau: Temperature of margins.

    Returns:
        One for each record.

    Raises:
        DataError: A record has no picture, or no answer; names it.
        ValueError: Rows are packed, or padded elsewhere than at their ends.
    """
    tokens: TokenLayout = batch["tokens"]
    names = _names(batch)
    spans = [_span(tokens, b, name) for b, name in enumerate(names)]
    for b, name in enumerate(names):
        if not bool(tokens.is_vision[b].any()):
            raise DataError(
                f"record {name} has no picture; text-to-vision attention is what is looked at, "
                "leave records of text alone out"
            )
        if not bool(tokens.is_text[b, int(tokens.is_vision[b].nonzero().max()) + 1 :].any()):
            raise DataError(f"record {name} has no text behind its picture, and so no answer to it")
    captured, (adjacent, vision_text, hidden), margins = _run(teacher, batch, names, tau)
    own = _run_student(student, batch) if student is not None else None
    made = []
    for b, (start, stop) in enumerate(spans):
        alone = tokens.select([b])
        is_vision, is_text = (mask[0, start:stop] for mask in (alone.is_vision, alone.is_text))
        features, alignment = _read_maps(captured, own, b, start, is_vision, is_text)
        made.append(
            Observation(
                capability=batch["question_types"][b],
                num_tokens=stop - start,
                words=batch["input_ids"][b, start:stop][is_text].cpu().numpy(),
                margin=margins[b],
                adjacent=np.stack([layer[b] for layer in adjacent]),
                vision_text=np.stack([layer[b] for layer in vision_text]),
                hidden=np.stack([layer[b] for layer in hidden]),
                vision=features.vision.numpy(),
                pooled=features.pooled.numpy(),
                vision_mass=features.vision_mass.numpy(),
                sink_share=features.sink_share.numpy(),
                row_share=features.row_share.numpy(),
                sink_floor=features.sink_floor,
                alignment={region: pairs.numpy() for region, pairs in alignment.items()},
            )
        )
    return made


@torch.no_grad()
def observe_margins(model: nn.Module, batch: Mapping[str, Any], *, tau: float) -> list[Margin]:
    """The margins alone; pictures are not needed.

    Raises:
        DataError: A record has no answer; names it.
    """
    return _margins(batch, _names(batch), _forward(model, batch, _answer_places(batch)), tau)


def _names(batch: Mapping[str, Any]) -> list[str]:
    """What errors call the records."""
    ids = enumerate(batch["record_ids"])
    return [repr(name) if name else f"number {b + 1} of its batch" for b, name in ids]


def _span(tokens: TokenLayout, sample: int, name: str) -> tuple[int, int]:
    """Where a record's own tokens start and stop among padding."""
    if tokens.segment_ids is not None:
        raise ValueError("batches are packed; give records rows of their own, padded")
    valid = tokens.valid[sample].nonzero()
    start, stop = int(valid.min()), int(valid.max()) + 1
    if stop - start != len(valid):
        raise ValueError(f"record {name} has padding in its middle; it belongs to the ends")
    return start, stop


def _run(
    teacher: nn.Module, batch: Mapping[str, Any], names: list[str], tau: float
) -> tuple[CapturedAttention, _HiddenMeasures, list[Margin]]:
    """The teacher's queries and keys, hidden measures, and margins."""
    count = len(decoder_layers(find_decoder(teacher)))
    measured: _HiddenMeasures = ([], [], [])
    with ExitStack() as stack:
        captured = stack.enter_context(capture_attention(teacher, range(count)))
        stack.enter_context(_watch_hidden(teacher, batch["tokens"], measured))
        logits = _forward(teacher, batch, _answer_places(batch))
    return captured, measured, _margins(batch, names, logits, tau)


def _run_student(student: nn.Module, batch: Mapping[str, Any]) -> CapturedAttention:
    count = len(decoder_layers(find_decoder(student)))
    with capture_attention(student, range(count), stop_after_last=True) as captured:
        student(**_inputs(student, batch), use_cache=False)
    return captured


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch's tensors but the labels, where the model is and as its weights are."""
    first = next(model.parameters())
    inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    return {
        name: tensor.to(first.device, first.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _answer_places(batch: Mapping[str, Any]) -> Tensor:
    """Positions that predict a token of any record's answer."""
    labels: Tensor = batch["labels"]
    return (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()[:, 0]


def _forward(model: nn.Module, batch: Mapping[str, Any], places: Tensor) -> Tensor:
    """(B, A, V) logits at some positions; of no others where the model can do that."""
    inputs = _inputs(model, batch)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = places.to(inputs["input_ids"].device)
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return logits
    whole: Tensor = model(**inputs, use_cache=False).logits
    return whole.index_select(1, places.to(whole.device))


def _margins(
    batch: Mapping[str, Any], names: list[str], logits: Tensor, tau: float
) -> list[Margin]:
    places = _answer_places(batch)
    made = []
    for b, name in enumerate(names):
        labels = batch["labels"][b, places + 1]
        answered = labels != IGNORE_INDEX
        if not bool(answered.any()):
            raise DataError(f"record {name} has no answer; margins are those of answers")
        chosen = logits[b, answered.to(logits.device)]
        margins = generalized_margin(chosen, labels[answered].to(logits.device), tau=tau)
        made.append(
            Margin(
                batch["record_ids"][b],
                batch["pictures"][b] if "pictures" in batch else object(),  # equal to no other
                along_answer(margins).numpy(),
                float(margins.double().mean()),
                len(margins),
            )
        )
    return made


@contextmanager
def _watch_hidden(
    model: nn.Module, tokens: TokenLayout, measured: _HiddenMeasures
) -> Iterator[None]:
    """Measure hidden states as layers make them: none is kept."""

    def look(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        here = tokens.to(after.device)
        before, after = (h.to(torch.promote_types(h.dtype, torch.float32)) for h in (before, after))
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        vision, text = (_mean_state(after, mask) for mask in (here.is_vision, here.is_text))
        behind = here.is_text & (here.is_vision.flip(1).cumsum(1).flip(1) == 0)
        parts = (
            (cosine * here.valid).sum(1) / here.valid.sum(1),
            nn.functional.cosine_similarity(vision, text, dim=-1),
            _mean_state(after, behind).float(),
        )
        for into, part in zip(measured, parts, strict=True):
            into.append(part.cpu().numpy())

    hooks = [
        layer.register_forward_hook(look, with_kwargs=True)
        for layer in decoder_layers(find_decoder(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean over some tokens."""
    picked = states.masked_fill(~mask[..., None], 0)
    return picked.sum(1) / mask.sum(1, keepdim=True)


def _read_maps(
    teacher: CapturedAttention,
    student: CapturedAttention | None,
    sample: int,
    start: int,
    is_vision: Tensor,
    is_text: Tensor,
) -> tuple[MapFeatures, dict[str, Tensor]]:
    """Features of the teacher's maps and their cosines to the student's, a few rows at a time."""
    place = teacher[0].query.device
    is_vision, is_text = is_vision.to(place), is_text.to(place)
    num_tokens = len(is_vision)
    depth = len(teacher.layers) + (0 if student is None else len(student.layers))
    sums = MapSums(is_vision, is_text, len(teacher.layers))
    pairs = None
    if student is not None:
        pairs = PairCosines(is_vision, is_text, (len(student.layers), len(teacher.layers)))
    height = max(16, _CHUNK_BYTES // (4 * depth * num_tokens))
    read = partial(_rows, sample=sample, start=start, num_tokens=num_tokens, place=place)
    for row in range(0, num_tokens, height):
        rows = slice(row, min(row + height, num_tokens))
        maps = read(teacher, rows=rows)
        sums.add(rows, maps)
        if student is not None and pairs is not None:
            pairs.add(rows, read(student, rows=rows), maps)
    return sums.result(), {} if pairs is None else pairs.result()


def _rows(
    captured: CapturedAttention,
    *,
    rows: slice,
    sample: int,
    start: int,
    num_tokens: int,
    place: torch.device,
) -> Tensor:
    """(L, R, N) rows of the head-mean maps of all layers, of one record without its padding."""
    made = []
    for layer in captured.layers:
        record = captured[layer]
        own = slice(start, start + num_tokens)
        query, key = (each[sample : sample + 1, :, own] for each in (record.query, record.key))
        everything = torch.ones(1, num_tokens, dtype=torch.bool, device=query.device)
        wanted = torch.zeros_like(everything)
        wanted[:, rows] = True
        # The rectangle of these rows and all keys, whatever kind of token they are.
        (target,) = attention_map_targets(
            [(query, key)],
            [[0]],
            TokenLayout(is_vision=everything, is_text=wanted, valid=everything),
            region="text_to_vision",
            window=record.window,
            scale_teacher=record.scale,
        )
        made.append(torch.ldexp(target.values[0], target.exponents[0][:, None]).to(place))
    return torch.stack(made)
