"""The state of one capture during a forward, and the taps that feed it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.capture.calls import Call, StopForward
from drivekd.capture.flash import is_flash
from drivekd.capture.masks import (
    crosses_starts,
    sequence_starts,
    starts_of_lengths,
    unexplained,
)
from drivekd.capture.records import CapturedLayer
from drivekd.capture.registry import implementation
from drivekd.errors import CaptureError

_UNSUPPORTED_OPTIONS = {
    "softcap": "a soft cap on attention scores",
    "s_aux": "attention sinks",
    "position_bias": "an additive position bias",
    "head_mask": "a head mask",
}
_ARGUMENTS = ("input_ids", "position_ids", "attention_mask", "cu_seq_lens_q")


class ForwardWatch:
    """Follows the forwards of one model for one capture; a new forward replaces the records."""

    def __init__(
        self,
        decoder: nn.Module,
        layers: tuple[int, ...],
        records: dict[int, CapturedLayer],
        *,
        stops: bool,
    ) -> None:
        self.decoder = decoder
        self.layers = layers
        self.records = records
        self.stops = stops
        self.depth = 0
        self.thread: int | None = None
        self._begin()

    def _begin(self) -> None:
        self.records.clear()
        self.arguments: dict[str, Any] = {}
        self.position_ids: Any = None  # what the decoder itself was given
        self._grad_enabled = torch.is_grad_enabled()
        self._decoder_ran = False
        self._caches = False
        self._checked_weights = False
        self._checked_masks: list[tuple[Any, int | None]] = []  # with the layer's window

    def enter(self, call: Call) -> None:
        """A gated module is called; the outermost call begins a new forward."""
        if self.depth == 0:
            self._begin()
        # The outermost module that takes an argument by name tells what the caller passed.
        for name in _ARGUMENTS:
            if name not in self.arguments and call.knows(name):
                self.arguments[name] = call.argument(name)
        if call.module is self.decoder:
            self._enter_decoder(call)

    def _enter_decoder(self, call: Call) -> None:
        if self._decoder_ran:
            raise CaptureError(
                "the decoder ran twice within one forward of the model handed in, so a layer has "
                "two records; hand in the language model itself and call it once per capture"
            )
        self._decoder_ran = True
        self.position_ids = call.argument("position_ids")
        self._caches = _caches(call)

    def awaits(self, layer: int) -> bool:
        """Whether a forward is under way here that has no record of the layer yet.

        False for the recomputation of a checkpointed layer, so that records stay as they are.
        """
        return self.runs_here and layer in self.layers and layer not in self.records

    @property
    def runs_here(self) -> bool:
        """Whether a forward of its thread, which is this one, is under way."""
        return self.depth > 0 and self.thread == threading.get_ident()

    @property
    def may_stop(self) -> bool:
        """Whether the running forward is of no more use to this capture."""
        return self.stops and len(self.records) == len(self.layers)

    def take(
        self,
        layer: int,
        record: CapturedLayer,
        attention: nn.Module,
        mask: Any,
        options: dict[str, Any],
    ) -> None:
        """Check what only the running forward can tell, and keep the record."""
        if self._grad_enabled and attention.training and not torch.is_grad_enabled():
            raise CaptureError(
                f"layer {layer} runs without grad inside a forward with grad: reentrant gradient "
                "checkpointing, whose queries and keys carry no graph; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        learns = record.query.requires_grad and not record.query.is_meta
        if learns and not self._checked_weights:
            self._checked_weights = True
            if any(each.is_meta and each.requires_grad for each in self.decoder.parameters()):
                raise CaptureError(
                    f"layer {layer} runs with grad, but weights of the decoder are offloaded: "
                    "accelerate brings copies in for each call, and their gradients would be lost; "
                    "keep a student on its device, and run a teacher under torch.no_grad()"
                )
        self._check_mask(layer, record, mask, options, flash=is_flash(implementation(attention)))
        self.records[layer] = record

    def _check_mask(
        self, layer: int, record: CapturedLayer, mask: Any, options: dict[str, Any], *, flash: bool
    ) -> None:
        """Each mask of a forward is looked at once, and once more where a window differs."""
        batch, _, num_tokens, _ = record.query.shape
        window = record.window
        if window is not None and window >= num_tokens:
            window = None
        checked = [other for seen, other in self._checked_masks if seen is mask]
        if window in checked:
            return
        self._checked_masks.append((mask, window))
        fault = unexplained(mask, window, batch, num_tokens, record.query.device)
        if fault is not None:
            raise NotImplementedError(
                f"layer {layer}'s attention mask {fault}; attention maps are captured for causal "
                "attention with padding, packed sequences and sliding windows only"
            )
        if not checked:
            self._check_packing(record, mask, options, flash=flash)

    def _check_packing(
        self, record: CapturedLayer, mask: Any, options: dict[str, Any], *, flash: bool
    ) -> None:
        """Packed sequences must stay apart in what the attention function is given."""
        batch, _, num_tokens, _ = record.query.shape
        given = self.arguments.get("attention_mask")
        told = {
            "position_ids": sequence_starts(self.arguments.get("position_ids"), given),
            "cu_seq_lens_q": starts_of_lengths(
                self.arguments.get("cu_seq_lens_q"), batch, num_tokens
            ),
        }
        for name, starts in told.items():
            if starts is None:
                continue
            if starts.shape[0] != batch:
                starts = starts.expand(batch, -1)
            if crosses_starts(starts, mask, options, is_flash=flash):
                why, remedy = self._why_ignored(batch, given, flash=flash)
                raise CaptureError(
                    f"{name} pack several sequences into a row, but {why} transformers ignores "
                    f"that silently and tokens attend across sequences; {remedy}"
                )

    def _why_ignored(self, batch: int, given: Any, *, flash: bool) -> tuple[str, str]:
        plain = "pass use_cache=False and no attention_mask"
        if given is not None:
            return "with attention_mask", plain
        if self._caches and not flash:
            return "with use_cache", plain
        if flash and batch > 1:
            return "flash attention packs into one row only: with a batch of several", (
                "give one packed row a batch, or use model.set_attn_implementation('sdpa')"
            )
        return "in the form that they have", (
            "pass position_ids that start each sequence at 0, (B, N), or where positions have "
            "several axes (Qwen-VL) (4, B, N) with the text's in the first row"
        )


class LayerTap:
    """Sits on one attention module and hands its queries and keys to the captures that wait."""

    def __init__(self, attention: nn.Module, layer: int, above: list[nn.Module]) -> None:
        self.attention = attention
        self.watches: list[ForwardWatch] = []
        self._noted: dict[int, list[ForwardWatch]] = {}  # by thread
        self._layer = layer
        self._above = above  # from the attention module up to, without, the decoder

    def see(self, query: Tensor, key: Tensor, attention_mask: Any, options: dict[str, Any]) -> bool:
        """Record one attention call, if any capture waits; ends the forward that nobody needs."""
        # Copies: other threads may open and close captures meanwhile.
        waiting = [watch for watch in tuple(self.watches) if watch.awaits(self._layer)]
        self._noted[threading.get_ident()] = waiting
        if not waiting:
            return False
        record = self._record(query, key, options)
        for watch in waiting:
            watch.take(self._layer, record, self.attention, attention_mask, options)
        decoder = waiting[0].decoder
        running = [w for w in tuple(open_watches) if w.runs_here and w.decoder is decoder]
        if all(watch.may_stop for watch in running):
            raise StopForward(list(self._above))
        return True

    def finish(self, lse: Tensor) -> None:
        """Complete the records of the call that was seen last."""
        for watch in self._noted.pop(threading.get_ident(), []):
            record = watch.records[self._layer]
            watch.records[self._layer] = replace(record, lse=lse.detach())

    def _record(self, query: Tensor, key: Tensor, options: dict[str, Any]) -> CapturedLayer:
        for option, meaning in _UNSUPPORTED_OPTIONS.items():
            if options.get(option) is not None:
                raise NotImplementedError(
                    f"layer {self._layer} uses {meaning} ({option}), which an attention map from "
                    "queries and keys alone does not express"
                )
        if query.shape[-2] != key.shape[-2]:
            raise NotImplementedError(
                f"layer {self._layer} has {query.shape[-2]} queries and {key.shape[-2]} keys: "
                "cross-attention, a prefix or a key-value cache that holds tokens already; "
                "capture a forward over whole sequences, with use_cache=False"
            )
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(self.attention, "is_causal", True)
        if not is_causal:
            raise NotImplementedError(
                f"layer {self._layer} is not causal; attention maps are captured for causal "
                "self-attention only"
            )
        scale = options.get("scaling")
        window = options.get("sliding_window", getattr(self.attention, "sliding_window", None))
        return CapturedLayer(
            query,
            key,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            window=None if window is None else int(window),
        )


open_watches: list[ForwardWatch] = []


def _caches(call: Call) -> bool:
    """Whether the decoder works with a key-value cache in this call."""
    # Its name is `cache` in newer versions of transformers.
    if any(call.argument(name) is not None for name in ("past_key_values", "cache")):
        return True
    use_cache = call.argument("use_cache")
    if use_cache is None:
        use_cache = getattr(getattr(call.module, "config", None), "use_cache", False)
    checkpointing = getattr(call.module, "gradient_checkpointing", False) and call.module.training
    return bool(use_cache) and not checkpointing
