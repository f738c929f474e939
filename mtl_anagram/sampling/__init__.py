"""What samples: pure functions on tensors and two loops over callables; nothing here knows a network."""

from .attention_iou import anti_segregation_loss, anti_segregation_step, concept_maps
from .balancing import balance
from .guidance import combine, from_views, guide, to_views
from .recipe import Recipe
from .rectification import rectify, second_moments
from .schedule import Schedule, ddpm_step, predict_x0
from .stages import StepState, sample_stage1, sample_stage2

__all__ = [
    "Recipe",
    "Schedule",
    "StepState",
    "anti_segregation_loss",
    "anti_segregation_step",
    "balance",
    "combine",
    "concept_maps",
    "ddpm_step",
    "from_views",
    "guide",
    "predict_x0",
    "rectify",
    "sample_stage1",
    "sample_stage2",
    "second_moments",
    "to_views",
]
