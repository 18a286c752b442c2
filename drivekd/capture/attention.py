"""Queries and keys of chosen decoder layers, taken while a Hugging Face model runs.

Attention maps are softmax(scale * q k^T), so a loss on maps needs the rotated queries and keys and
nothing else; the model stays on sdpa or flash attention and never makes a map.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from drivekd.capture import flash
from drivekd.capture import registry as wrapping
from drivekd.capture.calls import Gate, close_gate, open_gate
from drivekd.capture.copies import leave_in, leave_out
from drivekd.capture.forward import ForwardWatch, LayerTap, open_watches
from drivekd.capture.model import (
    attention_module,
    check_can_stop,
    check_loaded,
    check_supported,
    decoder_depth,
    find_decoder,
    path_to,
    resolve_layers,
)
from drivekd.capture.records import CapturedAttention
from drivekd.errors import CaptureError

_lock = threading.RLock()  # models, and with them gates and taps, may be shared between threads


class AttentionCapture(CapturedAttention):
    """The context manager that `capture_attention` gives; readable inside and after the `with`."""

    def __init__(self, model: nn.Module, layers: Sequence[int], *, stop_after_last: bool) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._registry = _attention_registry()
        self._decoder = find_decoder(model)
        num_layers = decoder_depth(self._decoder)
        super().__init__(num_layers, resolve_layers(layers, num_layers), {}, None, None)
        check_loaded(self._decoder, self.layers)
        self._path = path_to(model, self._decoder)
        check_supported(self._path)
        if stop_after_last:
            check_can_stop(model)
        self._attention = {layer: attention_module(self._decoder, layer) for layer in self.layers}
        self._watch = ForwardWatch(self._decoder, self.layers, self._records, stops=stop_after_last)
        self._gates: list[Gate] = []
        self._taps: list[LayerTap] = []
        self._entries: list[wrapping.Entry] = []
        self._flash: list[flash.FlashImport] = []

    @property
    def input_ids(self) -> Tensor | None:
        """The (B, N) input_ids of the captured forward, None if it was given embeddings."""
        input_ids: Tensor | None = self._watch.arguments.get("input_ids")
        return input_ids

    @property
    def position_ids(self) -> Tensor | None:
        """The decoder's position_ids, (B, N) or (axes, B, N); None if it counts on its own."""
        position_ids: Tensor | None = self._watch.position_ids
        return position_ids

    @property
    def attention_mask(self) -> Any:
        """As the model was given it: (B, N), 0 at padding, or of another form; None without one."""
        return self._watch.arguments.get("attention_mask")

    def __enter__(self) -> AttentionCapture:
        with _lock:
            if self._gates:
                raise CaptureError(
                    "this capture is open already; make another with capture_attention"
                )
            try:
                self._install()
            except BaseException:
                self._remove()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            self._remove()
        missing = [layer for layer in self.layers if layer not in self._records]
        if kind is None and missing:
            raise CaptureError(
                f"layers {missing} of {self.num_layers} gave no record: call the model handed to "
                "capture_attention (or its language model) inside the `with`, in the thread that "
                "opened it, and do not change its attention implementation there"
            )

    def _install(self) -> None:
        self._watch.thread = threading.get_ident()
        modules = self._attention.values()
        names = sorted({wrapping.implementation(module) for module in modules})
        for name in names:
            self._entries.append(wrapping.install(self._registry, name))
        if any(flash.is_flash(name) for name in names):
            self._flash.append(flash.install())
        for module in modules:
            if wrapping.implementation(module) == wrapping.EAGER:
                wrapping.eager_function(module)
        for _, module in self._path:
            self._gates.append(open_gate(module, self._watch))
        for layer, module in self._attention.items():
            tap: LayerTap | None = module.__dict__.get(wrapping.TAP_ATTRIBUTE)
            if tap is None:
                above = [part for _, part in path_to(self._decoder, module)[:0:-1]]
                tap = module.__dict__[wrapping.TAP_ATTRIBUTE] = LayerTap(module, layer, above)
                leave_out(module, _without_tap)
            tap.watches.append(self._watch)
            self._taps.append(tap)
        open_watches.append(self._watch)

    def _remove(self) -> None:
        if self._watch in open_watches:
            open_watches.remove(self._watch)
        for tap in self._taps:
            tap.watches.remove(self._watch)
            if not tap.watches:
                del tap.attention.__dict__[wrapping.TAP_ATTRIBUTE]
                leave_in(tap.attention)
        for gate in self._gates:
            close_gate(gate, self._watch)
        for entry in self._entries:
            wrapping.release(self._registry, entry)
        for wrapped in self._flash:
            flash.release(wrapped)
        self._taps, self._gates, self._entries, self._flash = [], [], [], []


