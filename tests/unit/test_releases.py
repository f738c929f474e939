"""Releases by name: what each is made of, whose facts they state, how names, folders and mixed parts resolve."""

import hashlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from mtl_anagram import Cascade, ConfigError, InputError, SourceError, cli
from mtl_anagram.models.configs import UNetConfig
from mtl_anagram.models.t5 import T5Encoder
from mtl_anagram.models.unet import UNet
from mtl_anagram.parts import find_parts
from mtl_anagram.releases import LAYOUTS, PUBLISHED, RELEASES, T5_XXL, X4_UPSCALER
from tests.unit import tiny
from tests.unit.test_unet_config import RELEASED

GLIDE = "glide"


def make(source, **options):
    return Cascade.from_pretrained(source, device="cpu", **options)


@pytest.mark.parametrize(
    "name, first, second",
    [("IF-M", "IF-I-M", "IF-II-M"), ("IF-L", "IF-I-L", "IF-II-L"), ("IF-XL", "IF-I-XL", "IF-II-L")],
)
def test_what_each_name_means(name, first, second, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cascade = make(name)
    assert cascade.name == name
    assert cascade.sources == {
        "stage_1": f"DeepFloyd/{first}-v1.0",
        "stage_2": f"DeepFloyd/{second}-v1.0",
        "stage_3": X4_UPSCALER,
        "noise_clip": GLIDE,
    }
    assert cascade.variants == {**dict.fromkeys(cascade.sources, "fp16"), "stage_3": None}
    assert RELEASES[name].stage_3 == X4_UPSCALER
    assert make(name, variant="fp32").variants == dict.fromkeys(cascade.sources)


@pytest.mark.parametrize("name", RELEASED)
def test_the_stated_unets_are_the_published_ones(name):
    """Names, shapes and counts by the digest of the published list, independent of what is stated here."""
    *_, parameters, tensors, digest = RELEASED[name]
    (network,) = (n for n in PUBLISHED[f"DeepFloyd/{name}-v1.0"].networks if n.subfolder == "unet")
    with torch.device("meta"):
        state = UNet(network.config).state_dict()
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest
    assert len(state) == tensors
    assert network.parameters == parameters
    assert (network.tensor_bytes(None), network.tensor_bytes("fp16")) == (4 * parameters, 2 * parameters)
    assert UNetConfig.from_dict(network.config.to_dict()) == network.config


def test_the_stated_text_encoder():
    with torch.device("meta"):
        encoder = T5Encoder(T5_XXL.config)
    assert sum(p.numel() for p in encoder.parameters()) == T5_XXL.parameters == 4_762_310_656
    single = sum(p.numel() for name, p in encoder.named_parameters() if "DenseReluDense.wo" in name)
    assert T5_XXL.half_bytes == 2 * (T5_XXL.parameters - single) + 4 * single
    assert round(T5_XXL.half_bytes / 1e9, 2) == round(9.96 + 1.58, 2)  # the shards' published sizes
    assert round(T5_XXL.tensor_bytes(None) / 1e9, 2) == round(9.99 + 9.06, 2)
    assert T5_XXL.names("fp16") == [
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
    ]
    assert T5_XXL.names(None)[1] == "text_encoder/model-00001-of-00002.safetensors"


def test_published_layouts_hold_what_a_cascade_loads():
    for repo_id, layout in PUBLISHED.items():
        if repo_id == X4_UPSCALER:
            continue
        expected = LAYOUTS["stage_2" if "IF-II" in repo_id else "stage_1"]
        assert [(n.subfolder, n.base) for n in layout.networks] == [
            (n.subfolder, n.base) for n in expected.networks
        ]
        assert (layout.required, layout.optional) == (expected.required, expected.optional)


def test_an_unknown_name_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="'IF-S' is no folder.*known by name: IF-M, IF-L, IF-XL"):
        make("IF-S")
    with pytest.raises(SourceError, match="did you mean IF-XL?"):
        make("if-xl")


def test_a_folder_goes_before_the_release_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_cascade(tmp_path / "IF-M", stage_2=False)
    cascade = make("IF-M")
    assert (cascade.name, cascade.has_stage_2, cascade.variant) == ("tiny", False, None)
    (tmp_path / "IF-L").mkdir()
    with pytest.raises(
        SourceError, match="neither stage_1/ nor unet/.*here the folder goes before the release"
    ):
        make("IF-L")
    (tmp_path / "IF-XL").write_text("a file of that name is not in the way")
    assert make("IF-XL").name == "IF-XL"


