"""Knowing when a forward begins, and ending one early without a trace.

Hooks can neither swallow an exception nor tell the outermost call from an inner one, and a context
manager that swallows it would skip the statements after the call. So every module on the way from
the model handed in down to its decoder gets an instance-level `forward`, removed on exit. All of
them count: whichever module the caller calls (the model, or only its language model), the outermost
call is where a forward begins and where a stopped one returns None.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from drivekd.capture.copies import leave_in, leave_out


class StopForward(BaseException):
    """Ends a forward whose wanted layers are all known; never leaves the outermost gate.

    Not an Exception, so that `except Exception` inside model code does not take it.
    """

    def __init__(self, passed: list[nn.Module]) -> None:
        super().__init__()
        self.passed = passed  # modules left on the way to the innermost gate, innermost first


class Listener(Protocol):
    """What a gate tells about the calls that pass through it."""

    depth: int
    thread: int | None  # the one whose calls count

    def enter(self, call: Call) -> None:
        """One call begins; `depth` gates are already inside."""


class Call:
    """One call of a gated module: its arguments by name."""

    def __init__(
        self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.module = module
        self._signature = inspect.signature(forward)
        self._arguments = dict(kwargs)
        if args:
            self._arguments |= self._signature.bind_partial(*args).arguments

    def knows(self, name: str) -> bool:
        """Whether this module takes that argument by name."""
        return name in self._arguments or name in self._signature.parameters

    def argument(self, name: str) -> Any:
        """The argument, None where it was not passed."""
        return self._arguments.get(name)


def _in_backward() -> bool:
    """A call inside backward is a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def _finish_offload(module: nn.Module) -> None:
    """Do what accelerate's offload hook does after a forward that was left by an exception."""
    hook = getattr(module, "_hf_hook", None)
    for part in reversed(getattr(hook, "hooks", (hook,))):
        if getattr(part, "offload", False):
            part.post_forward(module, None)


_REASON = "drivekd.capture_attention watches this call"


class Gate:
    """The instance-level forward of one module, shared by all captures open on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.listeners: list[Listener] = []
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self._inner: Callable[..., Any] = module.forward
        # Only this frame and the bookkeeping stay out of torch.compile; the forward that it calls
        # is compiled.
        keep_out = torch.compiler.disable(  # type: ignore[no-untyped-call]
            recursive=False, reason=_REASON
        )
        self.forward = functools.wraps(self._inner)(keep_out(self._call))

    def strip(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the module without this gate, also where a hook has put it elsewhere."""
        plain = {n: self._inner if v is self.forward else v for n, v in state.items()}
        if self.previous is None and state.get("forward") is self.forward:
            del plain["forward"]
        return plain

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        entered = self._enter(args, kwargs)
        try:
            return self._inner(*args, **kwargs)
        except StopForward as stop:
            self._finish(stop)
            if any(listener.depth > 1 for listener in entered):
                raise
            return None
        finally:
            for listener in entered:
                listener.depth -= 1

    @torch.compiler.disable(reason=_REASON)  # type: ignore[no-untyped-call, untyped-decorator]
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Listener]:
        """Tell all listeners; the ones to be told when the call ends."""
        if not self.listeners or _in_backward():
            return []
        call = Call(self.module, self._inner, args, kwargs)
        here = threading.get_ident()
        listeners = [each for each in tuple(self.listeners) if each.thread == here]
        for listener in listeners:
            listener.enter(call)
        for listener in listeners:
            listener.depth += 1
        return listeners

    @torch.compiler.disable(reason=_REASON)  # type: ignore[no-untyped-call, untyped-decorator]
    def _finish(self, stop: StopForward) -> None:
        for module in (*stop.passed, self.module):
            _finish_offload(module)
        stop.passed = []


_gates: list[Gate] = []


def open_gate(module: nn.Module, listener: Listener) -> Gate:
    """Put a gate before `module`'s forward, or join the one that is there."""
    current = module.__dict__.get("forward")
    gate = next((g for g in _gates if g.module is module and g.forward is current), None)
    if gate is None:
        gate = Gate(module)
        _gates.append(gate)
        module.__dict__["forward"] = gate.forward
        leave_out(module, gate.strip)
    gate.listeners.append(listener)
    return gate


def close_gate(gate: Gate, listener: Listener) -> None:
    """Leave the gate; the last to leave restores the module's forward.

    If something else has wrapped the gate meanwhile, the gate stays beneath it and passes calls on.
    """
    gate.listeners.remove(listener)
    if gate.listeners:
        return
    _gates.remove(gate)
    if gate.module.__dict__.get("forward") is not gate.forward:
        return
    leave_in(gate.module)
    if gate.previous is None:
        del gate.module.__dict__["forward"]
    else:
        gate.module.__dict__["forward"] = gate.previous