def _without_tap(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != wrapping.TAP_ATTRIBUTE}


def _attention_registry() -> wrapping.Registry:
    """Transformers' table of attention functions, shared by all models."""
    try:
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise CaptureError(
            "capture_attention needs transformers >= 5.17, which cannot be imported "
            f"({error}): pip install 'transformers>=5.17'"
        ) from error
    table: wrapping.Registry = AttentionInterface._global_mapping
    return table


def capture_attention(
    model: nn.Module, layers: Sequence[int], *, stop_after_last: bool = False
) -> AttentionCapture:
    """Capture the rotated queries and keys of some decoder layers while `model` runs.

    The registry entry of the attention implementation that the model uses already (sdpa, eager,
    flex_attention, flash) is wrapped in place for as long as the `with` lasts; config, masks and
    the vision tower stay as they are. Leaving the `with` leaves no trace. Captures of several
    models, or several of one, may be open at once and close in any order. A capture follows the
    forwards of the thread that opened it. Copies of the model that are made inside the `with`
    (`copy.deepcopy`, `torch.save`, `AveragedModel`) are ordinary models that nothing captures.

    A new forward replaces the records of the one before. Gradient checkpointing with
    `use_reentrant=False` works: recomputation does not replace a record.

    With `stop_after_last=True` a forward ends as soon as the last wanted layer's queries and keys
    are known: the call of the model (whichever module between the one handed in and its decoder was
    called) returns None and the statements after it run. Hooks that torch runs after a module's
    forward do not run for the modules that were cut short; accelerate's offloading is tidied up.
    While another capture of the same model is open that has not all its records, or does not stop,
    the forward goes on to its end.

    Args:
        model: a transformers model, also inside PEFT, DistributedDataParallel, FSDP or
            torch.compile, or any module that holds exactly one text decoder. Hand in what is
            called.
        layers: decoder layer indices; negative ones count from the last, also in a truncated
            teacher from the whole model's. `captured[-2]` and `captured[n - 2]` are one record.
        stop_after_last: end the forward after the last wanted layer; for teachers.

    Returns:
        A context manager; its value holds `captured[layer]` (`CapturedLayer`), `.layers`,
        `.num_layers`, `.input_ids`, `.position_ids`, `.attention_mask` and `.select(rows)`, and
        stays readable after the `with`.

    Raises:
        TypeError: `model` is no module, `layers` no sequence of ints.
        ValueError: `layers` is empty, or names a layer that the decoder does not have or that a
            truncated one (`drivekd.train.load_teacher`) does not hold.
        CaptureError: no decoder, several, or an attention that cannot be wrapped; transformers is
            missing; on leaving, a layer without a record. During a forward: reentrant gradient
            checkpointing, packed `position_ids` that transformers would ignore, a decoder that runs
            twice.
        NotImplementedError: maps that causal order, window, padding and segments do not describe:
            soft caps, attention sinks, position biases, masks that differ between heads, attention
            in both directions, holes in a mask, chunked or linear attention, cross-attention, a
            cache that holds tokens; also tensor parallelism, DataParallel, DeepSpeed, and
            `stop_after_last` under FSDP.

    Note:
        A 4D or block mask that reaches the attention function is looked at whole, once a forward:
        O(B N^2), one value read back from the device. Its entries are True or 0 for tokens that
        are seen and False or at most about -1e4 for hidden ones (less than -9000, since bfloat16
        rounds), and must follow from causal order, padding, sequences and the layer's window.
        Tokens that do not see themselves count as padding, and nobody may see them. Whether these
        are the padding and sequences of the `TokenLayout` that a loss is given is not compared, nor
        is what flex attention's `score_mod` adds. That packed sequences stay apart where
        `position_ids` or `cu_seq_lens_q` are passed is checked by one more value. Neither happens
        without padding mask and positions.

    Example:
        >>> with torch.no_grad(), capture_attention(teacher, [0], stop_after_last=True) as captured:
        ...     teacher(**batch)
        >>> query, key = captured[0].query, captured[0].key
    """
    return AttentionCapture(model, layers, stop_after_last=stop_after_last)
