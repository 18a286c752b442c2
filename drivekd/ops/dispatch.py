"""The one registry of backends, and the only file that knows which backends exist.

`register` fills a table (op, backend) -> callable; `resolve` turns the `backend` argument of a
public function into a concrete name, once; `get` hands out the callable for that name. A backend
asked for by name runs or raises, it never becomes another one.

What `"auto"` picks is the first entry of its device's row that has the op, is installed, and takes
the tensors' device and dtype:

====== =======================
device order
====== =======================
cpu    native, torch
cuda   triton, native, torch
other  torch
====== =======================

The environment variable `DRIVEKD_BACKEND` replaces `"auto"` for every op that has such a backend;
ops that have none (attention maps and their targets are never `native`) keep to the table.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from drivekd.errors import BackendUnavailableError

BackendName = Literal["auto", "torch", "triton", "native"]

BACKENDS = ("torch", "triton", "native")

_AUTO_ORDER = {"cpu": ("native", "torch"), "cuda": ("triton", "native", "torch")}
_OP_MODULES = (
    "drivekd.ops.attention_map",
    "drivekd.ops.attention_target",
    "drivekd.ops.gradient",
)
_TRITON_MODULE = "drivekd.ops.triton_backend"
# Asked for by name, a backend that should have the op but does not is an error, also through
# DRIVEKD_BACKEND; every other missing pair means that the op never has that backend.
_NEVER = {
    ("attention_map", "native"), ("attention_map_loss", "native"),
    ("attention_map_target_loss", "native"), ("attention_map_targets", "native"),
}  # fmt: skip

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Entry:
    """One implementation and the tensors it takes; None means any."""

    function: Callable[..., Any]
    devices: Callable[[], tuple[str, ...]] | tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this implementation cannot take such tensors, or None."""
        devices = self.devices() if callable(self.devices) else self.devices
        if devices is not None and device.type not in devices:
            return f"it runs on {' and '.join(devices)} tensors, got {device.type} tensors"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, got {dtype}"
        return None


_REGISTRY: dict[tuple[str, str], _Entry] = {}
_REASONS: dict[str, str | None] = {}


