"""What models cost when they answer, and what a recipe's training steps cost."""

from drivekd.study.profile.deployment import Deployment, profile_model
from drivekd.study.profile.models import profile_models
from drivekd.study.profile.training import TrainingProfile, profile_recipe

__all__ = ["Deployment", "TrainingProfile", "profile_model", "profile_models", "profile_recipe"]
