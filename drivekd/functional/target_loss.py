"""Attention-map losses against given target maps: no teacher runs."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from drivekd import validation as check
from drivekd.autograd.attention_map import (
    AttentionMapTargetLossFunction,
    AttentionMapTargetLossSpec,
)
from drivekd.functional.attention import REDUCTIONS, Denominator, Loss, check_settings
from drivekd.functional.layers import LayerNames, ModelLayers, check_layout, listed_layers
from drivekd.functional.lse import SeenBy, check_log_sum_exps
from drivekd.functional.targets import AttentionMapTarget
from drivekd.ops.attention_map import work_dtype
from drivekd.ops.dispatch import BackendName, resolve
from drivekd.tokens import TokenLayout

_CELLS_AT_ONCE = 2**20  # of a target, while they are checked


def attention_map_target_loss(
    q_student: Tensor,
    k_student: Tensor,
    target: AttentionMapTarget,
    tokens: TokenLayout | None = None,
    *,
    loss: Loss = "mse",
    denominator: Denominator = "official",
    causal: bool = True,
    sample_weight: Tensor | None = None,
    scale_student: float | None = None,
    lse_student: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """`attention_map_loss` against a target map that was made before.

    With the target of `attention_map_targets` it is the loss against those teacher layers, but for
    the rounding of the values and, of a full map, the cells that were left out; region and window
    are the target's. With r the mass that a row leaves out, m its smallest cell kept, and c the
    number of cells left out, the target is off by at most 2 r in sum and sqrt(r min(r, m)) in
    norm, hence per row

    - `mse`: the root of the sum of squares by at most sqrt(r min(r, m));
    - `cosine`: the loss by at most 2 sqrt(r min(r, m)) over the norm of the row's kept cells;
    - `kl`: the loss by at most r (log c + d), d being the range of log P_s over the cells left out.

    Args:
        q_student: (B, H, N, D) queries after RoPE, as in `attention_map_loss`.
        k_student: (B, H_kv, N, D) keys, same dtype.
        target: The target of these B samples; `AttentionMapTarget.stack` pads.
        tokens: What each token is; needed for rectangles.
        loss: `"mse"`, `"cosine"` or `"kl"`.
        denominator: `"official"` or `"live"`; used by `mse` only.
        causal: Whether a query sees only itself and earlier tokens.
        sample_weight: As in `attention_map_loss`.
        scale_student: Factor of the student's scores; default 1/sqrt(D).
        lse_student: As in `attention_map_loss`.
        backend: `"auto"`, `"torch"`, or `"triton"`, which takes no float64: neither of queries and
            keys nor of the target's values.

    Returns:
        0-d loss, float32, float64 where `q_student` or the target's values are. Gradients reach
        `q_student` and `k_student`, and are computed as in `attention_map_loss`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: Shapes, devices or values do not fit; the target has fewer rows or keys than a
            sample has text or vision tokens (checked on the CPU, elsewhere under
            `DRIVEKD_DEBUG=1`).
        NotImplementedError: D is larger than 256; in backward, if `create_graph=True`.
        BackendUnavailableError: The backend asked for by name cannot run.

    Note:
        As `attention_map_loss`. The target is read in its own dtype and strides, in chunks of rows.

    Example:
        >>> import torch
        >>> from drivekd.functional import attention_map_target_loss, attention_map_targets
        >>> q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
        >>> teacher = (torch.randn(1, 8, 6, 16), torch.randn(1, 4, 6, 16))
        >>> target, = attention_map_targets([teacher], [[0]], top_k=4, dtype=torch.float16)
        >>> attention_map_target_loss(q, k, target).backward()
        >>> q.grad.shape
        torch.Size([1, 4, 6, 8])
    """
    names = LayerNames("q_student", "k_student", "scale_student", "lse_student", learns=True)
    student = names.layers([q_student], [k_student], [scale_student], [lse_student])
    losses = _losses(
        student,
        _checked([target], student, "target"),
        tokens,
        loss=loss,
        denominator=denominator,
        causal=causal,
        sample_weight=sample_weight,
        backend=backend,
    )
    return losses[0]


def layerwise_attention_map_target_loss(
    student_layers: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[AttentionMapTarget],
    tokens: TokenLayout | None = None,
    *,
    reduction: Literal["mean", "none"] = "mean",
    loss: Loss = "mse",
    denominator: Denominator = "official",
    causal: bool = True,
    sample_weight: Tensor | None = None,
    scale_student: float | Sequence[float | None] | None = None,
    lse_student: Sequence[Tensor | None] | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """`attention_map_target_loss` of several student layers, each against its own target.

    Args:
        student_layers: L pairs (q, k).
        targets: L targets of one region.
        tokens: As in `attention_map_target_loss`.
        reduction: `"mean"` over student layers, or `"none"`.
        loss: As in `attention_map_target_loss`.
        denominator: As in `attention_map_target_loss`.
        causal: As in `attention_map_target_loss`.
        sample_weight: As in `attention_map_loss`.
        scale_student: One for all, or one for each student layer.
        lse_student: One (B, H, N) or None for each student layer; default none.
        backend: As in `attention_map_target_loss`.

    Returns:
        0-d loss, or (L,) for `reduction="none"`; float32, float64 where an input is.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: As in `attention_map_target_loss`, or the numbers of layers and targets differ.
        NotImplementedError: D is larger than 256; in backward, if `create_graph=True`.
        BackendUnavailableError: The backend asked for by name cannot run.
    """
    check.check_choice("reduction", reduction, REDUCTIONS)
    student = listed_layers("student", student_layers, scale_student, lse_student, learns=True)
    if not check.is_sequence(targets):
        raise TypeError(f"targets is a {type(targets).__name__}; wanted a list of targets")
    count = len(student.queries)
    if len(targets) != count:
        raise ValueError(f"there are {count} student_layers but {len(targets)} targets")
    losses = _losses(
        student,
        _checked(targets, student, "targets[{i}]"),
        tokens,
        loss=loss,
        denominator=denominator,
        causal=causal,
        sample_weight=sample_weight,
        backend=backend,
    )
    return losses if reduction == "none" else losses.mean()


def _losses(
    student: ModelLayers,
    targets: Sequence[AttentionMapTarget],
    tokens: TokenLayout | None,
    *,
    loss: str,
    denominator: str,
    causal: bool,
    sample_weight: Tensor | None,
    backend: str,
) -> Tensor:
    """Settle what the targets leave open, and call: (L,) losses."""
    region = targets[0].region
    check_settings(region, loss, denominator)
    check.check_flag("causal", causal)
    first = student.queries[0]
    layout = check.check_tokens(tokens, first, student.name)
    weight = check.check_sample_weight(sample_weight, first)
    check_layout(region, layout)
    windows = [target.window for target in targets]
    seen_by = SeenBy(layout, causal, None, region)
    check_log_sum_exps(student, student, [()] * len(windows), windows, seen_by)
    rectangle = layout if region == "text_to_vision" else None
    for i, target in enumerate(targets):
        if target.causal != causal:
            raise ValueError(
                f"causal is {causal} but targets[{i}] was made with causal={target.causal}"
            )
    reads_values = first.device.type == "cpu" or check.debugging()
    if reads_values and not torch.compiler.is_compiling():
        if rectangle is not None:
            _check_counts(targets, rectangle)
        for i, target in enumerate(targets):
            _check_cells(f"targets[{i}]", target, layout, causal=causal)
    indices = [each.indices for each in targets if each.indices is not None]
    rest = [each.rest for each in targets if each.rest is not None]
    values = [each.values for each in targets]
    recording = torch.is_grad_enabled()
    spec = AttentionMapTargetLossSpec(
        scale_student=tuple(student.scales),
        windows=tuple(window or 0 for window in windows),
        causal=causal,
        loss=loss,
        denominator=denominator,
        needs_dq=tuple(recording and each.requires_grad for each in student.queries),
        needs_dk=tuple(recording and each.requires_grad for each in student.keys),
        backend=resolve(
            "attention_map_target_loss",
            backend,
            device=first.device,
            dtype=work_dtype([*student.queries, *values]),
        ),
    )
    losses: Tensor = AttentionMapTargetLossFunction.apply(  # type: ignore[no-untyped-call]
        spec,
        len(student.queries),
        len(indices),
        *student.queries,
        *student.keys,
        *values,
        *(each.exponents for each in targets),
        *indices,
        *rest,
        *student.lses,
        None if layout is None else layout.valid,
        None if layout is None else layout.segment_ids,
        None if rectangle is None else rectangle.is_text,
        None if rectangle is None else rectangle.is_vision,
        weight,
    )
    return losses


def _checked(
    targets: Sequence[object], student: ModelLayers, name: str
) -> list[AttentionMapTarget]:
    """Targets that fit the student's batch, of one region."""
    checked: list[AttentionMapTarget] = []
    query = student.queries[0]
    batch_size, _, num_tokens, _ = query.shape
    for i, target in enumerate(targets):
        where = name.format(i=i)
        if not isinstance(target, AttentionMapTarget):
            kind = type(target).__name__
            raise TypeError(f"{where} is a {kind}; wanted a drivekd.functional.AttentionMapTarget")
        if checked and target.region != checked[0].region:
            raise ValueError(
                f"{where} is of region {target.region!r}, the first of {checked[0].region!r}; "
                "give them in two calls"
            )
        own, rows = target.values.shape[:2]
        if own != batch_size or (target.region == "full" and rows != num_tokens):
            raise ValueError(
                f"{where} has {own} samples of {rows} rows but {student.name} has {batch_size} "
                f"samples of {num_tokens} tokens"
            )
        if target.values.device != query.device:
            raise ValueError(
                f"{where} is on {target.values.device} but {student.name} is on {query.device}; "
                "move it with target.to(device)"
            )
        for part in (target.values, target.rest):
            if part is not None:
                check.check_no_grad(where, part, "a target is constant")
        checked.append(target)
    return checked


