"""Tiny random models of stage III in the reference libraries, in the structure of the released ones."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

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
    "num_hidden_layers": 3, "max_position_embeddings": 77,
}  # fmt: skip
SCHEDULER = {
    "beta_end": 0.02, "beta_schedule": "scaled_linear", "beta_start": 0.0001, "clip_sample": False,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
LOW_RES_SCHEDULER = {"beta_end": 0.02, "beta_schedule": "scaled_linear", "beta_start": 0.0001}


def unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return _shaken(UNet2DConditionModel.from_config({**UNET, **changes}))


def autoencoder(seed: int = 1, **changes) -> AutoencoderKL:
    torch.manual_seed(seed)
    return _shaken(AutoencoderKL.from_config({**VAE, **changes}))


def text_tower(seed: int = 2, **changes) -> CLIPTextModel:
    torch.manual_seed(seed)
    vocab = {"vocab_size": 512 + len(MERGES) + 2}
    model = _shaken(CLIPTextModel(CLIPTextConfig(**{**TEXT, **vocab, **changes})))
    for parameter in model.parameters():
        parameter.mul_(3)  # transformers starts CLIP so small that its states would hardly differ
    return model


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER)


def low_res_scheduler() -> DDPMScheduler:
    return DDPMScheduler(**LOW_RES_SCHEDULER)


def write_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and the two files that quarrel about the padding, as in the release."""
    from mtl_anagram.models.tokenizers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "vocab.json").write_text(json.dumps(CLIPTokenizer(MERGES).names()))
    common = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**common, "pad_token": "!"}))
    config = {**common, "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _shaken(model):
    """Eval mode; norms' weights and biases random too, as trained ones are."""
    model = model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
