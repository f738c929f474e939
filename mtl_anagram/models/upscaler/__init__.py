"""Stage III: the Stable Diffusion x4 upscaler's networks, tokenizer and loaders; no sampling here."""

from .autoencoder import LatentDecoder, LatentEncoder
from .configs import AutoencoderConfig, CLIPTextConfig, UpscalerUNetConfig
from .loading import (
    Upscaler,
    load_upscaler,
    load_upscaler_decoder,
    load_upscaler_encoder,
    load_upscaler_text,
    load_upscaler_unet,
)
from .text import CLIPTextTower
from .tokenizer import UpscalerTokenizer
from .unet import UpscalerUNet

__all__ = [
    "AutoencoderConfig",
    "CLIPTextConfig",
    "CLIPTextTower",
    "LatentDecoder",
    "LatentEncoder",
    "Upscaler",
    "UpscalerTokenizer",
    "UpscalerUNet",
    "UpscalerUNetConfig",
    "load_upscaler",
    "load_upscaler_decoder",
    "load_upscaler_encoder",
    "load_upscaler_text",
    "load_upscaler_unet",
]
