"""Stage III's networks and tokenizer against diffusers' and transformers', on tiny random models."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mtl_anagram.errors import WeightsError
from mtl_anagram.models.releases import part_files
from mtl_anagram.models.tokenizers import CLIPTokenizer
from mtl_anagram.models.upscaler import (
    AutoencoderConfig,
    CLIPTextConfig,
    UpscalerTokenizer,
    UpscalerUNetConfig,
    load_upscaler,
)
from mtl_anagram.models.upscaler.loading import OLD_NAMES
from tests.helpers import published, relative
from tests.parity import upscaler_references as references
from tests.parity.upscaler_references import MERGES


@pytest.fixture(scope="module")
def vae():
    return references.autoencoder()


@pytest.fixture(scope="module")
def vae_folder(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 1},
        {"only_cross_attention": [False, True, False, False]},
        {"only_cross_attention": False},
        {
            "block_out_channels": [16, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "only_cross_attention": [True, True],
            "norm_num_groups": 16,
            "attention_head_dim": 2,
        },
    ],
)
def test_unet_equals_the_reference(changes, tmp_path):
    reference = references.unet(**changes)
    reference.save_pretrained(tmp_path / "unet")
    ours = load_upscaler(tmp_path).unet
    x, text = torch.randn(3, 7, 16, 24), torch.randn(3, 9, 24)
    t, levels = torch.tensor([963, 500, 1]), torch.tensor([0, 20, 350])
    with torch.no_grad():
        theirs = reference(x, t, text, class_labels=levels).sample
        assert relative(ours(x, t, text, levels), theirs) < 1e-5
        assert relative(ours(x, t, ours.prepare(text), levels), theirs) < 1e-5
        one = reference(x, 300, text, class_labels=torch.tensor([20] * 3)).sample
        assert relative(ours(x, 300, text, 20), one) < 1e-5
        assert relative(ours(x[:1], 300, ours.prepare(text)[:1], 20), one[:1]) < 1e-5


@pytest.mark.parametrize("band", [None, 1, 3000, 1 << 24])
def test_decoder_and_encoder_equal_the_reference_in_bands_of_any_height(vae, vae_folder, band):
    decoder, encoder = load_upscaler(vae_folder).decoder, load_upscaler(vae_folder).encoder
    z, pictures = torch.randn(2, 4, 12, 20), torch.rand(2, 3, 40, 48) * 2 - 1
    with torch.no_grad():
        assert relative(decoder(z, band=band), vae.decode(z).sample) < 1e-5
        assert relative(encoder(pictures, band=band), vae.encode(pictures).latent_dist.mode()) < 1e-5
        scaled = vae.decode(z / 0.08333).sample
        assert relative(decoder.picture(z, band=band), scaled) < 1e-5


def test_old_attention_names_load_and_the_other_half_is_skipped_by_name(vae, vae_folder, tmp_path):
    state = load_file(vae_folder / "vae" / "diffusion_pytorch_model.safetensors")
    old = {new: before for before, new in OLD_NAMES.items()}
    assert sorted(name.rsplit(".", 2)[1] for name in old.values() if name.startswith("decoder")) == [
        *("key", "key", "proj_attn", "proj_attn", "query", "query", "value", "value")
    ]
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text((vae_folder / "vae" / "config.json").read_text())
    path = folder / "diffusion_pytorch_model.safetensors"
    renamed = {old.get(name, name): tensor for name, tensor in state.items()}
    save_file(renamed, path)
    z, pictures = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative(load_upscaler(tmp_path).decoder(z), vae.decode(z).sample) < 1e-5
        theirs = vae.encode(pictures).latent_dist.mode()
        assert relative(load_upscaler(tmp_path).encoder(pictures), theirs) < 1e-5
    # The diffusers reference reads the old names as well: the map is theirs, not only ours.
    again = type(vae).from_pretrained(folder)
    assert torch.equal(again.decode(z).sample, vae.decode(z).sample)
    for extra in ("decoder.mid_block.attentions.0.extra.weight", "encoder.extra.weight"):
        save_file({**renamed, extra: torch.zeros(2)}, path)
        with pytest.raises(WeightsError, match=f"unexpected: {extra}"):
            _ = load_upscaler(tmp_path).decoder
    del renamed["post_quant_conv.bias"]
    save_file(renamed, path)
    with pytest.raises(WeightsError, match="missing: post_quant_conv.bias"):
        _ = load_upscaler(tmp_path).decoder


def test_half_precision_is_decoded_in_float32_where_the_config_says_so(vae, vae_folder, tmp_path):
    upscaler = load_upscaler(vae_folder, dtype="float16")
    assert upscaler.decoder.dtype == upscaler.encoder.dtype == torch.float32
    decoder = load_upscaler(vae_folder, dtype="bfloat16").decoder
    assert decoder.dtype == torch.bfloat16
    vae.save_pretrained(tmp_path / "vae", variant="fp16")
    half = tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(half).items()}, half)
    assert load_upscaler(tmp_path, variant="fp16").decoder.dtype == torch.float32
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    assert load_upscaler(tmp_path, variant="fp16").decoder.dtype == torch.float16
    z = torch.randn(1, 4, 8, 8)
    assert relative(decoder(z), vae.decode(z).sample) < 0.05


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_tower_equals_the_reference_with_and_without_the_prefix(prefix, tmp_path):
    reference = references.text_tower()
    reference.save_pretrained(tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "model.safetensors"
    state = {prefix + name.removeprefix("text_model."): t for name, t in load_file(path).items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, path)
    ours = load_upscaler(tmp_path).text_encoder
    for length in (77, 5):
        ids = torch.randint(0, reference.config.vocab_size, (3, length))
        with torch.no_grad():
            assert relative(ours(ids), reference(ids).last_hidden_state) < 1e-5


def test_configs_round_trip_through_the_reference():
    for kind, build in ((UpscalerUNetConfig, references.unet), (AutoencoderConfig, references.autoencoder)):
        ours = kind.from_dict(dict(build().config))
        fields = {name: value for name, value in ours.to_dict().items() if not name.startswith("_")}
        assert kind.from_dict(dict(build(**fields).config)) == ours
    text = CLIPTextConfig.from_dict(references.text_tower().config.to_dict())
    again = transformers.CLIPTextConfig.from_dict(text.to_dict()).to_dict()
    assert CLIPTextConfig.from_dict(again) == text


TEXTS = [
    "",
    "a duck",
    "  A  Sketch of\ta\nDuck ",
    "wow! a duck!!",
    "!wow!",
    "it's the cat's, don't",
    "café naïve ½ x² 东京 🎨 &amp; “quoted”",
    "<|endoftext|> a cat <|startoftext|>",
    "duck " * 100,
]


def tokenizers(folder, clip):
    """Ours and the reference from one folder, on texts of all kinds found equal."""
    references.write_tokenizer(folder / "tokenizer", clip)
    ours = UpscalerTokenizer(folder)
    # transformers 5 no longer reads special_tokens_map.json beside a tokenizer_config.json; the release's
    # effective padding is named outright.
    reference = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    expected = reference(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert ours(TEXTS).tolist() == expected
    assert ours.vocab_size == len(reference)
    return ours, reference


def test_tokenizer_equals_the_reference(tmp_path):
    ours, reference = tokenizers(tmp_path, CLIPTokenizer(MERGES))
    assert ours.vocab_size == 512 + len(MERGES) + 2
    assert ours(["wow!"])[0, :5].tolist() == [*reference("wow!").input_ids, 0]
    assert ours(["wow!"])[0, 2] == 0


def test_tokenizer_equals_the_reference_in_clips_own_vocabulary(tmp_path):
    ours, reference = tokenizers(tmp_path, CLIPTokenizer(published("bpe_simple_vocab_16e6.txt.gz")))
    assert ours.vocab_size == 49408
    reference.save_pretrained(tmp_path / "newer" / "tokenizer")
    newer = UpscalerTokenizer(tmp_path / "newer" / "tokenizer")
    assert newer(TEXTS).equal(ours(TEXTS))
    assert ours(["a photo of a cat!"], 9).tolist() == [[49406, 320, 1125, 539, 320, 2368, 0, 49407, 0]]


def test_the_whole_release_loads_lazily(vae, tmp_path):
    references.unet().save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    references.text_tower().save_pretrained(tmp_path / "text_encoder")
    references.write_tokenizer(tmp_path / "tokenizer")
    references.ddim().save_pretrained(tmp_path / "scheduler")
    upscaler = load_upscaler(tmp_path)
    assert upscaler.unet is upscaler.unet
    text, null = upscaler.encode(["a duck", "a cat"])
    assert (text.shape, null.shape) == ((2, 77, 24), (1, 77, 24))
    assert upscaler.max_noise_level == 350
    files = set(part_files(tmp_path, "stage_3", None))
    assert {"unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"} <= files
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", pad_token="!")
    shutil.rmtree(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # as today's libraries do: tokenizer.json
    assert part_files(tmp_path, "stage_3", None).keys() >= {"tokenizer/tokenizer.json"}
    assert load_upscaler(tmp_path).encode(["a duck", "a cat"])[0].equal(text)
