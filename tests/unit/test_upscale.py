"""Stage III of a request: files, metadata, repetition, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_anagram import InputError, Recipe, SourceError, UpscaleRecipe, WeightsError, repeat_anagram
from mtl_anagram.evaluation.best_of import best_of
from mtl_anagram.sampling import sample_stage3
from tests.unit.tiny_requests import REQUEST, files, maker, metadata, never, on_cpu, pictures, sample
from tests.unit.tiny_upscaler import write_upscaler

FAST = UpscaleRecipe(num_inference_steps=2)
PLAIN = {"recipe": Recipe.plain()}


@pytest.fixture(scope="module")
def upscaler_folder(tmp_path_factory):
    return write_upscaler(tmp_path_factory.mktemp("upscaler"))


@pytest.fixture
def own_folder(upscaler_folder, tmp_path):
    """A copy whose files a test may change."""
    return shutil.copytree(upscaler_folder, tmp_path / "upscaler")


@pytest.fixture(scope="module")
def with_stage_3(cascade_folder):
    """with_stage_3(source) is the tiny cascade with this stage III."""
    return lambda source: on_cpu(cascade_folder, stage_3=source)


@pytest.fixture(scope="module")
def whole(with_stage_3, upscaler_folder):
    return with_stage_3(upscaler_folder)


@pytest.fixture
def make(whole, tmp_path):
    return maker(tmp_path, whole, **PLAIN)


def test_three_sizes_are_written_and_stages_one_and_two_are_what_they_were(make, cascade):
    steps = []
    made = make(upscale=FAST, on_step=lambda seeds, stage, state: steps.append((stage, state.index)))[0]
    assert list(made.pictures) == metadata(made)["sizes"] == [8, 32, 128]
    assert steps == [(stage, index) for stage in (1, 2, 3) for index in (0, 1)]
    found = pictures(made)
    assert pictures(make("without", model=cascade)) == {n: found[n] for n in found if "128" not in n}


@pytest.mark.parametrize("views", ["first", "all", "all_latents"])
def test_the_picture_is_the_loops_own(whole, views):
    upscale = UpscaleRecipe(num_inference_steps=2, views=views, noise_level=20)
    prompts, recipe = ["a duck", "a cat!"], Recipe.released(num_inference_steps=2)
    run = sample(whole, prompts=["a duck", "a [cat]!"], views=["identity", "rotate_cw"], upscale=upscale)
    generator = torch.Generator().manual_seed(0)
    for size in (8, 8, 32, 32, 32):  # at the start and between two steps; in stage II also on its input
        torch.randn((3, size, size), generator=generator)
    upscaler, (text, null) = whole.upscaler, whole.upscaler.encode(prompts)
    parts = {"decode": upscaler.decoder.picture, "encode": upscaler.encoder.latents}
    parts |= {"score": whole.noise_clip.scorer(prompts), "generators": [generator], "recipe": recipe}
    parts["upscale"] = upscale
    *_, state = sample_stage3(upscaler.unet, run.pictures[32], text, null, run.views, **parts)
    assert torch.equal(state.picture, run.pictures[128])
    assert state.picture.std() > 0.01


def test_several_seeds_and_the_best_of_them_are_what_they_are_alone(make, whole, tmp_path):
    both = make("both", seed=[3, 4], upscale=FAST)
    alone = make("alone", seed=4, upscale=FAST)[0]
    assert pictures(both[1])["sample_128.png"] == pictures(alone)["sample_128.png"]
    arguments = {**REQUEST, **PLAIN, "model": whole, "upscale": FAST, "seed": 3}
    arguments["recipe"] = Recipe.plain(num_inference_steps=arguments.pop("num_inference_steps"))
    best, candidates = best_of(2, save_dir=tmp_path / "best", **arguments)
    assert [list(c.anagram.pictures) for c in candidates] == [[8], [8]]
    assert best.pictures[128].read_bytes() == both[best.seed - 3].pictures[128].read_bytes()


def test_stop_after_stage_two_needs_nothing_of_stage_three(make, whole, with_stage_3):
    made = make(model=with_stage_3("nobody/nothing"), stop_after=32)[0]
    assert list(made.pictures) == [8, 32]
    assert "stage_3" not in metadata(made)["request"]
    assert make(model=whole, stop_after=32)[0].skipped


def test_metadata_holds_stage_three_by_itself_and_repeats_it(make, whole, cascade, with_stage_3, tmp_path):
    made = make(upscale=UpscaleRecipe(3, 4, 7, "all", 2))[0]
    weights = metadata(made)["request"]["stage_3"].pop("weights_sha256")
    names = {"unet/config.json", "tokenizer/merges.txt", "low_res_scheduler/scheduler_config.json"}
    assert {f"stage_3/{name}" for name in names} < set(metadata(made)["weights"]["files"])
    path = made.folder / "metadata.json"
    again = repeat_anagram(path, tmp_path / "again", model=whole)
    assert files(again.folder) == files(made.folder)
    with pytest.raises(InputError, match="no stage III.*stage_3=|weights of sha256"):
        repeat_anagram(path, tmp_path / "none", model=cascade)
    other = with_stage_3(write_upscaler(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match=f"sha256 {weights}"):
        repeat_anagram(path, tmp_path / "none", model=other)
    damaged = metadata(made)
    for change in ([1], None, {**damaged["request"]["stage_3"], "views": "both"}, {"num_inference_steps": 3}):
        damaged["request"]["stage_3"] = change
        (tmp_path / "metadata.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError):
            repeat_anagram(tmp_path / "metadata.json", tmp_path / "none", model=whole)
    assert not (tmp_path / "none").exists()


def test_a_finished_request_is_skipped_and_one_that_ended_earlier_goes_on(make, cascade):
    before = pictures(make(model=cascade))
    made = make(upscale=FAST)[0]  # the same request, with a stage III now
    assert not made.skipped
    assert {name: data for name, data in pictures(made).items() if name in before} == before
    assert make(upscale=FAST)[0].skipped
    assert make(model=cascade)[0].skipped
    with pytest.raises(InputError, match="different: stage_3"):
        make(upscale=UpscaleRecipe(num_inference_steps=1))
    assert not make(upscale=UpscaleRecipe(num_inference_steps=1), overwrite=True)[0].skipped


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"upscale": FAST, "stop_after": 32}, r"no stage III.*\[8, 32\]"),
        ({"upscale": UpscaleRecipe(noise_level=351)}, "noise_level of stage III=351.*350"),
        ({"views": ["identity", "negate"], "upscale": UpscaleRecipe(views="all_latents")}, "changes values"),
    ],
)
def test_requests_that_are_refused_before_any_sampling(make, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        make(on_step=never, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("unet/config.json", {"in_channels": 8}, "stage III has in_channels=8, but 7"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type"),
    ],
)
def test_parts_that_do_not_fit(own_folder, with_stage_3, make, file, changes, message):
    path = own_folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=message):
        make(model=with_stage_3(own_folder), on_step=never)


def test_weights_that_would_not_load_are_found_in_their_headers(own_folder, with_stage_3, make):
    path, lacking = own_folder / "vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"
    request = {"model": with_stage_3(own_folder), "upscale": UpscaleRecipe(views="all"), "on_step": never}
    state = load_file(path)
    del state[lacking]
    save_file(state, path)
    with pytest.raises(WeightsError, match=f"missing: {lacking}"):
        make(**request)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        make(**request)


def test_a_release_without_its_small_files_uses_the_published_numbers(make, own_folder, with_stage_3):
    for name in ("scheduler", "low_res_scheduler"):
        shutil.rmtree(own_folder / name)
    (own_folder / "model_index.json").unlink()
    made, other = make("bare", model=with_stage_3(own_folder), upscale=FAST), make("whole", upscale=FAST)
    assert pictures(made) == pictures(other)
    (own_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SourceError, match="has no diffusion_pytorch_model"):
        make("gone", model=with_stage_3(own_folder))
