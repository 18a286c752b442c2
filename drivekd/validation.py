"""Checks of the arguments of public functions: from shapes, dtypes and flags, without a GPU sync.

Values are looked at only under `DRIVEKD_DEBUG=1`, because reading them back stalls a GPU.
"""

import math
import os
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from drivekd.tokens import TokenLayout

MAX_HEAD_DIM = 256
LARGEST_WINDOW = 2**31 - 1  # tokens; positions are added to it
MAX_SCALE = torch.finfo(torch.float32).max * math.log(2)  # kernels take it times log2(e)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def debugging() -> bool:
    """Whether checks that read values back are wanted."""
    return os.environ.get("DRIVEKD_DEBUG") == "1"


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """A string out of a few."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {_kind(value)}; wanted one of {_quoted(choices)}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; wanted one of {_quoted(choices)}")


def check_flag(name: str, value: object) -> None:
    """A plain bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {_kind(value)}; wanted True or False")


def check_count(name: str, value: object, *, at_least: int = 0) -> int:
    """A plain int from a bound on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {_kind(value)}; wanted an int")
    if value < at_least:
        raise ValueError(f"{name} is {value}; wanted an int >= {at_least}")
    return value


def check_window(name: str, window: object) -> int | None:
    """None, or a positive number of tokens."""
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"{name} is a {_kind(window)}; wanted None or a number of tokens (int)")
    if window < 1:
        raise ValueError(
            f"{name} is {window}; a query sees itself and the window - 1 tokens before it, so "
            "wanted None or an int >= 1"
        )
    return min(window, LARGEST_WINDOW)


def check_scale(name: str, scale: object, head_dim: int) -> float:
    """None (then 1/sqrt(D)), or a positive number that float32 holds, also times log2(e)."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{name} is a {_kind(scale)}; wanted None or a float")
    if not 0 < scale <= MAX_SCALE:
        raise ValueError(
            f"{name} is {scale}; wanted a positive number of at most {MAX_SCALE:.3g}: times "
            "log2(e) it is a finite float32"
        )
    return float(scale)


