"""Metadata, and the same picture from it: repeat_anagram, and what a folder tells of a request made before."""

import functools
import json
import platform
import shutil

import pytest
import torch

import mtl_anagram
from mtl_anagram import InputError, Recipe, SourceError, get_views, repeat_anagram
from mtl_anagram.files.checksums import combined_checksum
from tests.helpers import sha256
from tests.unit.test_views_registry import Halves
from tests.unit.tiny_requests import files, first_takes_all, metadata, never, on_cpu, pictures


def test_metadata(make, cascade):
    views = {"views": ["identity", "patch_permute"], "view_args": [None, {"num_patches": 4}]}
    (made,) = make(prompts=["a [duck]", "a rabbit"], noise_level=70, **views)
    content, (_, view) = metadata(made), get_views(*views.values())
    assert (content["seed"], content["sizes"]) == (9, [8, 32])
    assert content["request"] == {
        "style": "a sketch of",
        "prompts": ["a sketch of a duck", "a sketch of a rabbit"],
        "concepts": ["duck", None],
        "concept_positions": [14, None],
        "views": [{"name": "identity"}, view.to_metadata()],
        "recipe": Recipe.released(num_inference_steps=2).to_dict(),
        "noise_level": 70,
        "size": 8,
        "weights_sha256": combined_checksum(cascade.checksums()),
    }
    assert content["weights"]["name"] == "tiny"
    assert content["weights"]["files"] == cascade.checksums()
    assert content["pictures"] == {name: sha256(made.folder / name) for name in pictures(made)}
    versions = {"mtl_anagram": mtl_anagram.__version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    assert content["made_with"] == {**versions, "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"views": ["patch_permute", "patch_permute"], "view_args": [{"num_patches": 2}, None]},
        {"views": ["jigsaw", "jigsaw"], "view_args": [{"seed": 3}, None], "size": 16},
        {"views": ["rotate_cw+negate", "patch_permute+skew"], "view_args": [None, {"skew": {"factor": 0.5}}]},
        {"views": ["inner_circle", Halves(3)]},
        {"recipe": Recipe.corrected(map_places=("up",)), "noise_level": 0, "prompts": ["[a] duck", "a cat"]},
        {"seed": 2**63 - 1, "size": (16, 24), "views": ["identity", "flip"], "style": ""},
        {"negative": ["a cat", ""], "guidance_scale": 7.5, "batch_size": 7},
    ],
    ids=lambda changes: ",".join(changes) or "as it is",
)
def test_a_picture_from_its_metadata_alone(make, cascade, tmp_path, changes):
    made = make(**changes)[0]
    alone = tmp_path / "alone.json"  # with its keys in another order, without the pictures
    alone.write_text(json.dumps(metadata(made), sort_keys=True))
    again = repeat_anagram(alone, tmp_path / "again", model=cascade)
    assert not again.skipped
    assert again.warnings == ()
    assert files(again.folder) == files(made.folder)
    assert repeat_anagram(alone, tmp_path / "again", model=cascade).skipped


def test_repeating_needs_the_same_weights(make, cascade_folder, tmp_path):
    made = make(stop_after=8)[0]
    other = shutil.copytree(cascade_folder, tmp_path / "other")
    path = other / "noise_clip" / "merges.txt"
    path.write_text(path.read_text() + "e r\n")
    with pytest.raises(InputError, match="weights of sha256 .*tiny has .*model="):
        repeat_anagram(made.folder / "metadata.json", tmp_path / "again", "cpu", model=other)
    assert not (tmp_path / "again").exists()


def test_repeating_what_is_no_metadata(tmp_path, cascade):
    (tmp_path / "metadata.json").write_text('{"request": {}}')
    with pytest.raises(InputError, match="metadata.json is not metadata.*give a metadata.json"):
        repeat_anagram(tmp_path / "metadata.json", tmp_path / "again", model=cascade)
    with pytest.raises(SourceError, match="none.json.*No such file.*check its path"):
        repeat_anagram(tmp_path / "none.json", tmp_path / "again", model=cascade)


