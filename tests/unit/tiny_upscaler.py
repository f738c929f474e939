"""A tiny stage III with random weights in the published layout, written without any reference library."""

import json
from pathlib import Path

import torch

from mtl_anagram.models.tokenizers import CLIPTokenizer
from mtl_anagram.models.upscaler import (
    AutoencoderConfig,
    CLIPTextConfig,
    CLIPTextTower,
    LatentDecoder,
    LatentEncoder,
    UpscalerUNet,
    UpscalerUNetConfig,
)
from tests.unit.tiny import MERGES, save_module

UNET = {
    "attention_head_dim": 2, "block_out_channels": [8, 8], "cross_attention_dim": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "in_channels": 7, "layers_per_block": 1,
    "norm_num_groups": 4, "num_class_embeds": 1000, "only_cross_attention": [True, False],
    "out_channels": 4, "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
VAE = {"block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 4}
VAE_X4 = {**VAE, "block_out_channels": [4, 4, 8]}
TEXT = {
    "hidden_act": "gelu", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 512 + len(MERGES) + 2,
}  # fmt: skip
DDIM = {
    "_class_name": "DDIMScheduler", "beta_end": 0.02, "beta_schedule": "scaled_linear",
    "beta_start": 0.0001, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
LOW_RES = {
    **{name: value for name, value in DDIM.items() if name.startswith("beta") or "train" in name},
    "_class_name": "DDPMScheduler", "clip_sample": True, "prediction_type": "epsilon", "variance_type": "fixed_small",
}  # fmt: skip


def write_tokenizer(folder: Path, tokenizer: CLIPTokenizer | None = None) -> None:
    tokenizer = tokenizer or CLIPTokenizer(MERGES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges)]))
    (folder / "vocab.json").write_text(json.dumps(tokenizer.ids))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))


def write_upscaler(folder: Path, seed: int = 0) -> Path:
    """unet/, vae/, text_encoder/, tokenizer/, scheduler/, low_res_scheduler/, model_index.json."""
    torch.manual_seed(seed)
    unet = UpscalerUNet(UpscalerUNetConfig.from_dict(UNET))
    config = AutoencoderConfig.from_dict(VAE_X4)
    vae = torch.nn.Module()
    for part in (LatentDecoder(config), LatentEncoder(config)):
        for name, child in part.named_children():
            vae.add_module(name, child)
    text = CLIPTextTower(CLIPTextConfig.from_dict(TEXT))
    for name, module, base, content in (
        ("unet", unet, "diffusion_pytorch_model", unet.config.to_dict()),
        ("vae", vae, "diffusion_pytorch_model", config.to_dict()),
        ("text_encoder", text, "model", text.config.to_dict()),
    ):
        save_module(module, folder / name / f"{base}.safetensors")
        (folder / name / "config.json").write_text(json.dumps(content))
    write_tokenizer(folder / "tokenizer")
    for name, content in (("scheduler", DDIM), ("low_res_scheduler", LOW_RES)):
        (folder / name).mkdir()
        (folder / name / "scheduler_config.json").write_text(json.dumps(content))
    (folder / "model_index.json").write_text(json.dumps({"max_noise_level": 350}))
    return folder
