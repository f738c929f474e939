"""generate_anagram and repeat_anagram on a tiny cascade: files, sameness, restarts, metadata, switches."""

import dataclasses
import hashlib
import io
import json
import os
import platform
import shutil

import pytest
import torch
from PIL import Image

import mtl_anagram
from mtl_anagram import (
    Cascade,
    InputError,
    Recipe,
    SourceError,
    View,
    generate_anagram,
    get_views,
    repeat_anagram,
)
from mtl_anagram.checksums import combined_checksum
from mtl_anagram.media import encode_png, side_by_side
from mtl_anagram.prompts import concept_span
from mtl_anagram.sampling import sample_stage1, sample_stage2

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("sample_16.png", "sample_16.views.png", "sample_64.png", "sample_64.views.png", "metadata.json")
REQUEST = {
    "style": "a sketch of",
    "prompts": ["a duck", "a rabbit"],
    "views": ["identity", "rotate_cw"],
    "seed": 9,
    "num_inference_steps": 2,
    "size": 16,
}


@pytest.fixture
def make(cascade, tmp_path):
    """make(folder="out", **changes) calls generate_anagram with a small request and the tiny cascade."""

    def call(folder="out", **changes):
        return generate_anagram(**{"model": cascade, **REQUEST, **changes}, save_dir=tmp_path / folder)

    return call


def files(folder):
    """Every file below a folder, by relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pictures(made):
    """The PNGs of one seed's folder, by name."""
    (anagram,) = made if isinstance(made, list) else [made]
    return {name: content for name, content in files(anagram.folder).items() if name != "metadata.json"}


def pixels(content):
    """A PNG as (3, H, W) integers."""
    image = Image.open(io.BytesIO(content))
    return torch.tensor(list(image.tobytes())).view(image.height, image.width, 3).permute(2, 0, 1)


def metadata(anagram):
    return json.loads((anagram.folder / "metadata.json").read_text())


