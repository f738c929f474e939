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
        assert recipe.balancing
        assert recipe.rectification
        assert recipe.anti_segregation


def test_horizon_follows_the_steps_where_corrected():
    assert Recipe.corrected(num_inference_steps=50).balancing_horizon == 50
    assert Recipe.released(num_inference_steps=50).balancing_horizon == 30


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
    with pytest.raises(InputError, match="no field 'colour'"):
        Recipe.from_dict({"colour": 1})
    for bad in (None, [], "released", {1: 2}):
        with pytest.raises(InputError):
            Recipe.from_dict(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"num_inference_steps": 30.0},
        {"num_inference_steps": True},
        {"num_inference_steps": "30"},
        {"num_inference_steps": None},
        {"guidance_scale": -1},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"guidance_scale": "10"},
        {"guidance_scale": True},
        {"guidance_scale": 10**400},
        {"balancing": 1},
        {"rectification": None},
        {"anti_segregation": "no"},
        {"horizon": 0},
        {"horizon": 1.5},
        {"floor": 0},
        {"floor": 2.0},
        {"scorer_range": "full"},
        {"scorer_range": []},
        {"rectify_diagonal": "none"},
        {"overlap_measure": "dice"},
        {"overlap_target": 0.6},
        {"overlap_slope": -0.1},
        {"guidance_rate": -5},
        {"guidance_rate": math.inf},
        {"last_guided_step": -1},
        {"last_guided_step": 2.5},
        {"map_resolution": 0},
        {"map_resolution": 65},
        {"map_places": ()},
        {"map_places": "down"},
        {"map_places": ("down", "down")},
        {"map_places": ("left",)},
        {"map_places": ([],)},
        {"map_places": None},
    ],
)
def test_values_that_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        Recipe.released(**change)
