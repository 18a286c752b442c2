"""What a reweighting rule is to the projector."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Reweighting(Protocol):
    """What `GradientProjector.backward(weights=...)` takes beside a mapping."""

    def weights(self, names: tuple[str, ...], norms: Tensor, anchor: str) -> Tensor:
        """The losses' weights for this step.

        Args:
            names: The K losses of this step.
            norms: (K,) float64 norms of their raw gradients, on the device.
            anchor: Name of the anchor loss.

        Returns:
            (K,) float64 on the device of `norms`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        ...


@runtime_checkable
class LossObserver(Protocol):
    """A `Reweighting` that also wants to see the loss values of every projection."""

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Take the losses of a projection, before `weights` is asked for.

        Args:
            losses: 0-d float64 tensors, detached, on the device: means over micro-batches and
                ranks, in which an absent loss counts as 0.
        """
        ...
