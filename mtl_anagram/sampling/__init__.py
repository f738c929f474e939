"""What samples: pure functions on tensors and three loops over callables; nothing here knows a network."""

from .attention_iou import anti_segregation_loss, anti_segregation_step, concept_maps
from .balancing import balance
from .ddim import LatentSchedule, NoiseLevels, ddim_step, split_v
from .guidance import combine, from_views, guide, to_views
from .recipe import Recipe
from .rectification import rectify, second_moments
from .schedule import Schedule, ddpm_step, predict_x0
from .stages import StepState, sample_stage1, sample_stage2
from .upscale_recipe import UpscaleRecipe
from .upscaling import LatentState, sample_stage3

__all__ = [
    "LatentSchedule",
    "LatentState",
    "NoiseLevels",
    "Recipe",
    "Schedule",
    "StepState",
    "UpscaleRecipe",
    "anti_segregation_loss",
    "anti_segregation_step",
    "balance",
    "combine",
    "concept_maps",
    "ddim_step",
    "ddpm_step",
    "from_views",
    "guide",
    "predict_x0",
    "rectify",
    "sample_stage1",
    "sample_stage2",
    "sample_stage3",
    "second_moments",
    "split_v",
    "to_views",
]