# The dtype


def test_a_picture_in_half_precision_is_repeated_in_it(make, cascade, cascade_folder, tmp_path):
    made = make(model=on_cpu(cascade_folder, dtype="bfloat16"))[0]
    assert metadata(made)["made_with"]["dtype"] == "bfloat16"
    path = made.folder / "metadata.json"
    again = repeat_anagram(path, tmp_path / "again", "cpu", model=cascade_folder)
    assert files(again.folder) == files(made.folder)
    assert again.warnings == ()
    other = repeat_anagram(path, tmp_path / "other", model=cascade)
    assert pictures(other) != pictures(made)
    (said,) = other.warnings
    assert all(word in said for word in ("sample_8.png", "sample_32.png", str(other.folder), "bfloat16"))


def test_a_folder_with_pictures_of_another_dtype_says_so(make, cascade_folder):
    made = make()[0]
    before = files(made.folder)
    (again,) = make(model=on_cpu(cascade_folder, dtype="bfloat16"))
    assert again.skipped
    (said,) = again.warnings
    assert all(word in said for word in (str(made.folder), "float32", "bfloat16", "overwrite"))
    assert files(made.folder) == before
    assert make()[0].warnings == ()


# What older and other versions wrote


def test_metadata_from_before_recipes_named_a_solver(make, cascade, tmp_path):
    made = make(stop_after=8)[0]
    path, old = made.folder / "metadata.json", metadata(made)
    del old["request"]["recipe"]["solver"]
    path.write_text(json.dumps(old))
    assert make(stop_after=8, on_step=never)[0].skipped
    again = repeat_anagram(path, tmp_path / "again", model=cascade)
    assert pictures(again) == pictures(made)
    with pytest.raises(InputError, match="different: recipe"):
        make(recipe=Recipe.released(solver="ddim"), on_step=never)


def test_a_rule_of_ones_own_is_recorded_and_needed_again(make, cascade, tmp_path):
    name = f"{first_takes_all.__module__}.first_takes_all"
    made = make(combine={1: first_takes_all}, stop_after=8)[0]
    assert metadata(made)["request"]["rules"] == {"combine": f"1: {name}"}
    with pytest.raises(InputError, match="different: rules"):
        make(stop_after=8, on_step=never)
    half = make("b", step={1: None}, combine=functools.partial(first_takes_all), stop_after=8)[0]
    assert metadata(half)["request"]["rules"] == {"combine": name}
    path = made.folder / "metadata.json"
    for other in ({}, {"combine": first_takes_all}, {"step": {1: first_takes_all}}):
        with pytest.raises(InputError, match="first_takes_all.*combine="):
            repeat_anagram(path, tmp_path / "again", model=cascade, **other)
    again = repeat_anagram(path, tmp_path / "again", model=cascade, combine={1: first_takes_all})
    assert files(again.folder) == files(made.folder)


def test_every_number_of_the_request_decides_whether_it_is_the_same(make):
    """Against what a request's metadata has, one change at a time: none is taken for what is there."""
    folder = make(stop_after=8)[0].folder
    before = files(folder)
    changes = {
        "style": {"style": ""},
        "prompts": {"prompts": ["a duck", "a cat"]},
        "views": {"views": ["identity", "patch_permute"]},
        "recipe": {"guidance_scale": 9.0},
        "noise_level": {"noise_level": 51},
        "size": {"size": 16},
        "concepts": {"concepts": ["a", None]},
        "negative": {"negative": "a cat"},
        "rules": {"step": first_takes_all},
    }
    for field, change in changes.items():
        with pytest.raises(InputError, match=f"different: [a-z_, ]*{field}.*overwrite") as caught:
            make(**change, seed=[9, 10], on_step=never)
        assert str(folder) in str(caught.value)
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["0009"]
