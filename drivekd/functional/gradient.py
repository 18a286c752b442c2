"""Gram matrices and linear combinations of lists of task gradients, in one pass over them each.

Everything that gradient projection, reweighting and clipping need to know about K gradients of a
whole model is in their K x K inner products; everything they produce is a combination of the K.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drivekd.ops import gradient as _ops
from drivekd.ops.dispatch import BackendName, resolve
from drivekd.ops.gradient_layout import promoted_dtype

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

TaskGradients = Sequence[Sequence[Tensor | None]]


@dataclass(frozen=True)
class GradientGram:
    """Inner products of K task gradients, kept apart by which tasks have a gradient.

    Attributes:
        patterns: S tuples of task indices, ascending: the sets of tasks that have a gradient at
            the same tensors, in the order in which they first appear. Tensors without any gradient
            belong to none.
        values: (S, K, K) float64. `values[s, a, b]` sums g_a * g_b over the tensors of pattern s;
            rows and columns of tasks absent there are zero.
    """

    patterns: tuple[tuple[int, ...], ...]
    values: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.dtype != torch.float64:
            raise TypeError("values must be a float64 tensor")
        shape = tuple(self.values.shape)
        if len(shape) != 3 or shape[0] != len(self.patterns) or shape[1] != shape[2]:
            raise ValueError(
                f"values has shape {shape}; wanted (S, K, K) with S = {len(self.patterns)}, "
                "the number of patterns"
            )
        for tasks in self.patterns:
            if not tasks or list(tasks) != sorted(set(tasks)) or not 0 <= tasks[0] <= tasks[-1]:
                raise ValueError(f"patterns holds {tasks}; wanted ascending task indices")
            if tasks[-1] >= shape[1]:
                raise ValueError(f"patterns holds {tasks}, but values knows {shape[1]} tasks")

    @property
    def num_tasks(self) -> int:
        """K."""
        return int(self.values.shape[-1])

    @property
    def total(self) -> Tensor:
        """(K, K) float64: the Gram matrix with absent gradients counted as zero."""
        return self.values.sum(0)

    def scaled(self, weights: Tensor) -> "GradientGram":
        """The Gram of the gradients w_k g_k: diag(w) G diag(w).

        Args:
            weights: (K,) floating, on the device of `values`; taken to float64.

        Raises:
            TypeError: `weights` is no floating tensor.
            ValueError: `weights` has another shape or device.
        """
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            came = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights must be a floating tensor, got {came}")
        if weights.shape != (self.num_tasks,) or weights.device != self.values.device:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)} on {weights.device}; wanted "
                f"({self.num_tasks},), one per task, on {self.values.device}"
            )
        exact = weights.to(torch.float64)
        return replace(self, values=self.values * torch.outer(exact, exact))


@dataclass(frozen=True)
class _FlatGradients:
    """Checked gradients as the ops take them (`drivekd.ops.gradient_layout`)."""

    num_tasks: int
    positions: list[int]
    grads: list[Tensor]
    tasks: list[int]
    offsets: list[int]
    rows: list[int]
    patterns: tuple[tuple[int, ...], ...]
    num_tensors: int

    def gradients_of(self, tensor: int) -> list[Tensor]:
        """The gradients of the tensor at `positions[tensor]`."""
        return self.grads[self.offsets[tensor] : self.offsets[tensor + 1]]


def gradient_gram(task_grads: TaskGradients, *, backend: BackendName = "auto") -> GradientGram:
    """Inner products of K lists of gradients: G_ab = sum over tensors and elements of g_a * g_b.

    Reads every gradient once. There is one (K, K) matrix per *pattern* of tasks that have a
    gradient at a tensor; `.total` adds them up.

    Args:
        task_grads: K sequences of equal length T, one per task; entry t is that task's gradient of
            tensor t, or None. Gradients of one tensor share a shape; shapes, strides and dtypes
            (float64, float32, bfloat16, float16) may otherwise differ, the device may not.
        backend: "auto" (on a CPU native where the extension is built, else torch; on a CUDA device
            triton, else native where it was built for CUDA, else torch), "torch", "triton" or
            "native".

    Returns:
        The Gram matrices, on the device of the gradients; (0, K, K) on the CPU when there are none.

    Raises:
        TypeError: `task_grads` is not a sequence of sequences of floating tensors or None.
        ValueError: No task; lists of unequal length; shapes that differ between tasks; gradients
            on several devices.
        NotImplementedError: Sparse gradients, DTensors, float8.
        BackendUnavailableError: The backend asked for by name cannot run here.

    Note:
        float64 gradients are multiplied and summed in float64. For the other dtypes no fp32 sum
        has more than 32 products; everything above is summed in float64. Nothing is read back to
        the host, and the result carries no graph.

    Example:
        >>> import torch
        >>> from drivekd.functional import gradient_gram
        >>> ce = [torch.tensor([3.0, 4.0]), torch.ones(1)]
        >>> perception = [torch.tensor([1.0, 0.0]), None]
        >>> gram = gradient_gram([ce, perception])
        >>> gram.patterns, gram.total.tolist()
        (((0, 1), (0,)), [[26.0, 3.0], [3.0, 1.0]])
    """
    flat = _check_task_grads(task_grads)
    if not flat.grads:
        empty = torch.zeros(0, flat.num_tasks, flat.num_tasks, dtype=torch.float64)
        return GradientGram(patterns=(), values=empty)
    name = _resolve("gradient_gram", backend, flat)
    with torch.no_grad():
        values = _ops.gradient_gram(
            flat.grads,
            flat.tasks,
            flat.offsets,
            flat.rows,
            flat.num_tasks,
            len(flat.patterns),
            name,
        )
    return GradientGram(patterns=flat.patterns, values=values)


def combine_gradients(
    task_grads: TaskGradients,
    weights: Tensor,
    *,
    out: Sequence[Tensor | None] | None = None,
    accumulate: bool = False,
    backend: BackendName = "auto",
) -> list[Tensor | None]:
    """Linear combination of K lists of gradients: out_t = sum_k w_k g_k,t, absent ones left out.

    Reads every gradient once and writes once, rounded once.

    Args:
        task_grads: As for `gradient_gram`.
        weights: (K,), or (S, K) with one row per pattern in the order of
            `gradient_gram(task_grads).patterns`; floating, on the device of the gradients.
        out: Length T. Where an entry is a tensor (of the gradients' shape, device and promoted
            dtype), the result is written into it; where it is None, a new tensor is made. It may
            be one of the gradients of the same tensor; otherwise no overlap is allowed.
        accumulate: Add to the tensors of `out` instead of overwriting them. A new tensor counts
            as zero before.
        backend: As for `gradient_gram`.

    Returns:
        Length T: the results; `out[t]` itself where it was given. A tensor without any gradient
        stays as it is: `out[t]`, or None without an `out`.

    Raises:
        TypeError: As for `gradient_gram`; `weights` is no floating tensor; `out` is no sequence of
            tensors and None; `accumulate` is no bool.
        ValueError: As for `gradient_gram`; `weights` or `out` of the wrong shape, dtype or device;
            `accumulate` without `out`; an `out` tensor that overlaps itself.
        NotImplementedError: Sparse tensors, DTensors, float8.
        BackendUnavailableError: The backend asked for by name cannot run here.

    Note:
        Sums run in float64 and are rounded to the result's dtype once. The result carries no graph.

    Example:
        >>> import torch
        >>> from drivekd.functional import combine_gradients
        >>> lists = [[torch.tensor([3.0, 4.0]), None], [torch.tensor([1.0, 0.0]), None]]
        >>> combine_gradients(lists, torch.tensor([1.0, -2.0]))
        [tensor([1., 4.]), None]
    """
    flat = _check_task_grads(task_grads)
    weights = _check_weights(weights, flat)
    if not isinstance(accumulate, bool):
        raise TypeError(f"accumulate must be a bool, got {type(accumulate).__name__}")
    if accumulate and out is None:
        raise ValueError("accumulate=True needs out, the tensors to add to")
    result = _check_out(out, flat)
    if not flat.grads:
        return result
    name = _resolve("combine_gradients", backend, flat)
    # Only a mixture of given and new tensors needs new ones that hold zeros.
    accumulate = accumulate and any(result[position] is not None for position in flat.positions)
    targets = []
    with torch.no_grad():
        for tensor, position in enumerate(flat.positions):
            target = result[position]
            if target is None:
                make = torch.zeros_like if accumulate else torch.empty_like
                own = flat.gradients_of(tensor)
                target = make(own[0], dtype=promoted_dtype(own))
                result[position] = target
            targets.append(target)
        _ops.combine_gradients(
            targets,
            flat.grads,
            flat.tasks,
            flat.offsets,
            flat.rows,
            weights,
            accumulate,
            name,
        )
    return result


def _resolve(op: str, backend: str, flat: _FlatGradients) -> str:
    return resolve(op, backend, device=flat.grads[0].device, dtype=promoted_dtype(flat.grads))


def _check_task_grads(task_grads: TaskGradients) -> _FlatGradients:
    _require_sequence("task_grads", task_grads, "K sequences of gradients, one per task")
    if not task_grads:
        raise ValueError("task_grads is empty; give one sequence of gradients per task")
    for task, own in enumerate(task_grads):
        _require_sequence(f"task_grads[{task}]", own, "a sequence of tensors and None")
        if len(own) != len(task_grads[0]):
            raise ValueError(
                f"task_grads[{task}] has {len(own)} entries but task_grads[0] has "
                f"{len(task_grads[0])}; give one entry per tensor, None where there is no gradient"
            )
    flat = _FlatGradients(len(task_grads), [], [], [], [0], [], (), len(task_grads[0]))
    rows: dict[tuple[int, ...], int] = {}
    everybody = tuple(range(len(task_grads)))
    for position, entries in enumerate(zip(*task_grads, strict=True)):
        present = tuple(task for task in everybody if entries[task] is not None)
        if not present:
            continue
        first = entries[present[0]]
        device = flat.grads[0].device if flat.grads else getattr(first, "device", None)
        shape = getattr(first, "shape", None)
        for task in present:
            grad = entries[task]
            if (
                type(grad) not in _PLAIN_TYPES
                or grad.dtype not in _DTYPES
                or grad.layout is not torch.strided
                or grad.shape != shape
                or grad.device != device
            ):
                _explain_gradient(task_grads, task, position, present[0], device)
            flat.grads.append(grad.detach() if grad.requires_grad else grad)
        flat.positions.append(position)
        flat.tasks.extend(present)
        flat.offsets.append(len(flat.grads))
        flat.rows.append(rows.setdefault(present, len(rows)))
    return replace(flat, patterns=tuple(rows))


def _explain_gradient(
    task_grads: TaskGradients, task: int, position: int, first: int, device: torch.device | None
) -> None:
    """Raise what is wrong with a gradient, if anything is: its type may be a legal subclass."""
    name, first_name = f"task_grads[{task}][{position}]", f"task_grads[{first}][{position}]"
    grad = _require_plain_tensor(name, task_grads[task][position])
    shape = _require_plain_tensor(first_name, task_grads[first][position]).shape
    if grad.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(grad.shape)} but {first_name} has {tuple(shape)}; the "
            "gradients of one tensor share its shape"
        )
    if grad.device != device:
        raise ValueError(
            f"{name} is on {grad.device} but earlier gradients are on {device}; call once per "
            "device"
        )


def _check_weights(weights: Tensor, flat: _FlatGradients) -> Tensor:
    """The weights as (S, K) float64."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating, got {weights.dtype}")
    num_patterns, num_tasks = len(flat.patterns), flat.num_tasks
    if tuple(weights.shape) not in ((num_tasks,), (num_patterns, num_tasks)):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; wanted ({num_tasks},), one per task, or "
            f"({num_patterns}, {num_tasks}), one row per pattern of tasks with a gradient"
        )
    if flat.grads and weights.device != flat.grads[0].device:
        raise ValueError(
            f"weights is on {weights.device} but the gradients are on {flat.grads[0].device}"
        )
    rows = weights.detach().to(torch.float64).expand(num_patterns, num_tasks)
    return rows.contiguous()


