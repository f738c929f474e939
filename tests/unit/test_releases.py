"""Releases by name: what each is made of, whose facts they state, how names, folders and mixed parts resolve."""

import json

import pytest

from mtl_anagram import Cascade, ConfigError, SourceError
from mtl_anagram.models.releases import PUBLISHED, RELEASES, find_parts
from tests.unit import tiny
from tests.unit.test_unet_config import RELEASED

X4_UPSCALER = "stabilityai/stable-diffusion-x4-upscaler"


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
    stages = {"stage_1": f"DeepFloyd/{first}-v1.0", "stage_2": f"DeepFloyd/{second}-v1.0"}
    assert cascade.sources == {**stages, "stage_3": X4_UPSCALER, "noise_clip": "glide"}
    assert cascade.variants == {**dict.fromkeys(cascade.sources, "fp16"), "stage_3": None}
    assert RELEASES[name] == cascade.sources
    assert make(name, variant="fp32").variants == dict.fromkeys(cascade.sources)


@pytest.mark.parametrize("name", RELEASED)
def test_the_stated_unets_are_the_published_ones(name):
    parameters, first = PUBLISHED[f"DeepFloyd/{name}-v1.0"]["unet"]
    assert parameters == RELEASED[name][-2]  # counted from the config in test_unet_config
    assert first == RELEASED[name][0][0]


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
    assert (cascade.name, cascade.sources["stage_2"]) == ("tiny", None)
    (tmp_path / "IF-L").mkdir()
    with pytest.raises(SourceError, match="IF-L is no cascade.*neither stage_1/ nor unet/"):
        make("IF-L")
    (tmp_path / "IF-XL").write_text("a file of that name is not in the way")
    assert make("IF-XL").name == "IF-XL"


def test_mixed_parts(cascade_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = make("IF-M", stage_2="IF-XL", noise_clip=cascade_folder / "noise_clip")
    named = {"stage_2": "DeepFloyd/IF-II-L-v1.0", "noise_clip": cascade_folder / "noise_clip"}
    assert mixed.sources == RELEASES["IF-M"] | named
    assert mixed.variants == {"stage_1": "fp16", "stage_2": "fp16", "stage_3": None, "noise_clip": None}
    own = make(cascade_folder, stage_2="IF-L")
    assert (own.sources["stage_2"], own.variants["stage_2"]) == ("DeepFloyd/IF-II-L-v1.0", "fp16")
    assert (own.sources["stage_1"], own.variants["stage_1"]) == (cascade_folder / "stage_1", None)
    assert own.name == "tiny"
    by_id = make("DeepFloyd/IF-I-L-v1.0", stage_2="IF-L")
    assert by_id.variants == {"stage_1": None, "stage_2": "fp16", "stage_3": None, "noise_clip": None}
    assert make("DeepFloyd/IF-I-L-v1.0", stage_3="IF-L").sources["stage_3"] == X4_UPSCALER
    assert make("IF-M", stage_2=cascade_folder / "stage_2").variants["stage_2"] is None


def test_what_a_folder_says_of_itself(tmp_path):
    folder = tiny.write_cascade(tmp_path / "own")
    about = {"name": "own", "recipe": {"horizon": 7}, "concepts": ["duck"], "styles": ["a sketch of"]}
    about["variants"] = {"stage_1": "fp16", "stage_2": None}
    (folder / "cascade.json").write_text(json.dumps(about))
    expected = {"stage_1": "fp16", "stage_2": None, "stage_3": None, "noise_clip": None}
    assert make(folder).variants == expected
    assert make(folder, variant="fp32").variants["stage_1"] is None
    found = find_parts(folder)
    assert (found.name, found.recipe) == ("own", {"horizon": 7})
    assert (found.concepts, found.clip_concepts, found.styles) == (("duck",), (), ("a sketch of",))
    wrong = {"name": 3, "recipe": [], "concepts": "duck", "styles": [1], "variants": {"stage_1": 16}}
    for field, value in wrong.items():
        (folder / "cascade.json").write_text(json.dumps({**about, field: value}))
        said = "variants.stage_1=16" if field == "variants" else field
        with pytest.raises(ConfigError, match=f"cascade.json: {said}"):
            find_parts(folder)
    (folder / "cascade.json").unlink()
    assert find_parts(folder).name == "own"
