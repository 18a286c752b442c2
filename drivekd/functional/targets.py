"""Target maps in compact form: made from a teacher's layers, kept, and read without the teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from drivekd import validation as check
from drivekd.functional.attention import REGIONS, Region
from drivekd.functional.layers import check_layout, listed_layers
from drivekd.functional.lse import SeenBy, check_log_sum_exps
from drivekd.ops import attention_target as _ops
from drivekd.ops.attention_map import work_dtype
from drivekd.ops.dispatch import BackendName, resolve
from drivekd.tokens import TokenLayout

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class AttentionMapTarget:
    """The mean map of one group of teacher layers, as a loss needs it.

    One of two kinds. A *rectangle* (`indices` is None) holds the cells of text queries x vision
    keys: cell (r, c) of a sample is P of its r-th text token and its c-th vision token; where a
    sample has fewer than T or V of them, what stands behind is not looked at. A *full map* holds
    the K largest cells of each row, which keys they are, and the mass of all the others.

    In both, a row's values are P / 2^exponent with the largest in [0.5, 1], so that a 16-bit
    number keeps its relative precision however small the probabilities are.

    How the other cells of a full map's row count: their mass is spread evenly over the visible
    keys that are not given, and the given ones are scaled to what is left, so that a row sums to 1.

    Args:
        values: (B, T, V), or (B, N, K), floating, not negative.
        exponents: (B, T), or (B, N), integers.
        indices: (B, N, K) integers, keys of the values, all different in a row; negative ones
            are no cell.
        rest: (B, N) floating, the mass of a row's cells that are not given.
        window: A query of the teacher saw keys less than `window` tokens away; None: no bound.
        causal: Whether it saw no keys behind it.

    Raises:
        TypeError: A part is no tensor or has another kind of dtype.
        ValueError: Shapes or devices differ, a dimension is empty, or one of `indices` and `rest`
            is missing.
    """

    values: Tensor
    exponents: Tensor
    indices: Tensor | None = None
    rest: Tensor | None = None
    window: int | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        _check_part("values", self.values, _FLOATS)
        if self.values.ndim != 3 or self.values.numel() == 0:
            raise ValueError(
                f"values has shape {tuple(self.values.shape)}; wanted (B, T, V) or (B, N, K), no "
                "dimension empty"
            )
        if (self.indices is None) != (self.rest is None):
            raise ValueError("indices and rest belong together; give both or neither")
        shape = self.values.shape
        parts = (
            ("exponents", self.exponents, _INTEGERS, shape[:2]),
            ("indices", self.indices, _INTEGERS, shape),
            ("rest", self.rest, _FLOATS, shape[:2]),
        )
        for name, part, dtypes, wanted in parts:
            if part is None and name != "exponents":
                continue
            _check_part(name, part, dtypes)
            assert part is not None
            if part.shape != wanted or part.device != self.values.device:
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)} on {part.device}; wanted "
                    f"{tuple(wanted)} on {self.values.device}, as values has"
                )
        object.__setattr__(self, "window", check.check_window("window", self.window))
        check.check_flag("causal", self.causal)

    @property
    def region(self) -> Region:
        """Which cells it holds."""
        return "text_to_vision" if self.indices is None else "full"

    def to(
        self, device: torch.device | str | int, non_blocking: bool = False
    ) -> "AttentionMapTarget":
        """The same target on another device; `non_blocking` as for `torch.Tensor.to`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "AttentionMapTarget":
        """The same target in page-locked memory; data loaders call this."""
        return self._map(lambda part: part.pin_memory())

    @classmethod
    def stack(
        cls,
        samples: Sequence["AttentionMapTarget"],
        *,
        num_tokens: int | None = None,
        starts: Sequence[int] | None = None,
    ) -> "AttentionMapTarget":
        """Targets of single samples, each without padding, as one of a padded batch.

        Args:
            samples: Targets of B = 1, of one kind, window, device and dtype of values, exponents
                and rest: nothing is promoted, and nothing rounded.
            num_tokens: N of the batch; full maps only, which need it.
            starts: Where each sample's first token stands in the batch, from 0 on; default 0,
                padding on the right. Rectangles count text and vision tokens, wherever they are.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: There is no sample, they are of different kinds, windows, devices or dtypes,
                hold several samples, or do not fit into `num_tokens`; `starts` has another length
                or a negative entry.
        """
        check_targets("samples", samples)
        if num_tokens is not None:
            check.check_count("num_tokens", num_tokens, at_least=1)
        offsets = [0] * len(samples) if starts is None else _checked_starts(starts, len(samples))
        if len({(each.region, each.window, each.causal) for each in samples}) != 1:
            raise ValueError(
                "samples must be at least one target, all of one region, window and causal"
            )
        if any(each.values.shape[0] != 1 for each in samples):
            raise ValueError("samples holds a target of several samples; wanted B = 1 in each")
        first = samples[0]
        for i, each in enumerate(samples):
            if _storage(each) != _storage(first):
                raise ValueError(
                    f"samples[{i}] has {_storage(each)} but samples[0] has {_storage(first)}; "
                    "stack targets of one dtype on one device"
                )
        if first.indices is None:
            offsets = [0] * len(samples)
            height = max(each.values.shape[1] for each in samples)
        else:
            if num_tokens is None:
                raise ValueError("num_tokens is None; full maps need the N of their batch")
            height = num_tokens
            lengths = [each.values.shape[1] for each in samples]
            end = max(start + length for start, length in zip(offsets, lengths, strict=True))
            if end > height:
                raise ValueError(f"num_tokens is {num_tokens}, but a sample ends at {end}")
        width = max(each.values.shape[2] for each in samples)
        shape = (len(samples), height, width)
        values = first.values.new_zeros(shape)
        exponents = first.exponents.new_zeros(shape[:2])
        indices = None if first.indices is None else values.new_full(shape, -1, dtype=torch.int32)
        rest = None if first.rest is None else first.rest.new_zeros(shape[:2])
        for b, (each, start) in enumerate(zip(samples, offsets, strict=True)):
            rows = slice(start, start + each.values.shape[1])
            columns = each.values.shape[2]
            values[b, rows, :columns] = each.values[0]
            exponents[b, rows] = each.exponents[0]
            if indices is not None and each.indices is not None:
                keys = each.indices[0].to(torch.int32)
                indices[b, rows, :columns] = torch.where(keys >= 0, keys + start, -1)
            if rest is not None and each.rest is not None:
                rest[b, rows] = each.rest[0]
        return cls(values, exponents, indices, rest, first.window, first.causal)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "AttentionMapTarget":
        parts: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **parts | {name: change(part) for name, part in tensors.items()})


