"""Loss weights learnt online by the public code's rule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drivekd.reweighting.checks import (
    check_anchor,
    check_keys,
    check_known,
    check_norms,
    check_number,
    check_numbers,
    vector,
)


class OnlineWeights:
    """The public code's online rule: weights learnt so that gradient norms keep set proportions.

    With `G_k = w_k |g_k|` and `p_k` the static weights divided by their sum, one AdamW step
    (betas 0.9 and 0.99, no decay) on the parameters a of `w = softplus(a)` lowers
    `sum_k |G_k - p_k rho_k sum_j G_j|`; the sum inside is differentiated too, other than in
    GradNorm. `rho_k = (r_k / mean r)^alpha` with `r_k` the loss relative to its first value. Then
    the weights of the losses that took part are rescaled to the sum of their static weights and
    clamped. A step uses the weights that earlier steps made.

    Args:
        weights: Static weight of every loss, at least 0: the start and the proportions.
        learning_rate: Of AdamW.
        alpha: How much faster losses that lag behind may grow. Other than 0 it needs the loss
            values, which `GradientProjector` hands to `observe`.
        minimum: Lower bound of every weight.
        maximum: Upper bound of every weight.
        minimum_anchor: Lower bound of the anchor's weight.
        update_every: Calls of `weights` per update. The public code updates once per optimiser
            step, on norms averaged over its micro-batches: give the number of micro-batches, or 1
            for a projector with `every="step"`.

    Raises:
        TypeError: An argument is no number, or `weights` no mapping.
        ValueError: An argument is out of range.

    Note:
        An update needs two losses, and does not happen when a norm is not finite, all are 0, or a
        loss has no power `alpha` (a negative or non-finite one; losses are meant to be positive).
        State is float64; the public code's is float32 and overflows for weights above 88.

    Source:
        Colamentos2023/Drive-KD at 7589a0c, intern/trainer.py,
        `_OnlineReweightGroup.update_dynamic_weights_online_reweighting`, and the defaults of
        train.py; after GradNorm (arXiv 1711.02257).
    """

    _BETAS = (0.9, 0.99)
    _EPSILON = 1e-8

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        learning_rate: float = 3e-4,
        alpha: float = 0.0,
        minimum: float = 1e-6,
        maximum: float = 1e6,
        minimum_anchor: float = 0.6,
        update_every: int = 1,
    ) -> None:
        self._static = check_numbers("weights", weights, minimum=0.0)
        self._learning_rate = check_number("learning_rate", learning_rate, minimum=0.0)
        self._alpha = check_number("alpha", alpha)
        self._minimum = check_number("minimum", minimum, minimum=0.0, open_below=True)
        self._maximum = check_number("maximum", maximum, minimum=self._minimum)
        self._minimum_anchor = check_number("minimum_anchor", minimum_anchor, minimum=0.0)
        if not isinstance(update_every, int) or isinstance(update_every, bool):
            raise TypeError(f"update_every must be an int, got {type(update_every).__name__}")
        if update_every < 1:
            raise ValueError(f"update_every is {update_every}; wanted at least 1")
        self._update_every = update_every
        start = [min(max(w, self._minimum), self._maximum) for w in self._static.values()]
        zeros = torch.zeros(len(start), dtype=torch.float64)
        self._tensors = {
            "parameters": _softplus_inverse(torch.tensor(start, dtype=torch.float64)),
            "first_moments": zeros,
            "second_moments": zeros,
            "steps": zeros,
            "first_losses": zeros * math.nan,
            "norm_sums": zeros,
            "loss_sums": zeros,
        }
        # What the running window has seen, kept on the host: names are host data.
        self._calls = {"weights": 0, "observe": 0}
        self._seen: dict[str, list[str]] = {"weights": [], "observe": []}

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Take the loss values of a backward, for `alpha`.

        Raises:
            ValueError: A loss has no static weight.
        """
        check_known("weights", losses, self._static)
        values = [loss.detach().to(torch.float64) for loss in losses.values()]
        if values:
            self._add("loss_sums", "observe", list(losses), torch.stack(values))

    def weights(self, names: tuple[str, ...], norms: Tensor, anchor: str) -> Tensor:
        """The weights that earlier steps made, (K,) float64; then learns from these norms.

        Raises:
            TypeError: `norms` is no float64 tensor.
            ValueError: The anchor is absent, a name has no static weight, `norms` is not (K,), or
                `alpha` is not 0 and the losses of a window were not observed.
        """
        check_norms(names, norms)
        check_anchor(names, anchor)
        check_known("weights", names, self._static)
        self._add("norm_sums", "weights", names, norms)
        current = dict(zip(self._static, self._current(anchor).unbind(), strict=True))
        result = torch.stack([current[name] for name in names])
        if self._calls["weights"] == self._update_every:
            self._update(anchor)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Parameters, AdamW moments and the running window."""
        return {
            "names": list(self._static),
            "tensors": {key: value.clone() for key, value in self._tensors.items()},
            "calls": dict(self._calls),
            "seen": {key: list(value) for key, value in self._seen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; tensors move to the device of the next norms.

        Raises:
            ValueError: The state belongs to other losses.
        """
        check_keys(state, ("names", "tensors", "calls", "seen"))
        if list(state["names"]) != list(self._static):
            raise ValueError(
                f"state is about the losses {list(state['names'])}, but weights has "
                f"{list(self._static)}"
            )
        check_keys(state["tensors"], tuple(self._tensors))
        self._tensors = {key: state["tensors"][key].clone() for key in self._tensors}
        self._calls = dict(state["calls"])
        self._seen = {key: list(value) for key, value in state["seen"].items()}

    def _add(self, sums: str, kind: str, names: Sequence[str], values: Tensor) -> None:
        """Add `values` of `names` to the running window."""
        device = values.device
        self._tensors = {key: value.to(device) for key, value in self._tensors.items()}
        own = dict(zip(names, values.unbind(), strict=True))
        zero = values.new_zeros(())
        self._tensors[sums] = self._tensors[sums] + torch.stack(
            [own.get(name, zero) for name in self._static]
        )
        self._calls[kind] += 1
        self._seen[kind] += [name for name in names if name not in self._seen[kind]]

    def _current(self, anchor: str) -> Tensor:
        """(M,) weights of all M losses with a static weight."""
        raw = F.softplus(self._tensors["parameters"]) + self._EPSILON
        return self._clamped(raw, anchor)

    def _clamped(self, weights: Tensor, anchor: str) -> Tensor:
        weights = weights.clamp(self._minimum, self._maximum)
        return torch.maximum(weights, self._lower_bounds(anchor, weights.device))

    def _lower_bounds(self, anchor: str, device: torch.device) -> Tensor:
        bounds = [self._minimum_anchor if name == anchor else 0.0 for name in self._static]
        return vector(bounds, device)

    def _update(self, anchor: str) -> None:
        """One AdamW step on the window's means, then the rescaling; opens a new window."""
        tensors = self._tensors
        seen = self._seen["weights"]
        if len(seen) > 1:
            gradient, usable = self._gradient(anchor)
            chosen = vector([float(name in seen) for name in self._static], gradient.device)
            update = (chosen > 0) & usable
            moments = self._adamw(gradient)
            rescaled = self._rescaled(moments["parameters"], chosen, anchor)
            moments["parameters"] = _softplus_inverse(rescaled)
            for key, value in moments.items():
                tensors[key] = torch.where(update, value, tensors[key])
        for key in ("norm_sums", "loss_sums"):
            tensors[key] = torch.zeros_like(tensors[key])
        self._calls = {"weights": 0, "observe": 0}
        self._seen = {"weights": [], "observe": []}

    def _gradient(self, anchor: str) -> tuple[Tensor, Tensor]:
        """Gradient of the objective with respect to the parameters, and whether it is usable."""
        seen = self._seen["weights"]
        parameters = self._tensors["parameters"]
        norms = self._tensors["norm_sums"] / self._calls["weights"]
        weighted = self._current(anchor) * norms
        total = weighted.sum()
        sum_static = sum(self._static[name] for name in seen)
        shares = [
            (w / sum_static if sum_static > 0 else 1 / len(seen)) * (name in seen)
            for name, w in self._static.items()
        ]
        targets = vector(shares, norms.device) * self._lag()
        signs = torch.sign(weighted - targets * total)
        slopes = norms * (signs - (targets * signs).sum())
        # Where a clamp holds the weight, it has no slope.
        raw = F.softplus(parameters) + self._EPSILON
        free = self._clamped(raw, anchor) == raw
        usable = weighted.isfinite().all() & (total > 0) & targets.isfinite().all()
        return slopes * torch.sigmoid(parameters) * free, usable

    def _lag(self) -> Tensor | float:
        """rho: how far each loss lags behind the others, to the power of alpha."""
        if self._alpha == 0.0:
            return 1.0
        seen = self._seen["weights"]
        if set(seen) - set(self._seen["observe"]):
            raise ValueError(
                f"alpha is {self._alpha}, which needs loss values, but observe() was not called "
                f"with all of {seen}; use GradientProjector, or call it before weights()"
            )
        losses = self._tensors["loss_sums"] / self._calls["observe"]
        first = self._tensors["first_losses"]
        chosen = vector([float(name in seen) for name in self._static], losses.device)
        first = torch.where(first.isnan() & (chosen > 0), losses, first)
        self._tensors["first_losses"] = first
        ratios = torch.where(chosen > 0, losses / first.clamp(min=1e-12), 0.0)
        mean = ratios.sum() / len(seen)
        return torch.where(chosen > 0, (ratios / mean).pow(self._alpha), 0.0)

    def _adamw(self, gradient: Tensor) -> dict[str, Tensor]:
        """Parameters, moments and step counts after one AdamW step without decay."""
        old, (beta1, beta2) = self._tensors, self._BETAS
        steps = old["steps"] + 1
        first = beta1 * old["first_moments"] + (1 - beta1) * gradient
        second = beta2 * old["second_moments"] + (1 - beta2) * gradient.square()
        root = (second / (1 - torch.pow(beta2, steps))).sqrt()
        change = first / (1 - torch.pow(beta1, steps)) / (root + 1e-8)
        return {
            "parameters": old["parameters"] - self._learning_rate * change,
            "first_moments": first,
            "second_moments": second,
            "steps": steps,
        }

    def _rescaled(self, parameters: Tensor, chosen: Tensor, anchor: str) -> Tensor:
        """Weights with the chosen ones scaled to the sum of their static weights, clamped."""
        weights = self._clamped(F.softplus(parameters) + self._EPSILON, anchor)
        seen = self._seen["weights"]
        wanted = sum(self._static[name] for name in seen) or float(len(seen))
        scale = wanted / (weights * chosen).sum().clamp(min=1e-20)
        return self._clamped(weights * scale, anchor)


def _softplus_inverse(weights: Tensor) -> Tensor:
    return weights + torch.log(-torch.expm1(-weights))
