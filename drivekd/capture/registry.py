"""Wrapping, in place, the attention functions that transformers keeps by name.

A model looks its attention function up by the name of its implementation at every forward. While a
capture is open, the entry of that name is a wrapper that first shows queries and keys to the tap on
the calling module, if there is one, and then calls the function it wraps with the very arguments it
got. Config and mask functions stay as they are: a *custom* implementation name would lose padding
masks silently. The registry itself is handed in, so this file imports torch alone.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drivekd.capture import flash
from drivekd.errors import CaptureError

TAP_ATTRIBUTE = "_drivekd_tap"
EAGER = "eager"
_EAGER_SUFFIX = "eager_attention_forward"

AttentionFunction = Callable[..., Any]
Registry = MutableMapping[str, AttentionFunction]


class Tap(Protocol):
    """What sits on an attention module under `TAP_ATTRIBUTE`."""

    def see(self, query: Tensor, key: Tensor, attention_mask: Any, options: dict[str, Any]) -> bool:
        """Take note of one attention call, or not; may raise to end the forward."""

    def finish(self, lse: Tensor) -> None:
        """Take the log-sum-exp of the call that was noted last."""


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="drivekd.capture_attention records queries and keys here"
)
def _show(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, options: dict[str, Any]
) -> bool:
    tap: Tap | None = getattr(module, TAP_ATTRIBUTE, None)  # another thread may have taken it
    return tap is not None and tap.see(query, key, attention_mask, options)


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="drivekd.capture_attention records the log-sum-exp here"
)
def _finish(module: nn.Module, lse: Tensor) -> None:
    tap: Tap | None = getattr(module, TAP_ATTRIBUTE, None)
    if tap is not None:
        tap.finish(lse)


def _log_sum_exp(result: Any, query: Tensor) -> Tensor | None:
    """The log-sum-exp in what an attention function returned, if it is there and exact enough.

    Flex attention returns it where eager attention returns maps, but rounded to the dtype of the
    values: in 16 bits that is a few percent of a probability, and of no use.
    """
    lse = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(lse, Tensor) or lse.shape != query.shape[:-1] or lse.dtype != exact:
        return None
    # Under autocast the loss rounds queries and keys; their log-sum-exp is then another.
    return None if torch.is_autocast_enabled(query.device.type) else lse


def forward_code(module_type: type[nn.Module]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The global names that a module class' forward refers to, and the globals they live in."""
    function = inspect.unwrap(module_type.forward)
    code = getattr(function, "__code__", None)
    return (code.co_names, function.__globals__) if code is not None else ((), {})


_eager_functions: dict[type[nn.Module], AttentionFunction] = {}


def eager_function(module: nn.Module) -> AttentionFunction:
    """The eager attention that this module would call itself.

    Eager attention is no registry entry: each model file has its own, and forward names it as the
    registry's default. The name is read off forward's code, since a file may have several.
    """
    module_type = type(module)
    if module_type not in _eager_functions:
        names, namespace = forward_code(module_type)
        found = [name for name in names if name.endswith(_EAGER_SUFFIX) and name in namespace]
        if len(found) != 1:
            raise CaptureError(
                f"{module_type.__module__}.{module_type.__name__}.forward refers to {found} as its "
                f"eager attention; exactly one function named *{_EAGER_SUFFIX} is needed to pass "
                "the call on. Use model.set_attn_implementation('sdpa') while capturing."
            )
        _eager_functions[module_type] = namespace[found[0]]
    return _eager_functions[module_type]


def _wrap(inner: AttentionFunction | None, name: str) -> AttentionFunction:
    """A tapped `inner`; None stands for the eager function of whatever module calls."""
    is_flash = flash.is_flash(name)

    # Every model and every vision tower of the process passes through here, each with options of
    # its own: the signature has to be transparent.
    def tapped_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        function = eager_function(module) if inner is None else inner
        if not hasattr(module, TAP_ATTRIBUTE):
            return function(module, query, key, value, *args, **kwargs)
        mask = args[0] if args else kwargs.get("attention_mask")
        noted = _show(module, query, key, mask, kwargs)
        if noted and is_flash and not torch.compiler.is_compiling():
            result, told = flash.listen(
                lambda: function(module, query, key, value, *args, **kwargs)
            )
            lse = flash.laid_out(told, query, mask)
        else:
            result, lse = function(module, query, key, value, *args, **kwargs), None
        if noted and lse is None:
            lse = _log_sum_exp(result, query)
        if noted and lse is not None:
            _finish(module, lse)
        return result

    return tapped_attention


@dataclass(eq=False)
class Entry:
    """One wrapper in the registry and how many captures need it."""

    name: str
    inner: AttentionFunction | None
    wrapper: AttentionFunction
    users: int = 0


_entries: list[Entry] = []
_lock = threading.RLock()


def implementation(module: nn.Module) -> str:
    """The name of the attention implementation that an attention module asks for."""
    name: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    return name


def install(registry: Registry, name: str) -> Entry:
    """Wrap the entry `name`, or join the captures that have wrapped it already."""
    with _lock:
        current = registry.get(name)
        if current is None and name != EAGER:
            raise CaptureError(
                f"attention implementation {name!r} is not in transformers' attention registry; "
                "use model.set_attn_implementation('sdpa') or another registered one"
            )
        entry = next((e for e in _entries if e.name == name and e.wrapper is current), None)
        if entry is None:
            entry = Entry(name, current, _wrap(current, name))
            _entries.append(entry)
            registry[name] = entry.wrapper
        entry.users += 1
        return entry


def release(registry: Registry, entry: Entry) -> None:
    """Leave `entry`; the last to leave puts the wrapped function back.

    If something else has been registered over the wrapper meanwhile, it stays where it is: the
    wrapper beneath it passes calls through.
    """
    with _lock:
        entry.users -= 1
        if entry.users:
            return
        _entries.remove(entry)
        if registry.get(entry.name) is entry.wrapper:
            if entry.inner is None:
                del registry[entry.name]
            else:
                registry[entry.name] = entry.inner