def attention_map_targets(
    teacher_layers: Sequence[tuple[Tensor, Tensor]],
    groups: Sequence[Sequence[int]],
    tokens: TokenLayout | None = None,
    *,
    region: Region = "full",
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    causal: bool = True,
    window: int | None = None,
    scale_teacher: float | Sequence[float | None] | None = None,
    lse_teacher: Sequence[Tensor | None] | None = None,
    backend: BackendName = "auto",
) -> list[AttentionMapTarget]:
    """Targets of groups of teacher layers, to be kept instead of the teacher.

    Args:
        teacher_layers: Pairs (q, k) as in `layerwise_attention_map_loss`.
        groups: For each target the teacher layers whose head-mean maps it is the mean of.
        tokens: What each token is; needed for `"text_to_vision"`.
        region: `"text_to_vision"` gives rectangles, exact but for the dtype; `"full"` the largest
            cells of each row.
        top_k: How many cells of each row of a full map; default all.
        dtype: Of the values; default float32, float64 for float64 inputs.
        causal: Whether a query sees only itself and earlier tokens.
        window: A query sees keys less than `window` tokens away; default no bound.
        scale_teacher: One for all, or one for each teacher layer; default 1/sqrt(D).
        lse_teacher: As in `layerwise_attention_map_loss`.
        backend: `"auto"`, `"torch"`, or `"triton"`, which takes no float64.

    Returns:
        One target for each group, on the inputs' device, without graph. Of a rectangle T and V are
        the largest numbers of text and vision tokens of a sample, at least 1.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: As in `layerwise_attention_map_loss`, or `top_k` is not at least 1 or comes
            with `"text_to_vision"`.
        NotImplementedError: D is larger than 256; with triton, overlapping groups hold more than
            62 maps at once.
        BackendUnavailableError: The backend asked for by name cannot run.

    Note:
        Works in chunks of rows: no (N, N) tensor with a head axis exists, and from N = 512 on
        (triton: 4096) no (N, N) tensor but a target that holds all cells. Reads the numbers of text
        and vision tokens back from the device.

    Example:
        >>> import torch
        >>> from drivekd.functional import attention_map_targets
        >>> layers = [(torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8))]
        >>> target, = attention_map_targets(layers, [[0]], top_k=2)
        >>> target.rest[0].tolist()
        [0.0, 0.0, 0.3333333432674408, 0.5]
    """
    check.check_choice("region", region, REGIONS)
    check.check_flag("causal", causal)
    width = check.check_window("window", window)
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise TypeError(f"top_k is a {type(top_k).__name__}; wanted None or an int")
    if top_k is not None and (top_k < 1 or region == "text_to_vision"):
        raise ValueError(f"top_k is {top_k}; wanted None or an int >= 1, for region 'full' only")
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype is {dtype}; wanted a floating dtype")
    teacher = listed_layers("teacher", teacher_layers, scale_teacher, lse_teacher, learns=False)
    members = check.check_target_groups(groups, len(teacher.queries))
    if not members:
        raise ValueError("groups is empty; wanted at least one group of teacher layers")
    first = teacher.queries[0]
    layout = check.check_tokens(tokens, first, teacher.name)
    check_layout(region, layout)
    windows = [width] * len(members)
    check_log_sum_exps(teacher, teacher, members, windows, SeenBy(layout, causal, None, region))
    rectangle = layout if region == "text_to_vision" else None
    made = _ops.attention_map_targets(
        teacher.queries,
        teacher.keys,
        teacher.lses,
        members,
        None if layout is None else layout.valid,
        None if layout is None else layout.segment_ids,
        None if rectangle is None else rectangle.is_text,
        None if rectangle is None else rectangle.is_vision,
        teacher.scales,
        windows,
        causal,
        top_k,
        resolve(
            "attention_map_targets", backend, device=first.device, dtype=work_dtype(teacher.queries)
        ),
    )
    return [
        AttentionMapTarget(
            each.values if dtype is None else each.values.to(dtype),
            each.exponents,
            each.indices,
            each.rest,
            width,
            causal,
        )
        for each in made
    ]