def by_hand(cascade, prompts, views, seeds, recipe, *, sizes, noise_level=50, concepts=None):
    """Both stages without generate_anagram: the last x of each, (B, 3, H, W)."""
    text, null = cascade.encode(prompts)
    concepts = concepts or [prompt.split()[-1] for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shared = {
        "score": cascade.noise_clip.scorer(prompts),
        "generators": generators,
        "recipe": recipe,
    }
    spans = [concept_span(cascade.tokenizer, *pair) for pair in zip(prompts, concepts, strict=True)]
    unet_1, unet_2 = cascade.unet_1, cascade.unet_2
    *_, first = sample_stage1(unet_1, text, null, views, spans=spans, size=sizes[0], **shared)
    *_, second = sample_stage2(
        unet_2, first.x, text, null, views, size=sizes[1], noise_level=noise_level, **shared
    )
    return first.x, second.x


# What is written


@pytest.fixture(scope="module")
def full(cascade, tmp_path_factory):
    """One run with the sizes and file names of IF: 64 and 256 px."""
    folder = tmp_path_factory.mktemp("full")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = generate_anagram(
        "a sketch of",
        ["a duck", "a rabbit"],
        ["identity", "jigsaw"],
        folder,
        "cpu",
        9,
        num_inference_steps=2,
        model=cascade,
    )
    torch.set_num_threads(before)
    return folder, made


def test_files_of_a_seed(full):
    folder, made = full
    names = {
        "sample_64.png",
        "sample_64.views.png",
        "sample_256.png",
        "sample_256.views.png",
        "metadata.json",
    }
    assert set(files(folder)) == {f"0009/{name}" for name in names}
    (anagram,) = made
    assert (anagram.seed, anagram.folder, anagram.skipped) == (9, folder / "0009", False)
    assert anagram.pictures == {
        64: folder / "0009" / "sample_64.png",
        256: folder / "0009" / "sample_256.png",
    }


@pytest.mark.parametrize("side", [64, 256])
def test_the_views_picture_is_every_view_of_the_picture(full, side):
    folder, _ = full
    picture = pixels((folder / "0009" / f"sample_{side}.png").read_bytes())
    row = pixels((folder / "0009" / f"sample_{side}.views.png").read_bytes())
    assert picture.shape == (3, side, side)
    assert row.shape == (3, side, 2 * side)
    for i, view in enumerate(get_views(["identity", "jigsaw"])):
        assert torch.equal(row[:, :, i * side : (i + 1) * side], view.view(picture))
    assert len(picture.unique()) > 50  # a picture in which a moved pixel shows
    assert not torch.equal(row[:, :, side:], picture)


def test_negation_in_the_views_picture(make):
    made = make(views=["negate", "rotate_ccw"], stop_after=16)
    picture, row = (pixels(content) for _, content in sorted(pictures(made).items()))
    assert (row[:, :, :16] - (255 - picture)).abs().max() <= 1  # 127.5 rounds up in both
    assert torch.equal(row[:, :, 16:], picture.rot90(1, (1, 2)))


def test_the_call_is_nothing_but_its_parts(full, cascade):
    folder, _ = full
    prompts = ["a sketch of a duck", "a sketch of a rabbit"]
    views = get_views(["identity", "jigsaw"])
    recipe = Recipe.released(num_inference_steps=2)
    for side, x in zip(
        (64, 256), by_hand(cascade, prompts, views, [9], recipe, sizes=(64, 256)), strict=True
    ):
        assert (folder / "0009" / f"sample_{side}.png").read_bytes() == encode_png(x[0])
        expected = encode_png(side_by_side(x[0], views))
        assert (folder / "0009" / f"sample_{side}.views.png").read_bytes() == expected


def test_the_call_is_its_parts_with_everything_changed(make, cascade):
    recipe = Recipe.corrected(guidance_scale=4.0, num_inference_steps=3, guidance_rate=9.0)
    prompts, names = ["the big cat", "an house", "a sea turtle"], ["flip", "skew", "rotate_180+negate"]
    made = make(
        style="",
        prompts=prompts,
        views=names,
        seed=12345,
        num_inference_steps=30,  # the recipe's own number stands
        recipe=recipe,
        noise_level=200,
        concepts=["big", None, "sea turtle"],
    )
    found = pictures(made)
    assert made[0].folder.name == "12345"
    hand = by_hand(
        cascade,
        prompts,
        get_views(names),
        [12345],
        recipe,
        sizes=(16, 64),
        noise_level=200,
        concepts=["big", "house", "sea turtle"],
    )
    assert [found["sample_16.png"], found["sample_64.png"]] == [encode_png(x[0]) for x in hand]


# The same again


def test_the_same_seed_gives_the_same_bytes(make, cascade_folder):
    first = files(make("a")[0].folder)
    assert set(first) == set(NAMES)
    assert files(make("b")[0].folder) == first
    fresh = Cascade.from_pretrained(cascade_folder, device="cpu")
    assert files(make("c", model=fresh)[0].folder) == first
    assert files(make("d", model=str(cascade_folder), device="cpu")[0].folder) == first
    others = pictures(make("e", seed=10))
    assert all(others[name] != first[name] for name in others)


def test_a_batch_is_what_its_seeds_are_alone(make):
    seeds = [3, 2**63 - 1, 0]
    together = make("together", seed=seeds, batch_size=2)
    assert [anagram.seed for anagram in together] == seeds
    for anagram in together:
        alone = pictures(make("alone", seed=anagram.seed))
        assert set(alone) == set(pictures(anagram)) == set(NAMES) - {"metadata.json"}
        for name, content in pictures(anagram).items():
            difference = (pixels(content) - pixels(alone[name])).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 0.01


def test_batches_have_the_size_asked_for(make):
    for size, expected in ((1, [[5], [6], [7]]), (2, [[5, 6], [7]]), (4, [[5, 6, 7]])):
        seen = []
        make(
            f"{size}",
            seed=(5, 6, 7, 5),  # a repeated seed is made once
            batch_size=size,
            num_inference_steps=1,
            stop_after=16,
            on_step=lambda seeds, stage, state, seen=seen: seen.append((list(seeds), len(state.x))),
        )
        assert seen == [(batch, len(batch)) for batch in expected]


@pytest.mark.parametrize("size", [32, 64])
def test_the_number_of_threads_changes_next_to_nothing(make, size):
    """Sums are in another order with two threads, and 10-fold guidance makes more of it: 3 is used here."""
    last = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)

        def keep(seeds, stage, state, threads=threads):
            last[threads, stage] = state.x

        make(
            f"{threads}",
            size=size,
            guidance_scale=3.0,
            on_step=keep,
            stop_after=4 * size if size < 64 else size,
        )
    for stage in (1, 2) if size < 64 else (1,):
        assert (last[1, stage] - last[2, stage]).abs().max() < 1e-4
        assert last[1, stage].std() > 0.1


