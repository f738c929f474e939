"""Tiny random models of the reference libraries in the structure of the released ones."""

import torch
from diffusers import UNet2DConditionModel

STAGE_1 = {
    "act_fn": "gelu", "addition_embed_type": "text", "addition_embed_type_num_heads": 4, "attention_head_dim": 16,
    "block_out_channels": [32, 32, 48, 64], "cross_attention_dim": 64, "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock2D"] + 3 * ["SimpleCrossAttnDownBlock2D"],
    "encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "in_channels": 3, "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_num_groups": 16, "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift", "sample_size": 64,
    "up_block_types": 3 * ["SimpleCrossAttnUpBlock2D"] + ["ResnetUpsampleBlock2D"],
}  # fmt: skip
STAGE_2 = {
    **STAGE_1, "block_out_channels": [32, 32, 48, 64, 64], "class_embed_type": "timestep", "in_channels": 6,
    "down_block_types": 3 * ["ResnetDownsampleBlock2D"] + 2 * ["SimpleCrossAttnDownBlock2D"],
    "layers_per_block": [1, 2, 1, 2, 1], "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552, "resnet_skip_time_act": True, "sample_size": 256,
    "time_embedding_act_fn": "gelu", "time_embedding_dim": 64,
    "up_block_types": 2 * ["SimpleCrossAttnUpBlock2D"] + 3 * ["ResnetUpsampleBlock2D"],
}  # fmt: skip


def unet(config: dict, seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return shaken(UNet2DConditionModel.from_config({**config, **changes}))


def shaken(model):
    """Eval mode; norms' weights and biases random too, as trained ones are."""
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
