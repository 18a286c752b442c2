"""Head-mean attention maps and their distillation losses, from post-RoPE queries and keys."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from drivekd import validation as check
from drivekd.autograd.attention_map import AttentionMapLossFunction, AttentionMapLossSpec
from drivekd.functional.layers import (
    LayerNames,
    ModelLayers,
    autocast,
    check_layout,
    listed_layers,
)
from drivekd.functional.lse import SeenBy, check_log_sum_exps
from drivekd.ops import attention_map as _ops
from drivekd.ops.dispatch import BackendName, resolve
from drivekd.tokens import TokenLayout
from drivekd.validation import check_groups as check_groups

Region = Literal["full", "text_to_vision"]
Loss = Literal["mse", "cosine", "kl"]
Denominator = Literal["official", "live"]

REGIONS = ("full", "text_to_vision")
LOSSES = ("mse", "cosine", "kl")
DENOMINATORS = ("official", "live")
REDUCTIONS = ("mean", "none")


def attention_map(
    q: Tensor,
    k: Tensor,
    tokens: TokenLayout | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """The head-mean attention map, in full; for plots and small N.

    `P[i, j] = (1/H) sum_h softmax_j(scale * q_h[i] . k_h'[j])` over the keys visible to i: not
    later than i if `causal`, in the window, valid, and of the same segment.

    Args:
        q: (B, H, N, D) queries after RoPE; float64, float32, bfloat16 or float16, any strides.
        k: (B, H_kv, N, D) keys after RoPE, same dtype; H is a multiple of H_kv.
        tokens: Padding and segments; default none, one segment.
        causal: Whether a query sees only itself and earlier tokens.
        window: A query sees keys less than `window` tokens away; default no bound.
        scale: Factor of the scores; default 1/sqrt(D).
        backend: `"auto"` or the name of a backend (`drivekd.backend_info()`).

    Returns:
        (B, N, N) float32, float64 for float64 inputs; rows and columns of padding are zero. It
        carries no graph.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: Shapes, devices or values do not fit.
        NotImplementedError: D is larger than 256.
        BackendUnavailableError: The backend asked for by name cannot run.

    Example:
        >>> import torch
        >>> from drivekd.functional import attention_map
        >>> attention_map(torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8))[0, 1].tolist()
        [0.5, 0.5, 0.0]
    """
    check.check_query_key(q, k, "q", "k")
    layout = check.check_tokens(tokens, q, "q")
    check.check_flag("causal", causal)
    width = check.check_window("window", window)
    factor = check.check_scale("scale", scale, q.shape[-1])
    q, k = autocast(q.detach()), autocast(k.detach())
    name = resolve("attention_map", backend, device=q.device, dtype=q.dtype)
    valid = None if layout is None else layout.valid
    segment_ids = None if layout is None else layout.segment_ids
    result: Tensor = _ops.attention_map(
        q, k, None, valid, segment_ids, causal, width or 0, factor, name
    )
    return result


def attention_map_loss(
    q_student: Tensor,
    k_student: Tensor,
    q_teacher: Tensor | Sequence[Tensor],
    k_teacher: Tensor | Sequence[Tensor],
    tokens: TokenLayout | None = None,
    *,
    region: Region = "full",
    loss: Loss = "mse",
    denominator: Denominator = "official",
    causal: bool = True,
    window: int | None = None,
    sample_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | Sequence[float | None] | None = None,
    lse_student: Tensor | None = None,
    lse_teacher: Tensor | Sequence[Tensor | None] | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Distance between the head-mean attention maps of a student's and a teacher's layer.

    With P the full softmax averaged over heads (see `attention_map`), per sample:

    - `mse`: sum over the region's cells of (P_s - P_t)^2 / number of cells. `denominator` says
      which are counted: `"official"`, as the public code, every cell of the region among valid
      tokens of one segment, also those that the causal mask kills; `"live"`, visible ones only.
    - `cosine`: mean over the region's rows of 1 - cos(P_s[i], P_t[i]) over visible region cells.
    - `kl`: mean over the region's rows of KL(P_t[i] || P_s[i]), both renormalised over the
      visible region cells, in the log domain.

    Rows count that have a visible region cell. The loss is the mean over samples, each times its
    `sample_weight`. A sample without anything to count is left out of the mean; if all are, the
    loss is an exact 0 that backpropagates zeros. A region selects cells, it never changes P.

    Args:
        q_student: (B, H_s, N, D_s) queries after RoPE; float64, float32, bfloat16 or float16, any
            strides, D up to 256.
        k_student: (B, H_kv, N, D_s) keys, same dtype; H_s is a multiple of H_kv.
        q_teacher: (B, H_t, N, D_t), or a sequence of such: the target is then the mean of their
            head-mean maps. Heads, D and dtype may differ from the student's.
        k_teacher: Keys of the same layers.
        tokens: What each token is; needed for `"text_to_vision"`. Default: no padding, one
            segment.
        region: `"full"`, or `"text_to_vision"`: text queries x vision keys.
        loss: `"mse"`, `"cosine"` or `"kl"`.
        denominator: `"official"` or `"live"`; used by `mse` only.
        causal: Whether a query sees only itself and earlier tokens, in both models.
        window: A query sees keys less than `window` tokens away, in both models; default no bound.
        sample_weight: (B,) floating; the weighted losses are divided by the number of counted
            samples, not by the sum of weights.
        scale_student: Factor of the student's scores; default 1/sqrt(D_s).
        scale_teacher: The teacher's, or one for each of its layers; default 1/sqrt(D_t).
        lse_student: (B, H_s, N) natural log-sum-exp of the scaled scores over all visible keys, as
            a flash forward returns it; float32, float64 for float64 inputs. Saves a pass. What
            stands at padding does not matter; `DRIVEKD_DEBUG=1` recomputes some rows.
        lse_teacher: The teacher's, or one for each of its layers.
        backend: `"auto"` or the name of a backend (`drivekd.backend_info()`).

    Returns:
        0-d loss, float32, float64 where an input is. Gradients reach `q_student` and `k_student`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: Shapes, devices or values do not fit, a tensor other than the student's
            requires grad, or `"text_to_vision"` comes without tokens. Under `DRIVEKD_DEBUG=1` also
            if queries, keys or weights are not finite, or a log-sum-exp is not what it should be:
            in base 2, without the scale, over the region only, ...
        NotImplementedError: D is larger than 256; in backward, if `create_graph=True`.
        BackendUnavailableError: The backend asked for by name cannot run.

    Note:
        Gradients are computed in forward, in float32 or better, kept unscaled beside their factor
        and multiplied by it and by the upstream gradient in backward, before they are cast: small
        16-bit gradients survive. No (N, N) tensor with a head axis exists at any time, no value is
        read back from a GPU, results are bitwise repeatable. Under autocast queries and keys are
        cast to the autocast dtype first, as in scaled_dot_product_attention.

    Source:
        Drive-KD (arXiv 2601.21288), perception, reasoning and planning losses;
        Colamentos2023/Drive-KD, intern/trainer.py.

    Example:
        >>> import torch
        >>> from drivekd.functional import attention_map_loss
        >>> q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
        >>> loss = attention_map_loss(q, k, torch.randn(1, 8, 6, 16), torch.randn(1, 4, 6, 16))
        >>> loss.backward()
        >>> q.grad.shape
        torch.Size([1, 4, 6, 8])
    """
    if isinstance(q_teacher, Tensor) or not check.is_sequence(q_teacher):
        check.check_single("k_teacher", k_teacher, "q_teacher")
        where = ""
        q_layers, k_layers = _objects(q_teacher), _objects(k_teacher)
        scales, lses = _objects(scale_teacher), _objects(lse_teacher)
    else:
        q_layers = list(q_teacher)
        k_layers = check.check_listed("k_teacher", k_teacher, q_layers, "q_teacher")
        scales = check.per_layer("scale_teacher", scale_teacher, len(q_layers))
        lses = check.per_layer("lse_teacher", lse_teacher, len(q_layers))
        where = "[{i}]"
    student = LayerNames("q_student", "k_student", "scale_student", "lse_student", learns=True)
    teacher = LayerNames(
        f"q_teacher{where}",
        f"k_teacher{where}",
        "scale_teacher" + (where if check.is_sequence(scale_teacher) else ""),
        f"lse_teacher{where}",
        learns=False,
    )
    losses = _losses(
        student.layers([q_student], [k_student], [scale_student], [lse_student]),
        teacher.layers(q_layers, k_layers, scales, lses),
        [tuple(range(len(q_layers)))],
        tokens,
        region=region,
        loss=loss,
        denominator=denominator,
        causal=causal,
        windows=[check.check_window("window", window)],
        sample_weight=sample_weight,
        backend=backend,
    )
    return losses[0]


