"""Stage III's networks: the released sizes, what configs and calls refuse, what bands cost and change."""

import hashlib
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from mtl_anagram.errors import ConfigError, InputError, SourceError
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
from mtl_anagram.models.upscaler.configs import TEXT_FIXED, UNET_FIXED, VAE_FIXED
from tests.helpers import relative
from tests.unit.tiny_upscaler import TEXT, UNET, VAE, write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

RELEASED_UNET = {
    **UNET,
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D"] + 3 * ["CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "only_cross_attention": [True, True, True, False],
    "up_block_types": 3 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
}
RELEASED_VAE = {"block_out_channels": [128, 256, 512], "scaling_factor": 0.08333}
RELEASED_TEXT = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}


def facts(*modules):
    """Tensors, parameters, and the first 16 digits of the SHA-256 of all "name [shape]" lines, sorted."""
    shapes = sorted((n, list(t.shape)) for module in modules for n, t in module.state_dict().items())
    lines = "\n".join(f"{name} {shape}" for name, shape in shapes)
    count = sum(math.prod(shape) for _, shape in shapes)
    return len(shapes), count, hashlib.sha256(lines.encode()).hexdigest()[:16]


def test_released_sizes_on_the_meta_device():
    with torch.device("meta"):
        unet = UpscalerUNet(UpscalerUNetConfig.from_dict(RELEASED_UNET))
        config = AutoencoderConfig.from_dict(RELEASED_VAE)
        decoder, encoder = LatentDecoder(config), LatentEncoder(config)
        text = CLIPTextTower(CLIPTextConfig.from_dict(RELEASED_TEXT))
    assert facts(unet) == (687, 473_398_020, "b5f806b6da5d5081")
    assert facts(decoder, encoder) == (204, 55_325_927, "70661ec45c909ba6")
    assert facts(text) == (372, 340_387_840, "ed8ac14c6009c58f")
    assert config.factor == 4
    assert unet.config.size_factor == 8


def test_the_released_networks_fit_together_on_the_meta_device():
    with torch.device("meta"):
        unet = UpscalerUNet(UpscalerUNetConfig.from_dict(RELEASED_UNET))
        decoder = LatentDecoder(AutoencoderConfig.from_dict(RELEASED_VAE))
        text = CLIPTextTower(CLIPTextConfig.from_dict(RELEASED_TEXT))
        states = text(torch.zeros(2, 77, dtype=torch.long))
        v = unet(torch.zeros(2, 7, 256, 256), 963, states, 0)
        assert v.shape == (2, 4, 256, 256)
        assert decoder(v[:1]).shape == (1, 3, 1024, 1024)


