"""What the mask that reaches an attention function lets tokens see.

A model is told of padding and of packed sequences in one way, and its attention function in
another: a 4D mask (sdpa, eager), a block mask (flex), or a 2D mask and the positions (flash).
Transformers drops packing silently in several cases, so what arrives is what is looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sequence_starts(positions: Any, attention_mask: Any) -> Tensor | None:
    """Tokens at which a row goes over to another sequence, (B, N) bool; None if no position tells.

    These are the jumps of positions between tokens that are both valid. Of (4, B, N) positions the
    text's come first. Of (3, B, N), rotary ones alone, the first axis is time, which repeats and
    leaps within a sequence but goes back between two.
    """
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3):
        return None
    has_time = positions.ndim == 3 and positions.shape[0] == 3
    if positions.ndim == 3:
        positions = positions[0]
    before, after = positions[:, :-1], positions[:, 1:]
    jumps = after < before if has_time else after != before + 1
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        valid = attention_mask.to(jumps.device).bool()
        jumps = jumps & valid[:, 1:] & valid[:, :-1]
    return torch.nn.functional.pad(jumps, (1, 0))


def starts_of_lengths(cumulative: Any, batch: int, num_tokens: int) -> Tensor | None:
    """The same from flash attention's cumulative lengths of a flattened batch."""
    if not isinstance(cumulative, Tensor):
        return None
    starts = torch.zeros(batch * num_tokens, dtype=torch.bool, device=cumulative.device)
    starts[cumulative[:-1].long()] = True
    starts = starts.view(batch, num_tokens)
    starts[:, 0] = False
    return starts


def crosses_starts(starts: Tensor, mask: Any, options: dict[str, Any], *, is_flash: bool) -> bool:
    """Whether the first token of some sequence may attend to the last of the one before it.

    Reads one value back: a synchronisation on an accelerator.

    Args:
        starts: (B, N) bool; one row may stand for all samples.
        mask: What the attention function is given as its mask.
        options: Its other keyword arguments.
        is_flash: Whether it takes 2D masks and positions instead of a 4D mask.
    """
    if is_flash:
        return _flash_crosses(starts, mask, options)
    if mask is None:
        return bool(starts.any())
    before = _visible(mask, starts, offset=-1)
    return before is not None and bool((before & starts[:, 1:].to(before.device)).any())


def _flash_crosses(starts: Tensor, mask: Any, options: dict[str, Any]) -> bool:
    """Flash attention takes one kind of advice: a mask, else lengths, else positions of one row."""
    cuts = None
    if mask is None:
        given = starts_of_lengths(options.get("cu_seq_lens_q"), *starts.shape)
        positions = options.get("position_ids")
        if given is not None:
            cuts = given
        elif isinstance(positions, Tensor) and starts.shape[0] == 1 == positions.shape[0]:
            cuts = positions == positions.min()
    if cuts is None:
        return bool(starts.any())
    # Other cuts than those of the layout would be as wrong as none.
    return bool((cuts.to(starts.device) != starts)[:, 1:].any())


def sees_next_token(mask: Any, batch: int, num_tokens: int, device: torch.device) -> bool:
    """Whether some token may attend to the token after it, as image blocks and prefixes may.

    Looks at the diagonal above the main one only: O(B N), one synchronisation on an accelerator.
    """
    if num_tokens < 2:
        return False
    rows = torch.empty(batch, num_tokens, device=device)
    above = _visible(mask, rows, offset=1)
    return above is not None and bool(above.any())


def _visible(mask: Any, like: Tensor, *, offset: int) -> Tensor | None:
    """(B, N - 1) bool of one diagonal beside the main one; None where the mask has no such form.

    Entry i belongs to the pair of tokens i and i + 1; the later one asks for `offset=-1`.
    """
    if isinstance(mask, Tensor):
        if mask.ndim != 4:
            return None
        beside = mask.diagonal(offset=offset, dim1=-2, dim2=-1)
        if beside.dtype != torch.bool:
            beside = beside > torch.finfo(beside.dtype).min / 2
        return beside.any(1)
    mask_mod = getattr(mask, "mask_mod", None)
    if mask_mod is None:
        return None
    batch, num_tokens = like.shape
    first = torch.arange(num_tokens - 1, device=like.device)[None]
    samples = torch.arange(batch, device=like.device)[:, None]
    asks, asked = (first, first + 1) if offset > 0 else (first + 1, first)
    visible: Tensor = mask_mod(samples, torch.zeros_like(first), asks, asked)
    return visible