def register(
    op: str,
    backend: str,
    *,
    devices: Callable[[], tuple[str, ...]] | tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> Callable[[Implementation], Implementation]:
    """Decorator that enters a callable as the implementation of `op` on `backend`.

    Args:
        op: Name of the op, without the `drivekd::` namespace.
        backend: One of `BACKENDS`.
        devices: Device types it takes, e.g. `("cuda",)`; a callable where that is known only once
            the backend is loaded; None is any device.
        dtypes: Dtypes it takes; None is any floating dtype.

    Raises:
        ValueError: `backend` is unknown, or the pair is taken.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; wanted one of {', '.join(BACKENDS)}")
    if (op, backend) in _REGISTRY:
        raise ValueError(f"op {op!r} already has a {backend!r} implementation")

    def enter(function: Implementation) -> Implementation:
        _REGISTRY[op, backend] = _Entry(function, devices, dtypes)
        return function

    return enter


def get(op: str, backend: str) -> Callable[..., Any]:
    """The callable of (op, backend).

    Raises:
        BackendUnavailableError: The backend cannot run here, or does not have this op.
    """
    return _entry(op, backend).function


def resolve(op: str, requested: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Turn a `backend` argument into a concrete backend name, by the table of this module.

    Args:
        op: Name of the op, without the `drivekd::` namespace.
        requested: `"auto"` or one of `BACKENDS`.
        device: Device of the op's tensors.
        dtype: Compute dtype of the op's tensors.

    Raises:
        TypeError: `requested` is not a string.
        ValueError: `requested` (or `DRIVEKD_BACKEND`) is not a legal name.
        BackendUnavailableError: The backend asked for by name cannot run, with the reason.
    """
    if not isinstance(requested, str):
        raise TypeError(f"backend must be a string, got {type(requested).__name__}")
    _check_name("backend", requested)
    name = requested
    if name == "auto":
        name = os.environ.get("DRIVEKD_BACKEND", "auto") or "auto"
        _check_name("environment variable DRIVEKD_BACKEND", name)
        if name == "auto" or (op, name) in _NEVER:
            return _auto(op, device, dtype)
    refusal = _entry(op, name).refusal(device, dtype)
    if refusal is not None:
        raise BackendUnavailableError(
            f"backend {name!r} cannot run {op} here: {refusal}; use backend='auto' or 'torch'"
        )
    return name


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot run in this process, with the remedy; None when it can.

    The answer is found once per process. It says nothing about single ops: see `backend_info`.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend == "torch":
        return None
    if backend not in _REASONS:  # a plain dict: torch.compile warns about functools.cache
        _REASONS[backend] = _find_reason(backend)
    return _REASONS[backend]


def _find_reason(backend: str) -> str | None:
    if backend == "native":
        return _import_reason(
            "drivekd._C",
            missing="the compiled extension drivekd._C is not built; reinstall drivekd where a C++ "
            "compiler is present, with DRIVEKD_BUILD=1 so that a failure to build is an error",
            broken=f"rebuild it against the installed torch {torch.__version__}",
        )
    if backend == "triton":
        if importlib.util.find_spec(_TRITON_MODULE) is None:
            return "this version of drivekd ships no Triton kernels; use backend='torch'"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; pip install triton (Linux only)"
        return _import_reason(
            _TRITON_MODULE,
            missing="a module of the Triton backend is missing; reinstall drivekd",
            broken="install triton 3.6 or newer",
        )
    raise ValueError(f"backend is {backend!r}; wanted one of {', '.join(BACKENDS)}")


def backend_info() -> dict[str, dict[str, str]]:
    """What can run here, op by op.

    Returns:
        `{op: {backend: "available" or the reason why not, "auto on cpu": name, ...}}`, with one
        `"auto on ..."` entry for the CPU and, where there is one, for the CUDA device (float32).
    """
    for module in _OP_MODULES:
        importlib.import_module(module)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    info: dict[str, dict[str, str]] = {}
    for op in sorted({op for op, _ in _REGISTRY}):
        info[op] = {backend: _reason(op, backend) or "available" for backend in BACKENDS}
        for device in devices:
            choice = resolve(op, "auto", device=device, dtype=torch.float32)
            info[op][f"auto on {device.type}"] = choice
    return info


def _check_name(argument: str, name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        legal = ", ".join(repr(each) for each in ("auto", *BACKENDS))
        raise ValueError(f"{argument} is {name!r}; wanted one of {legal}")


def _auto(op: str, device: torch.device, dtype: torch.dtype) -> str:
    for backend in _AUTO_ORDER.get(device.type, ("torch",)):
        if _reason(op, backend) is None and not _REGISTRY[op, backend].refusal(device, dtype):
            return backend
    raise BackendUnavailableError(f"no backend runs {op} on {device.type} tensors of {dtype}")


def _entry(op: str, backend: str) -> _Entry:
    reason = _reason(op, backend)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} cannot run {op}: {reason}")
    return _REGISTRY[op, backend]


def _reason(op: str, backend: str) -> str | None:
    """Why (op, backend) cannot run, or None; loads the backend."""
    if (op, backend) in _NEVER:
        return f"{op} has no {backend} implementation; use backend='auto' or 'torch'"
    reason = unavailable_reason(backend)
    if reason is None and (op, backend) not in _REGISTRY:
        reason = f"{op} has no {backend} implementation; use backend='auto' or 'torch'"
    return reason


def _import_reason(module: str, *, missing: str, broken: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return missing if error.name == module else f"{module} needs {error.name}: {error}"
    except (ImportError, OSError) as error:
        return f"{module} does not load ({error}); {broken}"
    return None