def check_query_key(
    query: object, key: object, query_name: str, key_name: str
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, N, D) and keys (B, H_kv, N, D) of one layer of one model."""
    query, key = _check_heads(query_name, query), _check_heads(key_name, key)
    names = f"{query_name} and {key_name}"
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{names} have shapes {tuple(query.shape)} and {tuple(key.shape)}; batch and number of "
            "tokens must agree (with a key cache, capture a forward without one: use_cache=False)"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"{query_name} has head_dim {query.shape[3]} but {key_name} has {key.shape[3]}; both "
            "belong to one layer"
        )
    if query.shape[1] % key.shape[1] != 0:
        raise ValueError(
            f"{key_name} has {key.shape[1]} heads but {query_name} has {query.shape[1]}; query "
            "heads must be a multiple of key heads"
        )
    if query.dtype != key.dtype:
        raise ValueError(
            f"{query_name} is {query.dtype} but {key_name} is {key.dtype}; cast one of them"
        )
    if query.device != key.device:
        raise ValueError(
            f"{query_name} is on {query.device} but {key_name} is on {key.device}; move one"
        )
    if debugging():
        _check_finite(query_name, query)
        _check_finite(key_name, key)
    return query, key


def check_pairs(name: str, layers: object) -> tuple[list[object], list[object]]:
    """A non-empty sequence of (q, k), as two lists."""
    if not is_sequence(layers):
        raise TypeError(f"{name} is a {_kind(layers)}; wanted a list of (q, k) pairs")
    if len(layers) == 0:
        raise ValueError(f"{name} is empty; wanted at least one (q, k) pair")
    queries, keys = [], []
    for i, pair in enumerate(layers):
        if not is_sequence(pair):
            raise TypeError(f"{name}[{i}] is a {_kind(pair)}; wanted a pair (q, k)")
        if len(pair) != 2:
            raise ValueError(f"{name}[{i}] has {len(pair)} entries; wanted a pair (q, k)")
        queries.append(pair[0])
        keys.append(pair[1])
    return queries, keys


def check_single(name: str, value: object, like: str) -> None:
    """One tensor, because its partner is one."""
    if is_sequence(value):
        raise TypeError(f"{name} is a list but {like} is not; wanted two tensors or two lists")


def check_listed(name: str, value: object, like: Sequence[object], like_name: str) -> list[object]:
    """As many tensors as its partner has, at least one."""
    if not is_sequence(value):
        raise TypeError(
            f"{name} is a {_kind(value)} but {like_name} is a list; wanted two tensors or two lists"
        )
    if len(value) != len(like):
        raise ValueError(f"{like_name} has {len(like)} layers but {name} has {len(value)}")
    if len(value) == 0:
        raise ValueError(f"{like_name} is empty; wanted at least one layer")
    return list(value)


def per_layer(name: str, value: object, num_layers: int) -> list[object]:
    """One value for each layer: a sequence as it is, anything else repeated."""
    if not is_sequence(value):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} is one tensor; wanted one entry for each of the layers")
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(f"{name} has {len(value)} entries but there are {num_layers} layers")
    return list(value)


def check_same_tokens(query: Tensor, like: Tensor, name: str, like_name: str) -> None:
    """Two models (or layers) that saw the same batch, on one device."""
    if query.shape[0] != like.shape[0] or query.shape[2] != like.shape[2]:
        raise ValueError(
            f"{name} has {query.shape[0]} samples of {query.shape[2]} tokens but {like_name} has "
            f"{like.shape[0]} of {like.shape[2]}; both must come from the same tokens"
        )
    if query.device != like.device:
        raise ValueError(
            f"{name} is on {query.device} but {like_name} is on {like.device}; move one of them"
        )


def check_no_grad(name: str, tensor: Tensor, remedy: str) -> None:
    """A tensor through which no gradient may be expected."""
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to it; {remedy}")


def check_lse(name: str, lse: object, query: Tensor) -> Tensor | None:
    """None, or the log-sum-exp (B, H, N) that belongs to these queries."""
    if lse is None:
        return None
    if not isinstance(lse, Tensor):
        raise TypeError(f"{name} is a {_kind(lse)}; wanted None or a (B, H, N) tensor")
    wanted = torch.float64 if query.dtype == torch.float64 else torch.float32
    if lse.dtype != wanted:
        raise TypeError(f"{name} has dtype {lse.dtype}; wanted {wanted} (natural log)")
    if lse.shape != query.shape[:3]:
        raise ValueError(
            f"{name} has shape {tuple(lse.shape)}; wanted (B, H, N) = {tuple(query.shape[:3])}"
        )
    if lse.device != query.device:
        raise ValueError(f"{name} is on {lse.device} but the queries are on {query.device}")
    check_no_grad(name, lse, "pass lse.detach(): gradients flow through queries and keys")
    return lse


def check_tokens(tokens: object, query: Tensor, query_name: str) -> TokenLayout | None:
    """None, or a layout of the batch that these queries come from."""
    if tokens is None:
        return None
    if not isinstance(tokens, TokenLayout):
        raise TypeError(
            f"tokens is a {_kind(tokens)}; wanted a drivekd.TokenLayout "
            "(TokenLayout.from_batch or TokenLayout.from_masks)"
        )
    if (tokens.batch_size, tokens.num_tokens) != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"tokens describes {tokens.batch_size} samples of {tokens.num_tokens} tokens but "
            f"{query_name} has {query.shape[0]} of {query.shape[2]}"
        )
    if tokens.device != query.device:
        raise ValueError(
            f"tokens is on {tokens.device} but {query_name} is on {query.device}; move it with "
            "tokens.to(device)"
        )
    return tokens


def check_sample_weight(sample_weight: object, query: Tensor) -> Tensor | None:
    """None, or one weight (B,) for each sample."""
    if sample_weight is None:
        return None
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight is a {_kind(sample_weight)}; wanted None or a (B,) tensor")
    if not sample_weight.dtype.is_floating_point:
        raise TypeError(f"sample_weight has dtype {sample_weight.dtype}; wanted a floating dtype")
    if sample_weight.shape != query.shape[:1]:
        raise ValueError(
            f"sample_weight has shape {tuple(sample_weight.shape)}; wanted (B,) = "
            f"({query.shape[0]},)"
        )
    if sample_weight.device != query.device:
        raise ValueError(
            f"sample_weight is on {sample_weight.device} but the queries are on {query.device}"
        )
    check_no_grad("sample_weight", sample_weight, "pass sample_weight.detach()")
    if debugging():
        _check_finite("sample_weight", sample_weight)
    return sample_weight


def check_groups(groups: object, num_student: int, num_teacher: int) -> list[tuple[int, ...]]:
    """The teacher layers of each student layer, by index into the teacher's list."""
    if is_sequence(groups) and len(groups) != num_student:
        raise ValueError(
            f"groups has {len(groups)} entries but there are {num_student} student layers"
        )
    return check_target_groups(groups, num_teacher)


def check_target_groups(groups: object, num_teacher: int) -> list[tuple[int, ...]]:
    """The teacher layers of each target, however many there are."""
    if not is_sequence(groups):
        raise TypeError(f"groups is a {_kind(groups)}; wanted a list of lists of teacher indices")
    return [_check_group(f"groups[{i}]", group, num_teacher) for i, group in enumerate(groups)]


def _check_group(name: str, group: object, num_teacher: int) -> tuple[int, ...]:
    if not is_sequence(group):
        raise TypeError(f"{name} is a {_kind(group)}; wanted a list of teacher indices")
    if len(group) == 0:
        raise ValueError(f"{name} is empty; every student layer needs a teacher layer")
    members = []
    for index in group:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name} holds a {_kind(index)}; wanted teacher indices (int)")
        if not 0 <= index < num_teacher:
            raise ValueError(
                f"{name} holds {index}; wanted indices from 0 to {num_teacher - 1}, since "
                f"{num_teacher} teacher layers are given"
            )
        members.append(index)
    return tuple(members)


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """A list, tuple or the like, but no string and no tensor."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _check_heads(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {_kind(tensor)}; wanted a tensor")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"{name} is sparse or nested; wanted a plain strided tensor")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; wanted float64, float32, bfloat16 or float16"
        )
    shape = tuple(tensor.shape)
    if tensor.ndim != 4:
        raise ValueError(f"{name} has shape {shape}; wanted (B, heads, N, head_dim)")
    if tensor.numel() == 0:
        raise ValueError(f"{name} has shape {shape}; every dimension must be at least 1")
    if tensor.shape[3] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{name} has head_dim {tensor.shape[3]}; at most {MAX_HEAD_DIM} is supported"
        )
    return tensor


def _check_finite(name: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        where = tuple(int(index) for index in (~finite).nonzero()[0])
        raise ValueError(f"{name} is not finite at {where} (checked under DRIVEKD_DEBUG=1)")


def _quoted(choices: tuple[str, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _kind(value: object) -> str:
    return type(value).__name__
