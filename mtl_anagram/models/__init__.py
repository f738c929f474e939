"""The networks that predict, and their loaders; nothing here knows the sampler."""

from .configs import UNetConfig
from .judge import Judge
from .loading import load_judge, load_noise_clip, load_t5, load_tokenizer, load_unet
from .noise_clip import NoiseCLIP
from .t5 import T5Config, T5Encoder
from .t5_streamed import StreamedT5Encoder
from .tokenizers import CLIPTokenizer, T5Tokenizer
from .unet import UNet
from .unet_blocks import TextContext
from .upscaler import Upscaler, load_upscaler

__all__ = [
    "CLIPTokenizer", "Judge", "NoiseCLIP", "StreamedT5Encoder", "T5Config", "T5Encoder", "T5Tokenizer", "TextContext",
    "UNet", "UNetConfig", "Upscaler", "load_judge", "load_noise_clip", "load_t5", "load_tokenizer", "load_unet",
    "load_upscaler",
]  # fmt: skip
