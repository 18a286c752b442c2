"""The log-sum-exp of flash attention, which knows it and which transformers drops.

Transformers calls the package's functions in its own way and keeps the first of what they return.
While a capture is open on a model with flash attention they are handed to it wrapped: for the call
that is recorded, and in this thread only, they are asked for the log-sum-exp (which costs nothing
without dropout, since it is stored for backward anyway), and it is noted.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# vLLM's build of version 3, version 4, versions 2 and 3.
_ASKING = ("return_softmax_lse", "return_lse", "return_attn_probs")
_here = threading.local()
_lock = threading.RLock()


@dataclass
class Noted:
    """What one attention call told on its way."""

    lse: Tensor | None = None
    dtype: torch.dtype | None = None


def is_flash(implementation: str) -> bool:
    """Whether transformers calls this implementation as it calls flash attention."""
    return "flash" in implementation


def listen(call: Callable[[], Any]) -> tuple[Any, Noted]:
    """Run an attention function; its result, and what flash attention told on the way."""
    noted = Noted()
    before = getattr(_here, "noted", None)
    _here.noted = noted
    try:
        return call(), noted
    finally:
        _here.noted = before


def laid_out(noted: Noted, query: Tensor, attention_mask: Any) -> Tensor | None:
    """The log-sum-exp as (B, H, N) float32; None where it is not there or of other queries.

    Args:
        noted: What `listen` returned.
        query: (B, H, N, D), as captured.
        attention_mask: (B, N) of the call, or None; without padding a batch is flat, row by row.
    """
    lse = noted.lse
    # Rounded on the way in (fp32 weights, adapters): other scores than those of the loss.
    if lse is None or noted.dtype != query.dtype or lse.dtype != torch.float32:
        return None
    batch, heads, count = query.shape[:3]
    if lse.shape == (batch, heads, count):
        return lse
    if lse.ndim != 2 or lse.shape[0] != heads:
        return None
    if attention_mask is None:
        if lse.shape[1] != batch * count:
            return None
        return lse.view(heads, batch, count).transpose(0, 1)
    places = attention_mask.flatten().nonzero().flatten()
    if lse.shape[1] != len(places):
        return None
    whole = lse.new_zeros(heads, batch * count)  # padding asks nothing; finite is enough
    whole[:, places] = lse
    return whole.view(heads, batch, count).transpose(0, 1)


def _wrapped(function: Any) -> Any:
    """The same function, which tells who listens."""
    if function is None:
        return None
    parameters = inspect.signature(function).parameters
    asking = next((name for name in _ASKING if name in parameters), None)

    @functools.wraps(function)
    def call(q: Tensor, *args: Any, **options: Any) -> Any:
        noted: Noted | None = getattr(_here, "noted", None)
        # With dropout, asking for the log-sum-exp makes the probabilities too.
        if noted is None or options.get("dropout_p"):
            return function(q, *args, **options)
        result = function(q, *args, **options, **({} if asking is None else {asking: True}))
        if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], Tensor):
            noted.lse, noted.dtype = result[1].detach(), q.dtype
        return result

    return call


class FlashImport:
    """Transformers' lazy import of flash attention, with its functions wrapped."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.users = 0
        self._made: dict[int, tuple[Any, Any]] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What transformers' function returns; its functions wrapped where somebody listens."""
        functions, process = self.inner(*args, **options)
        if torch.compiler.is_compiling() or getattr(_here, "noted", None) is None:
            return functions, process
        fixed, varying, *others = functions
        return (self._wrap(fixed), self._wrap(varying), *others), process

    def _wrap(self, function: Any) -> Any:
        if id(function) not in self._made:
            self._made[id(function)] = (function, _wrapped(function))
        return self._made[id(function)][1]


def install() -> FlashImport:
    """Put the wrapped import in its place, or join the captures that did."""
    from transformers import modeling_flash_attention_utils as utils

    with _lock:
        current: Any = utils.lazy_import_flash_attention
        entry = current if isinstance(current, FlashImport) else FlashImport(current)
        utils.lazy_import_flash_attention = entry
        entry.users += 1
        return entry


def release(entry: FlashImport) -> None:
    """Leave; the last one puts transformers' own function back."""
    from transformers import modeling_flash_attention_utils as utils

    with _lock:
        entry.users -= 1
        current: Any = utils.lazy_import_flash_attention
        if entry.users == 0 and current is entry:
            utils.lazy_import_flash_attention = entry.inner