KINDS = {
    "unet": (UpscalerUNetConfig, UNET, UNET_FIXED),
    "vae": (AutoencoderConfig, VAE, VAE_FIXED),
    "text": (CLIPTextConfig, TEXT, TEXT_FIXED),
}


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, (*_, fixed) in KINDS.items() for name in fixed]
)
def test_every_other_value_of_a_fixed_field_is_refused_by_name(kind, name):
    config, content, _ = KINDS[kind]
    with pytest.raises(ConfigError, match=name):
        config.from_dict({**content, name: "something else"})


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_fields_are_refused_with_the_closest_and_defaults_are_the_release(kind):
    config, content, _ = KINDS[kind]
    with pytest.raises(ConfigError, match="unknown config field 'layers_per_blocks'"):
        config.from_dict({**content, "layers_per_blocks": 1})
    with pytest.raises(ConfigError, match="lacks"):
        config.from_dict({})
    with pytest.raises(ConfigError, match="JSON object"):
        config.from_dict([])
    assert AutoencoderConfig.from_dict({"block_out_channels": [32]}).scaling_factor == 0.08333
    assert AutoencoderConfig.from_dict({"block_out_channels": [32]}).force_upcast is True


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("unet", {"block_out_channels": []}, "1 to 16 widths"),
        ("unet", {"block_out_channels": [8, 12.5]}, r"block_out_channels\[1\]=12.5"),
        ("unet", {"down_block_types": ["DownBlock2D"]}, "one entry per block"),
        ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"only_cross_attention": [True]}, "per block"),
        ("unet", {"only_cross_attention": [1, 0]}, "per block"),
        ("unet", {"only_cross_attention": True}, "not implemented"),
        ("unet", {"attention_head_dim": 3}, "attention_head_dim=3 does not divide"),
        ("unet", {"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ("unet", {"layers_per_block": [2, 2]}, "layers_per_block"),
        ("unet", {"in_channels": 4}, "above out_channels"),
        ("unet", {"norm_eps": float("nan")}, "norm_eps=nan"),
        ("unet", {"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0"),
        ("vae", {"force_upcast": 1}, "force_upcast=1"),
        ("vae", {"norm_num_groups": 7}, "does not divide"),
        ("vae", {"latent_channels": True}, "latent_channels=True"),
        ("vae", {"_class_name": "VQModel"}, "VQModel"),
        ("text", {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ("text", {"num_attention_heads": 5}, "does not divide"),
        ("text", {"layer_norm_eps": 0}, "layer_norm_eps=0"),
        ("text", {"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ("text", {"model_type": "t5"}, "model_type"),
    ],
)
def test_bad_values_are_refused_with_field_and_remedy(kind, changes, message):
    config, content, _ = KINDS[kind]
    with pytest.raises(ConfigError, match=message):
        config.from_dict({**content, **changes})


def test_a_text_config_without_its_activation_is_another_models():
    with pytest.raises(ConfigError, match="quick_gelu"):
        CLIPTextConfig.from_dict({name: value for name, value in TEXT.items() if name != "hidden_act"})


@pytest.mark.parametrize(
    "shape, text, labels, message",
    [
        ((2, 4, 8, 8), (2, 5, 8), 0, r"expected \(rows, 7, H, W\)"),
        ((2, 7, 7, 8), (2, 5, 8), 0, "multiples of 2"),
        ((2, 7, 8, 8), (1, 5, 8), 0, "one per picture"),
        ((2, 7, 8, 8), (2, 5, 9), 0, "text tower"),
        ((2, 7, 8, 8), (2, 5, 8), 1000, "0 to 999"),
        ((2, 7, 8, 8), (2, 5, 8), torch.tensor([0, -1]), "from -1 to 0"),
        ((2, 7, 8, 8), (2, 5, 8), torch.tensor([0, 1, 2]), "class_labels"),
        ((2, 7, 8, 8), (2, 5, 8), 0.5, "whole numbers"),
    ],
)
def test_bad_inputs_of_a_call(shape, text, labels, message):
    unet = UpscalerUNet(UpscalerUNetConfig.from_dict(UNET))
    with pytest.raises(InputError, match=message):
        unet(torch.zeros(shape), 1, torch.zeros(text), labels)


@pytest.mark.parametrize("ids", [[[0, 1]], torch.zeros(2, 3), torch.zeros(2, 78, dtype=torch.long),
                                 torch.full((1, 2), 300), torch.full((1, 2), -1)])  # fmt: skip
def test_ids_that_are_none(ids):
    tower = CLIPTextTower(CLIPTextConfig.from_dict({**TEXT, "vocab_size": 300}))
    with pytest.raises(InputError, match="ids"):
        tower(ids)


def test_shapes_that_are_no_latents_and_no_pictures():
    config = AutoencoderConfig.from_dict(VAE)
    with pytest.raises(InputError, match="latents"):
        LatentDecoder(config)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="multiples of 2"):
        LatentEncoder(config)(torch.zeros(1, 3, 8, 9))


def test_bands_change_nothing_but_tiles_would():
    """Norms and attention see the whole picture: its halves decoded by themselves are another picture."""
    torch.manual_seed(0)
    decoder = LatentDecoder(AutoencoderConfig.from_dict({**VAE, "block_out_channels": [16, 32]})).eval()
    z = torch.randn(1, 4, 24, 24) + torch.linspace(-2, 2, 24)[:, None]
    with torch.no_grad():
        whole = decoder(z, band=None)
        assert relative(decoder(z, band=500), whole) < 1e-5
        tiles = torch.cat([decoder(z[:, :, :12]), decoder(z[:, :, 12:])], dim=2)
        interior = slice(0, 12)  # far from the cut
        assert relative(tiles[:, :, interior], whole[:, :, interior]) > 0.01


def test_bands_keep_gradients_and_the_input():
    decoder = LatentDecoder(AutoencoderConfig.from_dict(VAE))
    z = torch.randn(1, 4, 6, 6, requires_grad=True)
    before = z.detach().clone()
    gradients = [torch.autograd.grad(decoder(z, band=band).square().sum(), z)[0] for band in (None, 1)]
    assert relative(*gradients) < 1e-4
    assert torch.equal(z, before)


def test_pictures_of_a_batch_are_what_they_are_alone():
    decoder = LatentDecoder(AutoencoderConfig.from_dict(VAE))
    z = torch.randn(3, 4, 6, 6)
    together = decoder.picture(z)
    for i in range(3):
        assert torch.equal(together[i : i + 1], decoder.picture(z[i : i + 1]))


def test_a_picture_of_1024_px_fits_at_the_released_sizes():
    """Bytes of all tensors alive at once, counted on the meta device; what kernels take inside is not seen."""
    with torch.device("meta"):
        unet = UpscalerUNet(UpscalerUNetConfig.from_dict(RELEASED_UNET))
        config = AutoencoderConfig.from_dict(RELEASED_VAE)
        decoder, encoder = LatentDecoder(config), LatentEncoder(config)
        z, x = torch.zeros(1, 4, 256, 256), torch.zeros(2, 7, 256, 256)
        states, picture = torch.zeros(2, 77, 1024), torch.zeros(1, 3, 1024, 1024)
        gib = {
            "decoder": peak_bytes(lambda: decoder(z)) / 2**30,
            "decoder, whole": peak_bytes(lambda: decoder(z, band=None)) / 2**30,
            "encoder": peak_bytes(lambda: encoder(picture)) / 2**30,
            "unet": peak_bytes(lambda: unet(x, 963, states, 0)) / 2**30,
            "unet, half": peak_bytes(lambda: unet.half()(x, 963, states, 0)) / 2**30,
        }
    assert gib["decoder"] < 2.3
    assert gib["decoder, whole"] > 2.9
    assert gib["encoder"] < 1.7
    assert gib["unet"] < 1.8
    assert gib["unet, half"] < 0.9


def peak_bytes(run):
    """The most bytes that the tensors made by `run` hold at once."""

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.alive, self.peak = WeakIdKeyDictionary(), 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.alive[tensor] = (storage._cdata, storage.nbytes())
            self.peak = max(self.peak, sum(size for _, size in set(self.alive.values())))
            return out

    with torch.no_grad(), Count() as count:
        run()
    return count.peak


def test_a_vocabulary_of_other_merges_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    assert UpscalerTokenizer.from_source(tmp_path).pad == 0
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    swapped = {**vocab, "a": vocab["b"], "b": vocab["a"]}
    with pytest.raises(SourceError, match="do not belong together.*2 tokens"):
        UpscalerTokenizer(tmp_path / "merges.txt", swapped)
    with pytest.raises(SourceError, match="padding token '<pad>'"):
        UpscalerTokenizer(tmp_path / "merges.txt", vocab, pad="<pad>")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|endoftext|>"}}')
    tokenizer = UpscalerTokenizer.from_source(tmp_path)
    assert tokenizer(["a"], 5).tolist() == [[*tokenizer(["a"], 3)[0].tolist(), tokenizer.pad, tokenizer.pad]]
    assert tokenizer.pad == tokenizer.vocab_size - 1
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": 3}')
    with pytest.raises(SourceError, match="pad_token=3"):
        UpscalerTokenizer.from_source(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(SourceError, match="has no vocab.json"):
        UpscalerTokenizer.from_source(tmp_path, subfolder=None)


@pytest.mark.parametrize("texts, length", [("a", 77), ([], 77), ([1], 77), (["\ud800"], 77), (["a"], 1)])
def test_texts_that_are_none(tmp_path, texts, length):
    write_tokenizer(tmp_path)
    with pytest.raises(InputError):
        UpscalerTokenizer.from_source(tmp_path)(texts, length)
