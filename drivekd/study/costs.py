"""A table of what models will load and compute."""

from __future__ import annotations

from collections.abc import Sequence

from drivekd.study.tables import Row, Table
from drivekd.train.cost import LoadingCost

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def cost_table(costs: Sequence[LoadingCost]) -> Table:
    """One row a role: layers, parameters and bytes to load, and what a forward then computes."""
    columns = ("", "layers", "parameters", "memory", "read", "files", "run per token")
    rows = tuple(
        Row(
            cost.role,
            (
                f"{cost.layers} of {cost.depth}",
                quantity(cost.parameters),
                f"{quantity(cost.bytes)}B",
                f"{quantity(cost.bytes_read)}B of {quantity(cost.bytes_on_disk)}B",
                f"{cost.files_read} of {cost.files}",
                quantity(cost.run_per_token),
            ),
            cost.checkpoint,
        )
        for cost in costs
    )
    notes = (
        "Layers of the text decoder; the rest of the parameters are vision tower, projector, "
        "embeddings and, of a whole model, its head. Run per token: decoder parameters that a "
        "forward passes, two floating-point operations each; a teacher of maps ends at the queries "
        "and keys of its deepest layer. No weights were read.",
    )
    return Table("What it will load and compute", columns, rows, notes)


def quantity(count: int) -> str:
    """A count with three digits and a unit of 1000s, such as "8.11 G"; exact below 1000."""
    for size, unit in _UNITS:
        if count >= 0.9995 * size:  # what three digits round up to it
            return f"{count / size:.3g} {unit}"
    return f"{count} "
