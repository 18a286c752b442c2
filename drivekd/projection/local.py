"""Gradients of several losses in one process; what distributed engines refine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram
from drivekd.phases import phase
from drivekd.projection.agreement import Statement
from drivekd.projection.checks import check_engine

TaskGradients = dict[str, list[Tensor | None]]
Scalars = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reduced:
    """Gradients that are ready to be combined.

    Attributes:
        names: The K losses that some rank holds.
        lists: One list of gradients per loss, in the engine's own layout.
        gram: Their inner products over all ranks.
        weights: (K,) float64 loss weights, means over the ranks that hold a loss; 0 if not given.
        values: (K,) float64 loss values, means over all ranks, 0 where a rank has no such loss.
    """

    names: tuple[str, ...]
    lists: list[list[Tensor | None]]
    gram: GradientGram
    weights: Tensor
    values: Tensor


class LocalGradients:
    """Whole gradients in one process.

    Args:
        parameters: The parameters, each once.
    """

    is_distributed = False

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters

    def agree(self, statement: Statement) -> None:
        """Make sure that `differentiate` takes the same course on all ranks."""

    def differentiate(
        self, losses: Sequence[tuple[str, Tensor]], seed: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, list[Tensor | None]]]:
        """Each loss's gradients of all parameters, None where there is none.

        Args:
            losses: Names and scalars; the last one frees the graph.
            seed: From a loss to the gradient that its backward starts with.
        """
        live = [i for i, parameter in enumerate(self.parameters) if parameter.requires_grad]
        if not live:
            raise ValueError("no parameter requires grad; there is nothing to differentiate for")
        for i in live:
            check_engine(f"parameters[{i}]", self.parameters[i])
        for number, (name, loss) in enumerate(losses, start=1):
            with phase(f"backward of {name}"):
                found = torch.autograd.grad(
                    loss,
                    [self.parameters[i] for i in live],
                    grad_outputs=seed(loss),
                    retain_graph=number < len(losses),
                    allow_unused=True,
                )
            grads: list[Tensor | None] = [None] * len(self.parameters)
            for i, grad in zip(live, found, strict=True):
                grads[i] = grad
            del found
            yield name, grads

    def reduce(
        self, grads: TaskGradients, statement: Statement, weights: Scalars, values: Scalars
    ) -> Reduced:
        """Inner products of the gradients; takes the lists of `grads` over.

        Args:
            grads: This rank's gradients by loss.
            statement: What this rank says; `reached` is filled in here.
            weights: 0-d float64 weights of this rank's losses, or nothing.
            values: 0-d float64 values of this rank's losses, or nothing.
        """
        names, lists = tuple(grads), list(grads.values())
        gram = gradient_gram(lists)
        check_reached(names, gram)
        rows = [in_order(own, names, gram.values) for own in (weights, values)]
        return Reduced(names, lists, gram, *rows)

    def add(self, reduced: Reduced, weights: Tensor) -> None:
        """Add the combination of the gradients, (K,) or (S, K) weights, to `.grad`."""
        before = [parameter.grad for parameter in self.parameters]
        result = combine_gradients(reduced.lists, weights, out=before, accumulate=True)
        for parameter, grad in zip(self.parameters, result, strict=True):
            if grad is not parameter.grad:
                parameter.grad = grad


def in_order(scalars: Scalars, names: Sequence[str], like: Tensor) -> Tensor:
    """(K,) of the type of `like`, 0 where a loss has no scalar."""
    zero = like.new_zeros(())
    return torch.stack([scalars.get(name, zero) for name in names])


def check_reached(names: Sequence[str], gram: GradientGram) -> None:
    """Refuse losses without any gradient: the projector then holds the wrong parameters."""
    if not gram.patterns:
        raise ValueError(
            f"none of the losses {list(names)} reaches any of the parameters; make the projector "
            "after what replaces parameters (fully_shard, adapters, model.to_empty)"
        )
