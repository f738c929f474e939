"""A tiny cascade with random weights in the published layout, written without any reference library."""

import io
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.noise_clip import ImageEncoder, TextEncoder
from mtl_anagram.models.t5 import T5Config, T5Encoder
from mtl_anagram.models.tokenizers import CLIPTokenizer
from mtl_anagram.models.unet import UNet

WORDS = ["a", "duck", "rabbit", "sketch", "of", "the", "sea", "turtle", "big", "cat", "house", "photo", "an"]
MERGES = ["d u", "du c", "duc k</w>", "c a", "ca t</w>"]
STAGE_1 = {
    "addition_embed_type_num_heads": 2, "attention_head_dim": 8, "block_out_channels": [8, 16, 16, 16],
    "cross_attention_dim": 32, "encoder_hid_dim": 16, "in_channels": 3, "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["ResnetDownsampleBlock2D"] + 3 * ["SimpleCrossAttnDownBlock2D"],
    "up_block_types": 3 * ["SimpleCrossAttnUpBlock2D"] + ["ResnetUpsampleBlock2D"],
}  # fmt: skip
STAGE_2 = {
    **STAGE_1, "block_out_channels": [8, 8, 8, 16, 16], "class_embed_type": "timestep", "in_channels": 6,
    "down_block_types": 3 * ["ResnetDownsampleBlock2D"] + 2 * ["SimpleCrossAttnDownBlock2D"],
    "up_block_types": 2 * ["SimpleCrossAttnUpBlock2D"] + 3 * ["ResnetUpsampleBlock2D"],
    "resnet_skip_time_act": True, "sample_size": 256, "time_embedding_act_fn": "gelu", "time_embedding_dim": 32,
}  # fmt: skip
# In place of a stage's own: quick to compile.
TWO_LEVELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}


def sentencepiece_model(extra: list[str] | None = None) -> bytes:
    """A small unigram model with T5's special ids, trained on the spot."""
    import sentencepiece

    letters = ["abcdefghijklmnopqrstuvwxyz", "A B C . , ! 0 1 2 3"]
    corpus = [" ".join(WORDS), *WORDS * 20, *(extra or []), *letters]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, vocab_size=64, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def save_module(module: torch.nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype).contiguous() for name, value in module.state_dict().items()}, str(path))


def write_unet(folder: Path, config: dict, seed: int = 0) -> None:
    torch.manual_seed(seed)
    unet = UNet(UNetConfig.from_dict(config))
    save_module(unet, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(unet.config.to_dict()))


def write_t5(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = T5Config.from_dict(
        {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
         "feed_forward_proj": "gated-gelu", "model_type": "t5"}
    )  # fmt: skip
    save_module(T5Encoder(config), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def write_cascade(folder: Path, *, stage_2: bool = True) -> Path:
    """stage_1/, stage_2/, noise_clip/ and cascade.json, as the embedded cascade's folder is."""
    write_unet(folder / "stage_1" / "unet", STAGE_1)
    write_t5(folder / "stage_1" / "text_encoder")
    (folder / "stage_1" / "tokenizer").mkdir()
    (folder / "stage_1" / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model())
    if stage_2:
        write_unet(folder / "stage_2" / "unet", STAGE_2, seed=1)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(MERGES)
    image = ImageEncoder(image_size=64, patch_size=16, width=64, layers=1, embedding=16)
    text = TextEncoder(vocab=tokenizer.vocab_size, width=64, layers=1, embedding=16)
    for parameter in (*image.parameters(), *text.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    save_module(image, folder / "noise_clip" / "clip_image_enc.safetensors")
    save_module(text, folder / "noise_clip" / "clip_text_enc.safetensors")
    (folder / "noise_clip" / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    (folder / "cascade.json").write_text(json.dumps({"name": "tiny"}))
    return folder