def test_mixed_parts(cascade_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = make("IF-M", stage_2="IF-XL", noise_clip=cascade_folder / "noise_clip")
    assert mixed.sources == {
        "stage_1": "DeepFloyd/IF-I-M-v1.0",
        "stage_2": "DeepFloyd/IF-II-L-v1.0",
        "stage_3": X4_UPSCALER,
        "noise_clip": cascade_folder / "noise_clip",
    }
    assert mixed.variants == {"stage_1": "fp16", "stage_2": "fp16", "stage_3": None, "noise_clip": None}
    own = make(cascade_folder, stage_2="IF-L")
    assert (own.sources["stage_2"], own.variants["stage_2"]) == ("DeepFloyd/IF-II-L-v1.0", "fp16")
    assert (own.sources["stage_1"], own.variants["stage_1"]) == (cascade_folder / "stage_1", None)
    assert own.name == "tiny"
    by_id = make("DeepFloyd/IF-I-L-v1.0", stage_2="IF-L")
    assert by_id.variants == {"stage_1": None, "stage_2": "fp16", "stage_3": None, "noise_clip": None}
    assert make("DeepFloyd/IF-I-L-v1.0", stage_3="IF-L").sources["stage_3"] == X4_UPSCALER
    assert make("IF-M", stage_2=cascade_folder / "stage_2").variants["stage_2"] is None


def test_parts_can_be_left_out(cascade_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("IF-M", cascade_folder):
        bare = make(source, stage_2="none", noise_clip="none")
        assert (bare.has_stage_2, bare.has_stage_3, bare.has_noise_clip) == (False, False, False)
        with pytest.raises(InputError, match="has no stage_2"):
            _ = bare.unet_2


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_part_that_is_published_in_full_only_has_no_variant(tmp_path, monkeypatch, variant):
    monkeypatch.chdir(tmp_path)
    found = find_parts("IF-M", variant, stage_2=None, stage_3=None)
    assert found.sources["stage_3"] == X4_UPSCALER
    assert found.variants == {"stage_1": "fp16", "stage_2": "fp16", "stage_3": None}


def test_variants_in_cascade_json(tmp_path):
    folder = tiny.write_cascade(tmp_path / "own")
    (folder / "cascade.json").write_text('{"name": "own", "variants": {"stage_1": "fp16", "stage_2": null}}')
    expected = {"stage_1": "fp16", "stage_2": None, "stage_3": None, "noise_clip": None}
    assert make(folder).variants == expected
    assert make(folder, variant="fp32").variants["stage_1"] is None
    (folder / "cascade.json").write_text('{"name": "own", "variants": {"stage_1": 16}}')
    with pytest.raises(ConfigError, match="variants=.*by part"):
        make(folder)


def test_a_named_release_touches_no_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MTL_ANAGRAM_CACHE", str(tmp_path / "ours"))
    plan = make("IF-M").plan()
    assert [(n.name, n.parameters) for n in plan.networks] == [
        ("text_encoder", 4_762_310_656),
        ("unet_1", 371_605_830),
        ("unet_2", 461_064_198),
        ("text_encoder_3", 340_387_840),
        ("unet_3", 473_398_020),
        ("autoencoder_3", 55_325_927),
        ("noise_clip", 158_123_264),
    ]
    assert not any(file.present for network in plan.networks for file in network.files)
    assert [stage.name for stage in plan.stages] == [
        "text",
        "stage I",
        "stage II",
        "text III",
        "stage III",
    ]
    assert all(stage.activations > 0 for stage in plan.stages)
    assert list(tmp_path.iterdir()) == []


def test_the_pages_commands_are_understood():
    page = (Path(__file__).resolve().parents[2] / "docs" / "releases.md").read_text(encoding="utf-8")
    commands = re.findall(r"^mtl-anagram (.*)$", page, re.M) + re.findall(
        r"`mtl-anagram (\w+ --model .*?)`", page
    )
    assert len(commands) >= 4
    for command in commands:
        assert cli._parser().parse_args(shlex.split(command)).model
    for link in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (Path(__file__).resolve().parents[2] / "docs" / link).exists(), link
