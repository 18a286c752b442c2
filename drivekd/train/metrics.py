"""What a distillation logs, gathered on the device and read back once per log row."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drivekd.train.config import ANCHOR
from drivekd.train.guards import TaskLoss
from drivekd.train.ranks import gather

_LOG = logging.getLogger(__name__)
_COLUMNS = (
    "weight",
    "share_raw",
    "share",
    "cosine_ce",
    "conflict_ce",
    "conflict_others",
    "coefficient",
)
# A signal counts as too small after this many micro-batches in a row, none above the threshold.
_PATIENCE = 10


class GradientReport(Protocol):
    """What is read of a `drivekd.projection.ProjectionReport`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Task names, K of them."""
        ...

    @property
    def cosines(self) -> Tensor:
        """(K, K) cosines of the raw gradients."""
        ...

    @property
    def conflicts(self) -> Tensor:
        """(K, K) bool, negative inner products of raw gradients."""
        ...

    @property
    def norms(self) -> Tensor:
        """(K,) norms of the raw gradients."""
        ...

    @property
    def loss_weights(self) -> Tensor:
        """(K,) weights of the losses."""
        ...

    @property
    def weights(self) -> Tensor:
        """(K,) final coefficients of the raw gradients."""
        ...


class StepMetrics:
    """Means over the micro-batches since the last log row; no synchronisation until `flush`.

    Args:
        threshold: A signal whose weighted gradient norm stays under this share of the
            cross-entropy's is reported once, by a warning.
        method: How gradients are joined (`drivekd.GradientProjector`).
        names: Signals in the order in which pairs of them are named; reports of several processes
            have their own.
    """

    def __init__(
        self, *, threshold: float, method: str = "none", names: Sequence[str] = ()
    ) -> None:
        self._threshold = threshold
        self._places = {name: place for place, name in enumerate(names)}
        self._method = method
        self._projected: list[Tensor] = []
        self._losses: dict[str, list[Tensor]] = {}
        self._layers: dict[str, tuple[int, ...]] = {}
        self._pairs: dict[tuple[str, str], list[Tensor]] = {}
        self._anchor: list[Tensor] = []
        self._gradients: dict[str, list[Tensor]] = {}
        self._below: dict[str, int] = {}
        self._warned: set[str] = set()

    def add_losses(self, losses: Mapping[str, TaskLoss]) -> None:
        """Note the losses of a micro-batch, by task name."""
        for name, loss in losses.items():
            self._losses.setdefault(name, []).append(loss.layers.detach().float())
            self._layers[name] = loss.names

    def add_report(self, report: GradientReport, *, scale: float = 1.0) -> None:
        """Note norms, cosines, conflicts and projections of a micro-batch.

        Args:
            report: What the projector reports.
            scale: Factor of the update that `report.weights` has in it.
        """
        anchor = report.names.index(ANCHOR)
        weighted = report.norms * report.loss_weights
        conflicts = report.conflicts.to(report.norms.dtype)
        self._projected.append(self._fired(report, anchor, scale))
        self._anchor.append(report.weights[anchor].to(torch.float64))
        for index, name in enumerate(report.names):
            if index == anchor:
                continue
            others = [i for i in range(len(report.names)) if i not in (anchor, index)]
            columns = [
                report.loss_weights[index] / report.loss_weights[anchor],
                report.norms[index] / report.norms[anchor],
                weighted[index] / weighted[anchor],
                report.cosines[index, anchor],
                conflicts[index, anchor],
                # A list as an index would be copied to the device, which waits.
                torch.stack([conflicts[index, other] for other in others]).mean()
                if others
                else conflicts.new_zeros(()),
                report.weights[index],
            ]
            for other in others:
                if index < other:
                    first, second = sorted(
                        (name, report.names[other]), key=lambda own: self._places.get(own, 0)
                    )
                    pair = (first, second)
                    both = torch.stack([report.cosines[index, other], conflicts[index, other]])
                    self._pairs.setdefault(pair, []).append(both.to(torch.float64))
            row = torch.stack([column.to(torch.float64) for column in columns])
            self._gradients.setdefault(name, []).append(row)

    def _fired(self, report: GradientReport, anchor: int, scale: float) -> Tensor:
        """0-d bool, whether a projection changed the update.

        One against the anchor changes the anchor's coefficient only, which its multiplicity
        changes too; it fires on a raw conflict. Any other changes a signal's coefficient.
        """
        plain = report.loss_weights * scale
        changed = (report.weights - plain).abs() > 1e-9 * plain.abs()
        if self._method in ("agp", "stage1"):
            changed = changed | report.conflicts[anchor]
        if self._method in ("agp", "stage1", "stage2"):
            changed = changed.clone()
            changed[anchor] = False
        return changed.any()

    def flush(self) -> dict[str, float]:
        """The means since the last call, and the warning about small signals.

        Losses are means over the micro-batches of all processes, which all call this at one time.
        What comes from reports is the same on all of them already.

        Returns:
            `ce` and, for each signal that had samples, `NAME/loss`, and `NAME/layer_N` for each of
            its student layers if there are several; where gradients were compared also
            `NAME/weight` (of the loss, relative to cross-entropy's), `NAME/share_raw` and
            `NAME/share` (gradient norm over cross-entropy's, without and with weights),
            `NAME/cosine_ce`, `NAME/conflict_ce`, `NAME/conflict_others` (how often the raw gradient
            opposed cross-entropy's, which is when the first projection fires, and the other
            signals' on average), `NAME/coefficient` and `ce/coefficient` (of the raw gradient in
            the update: loss weight and projection together), and for each pair of signals
            `cosine/A/B` and `conflict/A/B`; and `projected`, how often a projection fired at all.
        """
        logs = self._mean_losses()
        for name, rows in self._gradients.items():
            table = torch.stack(rows)
            columns = table.mean(0).tolist()
            logs.update({f"{name}/{k}": mean for k, mean in zip(_COLUMNS, columns, strict=True)})
            self._watch(name, float(table[:, _COLUMNS.index("share")].max()), len(rows))
        for (first, second), rows in self._pairs.items():
            cosine, conflict = torch.stack(rows).mean(0).tolist()
            logs[f"cosine/{first}/{second}"] = cosine
            logs[f"conflict/{first}/{second}"] = conflict
        if self._anchor:
            logs[f"{ANCHOR}/coefficient"] = float(torch.stack(self._anchor).mean())
            logs["projected"] = float(torch.stack(self._projected).double().mean())
        self._losses, self._gradients, self._pairs = {}, {}, {}
        self._anchor, self._projected = [], []
        return logs

    def _mean_losses(self) -> dict[str, float]:
        """Over the micro-batches of all processes; every one of them must call it."""
        own = {
            name: (self._layers[name], torch.stack(losses).double().sum(0).tolist(), len(losses))
            for name, losses in self._losses.items()
        }
        logs: dict[str, float] = {}
        everyone = gather(own)
        for name in dict.fromkeys(name for table in everyone for name in table):
            entries = [table[name] for table in everyone if name in table]
            count = sum(entry[2] for entry in entries)
            sums = zip(*(entry[1] for entry in entries), strict=True)
            means = [sum(layer) / count for layer in sums]
            logs[ANCHOR if name == ANCHOR else f"{name}/loss"] = sum(means) / len(means)
            if len(means) > 1:
                layers = zip(entries[0][0], means, strict=True)
                logs.update({f"{name}/layer_{layer}": mean for layer, mean in layers})
        return logs

    def _watch(self, name: str, largest: float, count: int) -> None:
        """Warn once about a signal that stays too small."""
        self._below[name] = self._below.get(name, 0) + count if largest < self._threshold else 0
        if self._below[name] >= _PATIENCE and name not in self._warned:
            self._warned.add(name)
            _LOG.warning(
                "signal %r has had at most %.2g of cross-entropy's gradient norm for %d "
                "micro-batches (threshold %.2g): it does next to nothing; raise its weight, or use "
                "weighting 'balance' with a share of 0.02 to 0.25",
                name,
                largest,
                self._below[name],
                self._threshold,
            )