def _check_counts(targets: Sequence[AttentionMapTarget], layout: TokenLayout) -> None:
    """Every text and vision token has its row and column; reads values back."""
    masks = (("text", layout.is_text, 1), ("vision", layout.is_vision, 2))
    for kind, mask, axis in masks:
        most = int((mask & layout.valid).sum(dim=-1).max())
        held = min(target.values.shape[axis] for target in targets)
        if most > held:
            raise ValueError(
                f"a sample has {most} {kind} tokens but the target has room for {held}; it was "
                "made from other tokens"
            )


def _check_cells(
    name: str, target: AttentionMapTarget, layout: TokenLayout | None, *, causal: bool
) -> None:
    """What is given are probabilities, of keys that a row sees, each once; reads values back.

    What belongs to no token of the batch may be anything.
    """
    batch_size, num_rows, width = target.values.shape
    step = max(1, _CELLS_AT_ONCE // width)
    for b in range(batch_size):
        if target.indices is None:
            assert layout is not None
            text, vision = (
                int((mask[b] & layout.valid[b]).sum())
                for mask in (layout.is_text, layout.is_vision)
            )
            _check_probabilities(f"{name}.values", target.values[b, :text, :vision])
            continue
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            _check_rows(name, target, layout, b, rows, causal=causal)


def _check_rows(
    name: str,
    target: AttentionMapTarget,
    layout: TokenLayout | None,
    sample: int,
    rows: slice,
    *,
    causal: bool,
) -> None:
    """The same of some rows of a full map."""
    assert target.indices is not None and target.rest is not None
    num_rows = target.values.shape[1]
    row = torch.arange(rows.start, rows.stop, device=target.values.device)
    is_row = row >= 0 if layout is None else layout.valid[sample, rows]
    keys = target.indices[sample, rows][is_row]
    _check_probabilities(f"{name}.values", target.values[sample, rows][is_row][keys >= 0])
    _check_probabilities(f"{name}.rest", target.rest[sample, rows][is_row])
    last = row[is_row, None] if causal else num_rows - 1
    if bool((keys > last).any()):
        what = "behind its token" if causal else "that do not exist"
        raise ValueError(
            f"{name}.indices names keys {what} in sample {sample}; it was made from other tokens, "
            f"or for padding on the other side ({num_rows} tokens here)"
        )
    ordered = keys.sort(dim=-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError(f"{name}.indices names a key twice in a row of sample {sample}")


def _check_probabilities(name: str, values: Tensor) -> None:
    if not bool((values >= 0).all()):
        raise ValueError(f"{name} holds negative numbers or NaN; wanted probabilities")
