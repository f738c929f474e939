"""generate_anagram on a tiny cascade: files, sameness, switches."""

import pytest
import torch

from mtl_anagram import InputError, Recipe, generate_anagram, get_views
from mtl_anagram.files.images import encode_png, views_strip
from mtl_anagram.models.prompts import concept_span
from mtl_anagram.sampling import sample_stage1, sample_stage2
from tests.unit.tiny_requests import PICTURES, files, metadata, never, on_cpu, pictures, sample


def by_hand(cascade, prompts, concepts, views, seed, recipe, sizes, noise_level=50):
    """Both stages without generate_anagram: the last x of each, (3, H, W)."""
    text, null = cascade.encode(prompts)
    spans = [concept_span(cascade.tokenizer, *pair) for pair in zip(prompts, concepts, strict=True)]
    shared = {"score": cascade.noise_clip.scorer(prompts), "recipe": recipe}
    shared["generators"] = [torch.Generator().manual_seed(seed)]
    *_, first = sample_stage1(cascade.unet_1, text, null, views, spans=spans, size=sizes[0], **shared)
    second = {"size": sizes[1], "noise_level": noise_level, **shared}
    *_, last = sample_stage2(cascade.unet_2, first.x, text, null, views, **second)
    return first.x[0], last.x[0]


# What is written


def test_the_released_call_writes_what_its_parts_make(cascade, tmp_path):
    prompts, names = ["a duck", "a rabbit"], ["identity", "jigsaw"]
    (made,) = generate_anagram(
        "a sketch of", prompts, names, tmp_path, "cpu", 9, num_inference_steps=1, model=cascade
    )
    labels = [f"sample_{side}{kind}.png" for side in (64, 256) for kind in ("", ".views")]
    assert set(files(tmp_path)) == {f"0009/{name}" for name in (*labels, "metadata.json")}
    assert (made.seed, made.folder, made.skipped) == (9, tmp_path / "0009", False)
    assert made.pictures == {side: made.folder / f"sample_{side}.png" for side in (64, 256)}
    views, recipe = get_views(names), Recipe.released(num_inference_steps=1)
    full = [f"a sketch of {prompt}" for prompt in prompts]
    hand = by_hand(cascade, full, ["duck", "rabbit"], views, 9, recipe, (64, 256))
    for side, x in zip((64, 256), hand, strict=True):
        assert (made.folder / f"sample_{side}.png").read_bytes() == encode_png(x)
        strip = (made.folder / f"sample_{side}.views.png").read_bytes()
        assert strip == encode_png(views_strip(x, views))
    assert list(metadata(made)) == ["format", "seed", "sizes", "request", "pictures", "weights", "made_with"]


def test_the_call_is_its_parts_with_everything_changed(make, cascade):
    recipe = Recipe.corrected(guidance_scale=4.0, num_inference_steps=3, guidance_rate=9.0)
    prompts, names = ["the big cat", "an house", "a sea turtle"], ["flip", "skew", "rotate_180+negate"]
    request = {"prompts": prompts, "concepts": ["big", None, "sea turtle"], "views": names, "seed": 12345}
    (made,) = make(style="", recipe=recipe, num_inference_steps=None, noise_level=200, **request)
    found, concepts = pictures(made), ["big", "house", "sea turtle"]
    assert made.folder.name == "12345"
    hand = by_hand(cascade, prompts, concepts, get_views(names), 12345, recipe, (8, 32), noise_level=200)
    assert [found["sample_8.png"], found["sample_32.png"]] == [encode_png(x) for x in hand]


# The same again


def test_the_same_seed_gives_the_same_bytes(make, cascade_folder):
    first = files(make("a")[0].folder)
    assert files(make("b")[0].folder) == first
    assert files(make("loaded anew", model=str(cascade_folder), device="cpu")[0].folder) == first
    others = pictures(make("c", seed=10))
    assert all(others[name] != first[name] for name in others)


def test_the_number_of_threads_changes_next_to_nothing(cascade):
    """Sums are in another order with two threads, and 10-fold guidance makes more of it: 3 is used here."""
    made, recipe = [], Recipe.released(num_inference_steps=2, guidance_scale=3.0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(sample(cascade, recipe=recipe, size=32).pictures)
    for size, one in made[0].items():
        assert (one - made[1][size]).abs().max() < 1e-4
        assert one.std() > 0.1


def test_nothing_global_changes(make, capsys):
    torch.manual_seed(123), torch.set_num_threads(2)

    def state():
        flags = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
        return *flags, torch.get_rng_state().tolist()

    before = state()
    make(views=["identity", "patch_permute"])
    assert state() == before
    assert capsys.readouterr() == ("", "")


# What is asked for


def test_concepts(make):
    shared = {"num_inference_steps": 3, "stop_after": 8, "style": ""}
    default = pictures(make("a", prompts=["a big duck", "a sea turtle"], **shared))
    assert pictures(make("b", prompts=["a big [duck]", "a sea [turtle]"], **shared)) == default
    bracketed = pictures(make("c", prompts=["a [big] duck", "a [sea turtle]"], **shared))
    assert bracketed["sample_8.png"] != default["sample_8.png"]
    named = make("d", prompts=["a big duck", "a sea turtle"], concepts=["big", "sea turtle"], **shared)
    assert pictures(named) == bracketed


def test_a_cascades_own_device_must_be_the_one_that_is_named(make, monkeypatch):
    make(device=torch.device("cpu:0"), stop_after=8, num_inference_steps=1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(InputError, match="device='mps', but the cascade is on 'cpu'"):
        make(device="mps", on_step=never)


def test_without_a_stage_2_or_a_noise_aware_clip(make, cascade_folder):
    usual = pictures(make("usual"))
    alone, unscored = on_cpu(cascade_folder, stage_2="none"), on_cpu(cascade_folder, noise_clip="none")
    assert pictures(make("a", model=alone)) == {name: usual[name] for name in PICTURES[:2]}
    with pytest.raises(InputError, match="stop_after=32: the cascade tiny has no stage II.*stage_2="):
        make(model=alone, stop_after=32, on_step=never)
    with pytest.raises(InputError, match="noise-aware CLIP.*noise_clip=.*balancing off"):
        make(model=unscored, on_step=never)
    unbalanced = Recipe.released(balancing=False)
    assert pictures(make(model=unscored, recipe=unbalanced)) == pictures(make("b", recipe=unbalanced))
    make("c", model=unscored, prompts=["a duck"], views=["identity"])  # one view has nothing to balance
