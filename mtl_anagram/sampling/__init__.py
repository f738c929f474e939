"""What samples: pure functions on tensors and one loop over callables; nothing here knows a network."""

from .attention_iou import anti_segregation_loss, anti_segregation_step, concept_maps
from .balancing import balance
from .guidance import combine, from_views, guide, to_views
from .loop import Combined, Prediction, StepState, sample
from .recipe import Recipe, UpscaleRecipe
from .rectification import noise_fit, rectify, second_moments
from .schedule import LatentSchedule, NoiseLevels, Schedule
from .solvers import DDIM, DDPM, DPMSolver2M, ddim_step, ddpm_step, predict_x0, split_v
from .stages import alternate, sample_stage1, sample_stage2
from .upscaling import LatentState, sample_stage3

__all__ = [
    "DDIM", "DDPM", "Combined", "DPMSolver2M", "LatentSchedule", "LatentState", "NoiseLevels", "Prediction",
    "Recipe", "Schedule", "StepState", "UpscaleRecipe", "alternate", "anti_segregation_loss", "anti_segregation_step",
    "balance", "combine", "concept_maps", "ddim_step", "ddpm_step", "from_views", "guide", "noise_fit", "predict_x0",
    "rectify", "sample", "sample_stage1", "sample_stage2", "sample_stage3", "second_moments", "split_v",
    "to_views",
]  # fmt: skip
