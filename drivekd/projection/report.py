"""What a projection did, read off the Gram matrix that it needed anyway."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd.functional.gradient import GradientGram
from drivekd.functional.projection import on_device


@dataclass(frozen=True)
class ProjectionReport:
    """Inner products, weights and norms of one projection; device tensors, unscaled.

    Nothing here was read back to the host: reading an entry is what synchronises.

    Attributes:
        names: The K losses that took part, in the order of the other fields. A loss whose weight
            was the number 0 was not differentiated and is not among them.
        cosines: (K, K) float64 cosines between the raw gradients, 0 where a gradient is zero.
        conflicts: (K, K) bool, True where two raw gradients have a negative inner product.
        weights: (K,) float64, the final coefficient of each raw gradient in what was added to
            `.grad`: projection, loss weights, clipping and `scale` folded in. With
            `missing="official"` coefficients differ between tensors; this is their mean over the
            patterns (`GradientGram.patterns`) in which the loss has a gradient.
        norms: (K,) float64 norms of the raw gradients.
        loss_weights: (K,) float64 weights of the losses.
        finite: (K,) bool, whether a raw gradient has only finite entries (and a finite norm).
    """

    names: tuple[str, ...]
    cosines: Tensor
    conflicts: Tensor
    weights: Tensor
    norms: Tensor
    loss_weights: Tensor
    finite: Tensor


def make_report(
    names: tuple[str, ...], gram: GradientGram, final: Tensor, loss_weights: Tensor
) -> ProjectionReport:
    """Report on unscaled raw gradients with Gram `gram`, combined with `final`, (K,) or (S, K)."""
    total = gram.total
    norms = total.diagonal().sqrt()
    scale = torch.outer(norms, norms)
    others = ~torch.eye(len(names), dtype=torch.bool, device=total.device)
    if final.dim() == 2:
        present = [sum(task in own for own in gram.patterns) for task in range(len(names))]
        counts = torch.tensor(present, dtype=torch.float64)
        final = final.sum(0) / on_device(counts, final.device).clamp(min=1.0)
    return ProjectionReport(
        names=names,
        cosines=torch.where(scale > 0, total / scale, torch.where(scale.isnan(), scale, 0.0)),
        conflicts=(total < 0) & others,
        weights=final,
        norms=norms,
        loss_weights=loss_weights,
        finite=norms.isfinite(),
    )
