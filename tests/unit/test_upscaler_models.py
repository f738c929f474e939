"""Stage III's networks: the released sizes, what configs and calls refuse, what bands cost and change."""

import json

import pytest
import torch
from torch.utils.weak import WeakIdKeyDictionary

from mtl_anagram.errors import ConfigError, SourceError
from mtl_anagram.models.configs import TEXT_FIXED, UNET_FIXED, VAE_FIXED
from mtl_anagram.models.upscaler import (
    AutoencoderConfig,
    CLIPTextConfig,
    CLIPTextTower,
    LatentDecoder,
    LatentEncoder,
    UpscalerTokenizer,
    UpscalerUNet,
    UpscalerUNetConfig,
)
from tests.helpers import Operations, facts, relative
from tests.unit.tiny_upscaler import TEXT, UNET, VAE, write_tokenizer

RELEASED_UNET = {
    **UNET, "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024, "down_block_types": ["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
    "layers_per_block": 2, "norm_num_groups": 32, "only_cross_attention": [True, True, True, False],
    "up_block_types": 3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
}  # fmt: skip
RELEASED_VAE = {"block_out_channels": [128, 256, 512], "scaling_factor": 0.08333}
RELEASED_TEXT = {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23,
}  # fmt: skip


@pytest.fixture(scope="module")
def released():
    """The released sizes on the meta device: UNet, decoder, encoder, text tower."""
    vae = AutoencoderConfig.from_dict(RELEASED_VAE)
    with torch.device("meta"):
        unet = UpscalerUNet(UpscalerUNetConfig.from_dict(RELEASED_UNET))
        text = CLIPTextTower(CLIPTextConfig.from_dict(RELEASED_TEXT))
        return unet, LatentDecoder(vae), LatentEncoder(vae), text


def test_released_sizes(released):
    unet, decoder, encoder, text = released
    assert facts(unet) == (687, 473_398_020, "b5f806b6da5d5081")
    assert facts(decoder, encoder) == (204, 55_325_927, "70661ec45c909ba6")
    assert facts(text) == (372, 340_387_840, "ed8ac14c6009c58f")
    assert decoder.config.factor == 4
    assert unet.config.size_factor == 8


KINDS = {
    "unet": (UpscalerUNetConfig, UNET, UNET_FIXED),
    "vae": (AutoencoderConfig, VAE, VAE_FIXED),
    "text": (CLIPTextConfig, TEXT, TEXT_FIXED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_values_that_are_not_implemented_are_refused_by_name(kind):
    config, content, fixed = KINDS[kind]
    for name in fixed:
        with pytest.raises(ConfigError, match=name):
            config.from_dict({**content, name: "something else"})
    with pytest.raises(ConfigError):
        config.from_dict({})
    if kind != "text":  # transformers' files hold dozens of fields that say nothing about the network
        with pytest.raises(ConfigError, match="'layers_per_blocks'.*layers_per_block"):
            config.from_dict({**content, "layers_per_blocks": 1})


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"only_cross_attention": True}, "only_cross_attention"),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ("text", {"num_attention_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_sizes_that_no_network_has(kind, changes, message):
    config, content, _ = KINDS[kind]
    with pytest.raises(ConfigError, match=message):
        config.from_dict({**content, **changes})


def test_bands_keep_gradients_and_the_input():
    decoder = LatentDecoder(AutoencoderConfig.from_dict(VAE))
    z = torch.randn(1, 4, 6, 6, requires_grad=True)
    before = z.detach().clone()
    gradients = [torch.autograd.grad(decoder(z, band=band).square().sum(), z)[0] for band in (None, 1)]
    assert relative(*gradients) < 1e-4
    assert torch.equal(z, before)


def test_a_picture_of_1024_px_fits_at_the_released_sizes(released):
    """Bytes of all tensors alive at once, counted on the meta device; what kernels take inside is not seen."""
    unet, decoder, encoder, text = released
    with torch.device("meta"):
        x, states = torch.zeros(2, 7, 256, 256), text(torch.zeros(2, 77, dtype=torch.long))
        assert peak_gib(lambda: decoder(torch.zeros(1, 4, 256, 256))) < 2.3
        assert peak_gib(lambda: encoder(torch.zeros(1, 3, 1024, 1024))) < 1.7
        assert peak_gib(lambda: unet(x, 963, states, 0)) < 1.8


def peak_gib(run):
    """How many GiB the tensors made by `run` hold at most."""
    alive, totals = WeakIdKeyDictionary(), []

    def count(name, made):
        for tensor in made:
            storage = tensor.untyped_storage()
            alive[tensor] = (storage._cdata, storage.nbytes())
        totals.append(sum(size for _, size in set(alive.values())))

    with torch.no_grad(), Operations(count):
        run()
    return max(totals) / 2**30


def test_a_vocabulary_of_other_merges_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    assert UpscalerTokenizer(tmp_path).pad == 0
    special, vocab = tmp_path / "special_tokens_map.json", json.loads((tmp_path / "vocab.json").read_text())
    special.write_text('{"pad_token": {"content": "<|endoftext|>"}}')
    tokenizer = UpscalerTokenizer(tmp_path)
    assert tokenizer(["a"], 5).tolist() == [[*tokenizer(["a"], 3)[0].tolist(), tokenizer.pad, tokenizer.pad]]
    assert tokenizer.pad == tokenizer.vocab_size - 1
    special.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "a": vocab["b"], "b": vocab["a"]}))
    with pytest.raises(SourceError, match="do not belong together"):
        UpscalerTokenizer(tmp_path)
