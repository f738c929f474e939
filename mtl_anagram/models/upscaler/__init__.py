"""Stage III: the Stable Diffusion x4 upscaler's networks, tokenizer and loader; no sampling here."""

from ..configs import AutoencoderConfig, CLIPTextConfig, UpscalerUNetConfig
from .autoencoder import LatentDecoder, LatentEncoder
from .loading import Upscaler, load_upscaler
from .text import CLIPTextTower, UpscalerTokenizer
from .unet import UpscalerUNet

__all__ = [
    "AutoencoderConfig", "CLIPTextConfig", "CLIPTextTower", "LatentDecoder", "LatentEncoder", "Upscaler",
    "UpscalerTokenizer", "UpscalerUNet", "UpscalerUNetConfig", "load_upscaler",
]  # fmt: skip
