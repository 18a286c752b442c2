"""Distillation through hidden states, a baseline beside attention maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drivekd.capture.model import decoder_layers, find_decoder
from drivekd.errors import CaptureError
from drivekd.pairing import match_layer_groups


class HiddenStateLoss(nn.Module):
    """Mean squared error between projected hidden states of the student and a teacher's.

    Every student layer has a linear map to the teacher's width, trained along with the student and
    thrown away after training; its target is the mean of its group of teacher layers. Per sample
    the error is the mean over valid tokens and features; then the mean over samples, times
    `sample_weight`.

    Args:
        student_layers: Student layers, non-negative.
        teacher_layers: Teacher layers, paired as in `drivekd.AttentionMapLoss`.
        student_width: Features of the student's hidden states.
        teacher_width: Features of the teacher's.
    """

    def __init__(
        self,
        *,
        student_layers: Sequence[int],
        teacher_layers: Sequence[int],
        student_width: int,
        teacher_width: int,
    ) -> None:
        super().__init__()
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)
        self.groups = match_layer_groups(len(self.student_layers), len(self.teacher_layers))
        self.maps = nn.ModuleList(
            nn.Linear(student_width, teacher_width) for _ in self.student_layers
        )

    def forward(
        self,
        student: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor],
        valid: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of every student layer.

        Args:
            student: (B, N, D_s) hidden states by layer.
            teacher: (B, N, D_t) hidden states by layer, without a graph.
            valid: (B, N) bool; other tokens are left out.
            sample_weight: (B,) floating, one weight a sample.

        Returns:
            (L,) float32.
        """
        counts = valid.sum(1).clamp(min=1)
        losses = []
        for layer, group, map_ in zip(self.student_layers, self.groups, self.maps, strict=True):
            target = torch.stack([teacher[self.teacher_layers[i]].float() for i in group]).mean(0)
            error = (map_(student[layer].float()).float() - target).square().mean(-1)
            per_sample = (error * valid).sum(1) / counts
            if sample_weight is not None:
                per_sample = per_sample * sample_weight
            losses.append(per_sample.mean())
        return torch.stack(losses)


@contextlib.contextmanager
def capture_hidden_states(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what the next forward's decoder layers return.

    Args:
        model: A transformers model with one text decoder.
        layers: Layers, non-negative.

    Yields:
        (B, N, D) hidden states by layer, filled by the forward.

    Raises:
        CaptureError: A layer did not run, or ran without a graph under reentrant checkpointing.
    """
    states: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        # Gradient checkpointing runs a layer again in the backward: the first call counts.
        states.setdefault(layer, output if isinstance(output, Tensor) else output[0])

    decoder = decoder_layers(find_decoder(model))
    hooks = [decoder[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        yield states
        if missing := sorted(set(layers) - set(states)):
            raise CaptureError(f"layers {missing} did not run; call the model inside the with")
        trains = any(parameter.requires_grad for parameter in model.parameters())
        if trains and torch.is_grad_enabled() and not any(s.requires_grad for s in states.values()):
            raise CaptureError(
                "hidden states have no graph: reentrant gradient checkpointing drops it; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
    finally:
        for hook in hooks:
            hook.remove()


def width(model: nn.Module) -> int:
    """Features of a model's hidden states."""
    embedding: Any = find_decoder(model).embed_tokens
    return int(embedding.weight.shape[1])
