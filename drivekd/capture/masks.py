"""What the mask that reaches an attention function lets tokens see.

A model is told of padding and of packed sequences in one way, and its attention function in
another: a 4D mask (sdpa, eager), a block mask (flex), or a 2D mask and the positions (flash).
Transformers drops packing silently in several cases, so what arrives is what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A mask hides by numbers from -1e4 (which is -9984 in bfloat16) down to -inf: beside scores of any
# model, exp of that is 0 also in float64.
_HIDDEN = -9000.0
_CHUNK = 2**24  # entries looked at in one go
_FAULTS = (
    "has entries that are neither 0 nor hide a token (-1e4 and less): a position bias",
    "differs between heads",
    "lets tokens see later ones (image blocks or prefixes that attend in both directions)",
    "hides some earlier tokens from some later ones, or shows them, in a way that is neither "
    "padding nor packing, and the layer has {}",
)


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
    before = _sees_before(mask, starts)
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


def _sees_before(mask: Any, like: Tensor) -> Tensor | None:
    """(B, N - 1) bool, whether each token sees the one before it; None without such a mask."""
    if isinstance(mask, Tensor):
        if mask.ndim != 4:
            return None
        return _visible(mask.diagonal(offset=-1, dim1=-2, dim2=-1)).any(1)
    mask_mod = getattr(mask, "mask_mod", None)
    if mask_mod is None:
        return None
    batch, num_tokens = like.shape
    asked = torch.arange(num_tokens - 1, device=like.device)[None]
    samples = torch.arange(batch, device=like.device)[:, None]
    visible: Tensor = mask_mod(samples, torch.zeros_like(asked), asked + 1, asked)
    return visible


def unexplained(
    mask: Any, window: int | None, batch: int, num_tokens: int, device: torch.device
) -> str | None:
    """What a mask does that causal order, padding, packing and the window do not express.

    A token is padding where it does not see itself, and belongs to the sequence of the nearest
    earlier token that it sees; what each token sees must follow from that. The rows of padding may
    show anything that is no padding. Two passes over the mask, in chunks; one value is read back:
    a synchronisation on an accelerator.

    Args:
        mask: What the attention function is given as its mask.
        window: The layer's sliding window, None where it covers all tokens.
        batch: Number of samples B.
        num_tokens: Number of tokens N.
        device: Of queries and keys.

    Returns:
        The end of a sentence about the mask; None where all is well, or the mask has no such form.
    """
    look = _reader(mask, batch, num_tokens, device)
    if num_tokens < 2 or look is None:
        return None
    device = mask.device if isinstance(mask, Tensor) else device
    token = torch.arange(num_tokens, device=device, dtype=torch.int32)
    size = max(1, _CHUNK // (batch * num_tokens))
    chunks = [slice(first, first + size) for first in range(0, num_tokens, size)]
    graded, by_head, above, valid, nearest = [], [], [], [], []
    for rows in chunks:
        entries = look(rows)
        if entries.dtype != torch.bool:
            graded.append((~(entries <= _HIDDEN) & (entries != 0)).any())
        seen = _visible(entries)
        if seen.shape[1] > 1:
            by_head.append((seen.any(1) != seen.all(1)).any())
        seen, asks = seen.any(1), token[rows, None]
        above.append((seen & (token > asks)).any())
        valid.append(seen.diagonal(rows.start, -2, -1))
        earlier = torch.where(seen & (token < asks), token, -1).amax(-1)
        nearest.append(torch.where(earlier < 0, token[rows], earlier))
    is_valid, first = torch.cat(valid, 1), torch.cat(nearest, 1).long()
    for _ in range(num_tokens.bit_length()):  # to the first token of the sequence
        first = first.gather(1, first)
    holes = []
    for rows in chunks:
        seen, asks = _visible(look(rows)).any(1), token[rows, None]
        wanted = (first[:, rows, None] == first[:, None]) & is_valid[:, None] & (token <= asks)
        if window is not None:
            wanted &= asks - token < window
        holes.append(((seen != wanted) & is_valid[:, rows, None]).any())
        holes.append((seen & ~is_valid[:, None]).any())
    none = torch.zeros((), dtype=torch.bool, device=device)
    faults = [torch.stack([none, *each]).any() for each in (graded, by_head, above, holes)]
    bits = torch.arange(len(faults), device=device)
    found = int((torch.stack(faults).long() << bits).sum())  # the one synchronisation
    if not found:
        return None
    within = "no sliding window" if window is None else f"a sliding window of {window} tokens"
    return next(text for bit, text in enumerate(_FAULTS) if found >> bit & 1).format(within)


def _visible(entries: Tensor) -> Tensor:
    return entries if entries.dtype == torch.bool else entries > _HIDDEN


def _reader(
    mask: Any, batch: int, num_tokens: int, device: torch.device
) -> Callable[[slice], Tensor] | None:
    """What gives (B, H, rows, N) entries of the mask; B and H may be 1."""
    if isinstance(mask, Tensor):
        if mask.ndim != 4 or mask.shape[-2] not in (1, num_tokens):
            return None
        if 1 != mask.shape[-1] < num_tokens:
            return None  # the attention function complains
        # Eager attention cuts off what a mask has for more keys than there are.
        whole = mask.detach()[..., :num_tokens].expand(-1, -1, num_tokens, num_tokens)
        distinct = whole[:1] if whole.stride(0) == 0 else whole
        distinct = distinct[:, :1] if whole.stride(1) == 0 else distinct
        return lambda rows: distinct[:, :, rows]
    mask_mod = getattr(mask, "mask_mod", None)
    if mask_mod is None:
        return None
    tokens = torch.arange(num_tokens, device=device)
    samples = torch.arange(batch, device=device)[:, None, None, None]

    def evaluate(rows: slice) -> Tensor:
        asks = tokens[rows, None]
        seen: Tensor = mask_mod(samples, torch.zeros_like(samples[:1]), asks, tokens)
        return seen.expand(batch, 1, len(asks), num_tokens)

    return evaluate
