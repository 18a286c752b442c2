"""What each token is: vision, text or padding, and which segment of a packed row it belongs to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# The last is an attribute of InternVL's remote code, where the model stands for its config.
_IMAGE_ID_NAMES = ("image_token_id", "image_token_index", "img_context_token_id")
_VIDEO_ID_NAMES = ("video_token_id", "video_token_index")


@dataclass(frozen=True)
class TokenLayout:
    """Masks of a batch of B samples of N tokens; built once per batch, best in the collator.

    Build it with `from_masks` or `from_batch`, which check the values. The constructor itself
    checks shapes, dtypes and devices only, and never synchronises with a GPU.

    Args:
        is_vision: (B, N) bool, tokens that stand for image or video patches.
        is_text: (B, N) bool, the other tokens whose queries are compared.
        valid: (B, N) bool, tokens that are no padding.
        segment_ids: (B, N) integers or None. A token attends only to tokens with its own number;
            None means that every row is one segment.

    Raises:
        TypeError: A mask is not a bool tensor, or `segment_ids` not an integer tensor.
        ValueError: Shapes or devices differ, or B or N is 0.
    """

    is_vision: Tensor
    is_text: Tensor
    valid: Tensor
    segment_ids: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("is_vision", "is_text", "valid"):
            _check_mask(name, getattr(self, name), self.is_vision)
        if self.segment_ids is not None:
            _check_segments(self.segment_ids, self.is_vision)

    @classmethod
    def from_masks(
        cls,
        is_vision: Tensor,
        *,
        is_text: Tensor | None = None,
        valid: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> "TokenLayout":
        """A layout from explicit masks, values checked.

        Reads the masks once: with masks on a GPU that is one synchronisation, on the CPU none.

        Args:
            is_vision: (B, N) bool, tokens that stand for image or video patches.
            is_text: (B, N) bool; default `valid & ~is_vision`.
            valid: (B, N) bool, no padding; default all True.
            segment_ids: (B, N) integers, the sequence of a packed row; default one segment a row.

        Raises:
            TypeError: A mask is not a bool tensor, or `segment_ids` not an integer tensor.
            ValueError: Shapes or devices differ, B or N is 0, a token is both text and vision, or
                a token of padding is marked as text or vision.

        Example:
            >>> import torch
            >>> from drivekd.tokens import TokenLayout
            >>> layout = TokenLayout.from_masks(torch.tensor([[True, True, False]]))
            >>> layout.is_text.tolist()
            [[False, False, True]]
        """
        _check_mask("is_vision", is_vision, is_vision)
        if valid is None:
            valid = torch.ones_like(is_vision)
        _check_mask("valid", valid, is_vision)
        if is_text is None:
            is_text = valid & ~is_vision
        layout = cls(is_vision, is_text, valid, segment_ids)
        faults = torch.stack([is_vision & is_text, is_vision & ~valid, is_text & ~valid])
        if bool(faults.any()):  # the one synchronisation
            kind, sample, position = (int(index) for index in faults.nonzero()[0])
            said = (
                "is_vision and is_text are both True",
                "is_vision is True where valid is False",
                "is_text is True where valid is False",
            )[kind]
            raise ValueError(
                f"{said} at sample {sample}, position {position}; a token is text, vision or "
                "neither, and padding is neither"
            )
        return layout

    @classmethod
    def from_batch(cls, batch: Mapping[str, object], config: object) -> "TokenLayout":
        """A layout from the inputs of a Hugging Face model.

        Vision tokens are those whose id is the config's `image_token_id` (or `image_token_index`)
        or `video_token_id`; a batch without any is legal. `attention_mask`, where given, marks
        padding. Segments of packed rows are read from jumps of `position_ids`, as transformers
        does: only where no `attention_mask` is given; or from `cu_seq_lens_q`, as its collator for
        flattened rows makes them.

        Args:
            batch: Model inputs: `input_ids` (B, N), and optionally `attention_mask` (B, N),
                `position_ids` (B, N), (1, N), or (4, B, N) with the text's in the first row, and
                `cu_seq_lens_q` (S + 1,), the ends of the sequences in one row.
            config: The model's config, or any object with these attributes (also on its
                `text_config`); for InternVL's remote code the model itself, whose
                `img_context_token_id` must be set; None for a model that reads text alone.

        Raises:
            TypeError: An entry is not a tensor of the wanted kind.
            ValueError: `input_ids` is missing, the config has no image token id, shapes differ, a
                masked-out token is an image token, or `position_ids` restart although an
                `attention_mask` is given (transformers then ignores the packing).
            NotImplementedError: `attention_mask` or `position_ids` has a form from which no layout
                follows; use `from_masks`.

        Example:
            >>> import torch, types
            >>> from drivekd.tokens import TokenLayout
            >>> config = types.SimpleNamespace(image_token_id=9)
            >>> batch = {"input_ids": torch.tensor([[9, 9, 4]])}
            >>> TokenLayout.from_batch(batch, config).is_vision.tolist()
            [[True, True, False]]
        """
        input_ids = _entry(batch, "input_ids")
        if input_ids is None:
            raise ValueError(
                "batch has no input_ids, from which vision tokens are known; where the model is "
                "given inputs_embeds, build the layout with TokenLayout.from_masks"
            )
        if input_ids.dtype.is_floating_point or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids has dtype {input_ids.dtype}; wanted integers")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; wanted (B, N)")
        is_vision = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in _vision_token_ids(config):
            is_vision |= input_ids == token_id
        mask = _entry(batch, "attention_mask")
        valid = None if mask is None else _padding(mask, input_ids)
        positions = _entry(batch, "position_ids")
        segments = None if positions is None else _segments(positions, input_ids, valid)
        lengths = _entry(batch, "cu_seq_lens_q")
        if lengths is not None:
            segments = _segments_of_lengths(lengths, input_ids, valid)
        return cls.from_masks(is_vision, valid=valid, segment_ids=segments)

    @property
    def batch_size(self) -> int:
        """Number of samples B."""
        return self.is_vision.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens N, padding included."""
        return self.is_vision.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the masks."""
        return self.is_vision.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "TokenLayout":
        """The same layout on another device; `non_blocking` as for `torch.Tensor.to`."""
        return self._map(lambda mask: mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TokenLayout":
        """The same layout in page-locked memory; data loaders call this."""
        return self._map(lambda mask: mask.pin_memory())

    def select(self, rows: Tensor | Sequence[int]) -> "TokenLayout":
        """The layout of some samples.

        Args:
            rows: Sample indices, (R,) int64 or a sequence of int, at least one.

        Raises:
            TypeError: `rows` does not hold integers.
            ValueError: `rows` is empty, not one-dimensional, or (where it lies on the CPU) names a
                sample that does not exist.
        """
        index = sample_indices(rows, self.batch_size)
        if index.numel() == 0:
            raise ValueError("rows is empty; wanted (R,) with R >= 1")
        index = index.to(self.device)
        return self._map(lambda mask: mask.index_select(0, index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenLayout":
        masks = {each.name: getattr(self, each.name) for each in fields(self)}
        changed = {name: change(mask) for name, mask in masks.items() if mask is not None}
        return replace(self, **changed)


def sample_indices(rows: object, batch_size: int) -> Tensor:
    """`rows` as (R,) indices of samples; those on a GPU are not looked at.

    Raises:
        TypeError: `rows` is neither a tensor nor a sequence of ints.
        ValueError: It has another shape, or names a sample that does not exist.
    """
    if isinstance(rows, Tensor):
        if rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"rows has dtype {rows.dtype}; wanted sample indices (int64)")
        if rows.ndim != 1:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; wanted (R,)")
        index = rows
    else:
        if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
            raise TypeError(f"rows is a {type(rows).__name__}; wanted (R,) int64 or a list of int")
        for i, row in enumerate(rows):
            if isinstance(row, bool) or not isinstance(row, int):
                raise TypeError(
                    f"rows[{i}] is a {type(row).__name__}; wanted the index of a sample"
                )
            if not 0 <= row < batch_size:
                raise ValueError(f"rows[{i}] is {row}; wanted 0 to {batch_size - 1}")
        index = torch.tensor(rows, dtype=torch.int64)
    can_look = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_look and bool(((index < 0) | (index >= batch_size)).any()):
        raise ValueError(f"rows is {index.tolist()}; wanted samples from 0 to {batch_size - 1}")
    return index


def _check_mask(name: str, mask: object, like: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}; wanted a (B, N) bool tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; wanted torch.bool")
    if mask.ndim != 2 or mask.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; wanted (B, N) with B, N >= 1")
    _check_like(name, mask, like)


def _check_segments(segment_ids: object, like: Tensor) -> None:
    if not isinstance(segment_ids, Tensor):
        kind = type(segment_ids).__name__
        raise TypeError(f"segment_ids is a {kind}; wanted a (B, N) integer tensor or None")
    if segment_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"segment_ids has dtype {segment_ids.dtype}; wanted integers")
    _check_like("segment_ids", segment_ids, like)


def _check_like(name: str, mask: Tensor, like: Tensor) -> None:
    if mask.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} but is_vision has {tuple(like.shape)}"
        )
    if mask.device != like.device:
        raise ValueError(f"{name} is on {mask.device} but is_vision is on {like.device}")


def _entry(batch: Mapping[str, object], name: str) -> Tensor | None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch is a {type(batch).__name__}; wanted a mapping of model inputs")
    entry = batch.get(name)
    if entry is not None and not isinstance(entry, Tensor):
        raise TypeError(f"batch[{name!r}] is a {type(entry).__name__}; wanted a tensor")
    return entry


def _vision_token_ids(config: object) -> list[int]:
    """Token ids of images, and of videos where the model has them."""
    places = [config, getattr(config, "text_config", None)]

    def first(names: tuple[str, ...]) -> list[int]:
        for place in places:
            for name in names:
                token_id = getattr(place, name, None)
                if isinstance(token_id, int):
                    return [token_id]
        return []

    if config is None:
        return []
    images = first(_IMAGE_ID_NAMES)
    if images:
        return images + first(_VIDEO_ID_NAMES)
    kind = type(config).__name__
    remote = "model.img_context_token_id = tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
    if hasattr(config, "img_context_token_id"):
        raise ValueError(f"img_context_token_id of config ({kind}) is not set: {remote}")
    if hasattr(config, "llm_config"):
        raise ValueError(
            f"config ({kind}) is of InternVL's remote code and does not know its image token: hand "
            f"in the model itself as config, after {remote}"
        )
    raise ValueError(
        f"config ({kind}) has none of {', '.join(_IMAGE_ID_NAMES)}; hand in the whole model's "
        "config, None for a model that reads text alone, or build the layout with "
        "TokenLayout.from_masks"
    )


def reads_text_alone(config: object) -> bool:
    """Whether a model's config speaks of neither image tokens nor a vision tower."""
    names = (*_IMAGE_ID_NAMES, "vision_config", "vision_tower", "mm_vision_tower", "visual")
    places = (config, getattr(config, "text_config", None))
    return not any(getattr(place, name, None) is not None for place in places for name in names)


