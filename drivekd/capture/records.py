"""What a capture holds: queries and keys of decoder layers, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drivekd.errors import CaptureError
from drivekd.tokens import sample_indices


@dataclass(frozen=True)
class CapturedLayer:
    """What one decoder layer handed to its attention function.

    Attributes:
        query: (B, H, N, D), after rotary embedding, as the model made it: no copy, any strides
            (transformers hands over a transposed (B, N, H, D) view), with its graph.
        key: (B, H_kv, N, D), after rotary embedding, not repeated over query groups.
        scale: the factor on q k^T.
        lse: (B, H, N) natural log-sum-exp of the scaled scores where the attention function
            returns it in float32 (float64 for float64), else None, and the loss computes it. Flash
            attention is asked for it (not with dropout, nor where it rounds float32 queries); flex
            attention gives it on a GPU, in the dtype of the values; sdpa has none, nor the last
            layer of a stopped forward. Rows of padding hold no meaning.
        window: a query at i sees the keys at j with i - window < j <= i; None: all of j <= i.
    """

    query: Tensor
    key: Tensor
    scale: float
    lse: Tensor | None = None
    window: int | None = None


class CapturedAttention:
    """Captured layers, by index.

    Attributes:
        num_layers: depth of the (whole) model's decoder.
        layers: the captured layers, ascending and non-negative.
    """

    def __init__(
        self,
        num_layers: int,
        layers: tuple[int, ...],
        records: dict[int, CapturedLayer],
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Any = None,
    ) -> None:
        self.num_layers = num_layers
        self.layers = layers
        self._records = records
        self._input_ids = input_ids
        self._position_ids = position_ids
        self._attention_mask = attention_mask

    @property
    def input_ids(self) -> Tensor | None:
        """The (B, N) input_ids of the captured forward, None if it was given embeddings."""
        return self._input_ids

    @property
    def position_ids(self) -> Tensor | None:
        """The decoder's position_ids, (B, N) or (axes, B, N); None if it counts on its own."""
        return self._position_ids

    @property
    def attention_mask(self) -> Any:
        """As the model was given it: (B, N), 0 at padding, or of another form; None without one."""
        return self._attention_mask

    def __getitem__(self, layer: int) -> CapturedLayer:
        """The record of `layer`; negative indices count from the last decoder layer.

        Raises:
            TypeError: `layer` is no int.
            CaptureError: the layer does not exist, was not asked for, or no forward has passed it.
        """
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"a captured layer is named by an int, got {type(layer).__name__}")
        index = layer + self.num_layers if layer < 0 else layer
        if index not in self.layers:
            raise CaptureError(
                f"layer {layer} was not captured: layers {list(self.layers)} of "
                f"{self.num_layers} were asked for"
            )
        if index not in self._records:
            raise CaptureError(f"layer {layer} has no record yet: no forward has passed it")
        return self._records[index]

    def select(self, rows: Tensor | Sequence[int]) -> CapturedAttention:
        """The same records for some samples only; gradients flow to the samples selected.

        Args:
            rows: (b,) int64 indices into the batch, as a tensor or a sequence of ints.

        Returns:
            Records with b samples, in the order of `rows`.

        Raises:
            TypeError: `rows` does not hold ints (a boolean mask has no size known on the host).
            ValueError: `rows` is not one-dimensional, or (where it lies on the CPU) names a sample
                that does not exist.
            CaptureError: No forward has passed a captured layer.
        """
        if not self._records:
            raise CaptureError("there is no record yet to select samples of: no forward has passed")
        index = sample_indices(rows, next(iter(self._records.values())).query.shape[0])

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device, non_blocking=True))

        records = {
            layer: CapturedLayer(
                pick(record.query),
                pick(record.key),
                record.scale,
                None if record.lse is None else pick(record.lse),
                record.window,
            )
            for layer, record in self._records.items()
        }
        input_ids = None if self.input_ids is None else pick(self.input_ids)
        mask = self.attention_mask
        # One 4D mask may stand for all samples.
        if isinstance(mask, Tensor) and (mask.ndim == 2 or mask.shape[0] != 1):
            mask = pick(mask)
        positions = self.position_ids
        if positions is not None and positions.shape[-2] != 1:  # one row may stand for all samples
            positions = positions.index_select(-2, index.to(positions.device, non_blocking=True))
        return CapturedAttention(self.num_layers, self.layers, records, input_ids, positions, mask)
