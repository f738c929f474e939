"""Stage III of a request: files, options, metadata, repetition, and what is refused."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mtl_anagram import (
    Cascade,
    InputError,
    Recipe,
    SourceError,
    UpscaleRecipe,
    WeightsError,
    cli,
    generate_anagram,
    repeat_anagram,
)
from mtl_anagram.best_of import best_of
from mtl_anagram.cli import main
from mtl_anagram.errors import ConfigError
from mtl_anagram.media import encode_png
from mtl_anagram.sampling import sample_stage3
from mtl_anagram.views import get_views
from tests.unit.tiny import write_cascade
from tests.unit.tiny_upscaler import write_upscaler

pytestmark = pytest.mark.usefixtures("one_thread")
REQUEST = {
    "style": "a photo of",
    "prompts": ["a duck", "a [cat]!"],
    "views": ["identity", "rotate_cw"],
    "size": 8,
    "num_inference_steps": 2,
    "recipe": Recipe.plain(),
}
FAST = UpscaleRecipe(num_inference_steps=2)


@pytest.fixture(scope="module")
def upscaler_folder(tmp_path_factory):
    return write_upscaler(tmp_path_factory.mktemp("upscaler"))


@pytest.fixture(scope="module")
def whole(cascade_folder, upscaler_folder):
    """The tiny cascade with a stage III."""
    return Cascade.from_pretrained(cascade_folder, stage_3=upscaler_folder, device="cpu")


@pytest.fixture
def make(whole, tmp_path):
    def run(folder="out", **changes):
        return generate_anagram(save_dir=tmp_path / folder, **{**REQUEST, "model": whole, **changes})

    return run


def content(anagram):
    return json.loads((anagram.folder / "metadata.json").read_text())


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_best_of_several_goes_through_stage_3_too(whole, tmp_path):
    arguments = {**REQUEST, "model": whole}
    best, candidates = best_of(2, save_dir=tmp_path / "best", upscale=FAST, **arguments)
    assert list(best.pictures) == [8, 32, 128]
    assert [list(c.anagram.pictures) for c in candidates] == [[8], [8]]
    alone = generate_anagram(save_dir=tmp_path / "alone", seed=best.seed, upscale=FAST, **arguments)[0]
    assert best.pictures[128].read_bytes() == alone.pictures[128].read_bytes()


def test_three_sizes_are_written_and_stages_one_and_two_are_what_they_were(make, cascade):
    steps = []
    made = make(upscale=FAST, on_step=lambda seeds, stage, state: steps.append((stage, state.index)))[0]
    assert list(made.pictures) == [8, 32, 128]
    assert steps == [(stage, index) for stage in (1, 2, 3) for index in (0, 1)]
    with Image.open(made.folder / "sample_128.png") as picture:
        assert picture.size == (128, 128)
    with Image.open(made.folder / "sample_128.views.png") as picture:
        assert picture.size == (256, 128)
    assert content(made)["sizes"] == [8, 32, 128]
    without = make("without", model=cascade)[0]
    for name, data in files(without.folder).items():
        if name.endswith(".png"):
            assert data == (made.folder / name).read_bytes()


@pytest.mark.parametrize("views", ["first", "all", "all_latents"])
def test_the_picture_is_the_loops_own(make, whole, views):
    """The generator of stages I and II goes on in stage III, as in the released code."""
    upscale = UpscaleRecipe(num_inference_steps=2, views=views, noise_level=20)
    last = {}
    recipe = Recipe.released()
    record = lambda _, stage, state: last.update({stage: state})  # noqa: E731
    made = make(upscale=upscale, recipe=recipe, on_step=record)[0]
    generator = torch.Generator().manual_seed(0)
    for size in (8, 8, 32, 32, 32):  # at the start and between two steps; in stage II also on its input
        torch.randn((3, size, size), generator=generator)
    prompts = ["a photo of a duck", "a photo of a cat!"]
    text, null = whole.upscaler.encode(prompts)
    *_, state = sample_stage3(
        whole.upscaler.unet,
        last[2].x,
        text,
        null,
        get_views(["identity", "rotate_cw"]),
        decode=whole.upscaler.decoder.picture,
        encode=whole.upscaler.encoder.latents,
        score=whole.noise_clip.scorer(prompts),
        generators=[generator],
        upscale=upscale,
        recipe=recipe,
    )
    assert torch.equal(state.picture, last[3].picture)
    assert (made.folder / "sample_128.png").read_bytes() == encode_png(state.picture[0])
    assert state.picture.std() > 0.01


def test_several_seeds_are_what_they_are_alone(make):
    both = make("both", seed=[3, 4], upscale=FAST)
    alone = make("alone", seed=4, upscale=FAST)
    assert files(both[1].folder)["sample_128.png"] == files(alone[0].folder)["sample_128.png"]


def test_stop_after_stage_two_needs_nothing_of_stage_three(make, whole, cascade_folder, tmp_path):
    never_there = Cascade.from_pretrained(cascade_folder, stage_3="nobody/nothing", device="cpu")
    made = make(model=never_there, stop_after=32)[0]
    assert list(made.pictures) == [8, 32]
    assert "stage_3" not in content(made)["request"]
    assert make(model=whole, stop_after=32)[0].skipped


def test_metadata_holds_stage_three_by_itself_and_repeats_it(make, whole, upscaler_folder, tmp_path):
    upscale = UpscaleRecipe(
        num_inference_steps=3, guidance_scale=4, noise_level=7, views="all", exchange_every=2
    )
    made = make(upscale=upscale)[0]
    request = content(made)["request"]
    weights = request["stage_3"].pop("weights_sha256")
    assert UpscaleRecipe.from_dict(request["stage_3"]) == upscale
    assert len(weights) == 64
    names = set(content(made)["weights"]["files"])
    assert {"stage_1/unet/config.json", "stage_3/unet/config.json", "stage_3/tokenizer/merges.txt"} <= names
    assert "stage_3/low_res_scheduler/scheduler_config.json" in names
    again = repeat_anagram(made.folder / "metadata.json", tmp_path / "again", model=whole)
    assert files(again.folder) == files(made.folder)


def test_repeating_needs_the_same_stage_three(make, cascade, cascade_folder, tmp_path):
    made = make(upscale=FAST)[0]
    metadata = made.folder / "metadata.json"
    with pytest.raises(InputError, match="no stage III.*stage_3="):
        repeat_anagram(metadata, tmp_path / "again", model=cascade)
    other = Cascade.from_pretrained(
        cascade_folder, stage_3=write_upscaler(tmp_path / "other", seed=1), device="cpu"
    )
    with pytest.raises(InputError, match="stage III of sha256"):
        repeat_anagram(metadata, tmp_path / "again", model=other)


@pytest.mark.parametrize(
    "change",
    [
        lambda request: request.pop("stage_3"),
        lambda request: request["stage_3"].pop("weights_sha256"),
        lambda request: request.update(stage_3=[1]),
        lambda request: request.update(stage_3=None),
        lambda request: request["stage_3"].update(views="both"),
        lambda request: request["stage_3"].update(steps=3),
    ],
)
def test_damaged_metadata_is_refused(make, whole, tmp_path, change):
    made = make(upscale=FAST)[0]
    damaged = content(made)
    change(damaged["request"])
    (tmp_path / "metadata.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError):
        repeat_anagram(tmp_path / "metadata.json", tmp_path / "again", model=whole)
    assert not (tmp_path / "again").exists()


def test_a_finished_request_is_skipped_and_one_that_ended_earlier_goes_on(make, cascade):
    earlier = make(model=cascade)[0]
    before = files(earlier.folder)
    made = make(upscale=FAST)[0]  # the same request, with a stage III now
    assert not made.skipped
    assert {name: data for name, data in files(made.folder).items() if name in before and "png" in name} == {
        name: data for name, data in before.items() if "png" in name
    }
    assert make(upscale=FAST)[0].skipped
    assert make(model=cascade)[0].skipped
    with pytest.raises(InputError, match="different: stage_3"):
        make(upscale=UpscaleRecipe(num_inference_steps=1))
    assert not make(upscale=UpscaleRecipe(num_inference_steps=1), overwrite=True)[0].skipped


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"upscale": 75}, "must be an UpscaleRecipe"),
        ({"upscale": FAST, "stop_after": 32}, r"no stage III is to run: the sizes are \[8, 32\]"),
        ({"upscale": UpscaleRecipe(noise_level=351)}, "above 350"),
        ({"stop_after": 1024}, r"must be 8 .* or 32 .* or 128 \(stage III\)"),
    ],
)
def test_requests_that_are_refused_before_any_sampling(make, changes, message, tmp_path):
    def never(*_):
        raise AssertionError("sampling has begun")

    with pytest.raises(InputError, match=message):
        make(on_step=never, **changes)
    assert not (tmp_path / "out").exists()


def test_negation_is_refused_on_latents_before_any_sampling(make):
    with pytest.raises(InputError, match="changes values"):
        make(
            views=["identity", "negate"],
            upscale=UpscaleRecipe(views="all_latents"),
            on_step=lambda *_: pytest.fail("sampling has begun"),
        )


def test_stage_three_without_stage_two(cascade_folder, upscaler_folder, make, tmp_path):
    folder = write_cascade(tmp_path / "cascade", stage_2=False)
    alone = Cascade.from_pretrained(folder, stage_3=upscaler_folder, device="cpu")
    assert alone.has_stage_3
    with pytest.raises(InputError, match="stage III and no stage II"):
        make(model=alone)
    with pytest.raises(InputError, match="no stage II; name one with stage_2="):
        make(model=alone, stop_after=128)
    assert list(make(model=alone, stop_after=8)[0].pictures) == [8]


@pytest.mark.parametrize(
    "file, changes, error, message",
    [
        ("unet/config.json", {"in_channels": 8}, InputError, "UNet's in_channels is 8, but 7"),
        ("text_encoder/config.json", {"hidden_size": 16}, InputError, "cross_attention_dim is 8, but 16"),
        ("vae/config.json", {"block_out_channels": [4, 8]}, InputError, "px per latent is 2, but 4"),
        ("vae/config.json", {"act_fn": "gelu"}, ConfigError, "vae/config.json.*act_fn"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, ConfigError, "scheduler_config"),
        ("low_res_scheduler/scheduler_config.json", {"beta_end": 3}, ConfigError, "low_res_scheduler"),
        ("model_index.json", {"max_noise_level": "high"}, ConfigError, "max_noise_level"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_sampling(
    cascade_folder, upscaler_folder, make, tmp_path, file, changes, error, message
):
    folder = tmp_path / "upscaler"
    shutil.copytree(upscaler_folder, folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if "block_out_channels" in changes:
        config = json.loads(path.read_text())
        del config["down_block_types"], config["up_block_types"]
        path.write_text(json.dumps(config))
    damaged = Cascade.from_pretrained(cascade_folder, stage_3=folder, device="cpu")
    with pytest.raises(error, match=message):
        make(model=damaged, on_step=lambda *_: pytest.fail("sampling has begun"))


@pytest.mark.parametrize(
    "file, views, message",
    [
        ("unet/diffusion_pytorch_model.safetensors", "first", "missing: conv_out.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "first", "missing: post_quant_conv.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "all", "missing: encoder.conv_in.bias"),
        ("text_encoder/model.safetensors", "first", "missing: text_model.final_layer_norm.bias"),
    ],
)
def test_weights_that_would_not_load_are_found_in_their_headers_before_any_sampling(
    cascade_folder, upscaler_folder, make, tmp_path, file, views, message
):
    folder = tmp_path / "upscaler"
    shutil.copytree(upscaler_folder, folder)
    state = load_file(folder / file)
    del state[message.removeprefix("missing: ")]
    save_file(state, folder / file)
    damaged = Cascade.from_pretrained(cascade_folder, stage_3=folder, device="cpu")
    upscale = UpscaleRecipe(num_inference_steps=2, views=views)
    with pytest.raises(WeightsError, match=message):
        make(model=damaged, upscale=upscale, on_step=lambda *_: pytest.fail("sampling has begun"))
    (folder / file).write_bytes((folder / file).read_bytes()[:-200])
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        damaged.upscaler.check_weights(encoder=True)


def test_the_page_says_what_the_command_understands():
    page = (Path(__file__).resolve().parents[2] / "docs" / "stage-3.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (mtl-anagram .*)$", page.replace("\\\n", " "), re.M)
    arguments = cli._parser().parse_args(shlex.split(command)[1:])
    assert arguments.stage_3 == "stabilityai/stable-diffusion-x4-upscaler"
    options = re.findall(r"^\| `(--stage-3-[a-z-]+)` \| `(\w+)` \| `?(\w+)`? \|", page, re.M)
    assert {name: getattr(UpscaleRecipe(), name) for _, name, _ in options} == UpscaleRecipe().to_dict()
    for option, name, default in options:
        value = {"views": "all"}.get(name, "7")
        changed = cli._upscale(cli._parser().parse_args([*shlex.split(command)[1:], option, value]))
        assert str(getattr(changed, name)).startswith(value)
        assert str(getattr(UpscaleRecipe(), name)).removesuffix(".0") == default


def test_a_release_without_its_small_files_uses_the_published_numbers(
    cascade_folder, upscaler_folder, make, tmp_path
):
    folder = tmp_path / "upscaler"
    shutil.copytree(upscaler_folder, folder)
    shutil.rmtree(folder / "scheduler")
    shutil.rmtree(folder / "low_res_scheduler")
    (folder / "model_index.json").unlink()
    bare = Cascade.from_pretrained(cascade_folder, stage_3=folder, device="cpu")
    made, other = make("bare", model=bare, upscale=FAST)[0], make("whole", upscale=FAST)[0]
    assert files(made.folder)["sample_128.png"] == files(other.folder)["sample_128.png"]
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    gone = Cascade.from_pretrained(cascade_folder, stage_3=folder, device="cpu")
    with pytest.raises(SourceError, match="has no diffusion_pytorch_model"):
        make("gone", model=gone)


def test_a_folder_may_hold_stage_three_itself(cascade_folder, upscaler_folder, tmp_path):
    folder = tmp_path / "cascade"
    shutil.copytree(cascade_folder, folder)
    shutil.copytree(upscaler_folder, folder / "stage_3")
    cascade = Cascade.from_pretrained(folder, device="cpu")
    assert cascade.has_stage_3
    assert cascade.upscaler.decoder.config.factor == 4
    first = cascade.upscaler
    cascade.release("upscaler")
    assert cascade.upscaler is not first
    first.release("decoder")
    assert first.decoder is first.decoder


def test_a_hub_id_is_asked_for_the_published_files_alone(cascade_folder, upscaler_folder, make, monkeypatch):
    asked = set()

    def download(repo_id, name, *, subfolder=None):
        assert repo_id == "stabilityai/stable-diffusion-x4-upscaler"
        path = upscaler_folder / (subfolder or "") / name
        asked.add(str(path.relative_to(upscaler_folder)))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub = Cascade.from_pretrained(
        cascade_folder, stage_3="stabilityai/stable-diffusion-x4-upscaler", device="cpu"
    )
    assert not asked
    made, other = make("hub", model=hub, upscale=FAST)[0], make("folder", upscale=FAST)[0]
    assert files(made.folder) == files(other.folder)
    own = {str(path.relative_to(upscaler_folder)) for path in upscaler_folder.rglob("*") if path.is_file()}
    assert asked == own


def test_the_command(cascade_folder, upscaler_folder, tmp_path, capsys):
    command = [
        *(
            "generate",
            "a duck",
            "a cat",
            "--views",
            "identity",
            "flip",
            "--size",
            "8",
            "--steps",
            "2",
            "--recipe",
            "plain",
        ),
        *("--model", str(cascade_folder), "--device", "cpu", "--quiet"),
    ]
    stage_3 = ["--stage-3", str(upscaler_folder)]
    options = [
        *("--stage-3-steps", "2", "--stage-3-guidance-scale", "5", "--stage-3-noise-level", "3"),
        *("--stage-3-views", "all", "--stage-3-exchange-every", "2"),
    ]
    assert main([*command, *stage_3, *options, "--out", str(tmp_path / "a")]) == 0
    assert "sample_128.png  sample_128.views.png" in capsys.readouterr().out
    path = tmp_path / "a" / "0000" / "metadata.json"
    request = json.loads(path.read_text())["request"]["stage_3"]
    del request["weights_sha256"]
    assert request == UpscaleRecipe(2, 5.0, 3, "all", 2).to_dict()
    repeat = ["repeat", str(path), "--model", str(cascade_folder), "--device", "cpu", "--quiet"]
    assert main([*repeat, *stage_3, "--out", str(tmp_path / "b")]) == 0
    assert files(tmp_path / "a" / "0000") == files(tmp_path / "b" / "0000")
    capsys.readouterr()
    assert main([*command, *options, "--out", str(tmp_path / "c")]) == 2
    assert "no stage III is to run" in capsys.readouterr().err
    assert main([*command, *stage_3, "--stop-after", "32", "--out", str(tmp_path / "d")]) == 0
    assert not (tmp_path / "d" / "0000" / "sample_128.png").exists()