def test_nothing_global_changes(make, capsys):
    torch.manual_seed(123)
    before = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
    make(views=["identity", "patch_permute"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == before[1:]
    assert capsys.readouterr() == ("", "")


# Starting again, and being interrupted


def test_stage_2_can_be_left_out_and_added(make):
    first = make(stop_after=16)
    assert set(files(first[0].folder)) == {"sample_16.png", "sample_16.views.png", "metadata.json"}
    assert list(first[0].pictures) == [16]
    assert metadata(first[0])["sizes"] == [16]
    assert make(stop_after=16)[0].skipped
    whole = make()[0]
    assert not whole.skipped
    assert pictures(whole) == pictures(make("elsewhere"))
    assert pictures(whole)["sample_16.png"] == files(first[0].folder)["sample_16.png"]
    again = make(stop_after=16)[0]  # is there, with more beside it
    assert again.skipped
    assert list(again.pictures) == [16]


def test_stop_after_64_by_its_own_name(make):
    made = make(size=None, stop_after=64, num_inference_steps=1)
    assert set(files(made[0].folder)) == {"sample_64.png", "sample_64.views.png", "metadata.json"}


def never(*args):
    raise AssertionError("something was sampled")


def test_a_finished_seed_is_skipped(make):
    folder = make()[0].folder
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (again,) = make(on_step=never)
    assert again.skipped
    assert again.pictures == {16: folder / "sample_16.png", 64: folder / "sample_64.png"}
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.parametrize(
    "name, damage",
    [
        ("metadata.json", "missing"),
        *((name, damage) for name in NAMES[:4] for damage in ("missing", "cut", "changed")),
    ],
)
def test_a_damaged_file_is_made_again(make, name, damage):
    folder = make()[0].folder
    before = files(folder)
    if damage == "missing":
        (folder / name).unlink()
    else:
        content = before[name]
        (folder / name).write_bytes(content[:-9] if damage == "cut" else content[:-1] + b"?")
    assert not make()[0].skipped
    assert files(folder) == before


def test_only_the_unfinished_of_several_seeds_are_sampled(make):
    make(seed=5)
    seen = []
    made = make(seed=[4, 5, 6], on_step=lambda seeds, stage, state: seen.append(tuple(seeds)))
    assert [(anagram.seed, anagram.skipped) for anagram in made] == [(4, False), (5, True), (6, False)]
    assert set(seen) == {(4, 6)}
    assert all(set(files(anagram.folder)) == set(NAMES) for anagram in made)


CHANGES = [
    ("style", {"style": ""}),
    ("prompts", {"prompts": ["a duck", "a cat"]}),
    ("views", {"views": ["identity", "rotate_ccw"]}),
    ("views", {"views": ["identity", "patch_permute"]}),
    ("recipe", {"guidance_scale": 9.0}),
    ("recipe", {"recipe": Recipe.plain()}),
    ("recipe", {"num_inference_steps": 1}),
    ("noise_level", {"noise_level": 51}),
    ("size", {"size": 32}),
    ("concepts", {"concepts": ["a", None]}),
]


@pytest.mark.parametrize("field, changes", CHANGES, ids=lambda value: str(value)[:40])
def test_another_request_in_the_same_folder(make, field, changes):
    before = files(make(stop_after=16)[0].folder)
    with pytest.raises(InputError, match=f"different: [a-z_, ]*{field}.*overwrite") as caught:
        make(**changes, seed=[9, 10], on_step=never)
    folder = make(stop_after=16)[0].folder
    assert str(folder) in str(caught.value)
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["0009"]


def test_overwrite_leaves_nothing_of_the_other_request(make):
    make()
    made = make(prompts=["a cat", "a house"], stop_after=16, overwrite=True)[0]
    assert not made.skipped
    assert files(made.folder) == files(make("b", prompts=["a cat", "a house"], stop_after=16)[0].folder)
    assert metadata(made)["request"]["prompts"] == ["a sketch of a cat", "a sketch of a house"]
    assert not make(prompts=["a cat", "a house"], stop_after=16, overwrite=True)[0].skipped


def test_overwrite_keeps_a_users_own_files(make):
    folder = make()[0].folder
    (folder / "sample_16.mine.png").write_bytes(b"mine")
    make(style="", overwrite=True)
    assert (folder / "sample_16.mine.png").read_bytes() == b"mine"


class Stop:
    """An on_step that interrupts the given seeds at one step of one stage."""

    def __init__(self, seed, stage, index):
        self.at = (seed, stage, index)

    def __call__(self, seeds, stage, state):
        if self.at == (seeds[0], stage, state.index):
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage, index", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_an_interrupted_run_goes_on(make, tmp_path, stage, index):
    with pytest.raises(KeyboardInterrupt):
        make(seed=[1, 2, 3], batch_size=1, on_step=Stop(2, stage, index))
    left = files(tmp_path / "out")
    of_two = {"0002/sample_16.png", "0002/sample_16.views.png"} if stage == 2 else set()
    assert set(left) == {f"0001/{name}" for name in NAMES} | of_two
    for name, content in left.items():
        if name.endswith(".png"):
            assert pixels(content).shape[1] in (16, 64)
    made = make(seed=[1, 2, 3], batch_size=1)
    assert [anagram.skipped for anagram in made] == [True, False, False]
    make("undisturbed", seed=[1, 2, 3], batch_size=1)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("stage, old_is_whole", [(1, True), (2, False)])
def test_an_interrupted_overwrite_leaves_no_false_metadata(make, stage, old_is_whole):
    """Until the first new picture is written the old ones stay; then they must not pass for whole."""
    folder = make()[0].folder
    before = files(folder)
    with pytest.raises(KeyboardInterrupt):
        make(style="", overwrite=True, on_step=Stop(9, stage, 1))
    assert (files(folder) == before) == old_is_whole
    assert (folder / "metadata.json").exists() == old_is_whole
    if not old_is_whole:
        assert not make(style="")[0].skipped  # no overwrite needed: there is nothing finished to lose
        assert files(folder) == files(make("b", style="")[0].folder)


def test_leftovers_of_a_killed_process_are_removed(make, tmp_path):
    folder = tmp_path / "out" / "0009"
    folder.mkdir(parents=True)
    (folder / ".sample_16.png.k1ll3d.part").write_bytes(b"half")
    (folder / ".metadata.json.k1ll3d.part").write_bytes(b"{")
    make()
    assert set(files(folder)) == set(NAMES)
    (folder / ".sample_16.png.k1ll3d.part").write_bytes(b"half")  # killed while it made a damaged one again
    assert make()[0].skipped
    assert set(files(folder)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_whole_files(make, tmp_path, monkeypatch, name):
    replace = os.replace

    def full_disk(source, target):
        if os.path.basename(target) == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(SourceError, match=f"{name} cannot be written.*No space left"):
        make()
    monkeypatch.undo()
    left = files(tmp_path / "out" / "0009")
    assert set(left) == set(NAMES[: NAMES.index(name)])
    assert not make()[0].skipped
    whole = files(tmp_path / "out" / "0009")
    assert set(whole) == set(NAMES)
    assert all(whole[kept] == content for kept, content in left.items())


def test_folders_that_cannot_be_used(make, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in ("file", "file/below"):
        with pytest.raises(SourceError, match="is a file; choose another folder"):
            make(folder, on_step=never)
    make("deep/er", num_inference_steps=1, stop_after=16)  # a folder that is not there is made
    assert (tmp_path / "deep" / "er" / "0009" / "sample_16.png").is_file()


# Metadata, and the same picture from it


def test_metadata(make, cascade, cascade_folder):
    made = make(
        views=["identity", "patch_permute"],
        view_args=[None, {"num_patches": 4}],
        noise_level=70,
        prompts=["a [duck]", "a rabbit"],
    )[0]
    content = metadata(made)
    assert content["seed"] == 9
    assert content["sizes"] == [16, 64]
    view = get_views(["identity", "patch_permute"], [None, {"num_patches": 4}])[1]
    assert content["request"] == {
        "style": "a sketch of",
        "prompts": ["a sketch of a duck", "a sketch of a rabbit"],
        "concepts": ["duck", None],
        "concept_positions": [14, None],
        "views": [{"name": "identity"}, view.to_metadata()],
        "recipe": Recipe.released(num_inference_steps=2).to_dict(),
        "noise_level": 70,
        "size": 16,
        "weights_sha256": combined_checksum(cascade.checksums()),
    }
    weights = content["weights"]
    assert weights["name"] == "tiny"
    path = "stage_1/unet/diffusion_pytorch_model.safetensors"
    assert weights["files"][path] == hashlib.sha256((cascade_folder / path).read_bytes()).hexdigest()
    assert weights["files"] == cascade.checksums()
    assert content["pictures"] == {
        name: hashlib.sha256(content).hexdigest() for name, content in pictures(made).items()
    }
    assert content["made_with"] == {
        "mtl_anagram": mtl_anagram.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "dtype": "float32",
    }


class Blinds(View):
    """A user's own view, as the documentation of View has one."""

    name = "blinds"

    def __init__(self, bands=8):
        self.bands = bands

    def allows(self, size):
        return size % self.bands == 0

    def arguments(self):
        return {"bands": self.bands}

    def move(self, x):
        band = torch.arange(x.shape[-2]) * self.bands // x.shape[-2]
        return torch.where(band[:, None] % 2 == 1, x.flip(-1), x)

    move_back = move


PERMUTATION = torch.randperm(16 * 16, generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views": ["identity", "patch_permute"]},
        {"views": ["patch_permute", "patch_permute"], "view_args": [{"num_patches": 2}, None]},
        {"views": ["jigsaw", "jigsaw"], "view_args": [{"seed": 3}, None]},
        {"views": ["identity", "permutation"], "view_args": [None, {"permutation": PERMUTATION}]},
        {"views": ["rotate_cw+negate", "patch_permute+skew"], "view_args": [None, {"skew": {"factor": 0.5}}]},
        {"views": ["inner_circle", Blinds(4)]},
        {"views": ["identity"], "prompts": ["a [big] cat"], "stop_after": 16},
        {"recipe": Recipe.corrected(map_places=("up",)), "noise_level": 0, "prompts": ["[a] duck", "a cat"]},
        {"seed": 2**63 - 1, "size": 32, "guidance_scale": 7.5, "style": ""},
    ],
    ids=lambda changes: ",".join(changes) or "as it is",
)
def test_a_picture_from_its_metadata_alone(make, cascade, tmp_path, changes):
    made = make(**changes)[0]
    # Once through JSON, keys in another order, in another place, without the pictures.
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(metadata(made), sort_keys=True, ensure_ascii=True))
    again = repeat_anagram(alone, tmp_path / "again", model=cascade)
    assert not again.skipped
    assert again.seed == made.seed
    assert list(again.pictures) == list(made.pictures)
    assert files(again.folder) == files(made.folder)
    assert repeat_anagram(alone, tmp_path / "again", model=cascade).skipped
    assert not repeat_anagram(alone, tmp_path / "again", model=cascade, overwrite=True).skipped


def test_repeating_in_the_same_folder_changes_nothing(make, cascade):
    made = make()[0]
    again = repeat_anagram(made.folder / "metadata.json", made.folder.parent, "cpu", model=cascade)
    assert again.skipped
    assert again.pictures == made.pictures


def test_repeating_needs_the_same_weights(make, cascade_folder, tmp_path):
    made = make(stop_after=16)[0]
    other = shutil.copytree(cascade_folder, tmp_path / "other")
    path = other / "noise_clip" / "merges.txt"
    path.write_text(path.read_text() + "e r\n")
    with pytest.raises(InputError, match="made with weights of sha256 .*tiny has .*same weights with model="):
        repeat_anagram(made.folder / "metadata.json", tmp_path / "again", "cpu", model=other)
    assert not (tmp_path / "again").exists()


def test_repeating_what_is_no_metadata(tmp_path, cascade):
    for content, error in (("{}", InputError), ('{"request": {}}', InputError), ("[]", SourceError)):
        (tmp_path / "metadata.json").write_text(content)
        with pytest.raises(error):
            repeat_anagram(tmp_path / "metadata.json", tmp_path / "again", model=cascade)
    with pytest.raises(SourceError):
        repeat_anagram(tmp_path / "none.json", tmp_path / "again", model=cascade)


# What is asked for


def test_concepts(make):
    shared = {"num_inference_steps": 3, "stop_after": 16, "style": ""}
    default = pictures(make("a", prompts=["a big duck", "a sea turtle"], **shared))
    last = make("b", prompts=["a big [duck]", "a sea [turtle]"], **shared)
    assert pictures(last) == default
    assert metadata(last[0])["request"]["prompts"] == ["a big duck", "a sea turtle"]
    bracketed = pictures(make("c", prompts=["a [big] duck", "a [sea turtle]"], **shared))
    assert bracketed["sample_16.png"] != default["sample_16.png"]
    named = make("d", prompts=["a big duck", "a sea turtle"], concepts=["big", "sea turtle"], **shared)
    assert pictures(named) == bracketed
    mixed = make("e", prompts=["a [big] duck", "a sea turtle"], concepts=[None, "sea turtle"], **shared)
    assert pictures(mixed) == bracketed


def test_brackets_tell_which_of_two_equal_words_is_meant(make, cascade, monkeypatch):
    seen = []
    text_maps = type(cascade.unet_1).text_maps

    def watch(self, x, t, text, spans, **options):
        seen.append(spans)
        return text_maps(self, x, t, text, spans, **options)

    monkeypatch.setattr(type(cascade.unet_1), "text_maps", watch)
    for folder, prompt in (("a", "the cat of the [cat]"), ("b", "the [cat] of the cat")):
        make(folder, style="", prompts=[prompt, "a duck"], stop_after=16)
    assert seen[0][0][0] > seen[1][0][0]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"concepts": ["duck"]}, "a list of 2"),
        ({"concepts": ["elephant", None]}, "elephant"),
        ({"prompts": ["a [duck", "a rabbit"]}, "unbalanced"),
        ({"prompts": ["a duck"]}, "1 prompts for 2 views"),
        ({"size": 20}, "size=20 must be a multiple of 8"),
        ({"size": 0}, "size=0"),
        ({"views": ["identity", "pixel_permute"]}, "size=16 px does not suit the view 'pixel_permute'"),
        ({"stop_after": 100}, "must be 16 .* or 64 .* or 256"),
        ({"noise_level": 1000}, "noise_level=1000"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": []}, "no seed"),
        ({"recipe": "released"}, "must be a Recipe"),
        ({"recipe": Recipe.released(map_resolution=7)}, "attention at 1 px"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_requests_are_checked_before_anything_is_sampled(make, tmp_path, changes, match):
    with pytest.raises(InputError, match=match):
        make(**changes, on_step=never)
    assert not (tmp_path / "out").exists()


def test_steps_are_seen_one_by_one(make):
    seen = []
    make(num_inference_steps=3, on_step=lambda *step: seen.append(step))
    assert [(seeds, stage, state.index) for seeds, stage, state in seen] == [
        ([9], stage, index) for stage in (1, 2) for index in range(3)
    ]
    assert {state.num_steps for _, _, state in seen} == {3}
    for stage, side in ((1, 16), (2, 64)):
        states = [state for _, at, state in seen if at == stage]
        times = [state.timestep for state in states]
        assert times == sorted(times, reverse=True)
        assert all(state.x.shape == (1, 3, side, side) for state in states)
        assert all(state.weights.shape == (1, 2) for state in states)
        # Guided in stage I alone, and not at the last step, after which there is no timestep.
        assert [state.loss is None for state in states] == [stage == 2, stage == 2, True]


@pytest.mark.parametrize(
    "prompts, views",
    [(["a duck"], ["rotate_cw"]), (["a duck", "a cat", "a house"], ["identity", "flip", "skew"])],
)
def test_one_view_and_three(make, prompts, views):
    seen = []
    made = make(prompts=prompts, views=views, on_step=lambda seeds, stage, state: seen.append(state))
    assert seen[0].weights.shape == (1, len(views))
    assert (seen[0].loss is None) == (len(views) == 1)
    assert pixels(pictures(made)["sample_64.views.png"]).shape == (3, 64, 64 * len(views))


def test_one_step(make):
    seen = []
    made = make(num_inference_steps=1, on_step=lambda seeds, stage, state: seen.append((stage, state.index)))
    assert seen == [(1, 0), (2, 0)]
    assert set(pictures(made)) == set(NAMES) - {"metadata.json"}


@pytest.mark.parametrize(
    "size, stop, resolution", [(32, None, 16), (48, 48, 24), (24, None, 12), (None, 64, 32)]
)
def test_other_sizes(make, cascade, monkeypatch, size, stop, resolution):
    """The maps' resolution goes with the size: half the picture's side."""
    seen = set()
    text_maps = type(cascade.unet_1).text_maps

    def watch(self, *args, **options):
        maps = text_maps(self, *args, **options)
        seen.update((options["resolution"], value.shape[2]) for value in maps.values())
        return maps

    monkeypatch.setattr(type(cascade.unet_1), "text_maps", watch)
    made = make(size=size, stop_after=stop)
    assert seen == {(resolution, resolution)}
    side = size or 64
    assert set(made[0].pictures) == ({side, 4 * side} if stop is None else {side})
    for name, path in made[0].pictures.items():
        assert pixels(path.read_bytes()).shape == (3, name, name)


def test_device_none_is_the_best_there_is(make, cascade_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    shared = {"model": cascade_folder, "stop_after": 16}
    chosen = make("a", device=None, **shared)[0]
    assert metadata(chosen)["made_with"]["device"] == "cpu"
    assert files(chosen.folder) == files(make("b", device="cpu", **shared)[0].folder)


def test_device_of_a_cascade(make, monkeypatch):
    shared = {"stop_after": 16, "num_inference_steps": 1}
    make("a", device="cpu", **shared)
    make("b", device=torch.device("cpu:0"), **shared)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(InputError, match="device='mps', but the cascade is on 'cpu'"):
        make("c", device="mps", on_step=never, **shared)


def test_half_precision(make, cascade_folder):
    half = Cascade.from_pretrained(cascade_folder, device="cpu", dtype="bfloat16")
    made = make(model=half, num_inference_steps=1)[0]
    assert metadata(made)["made_with"]["dtype"] == "bfloat16"
    difference = pixels(pictures(made)["sample_16.png"]) - pixels(
        pictures(make("b", num_inference_steps=1))["sample_16.png"]
    )
    assert 0 < difference.abs().float().mean() < 8


@pytest.fixture(scope="module")
def without(cascade_folder):
    """without("stage_2") is the tiny cascade that lacks a part; None lacks nothing."""

    def build(*parts):
        given = {part: cascade_folder / part for part in ("stage_2", "noise_clip") if part not in parts}
        return Cascade(cascade_folder / "stage_1", **given, name="part", device="cpu")

    return build


def test_without_a_stage_2(make, without):
    cascade = without("stage_2")
    made = make(model=cascade)[0]
    assert list(made.pictures) == [16]
    assert set(files(made.folder)) == {"sample_16.png", "sample_16.views.png", "metadata.json"}
    assert pictures(made)["sample_16.png"] == pictures(make("b"))["sample_16.png"]
    with pytest.raises(InputError, match="stop_after=64: the cascade part has no stage II.*stage_2="):
        make(model=cascade, stop_after=64, on_step=never)


def test_without_a_noise_aware_clip(make, without):
    cascade = without("noise_clip")
    with pytest.raises(
        InputError, match="noise-aware CLIP and the cascade part has none.*noise_clip=.*balancing off"
    ):
        make(model=cascade, on_step=never)
    unbalanced = Recipe.released(balancing=False)
    made = make(model=cascade, recipe=unbalanced)
    assert pictures(made) == pictures(make("b", recipe=unbalanced))
    make("c", model=cascade, prompts=["a duck"], views=["identity"])  # one view has nothing to balance


RECIPES = {
    "released": Recipe.released(),
    "corrected": Recipe.corrected(),
    "plain": Recipe.plain(),
    "no balancing": Recipe.released(balancing=False),
    "no rectification": Recipe.released(rectification=False),
    "no anti-segregation": Recipe.released(anti_segregation=False),
    "measured diagonal": Recipe.released(rectify_diagonal="measured"),
    "iou": Recipe.released(overlap_measure="iou"),
    "horizon": Recipe.released(horizon=1),
    "signed": Recipe.released(scorer_range="signed"),
    "guidance scale": Recipe.released(guidance_scale=9.0),
    "guidance rate": Recipe.released(guidance_rate=50.0),
    "last guided step": Recipe.released(last_guided_step=0),
    "map resolution": Recipe.released(map_resolution=16),
    "map places": Recipe.released(map_places=("up",)),
}


def test_every_switch_changes_the_picture_and_is_recorded(make):
    last = {}
    for name, recipe in RECIPES.items():
        made = make(
            name,
            recipe=recipe,
            num_inference_steps=4,
            stop_after=16,
            on_step=lambda seeds, stage, state, name=name: last.update({name: state.x}),
        )[0]
        recorded = metadata(made)["request"]["recipe"]
        assert Recipe.from_dict(recorded) == dataclasses.replace(recipe, num_inference_steps=4)
    names = list(last)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert (last[name] - last[other]).abs().max() > 1e-5, f"{name} is as {other}"


def test_the_noise_level_changes_stage_2_alone(make):
    one, two = pictures(make("a")), pictures(make("b", noise_level=400))
    assert one["sample_16.png"] == two["sample_16.png"]
    assert one["sample_64.png"] != two["sample_64.png"]


def test_style_is_put_before_every_prompt(make):
    shared = {"stop_after": 16}
    one = make("a", style="a sketch of", **shared)
    two = make("b", style="", prompts=["a sketch of a duck", "a sketch of a rabbit"], **shared)
    assert pictures(one) == pictures(two)
    assert pictures(make("c", style="", **shared)) != pictures(one)


def test_progress(make, capsys):
    make(progress=True, seed=[1, 2])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "8/8" in shown.err  # 2 seeds, 2 stages, 2 steps
    assert "stage II, seed 1..2" in shown.err


def test_the_embedded_cascade_is_the_default(make):
    seen = []
    made = make(
        model=None,
        device="cpu",
        size=None,
        stop_after=64,
        num_inference_steps=1,
        on_step=lambda seeds, stage, state: seen.append(state),
    )[0]
    assert list(made.pictures) == [64]
    assert seen[0].x.shape == (1, 3, 64, 64)
    assert metadata(made)["weights"]["files"] == Cascade.from_pretrained(device="cpu").checksums()
