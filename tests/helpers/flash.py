"""Flash attention's own functions by plain torch, where transformers imports the package.

The package needs a GPU. Everything that transformers does around its functions (availability,
signatures, unpadding, packed rows, windows) runs as it is.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils
from transformers import modeling_utils


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(N, H, D) of one sequence -> output in its layout, and (H, N) log-sum-exp in float32."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (each.repeat_interleave(groups, 1).transpose(0, 1) for each in (k, v))
    scores = (q.transpose(0, 1) @ keys.mT).float() * scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))[None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window[0] >= 0:
        seen &= distance <= window[0]
    if window[1] >= 0:
        seen &= distance >= -window[1]
    scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ values).transpose(0, 1), scores.logsumexp(-1)


class FlashAttention:
    """The two functions of flash-attn 2.8, signatures and layouts included, and their calls.

    Attributes:
        calls: "fixed" or "varlen", and what of the keyword arguments matters.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        self.calls.append(("fixed", {"window_size": window_size, "asked": return_attn_probs}))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rows = [_attend(*each, scale, causal, window_size) for each in zip(q, k, v, strict=True)]
        output, lse = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return (output, lse.detach(), None) if return_attn_probs else output

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        cuts = cu_seqlens_q.tolist()
        assert cuts == cu_seqlens_k.tolist()
        assert (cuts[0], cuts[-1]) == (0, len(q)) and len(q) == len(k)
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(cuts))
        self.calls.append(
            ("varlen", {"window_size": window_size, "asked": return_attn_probs, "cuts": cuts})
        )
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        parts = [
            _attend(q[a:b], k[a:b], v[a:b], scale, causal, window_size)
            for a, b in itertools.pairwise(cuts)
        ]
        output = torch.cat([part[0] for part in parts])
        lse = torch.cat([part[1] for part in parts], dim=1)
        return (output, lse.detach(), None) if return_attn_probs else output

    def flash_attn_with_kvcache(self, *_: Any, **__: Any) -> None:
        raise AssertionError("training does not decode")


@contextmanager
def flash_attention() -> Iterator[FlashAttention]:
    """Let `set_attn_implementation("flash_attention_2")` and its forwards work on a CPU."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    made = FlashAttention()
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(package, name, getattr(made, name))
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        patch.setattr(utils, "is_flash_attn_2_available", lambda: True)
        matrix = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        patch.setitem(matrix, "general_availability_check", lambda: True)
        # Models are on the CPU, which transformers refuses before it looks at anything else.
        patch.setattr(
            modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True
        )
        for name in (
            "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn",
            "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn",
        ):  # fmt: skip
            patch.setattr(utils, name, None)
        yield made
