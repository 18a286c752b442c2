"""Copies of a model under capture: ordinary models, with weights of their own.

What a capture puts on a module lies in the module's `__dict__`. A deep copy would take the gate's
function along as it is, bound to the original, and the copy would quietly run the original's
weights. `copy.copy`, `copy.deepcopy` and `pickle` (and with it `torch.save`) ask the instance for
its state, so that is where the capture is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from drivekd.errors import CaptureError

_ATTRIBUTE = "__getstate__"


class PlainState:
    """The instance-level `__getstate__` of a module that bears something of a capture."""

    def __init__(
        self, module: nn.Module, strip: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self._module = module
        self._strip = strip

    def __call__(self) -> dict[str, Any]:
        """The module's state, as if it were not captured."""
        kind: Any = type(self._module)
        state = kind.__getstate__(self._module)
        if not isinstance(state, dict):
            raise self._refusal()
        plain = {name: value for name, value in state.items() if value is not self}
        return self._strip(plain)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reached only where a class copies its `__dict__` in a way of its own."""
        raise self._refusal()

    def _refusal(self) -> CaptureError:
        return CaptureError(
            f"{type(self._module).__name__} cannot be copied or pickled while capture_attention is "
            "open on it, because it has a way of its own to be copied: copy it before or after the "
            "`with`"
        )


def leave_out(module: nn.Module, strip: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have copies of `module` made from what `strip` makes of its state."""
    module.__dict__[_ATTRIBUTE] = PlainState(module, strip)


def leave_in(module: nn.Module) -> None:
    """Undo `leave_out`."""
    del module.__dict__[_ATTRIBUTE]
