"""Training: settings, recipes, the trainer, and a whole distillation from one file."""

from drivekd.train.cache.fill import cache_targets, plan_cache
from drivekd.train.cache.plan import CachePlan
from drivekd.train.callbacks import JsonlLogger
from drivekd.train.config import DistillConfig, ProjectionConfig, SignalConfig
from drivekd.train.cost import LoadingCost, loading_cost
from drivekd.train.logits import logit_distillation_loss
from drivekd.train.mixin import DistillMixin
from drivekd.train.models import load_model
from drivekd.train.recipe import CacheConfig, DataConfig, EncoderConfig, Recipe, load_recipe
from drivekd.train.run import distill
from drivekd.train.teachers import load_teacher, share_equal_weights, truncate_teacher
from drivekd.train.trainer import DistillTrainer

__all__ = [
    "CacheConfig",
    "CachePlan",
    "DataConfig",
    "DistillConfig",
    "DistillMixin",
    "DistillTrainer",
    "EncoderConfig",
    "JsonlLogger",
    "LoadingCost",
    "ProjectionConfig",
    "Recipe",
    "SignalConfig",
    "cache_targets",
    "distill",
    "load_model",
    "load_recipe",
    "load_teacher",
    "loading_cost",
    "logit_distillation_loss",
    "plan_cache",
    "share_equal_weights",
    "truncate_teacher",
]
