"""`GradientProjector`: backward for several losses at once."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drivekd.functional.gradient import GradientGram
from drivekd.functional.projection import (
    ANCHORED_METHODS,
    METHODS,
    Method,
    Missing,
    Multiplicity,
    check_choice,
    projection_weights,
)
from drivekd.phases import phase
from drivekd.projection.agreement import Statement
from drivekd.projection.checks import (
    Scaler,
    check_group,
    check_losses,
    check_parameters,
    check_positive,
    check_scaler,
    check_weights,
    scale_of,
)
from drivekd.projection.engines import make_engine
from drivekd.projection.local import LocalGradients
from drivekd.projection.pending import Pending, Weights
from drivekd.projection.report import ProjectionReport, make_report
from drivekd.reweighting import LossObserver, Reweighting

# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
_CLIP_EPSILON = 1e-6


class GradientProjector:
    """Differentiates several losses and adds one conflict-free update to `.grad`.

    Used where a plain loop calls `loss.backward()`; the optimiser, `zero_grad` and gradient
    accumulation stay as they are.

    Args:
        parameters: The parameters to differentiate for: the model, or `model.parameters()`. A tied
            parameter counts once; one that does not require grad at the time of a call is left
            alone. FSDP2 (`fully_shard`) needs the model.
        method: "agp" (see `agp_weights`), "stage1" or "stage2" (one stage of it), "pcgrad" (see
            `pcgrad_weights`) or "none", the plain weighted sum.
        anchor: Name of the loss that AGP projects the others off, and of the reweighting's anchor.
        missing: What an absent gradient is to AGP, see `agp_weights`.
        ce_multiplicity: How often AGP counts the anchor, see `agp_weights`. "official" counts it
            once per other loss: compare with a plain sum at that many times the other weights.
        seed: Of the generator that draws the order of every projection, the same on all ranks.
        every: "microbatch" projects in every `backward`. "step" adds up each loss's gradients over
            several `backward` calls and projects in `step`.
        max_norm: Bound of the update's norm, as `clip_grad_norm_` would apply it, at no extra pass.
            Only with `every="step"`; elsewhere .grad is not final yet.
        process_group: The ranks over which gradients are averaged; None is the default group, or
            FSDP2's, where there is one. A rank that trains alone gives a group of its own.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has no legal value; `max_norm` with `every="microbatch"`.
        NotImplementedError: Tensor, context and expert parallel parameters, FSDP1, DeepSpeed ZeRO.

    Note:
        Each loss is differentiated by its own `torch.autograd.grad`, the anchor last; the last one
        frees the graph. Tensor hooks on parameters run once per loss, post-accumulate-grad hooks
        never. At most K + 1 buffers of the parameters' size are alive: the K gradients and `.grad`
        (with `every="step"` K sums and one fresh gradient, if `.grad` is None until `step`).
        Nothing is read back to the host. A graph compiled with donated buffers refuses
        `retain_graph`: set `torch._functorch.config.donated_buffer = False`.

        Several ranks: the K gradients are averaged (`DistributedDataParallel`'s mean; a loss that a
        rank does not give is zero there) and then projected, so that ranks are one large batch,
        and norms, `max_norm`, reweighting and report are those of all ranks, the same on each. The
        ranks first compare seed, settings and losses, which reads back a few hundred bytes, and
        all raise where they do not agree. Every rank calls `backward` (with `{}` if it has no
        loss) and `step`; losses are then in the order of their names.

        - DDP: reduce-scatter of the K gradients, one small all-reduce, all-gather of the update:
          at most (K + 1) / 2 all-reduces, in every `backward` or, with `every="step"`, in `step`
          alone. DDP's own reduction and its communication hooks have no part in this. With
          find_unused_parameters or static_graph, run forward and `backward` under its `no_sync()`.
        - FSDP2: one `.backward()` per loss, one small all-reduce. Parameters are gathered once and
          stay whole until all losses are done; gradients stay sharded. All ranks must give the
          same losses. Leaf tensors outside `parameters` also get gradients.

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
        parameters: Iterable[Tensor] | nn.Module,
        *,
        method: Method = "agp",
        anchor: str = "ce",
        missing: Missing = "zero",
        ce_multiplicity: Multiplicity = "official",
        seed: int = 0,
        every: Literal["microbatch", "step"] = "microbatch",
        max_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._parameters = check_parameters(parameters)
        self._module = parameters if isinstance(parameters, nn.Module) else None
        check_choice("method", method, METHODS)
        check_choice("missing", missing, ("zero", "official"))
        check_choice("ce_multiplicity", ce_multiplicity, ("official", "once"))
        check_choice("every", every, ("microbatch", "step"))
        if not isinstance(anchor, str):
            raise TypeError(f"anchor must be the name of a loss, got {type(anchor).__name__}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed is {seed}; wanted an int of 64 bits")
        if max_norm is not None:
            max_norm = check_positive("max_norm", max_norm)
            if every != "step":
                raise ValueError(
                    f"max_norm is {max_norm} but every is {every!r}: .grad is not final after a "
                    "micro-batch; use every='step', or torch.nn.utils.clip_grad_norm_ before the "
                    "optimiser's step"
                )
        check_group(process_group)
        self._method: Method = method
        self._anchor = anchor
        self._missing: Missing = missing
        self._ce_multiplicity: Multiplicity = ce_multiplicity
        self._every = every
        self._max_norm = max_norm
        self._settings = (method, anchor, missing, ce_multiplicity, every, max_norm)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._group = process_group
        self._engine = make_engine(self._parameters, self._module, process_group)
        self._pending = Pending()

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
                mapping; with several ranks it may be absent from some and may be empty.
            weights: Weight of every loss: a mapping of numbers (the same on all ranks) or scalar
                tensors (averaged over ranks), or a `Reweighting`; None is 1 for all. A loss whose
                weight is the number 0 is not differentiated and takes no part. With `every="step"`
                the last weights given for a loss count.
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
                `weights` or `scaler` changed kind within a step; ranks do not agree; no loss
                reaches a parameter.
            NotImplementedError: Engines that the class refuses, and sparse gradients.
        """
        engine = self._engine = self._current_engine()
        losses = check_losses(losses, may_be_empty=engine.is_distributed)
        scale = check_positive("scale", scale)
        check_scaler(scaler)
        if weights is not None and not isinstance(weights, Reweighting):
            check_weights(weights, losses)
            losses = {n: loss for n, loss in losses.items() if not _is_zero(weights[n])}
        if engine.is_distributed:
            losses = dict(sorted(losses.items()))
        else:
            self._check_anchor(losses, weights)
        is_step = self._every == "step"
        pending = self._pending if is_step else Pending()
        pending.join(weights, scaler)
        pending.open(losses)
        engine.agree(self._statement(pending, losses, 1.0 if is_step else scale))

        def seed(loss: Tensor) -> Tensor:
            own = torch.full_like(loss, scale if is_step else 1.0, dtype=torch.float64)
            return (own if scaler is None else scaler.scale(own)).to(loss.dtype)

        anchor_last = sorted(losses.items(), key=lambda item: item[0] == self._anchor)
        for name, grads in engine.differentiate(anchor_last, seed):
            with phase("projection"):
                pending.add(name, grads)
        return None if is_step else self._project(pending, scale)

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
        if not self._pending.started:
            raise RuntimeError("step() has nothing to project; call backward() first")
        pending, self._pending = self._pending, Pending()
        return self._project(pending, 1.0)

    def reset(self) -> None:
        """Drop what `every="step"` has added up, e.g. after an error in `backward`."""
        self._pending = Pending()

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
        own = self._generator.get_state()
        if not isinstance(state, Mapping):
            raise ValueError(f"state is a {type(state).__name__}; wanted what state_dict() gives")
        if set(state) != {"generator"}:
            raise ValueError(f"state has the keys {list(state)}; wanted ['generator']")
        given = state["generator"]
        if not isinstance(given, Tensor) or (given.dtype, given.shape) != (own.dtype, own.shape):
            kind = type(given).__name__
            if isinstance(given, Tensor):
                kind = f"{given.dtype} tensor of shape {tuple(given.shape)}"
            raise ValueError(
                f"state['generator'] is a {kind}; wanted the {own.dtype} tensor of shape "
                f"{tuple(own.shape)} that state_dict() gives"
            )
        self._generator.set_state(given.cpu())

    def _check_anchor(self, losses: Mapping[str, Tensor], weights: Weights | None) -> None:
        if not losses:
            raise ValueError("every loss has the weight 0; there is nothing to differentiate")
        needed = self._method in ANCHORED_METHODS or isinstance(weights, Reweighting)
        if needed and self._every == "microbatch" and self._anchor not in losses:
            raise ValueError(
                f"losses has no anchor {self._anchor!r} (or its weight is 0); it has "
                f"{list(losses)}. Give the anchor's loss, or set anchor="
            )

    def _current_engine(self) -> LocalGradients:
        """The engine; a process group may have come up since the last call."""
        if self._engine.is_distributed:
            return self._engine
        return make_engine(self._parameters, self._module, self._group)

    def _statement(self, pending: Pending, losses: Iterable[str], scale: float) -> Statement:
        weights = pending.weights
        numbers = {}
        if isinstance(weights, dict):
            numbers = {n: float(w) for n, w in weights.items() if not isinstance(w, Tensor)}
        state = self._generator.get_state().numpy().tobytes()
        return Statement(
            parameters="",
            settings=self._settings,
            seed=(self._seed, hashlib.blake2b(state, digest_size=4).hexdigest()),
            scale=scale,
            scaler=pending.scaler is not None,
            weighting=type(weights).__name__,
            weights=numbers,
            reached=dict.fromkeys(losses, 0),
        )

    @phase("projection")
    def _project(self, pending: Pending, scale: float) -> ProjectionReport:
        """Project what is pending and add it to `.grad`."""
        weights, scaler = pending.weights, pending.scaler
        device = self._parameters[0].device
        given = {}
        if isinstance(weights, dict):
            given = {name: _scalar(weights[name], device) for name in pending.grads}
        statement = self._statement(pending, pending.grads, scale)
        reduced = self._engine.reduce(pending.grads, statement, given, pending.values())
        names, gram = reduced.names, reduced.gram
        grad_scale = scale_of(scaler, gram.values.device)
        if grad_scale is not None:
            gram = gram.scaled((1.0 / grad_scale).expand(len(names)))
        if isinstance(weights, LossObserver):
            weights.observe(dict(zip(names, reduced.values.unbind(), strict=True)))
        if isinstance(weights, Reweighting):
            loss_weights = weights.weights(names, gram.total.diagonal().sqrt(), self._anchor)
        elif weights is None:
            loss_weights = torch.ones(len(names), dtype=torch.float64, device=gram.values.device)
        else:
            loss_weights = reduced.weights
        weighted = gram.scaled(loss_weights)
        projected = self._projection_weights(names, weighted)
        final = projected * loss_weights * (scale * self._clip_factor(projected, weighted))
        self._engine.add(reduced, final)
        return make_report(names, gram, final, loss_weights)

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