def _padding(mask: Tensor, input_ids: Tensor) -> Tensor:
    if mask.ndim != 2:
        raise NotImplementedError(
            f"attention_mask has shape {tuple(mask.shape)}; only a (B, N) mask says what padding "
            "is: build the layout with TokenLayout.from_masks"
        )
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} but input_ids has "
            f"{tuple(input_ids.shape)}"
        )
    if mask.dtype.is_floating_point:
        raise TypeError(f"attention_mask has dtype {mask.dtype}; wanted bool or integers 0, 1")
    return mask != 0


def _segments(positions: Tensor, input_ids: Tensor, valid: Tensor | None) -> Tensor | None:
    """Numbers of the packed sequences, or None where every row is one."""
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of text; the rotary axes of images and videos follow
    if positions.ndim == 3 and valid is not None:
        return None  # multimodal positions; with a mask, transformers looks for no packing
    if positions.ndim != 2:
        raise NotImplementedError(
            f"position_ids has shape {tuple(positions.shape)}; packed sequences are read from "
            "(B, N) positions, or from the first of four rows (4, B, N): build the layout with "
            "TokenLayout.from_masks"
        )
    if positions.shape[1] != input_ids.shape[1] or positions.shape[0] not in (
        1,
        input_ids.shape[0],
    ):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)} but input_ids has "
            f"{tuple(input_ids.shape)}"
        )
    jump = torch.zeros_like(input_ids, dtype=torch.bool)
    jump[:, 1:] = positions.diff(dim=-1) != 1
    if valid is None:
        return jump.cumsum(dim=-1) if bool(jump.any()) else None
    jump[:, 1:] &= valid[:, 1:] & valid[:, :-1]
    if bool(jump.any()):
        sample, position = (int(index) for index in jump.nonzero()[0])
        raise ValueError(
            f"position_ids jump at sample {sample}, position {position} although an attention_mask "
            "is given: transformers then attends across packed sequences; drop the attention_mask, "
            "or build the layout with TokenLayout.from_masks"
        )
    return None


def _segments_of_lengths(lengths: Tensor, input_ids: Tensor, valid: Tensor | None) -> Tensor:
    """Numbers of the sequences of one row, from where each ends."""
    if input_ids.shape[0] != 1 or (valid is not None and not bool(valid.all())):
        raise NotImplementedError(
            f"cu_seq_lens_q is given with {input_ids.shape[0]} rows"
            f"{'' if valid is None else ' and an attention_mask'}; it tells the sequences of one "
            "row without padding: build the layout with TokenLayout.from_masks"
        )
    ends = lengths.to(input_ids.device).long()
    outer = torch.tensor([0, input_ids.shape[1]], device=ends.device)
    is_list = ends.ndim == 1 and ends.numel() > 1
    if not (is_list and torch.equal(ends[[0, -1]], outer) and bool((ends.diff() >= 0).all())):
        raise ValueError(
            f"cu_seq_lens_q is {lengths.tolist()}; wanted 0, the end of each sequence in order, "
            f"and last the {input_ids.shape[1]} tokens of input_ids"
        )
    starts = torch.zeros_like(input_ids)
    starts[0, ends[1:-1]] = 1
    return starts.cumsum(-1)
