"""Liger-Kernel's KL divergence for the logit baseline: one kernel instead of four passes.

It is the same sum, element by element in float32, of the same log-probabilities. Liger's fused
linear losses, which make the logits themselves, are not used: they divide by the tokens of the
batch, not sample by sample, and need both heads' weights whole.

Source: https://github.com/linkedin/Liger-Kernel, src/liger_kernel/ops/kl_div.py (0.8.5).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from drivekd.errors import BackendUnavailableError

Implementation = Literal["auto", "torch", "liger"]


def is_installed() -> bool:
    """Whether Liger-Kernel is."""
    return importlib.util.find_spec("liger_kernel") is not None


def check_installed() -> None:
    """Raise if Liger-Kernel is not installed.

    Raises:
        BackendUnavailableError: It is not.
    """
    if not is_installed():
        raise BackendUnavailableError(
            "implementation is 'liger' but Liger-Kernel is not installed; pip install "
            "liger-kernel, or take implementation 'auto' or 'torch'"
        )


def uses_liger(implementation: Implementation, logits: Tensor) -> bool:
    """Whether the KL divergence of these logits is Liger's.

    Args:
        implementation: "auto" is Liger's on an NVIDIA or AMD GPU where it is installed, in float32.
        logits: The student's.

    Raises:
        BackendUnavailableError: Liger's is asked for by name and cannot run here.
    """
    if implementation == "torch":
        return False
    is_wide = logits.dtype == torch.float64
    if implementation == "auto":
        return logits.is_cuda and not is_wide and is_installed()
    check_installed()
    if is_wide:
        raise BackendUnavailableError(
            "implementation is 'liger', which computes in float32, but the logits are float64; "
            "take implementation 'torch'"
        )
    if not logits.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailableError(
            f"implementation is 'liger', whose kernels run on GPUs, but the logits are on "
            f"{logits.device}; take implementation 'auto' or 'torch'"
        )
    return True


def sums_of_kl(student: Tensor, teacher: Tensor, counts: list[int]) -> Tensor:
    """The KL divergences of consecutive rows, summed by group.

    Args:
        student: (M, V) float32 log-probabilities.
        teacher: (M, V) float32 log-probabilities, without a graph.
        counts: Rows of each group; M together.

    Returns:
        (len(counts),) float32 sums of KL(teacher || student); an exact 0 for a group without rows.
    """
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    pieces = zip(torch.split(student, counts), torch.split(teacher, counts), strict=True)
    sums = [
        LigerKLDivLossFunction.apply(own, target, "sum", True) if len(own) else own.sum()
        for own, target in pieces
    ]
    return torch.stack(sums)
