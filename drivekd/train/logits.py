"""Distillation through next-token distributions, the usual baseline beside attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

from drivekd.errors import TokenMismatchError
from drivekd.train.liger import Implementation, sums_of_kl, uses_liger

IGNORE_INDEX = -100


def logit_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    sample_weight: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Forward KL divergence of next-token distributions at the positions that carry labels.

    Per sample `T^2 * mean_i KL(softmax(z_t[i] / T) || softmax(z_s[i] / T))` over the positions i
    that predict a labelled token (labels shifted by one, as in the cross-entropy); then the mean
    over samples with at least one such position, times `sample_weight`.

    Args:
        student_logits: (B, N, V), any float dtype.
        teacher_logits: (B, N, V), without a graph, on any device.
        labels: (B, N) int64; -100 is left out.
        temperature: T, above 0.
        sample_weight: (B,) factors; the sum is divided by the number of counted samples, not by
            the weights. None is ones.
        implementation: What computes the divergences of log-probabilities: "torch", Liger-Kernel's
            kernel ("liger"), or "auto", which is Liger's on a GPU where it is installed. The result
            is the same to float32 rounding.

    Returns:
        0-d loss in float32 (float64 for float64 logits); an exact 0 with zero gradients if no
        position carries a label.

    Raises:
        BackendUnavailableError: "liger" cannot run here; the message says why.
        TokenMismatchError: The vocabularies differ in size.
        ValueError: Another shape does not fit, `temperature` is not above 0, or the teacher's
            logits require grad.

    Note:
        Picks the labelled positions first, which reads their number back from the device once.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (the factor T^2).
    """
    if student_logits.dim() != 3 or student_logits.shape[:2] != teacher_logits.shape[:2]:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)}; wanted (B, N, V) with one B and N"
        )
    if student_logits.shape[2] != teacher_logits.shape[2]:
        raise TokenMismatchError(
            f"the student's vocabulary has {student_logits.shape[2]} entries and the teacher's "
            f"{teacher_logits.shape[2]}; logits need one vocabulary (for one tokenizer "
            "that was padded to two sizes, give the signal that tokenizer's size as vocabulary), "
            "attention maps do not: use a signal of kind 'attention' for this teacher"
        )
    if labels.shape != student_logits.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, wanted {tuple(student_logits.shape[:2])}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, wanted a number above 0")
    if teacher_logits.requires_grad:
        raise ValueError("teacher_logits requires grad; run the teacher under torch.no_grad()")
    is_liger = uses_liger(implementation, student_logits)
    is_target = labels[:, 1:] != IGNORE_INDEX
    sample, position = is_target.nonzero(as_tuple=True)
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student = student_logits[sample, position].to(dtype).div(temperature).log_softmax(-1)
    # Elsewhere than the student's: only what the loss needs travels.
    picked = teacher_logits[sample.to(teacher_logits.device), position.to(teacher_logits.device)]
    teacher = picked.to(student.device, dtype).div(temperature).log_softmax(-1)
    counts = is_target.sum(1)
    if is_liger:
        sums = sums_of_kl(student, teacher, counts.tolist())  # rows come sample by sample
    else:
        per_position = (teacher.exp() * (teacher - student)).sum(-1)  # (M,)
        placed = per_position.new_zeros(is_target.shape).index_put((sample, position), per_position)
        sums = placed.sum(1)
    per_sample = sums * temperature**2 / counts.clamp(min=1)
    if sample_weight is not None:
        per_sample = per_sample * sample_weight.to(dtype)
    return per_sample.sum() / (counts > 0).sum().clamp(min=1)