def _check_out(out: Sequence[Tensor | None] | None, flat: _FlatGradients) -> list[Tensor | None]:
    if out is None:
        return [None] * flat.num_tensors
    _require_sequence("out", out, "a sequence of tensors and None, or None")
    if len(out) != flat.num_tensors:
        raise ValueError(
            f"out has {len(out)} entries but the lists of task_grads have {flat.num_tensors}"
        )
    for position, target in enumerate(out):
        if target is not None and (
            type(target) not in _PLAIN_TYPES
            or target.dtype not in _DTYPES
            or target.layout is not torch.strided
        ):
            _require_plain_tensor(f"out[{position}]", target)
    for tensor, position in enumerate(flat.positions):
        target = out[position]
        if target is None:
            continue
        own = flat.gradients_of(tensor)
        dtype, shape, device = promoted_dtype(own), own[0].shape, own[0].device
        if target.shape != shape or target.dtype != dtype or target.device != device:
            raise ValueError(
                f"out[{position}] has shape {tuple(target.shape)}, dtype {target.dtype} and device "
                f"{target.device} but the gradients of that tensor have {tuple(shape)}, {dtype} "
                f"and {device}; give one like them, or None for a new one"
            )
        if not target.is_contiguous() and _overlaps_itself(target):
            raise ValueError(
                f"out[{position}] overlaps itself (strides {target.stride()}); give a tensor "
                "whose elements have memory of their own"
            )
    return list(out)


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _require_sequence(name: str, value: object, wanted: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def _require_plain_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if any(kind.__name__ == "DTensor" for kind in type(value).__mro__):
        raise NotImplementedError(
            f"{name} is a DTensor; inner products of its shards are partial sums. Pass local "
            "shards (DTensor.to_local()), count replicated tensors on one rank only, and "
            "all-reduce GradientGram.values before computing weights"
        )
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name} has layout {value.layout}; only dense gradients work")
    if value.dtype not in _DTYPES:
        wanted = "float64, float32, bfloat16 or float16"
        if value.is_floating_point():
            raise NotImplementedError(f"{name} has dtype {value.dtype}; supported: {wanted}")
        raise TypeError(f"{name} has dtype {value.dtype}; wanted {wanted}")
    return value
