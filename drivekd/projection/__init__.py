"""Several losses, one update: Gram matrix -> K coefficients -> one linear combination.

Asymmetric gradient projection (AGP), one of its stages alone, PCGrad, or the plain sum. The
arithmetic is `drivekd.functional.projection`; `GradientProjector` is `loss.backward()` for several
losses.
"""

from drivekd.functional.projection import agp_weights, pcgrad_weights
from drivekd.projection.projector import GradientProjector
from drivekd.projection.report import ProjectionReport

__all__ = ["GradientProjector", "ProjectionReport", "agp_weights", "pcgrad_weights"]
