"""`GradientProjector`: backward for several losses at once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram
from drivekd.functional.projection import (
    ANCHORED_METHODS,
    METHODS,
    Method,
    Missing,
    Multiplicity,
    check_choice,
    projection_weights,
)
from drivekd.projection.checks import (
    Scaler,
    check_engine,
    check_losses,
    check_parameters,
    check_positive,
    check_scaler,
    check_weights,
    scale_of,
)
from drivekd.projection.report import ProjectionReport, make_report
from drivekd.reweighting import LossObserver, Reweighting

Weights = Mapping[str, float | Tensor] | Reweighting

# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
_CLIP_EPSILON = 1e-6


@dataclass
class _Pending:
    """What `every="step"` keeps between micro-batches: one gradient list per loss."""

    grads: dict[str, list[Tensor | None]] = field(default_factory=dict)
    weights: dict[str, float | Tensor] | Reweighting | None = None
    scaler: Scaler | None = None
    started: bool = False


class GradientProjector:
    """Differentiates several losses and adds one conflict-free update to `.grad`.

    Used where a plain loop calls `loss.backward()`; the optimiser, `zero_grad` and gradient
    accumulation stay as they are.

    Args:
        parameters: The parameters to differentiate for, e.g. `model.parameters()`. A tied
            parameter counts once; one that does not require grad at the time of a call is left
            alone.
        method: "agp" (see `agp_weights`), "stage1" or "stage2" (one stage of it), "pcgrad" (see
            `pcgrad_weights`) or "none", the plain weighted sum.
        anchor: Name of the loss that AGP projects the others off, and of the reweighting's anchor.
        missing: What an absent gradient is to AGP, see `agp_weights`.
        ce_multiplicity: How often AGP counts the anchor, see `agp_weights`. "official" counts it
            once per other loss: compare with a plain sum at that many times the other weights.
        seed: Of the generator that draws the order of every projection. Give all ranks the same.
        every: "microbatch" projects in every `backward`. "step" adds up each loss's gradients over
            several `backward` calls and projects in `step`.
        max_norm: Bound of the update's norm, as `clip_grad_norm_` would apply it, at no extra pass.
            Only with `every="step"`; elsewhere .grad is not final yet.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has no legal value; `max_norm` with `every="microbatch"`.
        NotImplementedError: DTensor parameters (FSDP2, tensor or context parallel), FSDP1,
            DeepSpeed ZeRO.

    Note:
        Each loss is differentiated by its own `torch.autograd.grad`, the anchor last; the last one
        frees the graph. Tensor hooks on parameters run once per loss, post-accumulate-grad hooks
        never. With `every="microbatch"` at most K + 1 buffers of the parameters' size are alive:
        the K gradients and `.grad`. Nothing is read back to the host.

        Distributed data parallel: its reduction hooks see nothing of this, so every rank would
        train alone. DDP with find_unused_parameters or static_graph is refused; plain DDP cannot be
        told from a single process. Run forward and `backward` under its `no_sync()`, and all-reduce
        `.grad` afterwards, or better reduce the K gradients before the Gram matrix. A graph
        compiled with donated buffers refuses `retain_graph`: set
        `torch._functorch.config.donated_buffer = False`.

    Example:
        >>> import torch
        >>> from drivekd.projection import GradientProjector
        >>> model = torch.nn.Linear(2, 1)
        >>> projector = GradientProjector(model.parameters())
        >>> output = model(torch.ones(3, 2))
        >>> losses = {"ce": output.square().mean(), "perception": output.sum()}
        >>> report = projector.backward(losses, weights={"ce": 1.0, "perception": 0.1})
        >>> report.names, tuple(report.cosines.shape), model.weight.grad is None
        (('ce', 'perception'), (2, 2), False)
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        method: Method = "agp",
        anchor: str = "ce",
        missing: Missing = "zero",
        ce_multiplicity: Multiplicity = "official",
        seed: int = 0,
        every: Literal["microbatch", "step"] = "microbatch",
        max_norm: float | None = None,
    ) -> None:
        self._parameters = check_parameters(parameters)
        check_choice("method", method, METHODS)
        check_choice("missing", missing, ("zero", "official"))
        check_choice("ce_multiplicity", ce_multiplicity, ("official", "once"))
        check_choice("every", every, ("microbatch", "step"))
        if not isinstance(anchor, str):
            raise TypeError(f"anchor must be the name of a loss, got {type(anchor).__name__}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if max_norm is not None:
            max_norm = check_positive("max_norm", max_norm)
            if every != "step":
                raise ValueError(
                    f"max_norm is {max_norm} but every is {every!r}: .grad is not final after a "
                    "micro-batch; use every='step', or torch.nn.utils.clip_grad_norm_ before the "
                    "optimiser's step"
                )
        self._method: Method = method
        self._anchor = anchor
        self._missing: Missing = missing
        self._ce_multiplicity: Multiplicity = ce_multiplicity
        self._every = every
        self._max_norm = max_norm
        self._generator = torch.Generator().manual_seed(seed)
        self._pending = _Pending()

    def backward(
        self,
        losses: Mapping[str, Tensor],
        *,
        weights: Weights | None = None,
        scaler: Scaler | None = None,
        scale: float = 1.0,
    ) -> ProjectionReport | None:
        """Differentiate `losses`, then project and add to `.grad` (or, per step, wait for `step`).

        Args:
            losses: Scalars by name. A loss that is absent from this step is left out of the
                mapping.
            weights: Weight of every loss: a mapping of numbers or scalar tensors, or a
                `Reweighting`; None is 1 for all. A loss whose weight is the number 0 is not
                differentiated and takes no part. With `every="step"` the last weights given for a
                loss count.
            scaler: The `GradScaler` of an fp16 run: `.grad` is then scaled as its `step` expects,
                while projection, `max_norm` and the report are about unscaled gradients.
            scale: Factor of what is added to `.grad`, e.g. 1 / number of micro-batches. With
                `every="step"` it is the factor of this micro-batch's gradients.

        Returns:
            What was done, on the device; None with `every="step"`, where `step` returns it.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: A loss is no scalar or does not require grad; the anchor is absent or has
                the weight 0; a weight is missing, negative or not finite; no loss is left;
                `weights` or `scaler` changed kind within a step.
            NotImplementedError: Engines that the class refuses, and sparse gradients.
        """
        losses = check_losses(losses)
        scale = check_positive("scale", scale)
        check_scaler(scaler)
        if weights is not None and not isinstance(weights, Reweighting):
            check_weights(weights, losses)
            losses = {n: loss for n, loss in losses.items() if not _is_zero(weights[n])}
        self._check_anchor(losses, weights)
        if isinstance(weights, LossObserver):
            weights.observe({name: loss.detach() for name, loss in losses.items()})

        if self._every == "step":
            self._accumulate(losses, weights, scaler, scale)
            return None
        grads = {
            name: self._differentiate(losses[name], scaler, 1.0, retain_graph)
            for name, retain_graph in self._anchor_last(losses)
        }
        names = tuple(losses)
        return self._project(names, [grads[name] for name in names], weights, scaler, scale)

    def step(self) -> ProjectionReport:
        """Project the gradients added up since the last `step` and add the update to `.grad`.

        Returns:
            What was done; its gradients are the sums over the micro-batches, `scale` included.

        Raises:
            RuntimeError: `every` is "microbatch", or there was no `backward`.
            ValueError: The anchor had no `backward`.
        """
        if self._every != "step":
            raise RuntimeError(
                f"step() is for every='step'; with every={self._every!r} backward() has already "
                "added to .grad"
            )
        pending = self._pending
        if not pending.grads:
            raise RuntimeError("step() has nothing to project; call backward() first")
        self._pending = _Pending()
        names = tuple(pending.grads)
        return self._project(
            names, list(pending.grads.values()), pending.weights, pending.scaler, 1.0
        )

    def reset(self) -> None:
        """Drop what `every="step"` has added up, e.g. after an error in `backward`."""
        self._pending = _Pending()

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator that draws the orders: `{"generator": uint8 tensor}`.

        Raises:
            RuntimeError: There are gradients that wait for `step`; they are not saved.
        """
        if self._pending.started:
            raise RuntimeError("state_dict() between backward() and step(); call step() first")
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: `state` does not come from `state_dict()`.
        """
        if set(state) != {"generator"}:
            raise ValueError(f"state has the keys {list(state)}; wanted ['generator']")
        self._generator.set_state(state["generator"].cpu())

    def _check_anchor(self, losses: Mapping[str, Tensor], weights: Weights | None) -> None:
        if not losses:
            raise ValueError("every loss has the weight 0; there is nothing to differentiate")
        needed = self._method in ANCHORED_METHODS or isinstance(weights, Reweighting)
        if needed and self._every == "microbatch" and self._anchor not in losses:
            raise ValueError(
                f"losses has no anchor {self._anchor!r} (or its weight is 0); it has "
                f"{list(losses)}. Give the anchor's loss, or set anchor="
            )

    def _anchor_last(self, losses: Mapping[str, Tensor]) -> list[tuple[str, bool]]:
        """(name, whether the graph is needed afterwards): the anchor's is the largest."""
        names = sorted(losses, key=lambda name: name == self._anchor)
        return [(name, name != names[-1]) for name in names]

    def _differentiate(
        self, loss: Tensor, scaler: Scaler | None, scale: float, retain_graph: bool
    ) -> list[Tensor | None]:
        """The gradients of all parameters, None for those that the loss does not reach."""
        live = [i for i, parameter in enumerate(self._parameters) if parameter.requires_grad]
        if not live:
            raise ValueError("no parameter requires grad; there is nothing to differentiate for")
        for i in live:
            check_engine(f"parameters[{i}]", self._parameters[i])
        seed = torch.full_like(loss, scale, dtype=torch.float64)
        if scaler is not None:
            seed = scaler.scale(seed)
        found = torch.autograd.grad(
            loss,
            [self._parameters[i] for i in live],
            grad_outputs=seed.to(loss.dtype),
            retain_graph=retain_graph,
            allow_unused=True,
        )
        grads: list[Tensor | None] = [None] * len(self._parameters)
        for i, grad in zip(live, found, strict=True):
            grads[i] = grad
        return grads

    def _accumulate(
        self,
        losses: Mapping[str, Tensor],
        weights: Weights | None,
        scaler: Scaler | None,
        scale: float,
    ) -> None:
        pending = self._pending
        if pending.started and scaler is not pending.scaler:
            raise ValueError("scaler changed between two backward() calls of one step")
        pending.scaler = scaler
        pending.weights = self._merged_weights(pending, weights)
        pending.started = True
        for name, retain_graph in self._anchor_last(losses):
            grads = self._differentiate(losses[name], scaler, scale, retain_graph)
            total = pending.grads.setdefault(name, [None] * len(grads))
            for i, before in enumerate(total):
                grad, grads[i] = grads[i], None
                # Out of place: autograd may hand out one tensor for two parameters.
                total[i] = grad if before is None else before if grad is None else before + grad

    def _merged_weights(
        self, pending: _Pending, weights: Weights | None
    ) -> dict[str, float | Tensor] | Reweighting | None:
        before = pending.weights
        if not isinstance(weights, Mapping):
            if pending.started and weights is not before:
                raise ValueError("weights changed kind between two backward() calls of one step")
            return weights
        if pending.started and not isinstance(before, dict):
            raise ValueError("weights changed kind between two backward() calls of one step")
        return {**(before if isinstance(before, dict) else {}), **weights}

    def _project(
        self,
        names: tuple[str, ...],
        grads: list[list[Tensor | None]],
        weights: Weights | None,
        scaler: Scaler | None,
        scale: float,
    ) -> ProjectionReport:
        gram = gradient_gram(grads)
        device = gram.values.device
        grad_scale = scale_of(scaler, device)
        if grad_scale is not None:
            gram = gram.scaled((1.0 / grad_scale).expand(len(names)))
        loss_weights = self._loss_weights(names, weights, gram)
        weighted = gram.scaled(loss_weights)
        projected = self._projection_weights(names, weighted)
        factor = scale * self._clip_factor(projected, weighted)
        final = projected * loss_weights * factor
        before = [parameter.grad for parameter in self._parameters]
        result = combine_gradients(grads, final, out=before, accumulate=True)
        for parameter, grad in zip(self._parameters, result, strict=True):
            if grad is not parameter.grad:
                parameter.grad = grad
        return make_report(names, gram, final, loss_weights)

    def _loss_weights(
        self, names: tuple[str, ...], weights: Weights | None, gram: GradientGram
    ) -> Tensor:
        """(K,) float64 on the device."""
        device = gram.values.device
        if isinstance(weights, Reweighting):
            norms = gram.total.diagonal().sqrt()
            return weights.weights(names, norms, self._anchor)
        if weights is None:
            return torch.ones(len(names), dtype=torch.float64, device=device)
        return torch.stack([_scalar(weights[name], device) for name in names])

    def _projection_weights(self, names: tuple[str, ...], gram: GradientGram) -> Tensor:
        anchor = 0
        tasks = list(range(len(names)))
        if self._method in ANCHORED_METHODS:
            if self._anchor not in names:
                raise ValueError(
                    f"the anchor {self._anchor!r} had no backward() in this step; there were "
                    f"{list(names)}"
                )
            anchor = names.index(self._anchor)
            tasks.remove(anchor)
        order = torch.randperm(len(tasks), generator=self._generator).tolist()
        return projection_weights(
            gram,
            method=self._method,
            anchor=anchor,
            order=[tasks[i] for i in order],
            missing=self._missing,
            ce_multiplicity=self._ce_multiplicity,
        )

    def _clip_factor(self, projected: Tensor, gram: GradientGram) -> Tensor | float:
        """What brings the update's norm down to `max_norm`: a quadratic form of the Gram."""
        if self._max_norm is None:
            return 1.0
        rows = projected.expand(len(gram.patterns), -1)
        square = torch.einsum("sk,skl,sl->", rows, gram.values, rows)
        norm = square.clamp(min=0.0).sqrt()
        return (self._max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _scalar(weight: float | Tensor, device: torch.device) -> Tensor:
    """A weight as a 0-d float64 tensor on `device`."""
    if isinstance(weight, Tensor):
        own = weight.detach().reshape(())
        return own.to(device=device, dtype=torch.float64, non_blocking=True)
    return torch.full((), float(weight), dtype=torch.float64, device=device)