def check_targets(name: str, targets: object) -> None:
    """Refuse what is no list of targets."""
    if not check.is_sequence(targets):
        raise TypeError(f"{name} is a {type(targets).__name__}; wanted a list of targets")
    for i, target in enumerate(targets):
        if not isinstance(target, AttentionMapTarget):
            raise TypeError(
                f"{name}[{i}] is a {type(target).__name__}; wanted a "
                "drivekd.functional.AttentionMapTarget"
            )


def _checked_starts(starts: object, count: int) -> list[int]:
    if not check.is_sequence(starts):
        raise TypeError(f"starts is a {type(starts).__name__}; wanted None or a list of int")
    if len(starts) != count:
        raise ValueError(f"starts has {len(starts)} entries but there are {count} samples")
    return [check.check_count(f"starts[{i}]", each) for i, each in enumerate(starts)]


def _storage(target: AttentionMapTarget) -> str:
    """What targets of one batch share, in words."""
    rest = "" if target.rest is None else f", rest {target.rest.dtype}"
    return (
        f"values {target.values.dtype}, exponents {target.exponents.dtype}{rest} on "
        f"{target.values.device}"
    )


def _check_part(name: str, part: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{name} is a {type(part).__name__}; wanted a tensor")
    if part.dtype not in dtypes:
        wanted = ", ".join(map(str, dtypes))
        raise TypeError(f"{name} has dtype {part.dtype}; wanted one of {wanted}")
