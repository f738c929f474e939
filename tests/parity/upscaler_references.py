"""Tiny random models of stage III in the reference libraries, in the structure of the released ones."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from mtl_anagram.models.tokenizers import CLIPTokenizer
from tests.parity.references import shaken
from tests.unit import tiny_upscaler

MERGES = ["d u", "du c", "duc k</w>", "c a", "ca t</w>", "o f</w>", "s k", "w o", "wo w</w>", "! !</w>"]
UNET = {
    "attention_head_dim": 4, "block_out_channels": [16, 32, 32, 48], "cross_attention_dim": 24,
    "down_block_types": ["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"], "in_channels": 7,
    "layers_per_block": 2, "norm_num_groups": 8, "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False], "out_channels": 4, "sample_size": 16,
    "up_block_types": 3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "block_out_channels": [16, 24, 32], "down_block_types": 3 * ["DownEncoderBlock2D"],
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 64,
    "scaling_factor": 0.08333, "up_block_types": 3 * ["UpDecoderBlock2D"],
}  # fmt: skip
TEXT = {
    "hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 3, "max_position_embeddings": 77, "vocab_size": 512 + len(MERGES) + 2,
}  # fmt: skip


def unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return shaken(UNet2DConditionModel.from_config({**UNET, **changes}))


def autoencoder(**changes) -> AutoencoderKL:
    torch.manual_seed(1)
    return shaken(AutoencoderKL.from_config({**VAE, **changes}))


def text_tower() -> CLIPTextModel:
    torch.manual_seed(2)
    model = shaken(CLIPTextModel(CLIPTextConfig(**TEXT)))
    for parameter in model.parameters():
        parameter.mul_(3)  # transformers starts CLIP so small that its states would hardly differ
    return model


def ddim() -> DDIMScheduler:
    return DDIMScheduler.from_config(tiny_upscaler.DDIM)


def low_res_scheduler() -> DDPMScheduler:
    return DDPMScheduler.from_config(tiny_upscaler.LOW_RES)


def write_tokenizer(folder: Path, tokenizer: CLIPTokenizer | None = None) -> None:
    """vocab.json, merges.txt and the two files that quarrel about the padding, as in the release."""
    tiny_upscaler.write_tokenizer(folder, tokenizer or CLIPTokenizer(MERGES))
    config = {"bos_token": "<|startoftext|>", "model_max_length": 77}
    config |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