def layerwise_attention_map_loss(
    student_layers: Sequence[tuple[Tensor, Tensor]],
    teacher_layers: Sequence[tuple[Tensor, Tensor]],
    groups: Sequence[Sequence[int]],
    tokens: TokenLayout | None = None,
    *,
    reduction: Literal["mean", "none"] = "mean",
    region: Region = "full",
    loss: Loss = "mse",
    denominator: Denominator = "official",
    causal: bool = True,
    window: int | Sequence[int | None] | None = None,
    sample_weight: Tensor | None = None,
    scale_student: float | Sequence[float | None] | None = None,
    scale_teacher: float | Sequence[float | None] | None = None,
    lse_student: Sequence[Tensor | None] | None = None,
    lse_teacher: Sequence[Tensor | None] | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """`attention_map_loss` of several student layers, each against a group of teacher layers.

    The target of student layer i is the mean of the head-mean maps of the teacher layers
    `groups[i]`. Every teacher map is computed once, also where it serves several groups.

    Args:
        student_layers: L pairs (q, k) as in `attention_map_loss`.
        teacher_layers: Pairs (q, k) of the teacher's layers.
        groups: L lists of indices into `teacher_layers`; see `drivekd.match_layer_groups`.
        tokens: As in `attention_map_loss`.
        reduction: `"mean"` over student layers, or `"none"`.
        region: As in `attention_map_loss`.
        loss: As in `attention_map_loss`.
        denominator: As in `attention_map_loss`.
        causal: As in `attention_map_loss`.
        window: One for all, or one for each student layer; it holds for its teachers too.
        sample_weight: As in `attention_map_loss`.
        scale_student: One for all, or one for each student layer.
        scale_teacher: One for all, or one for each teacher layer.
        lse_student: One (B, H_s, N) or None for each student layer; default none.
        lse_teacher: One (B, H_t, N) or None for each teacher layer; default none. It belongs to
            one window, so all layers that the teacher layer serves must have the same.
        backend: `"auto"` or the name of a backend (`drivekd.backend_info()`).

    Returns:
        0-d loss, or (L,) for `reduction="none"`; float32, float64 where an input is.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: As in `attention_map_loss`; or counts of layers, groups, scales or windows
            differ, a group is empty, or an index is out of range.
        NotImplementedError: D is larger than 256; in backward, if `create_graph=True`.
        BackendUnavailableError: The backend asked for by name cannot run.

    Source:
        Drive-KD (arXiv 2601.21288), reasoning loss; Colamentos2023/Drive-KD, intern/trainer.py.

    Example:
        >>> import torch
        >>> from drivekd.functional import layerwise_attention_map_loss
        >>> layers = [(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)) for _ in range(3)]
        >>> losses = layerwise_attention_map_loss(
        ...     layers[:2], layers, [[0, 1], [1, 2]], reduction="none"
        ... )
        >>> losses.shape
        torch.Size([2])
    """
    check.check_choice("reduction", reduction, REDUCTIONS)
    student = listed_layers("student", student_layers, scale_student, lse_student, learns=True)
    teacher = listed_layers("teacher", teacher_layers, scale_teacher, lse_teacher, learns=False)
    num_student = len(student.queries)
    losses = _losses(
        student,
        teacher,
        check_groups(groups, num_student, len(teacher.queries)),
        tokens,
        region=region,
        loss=loss,
        denominator=denominator,
        causal=causal,
        windows=[
            check.check_window("window", each)
            for each in check.per_layer("window", window, num_student)
        ],
        sample_weight=sample_weight,
        backend=backend,
    )
    return losses if reduction == "none" else losses.mean()


def _losses(
    student: ModelLayers,
    teacher: ModelLayers,
    groups: Sequence[tuple[int, ...]],
    tokens: TokenLayout | None,
    *,
    region: str,
    loss: str,
    denominator: str,
    causal: bool,
    windows: Sequence[int | None],
    sample_weight: Tensor | None,
    backend: str,
) -> Tensor:
    """Check what concerns both models, settle the backend, and call: (L,) losses."""
    check_settings(region, loss, denominator)
    check.check_flag("causal", causal)
    first = student.queries[0]
    check.check_same_tokens(teacher.queries[0], first, teacher.name, student.name)
    layout = check.check_tokens(tokens, first, student.name)
    weight = check.check_sample_weight(sample_weight, first)
    check_layout(region, layout)
    check_log_sum_exps(student, teacher, groups, windows, SeenBy(layout, causal, None, region))
    rectangle = layout if region == "text_to_vision" else None
    dtype = _ops.work_dtype([*student.queries, *teacher.queries])
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    recording = torch.is_grad_enabled()
    spec = AttentionMapLossSpec(
        group_members=tuple(index for group in groups for index in group),
        group_offsets=tuple(offsets),
        scale_student=tuple(student.scales),
        scale_teacher=tuple(teacher.scales),
        windows=tuple(window or 0 for window in windows),
        causal=causal,
        loss=loss,
        denominator=denominator,
        needs_dq=tuple(recording and each.requires_grad for each in student.queries),
        needs_dk=tuple(recording and each.requires_grad for each in student.keys),
        backend=resolve("attention_map_loss", backend, device=first.device, dtype=dtype),
    )
    losses: Tensor = AttentionMapLossFunction.apply(  # type: ignore[no-untyped-call]
        spec,
        len(student.queries),
        len(teacher.queries),
        *student.queries,
        *student.keys,
        *teacher.queries,
        *teacher.keys,
        *student.lses,
        *teacher.lses,
        None if layout is None else layout.valid,
        None if layout is None else layout.segment_ids,
        None if rectangle is None else rectangle.is_text,
        None if rectangle is None else rectangle.is_vision,
        weight,
    )
    return losses


def check_settings(region: object, loss: object, denominator: object) -> None:
    """Refuse settings of an attention-map loss that do not exist, naming the legal ones."""
    check.check_choice("region", region, REGIONS)
    check.check_choice("loss", loss, LOSSES)
    check.check_choice("denominator", denominator, DENOMINATORS)


def _objects(value: object) -> list[object]:
    """One value as the list of one layer."""
    return [value]
