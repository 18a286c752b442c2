"""Loss weights: fixed, learnt online as the public code does, or at a share of the anchor's norm.

`GradientProjector` asks a `Reweighting` between the Gram matrix and the combination, so that the
weights of a step may follow from that step's gradient norms. All arithmetic stays on the device.
"""

from drivekd.reweighting.balanced import BalancedWeights
from drivekd.reweighting.online import OnlineWeights
from drivekd.reweighting.protocol import LossObserver, Reweighting
from drivekd.reweighting.static import StaticWeights

__all__ = ["BalancedWeights", "LossObserver", "OnlineWeights", "Reweighting", "StaticWeights"]
