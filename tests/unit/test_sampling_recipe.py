"""The recipe: its three forms, its limits, and that it survives metadata."""

import dataclasses
import json
import math

import pytest

from mtl_anagram.errors import InputError
from mtl_anagram.sampling import Recipe


def test_the_three_forms():
    released, corrected, plain = Recipe.released(), Recipe.corrected(), Recipe.plain()
    assert released == Recipe()
    assert (released.num_inference_steps, released.guidance_scale) == (30, 10.0)
    assert (released.horizon, released.scorer_range) == (30, "half")
    assert (released.rectify_diagonal, released.overlap_measure) == ("unit", "overlap")
    assert (released.guidance_rate, released.last_guided_step) == (5.0, 25)
    assert corrected.scorer_range == "signed"
    assert (corrected.rectify_diagonal, corrected.overlap_measure) == ("measured", "iou")
    assert (plain.balancing, plain.rectification, plain.anti_segregation) == (False, False, False)
    for recipe in (released, corrected):
        assert recipe.balancing and recipe.rectification and recipe.anti_segregation  # noqa: PT018


def test_changes_and_equality():
    assert Recipe.released(guidance_scale=7) == Recipe.released(guidance_scale=7.0)
    assert Recipe.released(map_places=["up"]).map_places == ("up",)
    assert Recipe.plain(rectification=True).rectification
    assert hash(Recipe.corrected()) != hash(Recipe.released())
    assert dataclasses.replace(Recipe.released(), balancing=False) == Recipe.released(balancing=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().balancing = False
    with pytest.raises(InputError, match="did you mean 'guidance_scale'"):
        Recipe.released(guidance_scal=3)


@pytest.mark.parametrize("recipe", [Recipe.released(), Recipe.corrected(map_places=("up",)), Recipe.plain()])
def test_metadata_round_trip(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_metadata_of_another_kind():
    assert Recipe.from_dict({}) == Recipe.released()
    with pytest.raises(InputError, match="colour"):
        Recipe.from_dict({"colour": 1})
    for bad in (None, [], "released", {1: 2}):
        with pytest.raises(InputError):
            Recipe.from_dict(bad)


BAD = {
    "num_inference_steps": (0, 1001, 30.0),
    "guidance_scale": (-1, math.nan, 1e40),
    "stage_2_guidance_scale": (-1, 1001),
    "guidance_interval": (0.5, (0.5,), (0.5, 0.2), (0.0, 1.5), ("0", 1)),
    "guidance_rate": (1e40,),
    "balancing": (1,),
    "scorer_range": ("full",),
    "overlap_target": (0.6,),
    "map_resolution": (65,),
    "map_places": (("left",),),
    "solver": ("euler",),
}


@pytest.mark.parametrize("name", BAD)
def test_values_that_are_refused(name):
    for value in BAD[name]:
        with pytest.raises(InputError, match=name):
            Recipe.released(**{name: value})
