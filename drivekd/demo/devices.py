"""Where the demo's students train, and how many side by side."""

from __future__ import annotations

import os

from drivekd.errors import BackendUnavailableError

_GIB_OF_A_WORKER = 2  # a CUDA context, the frames, a student and its teachers, with room to spare


def choose_device(device: str) -> str:
    """What a request comes to, "cpu" or "cuda"; "auto" is the GPU that torch sees, if any.

    Raises:
        BackendUnavailableError: "cuda", and torch sees no GPU.
        ValueError: another name.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device is 'cuda', but torch {torch.__version__} sees no GPU; use 'cpu' or 'auto'"
        )
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def default_workers(device: str) -> int:
    """One for each core; on a GPU no more than its memory holds."""
    cores = os.cpu_count() or 1
    if device == "cpu":
        return cores
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(cores, memory // (_GIB_OF_A_WORKER * 2**30)))


def device_name(device: str) -> str:
    """How reports call it: "cpu", or the GPU's name."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(0))
