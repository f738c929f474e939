"""Views by name and from metadata; seeds; what a caller may get wrong; a view of the user's own."""

import json
import random
import textwrap

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.views import VIEW_NAMES, IndexView, PermutationView, View, get_views, view_from_metadata
from mtl_anagram.views.base import pixel_numbers
from mtl_anagram.views.permutations import drawn_permutation

IDENTITY_4 = list(range(16))


def example() -> type[View]:
    """The class that View's docstring shows, as it stands there."""
    text = textwrap.dedent("    " + (View.__doc__ or ""))
    code = text[text.index("    import torch") : text.index("    views = get_views")]
    space: dict = {"__name__": "example_of_the_docs"}
    exec(textwrap.dedent(code), space)
    return space["Blinds"]


def picture(size: int = 64) -> torch.Tensor:
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_name_makes_its_view():
    names = [name for name in VIEW_NAMES if name != "permutation"]
    assert [view.name for view in get_views(names)] == names
    assert get_views(["permutation"], [{"permutation": IDENTITY_4}])[0].name == "permutation"
    assert get_views(("flip", " rotate_cw + negate "))[1].name == "rotate_cw+negate"


def test_metadata_makes_exactly_the_same_views():
    order = drawn_permutation(64 * 64, 5)
    names = [*VIEW_NAMES, "pixel_permute+jigsaw+negate", "skew+patch_permute"]
    arguments = [None] * len(names)
    arguments[names.index("permutation")] = {"permutation": order}
    arguments[names.index("jigsaw")] = {"seed": 8}
    arguments[-1] = {"skew": {"factor": 0.3}, "patch_permute": {"num_patches": 16}}
    for view in get_views(names, arguments, seed=11):
        text = json.dumps(view.to_metadata())
        assert len(text) < (300 if view.name != "permutation" else 25_000)
        again = view_from_metadata(json.loads(text))
        assert type(again) is type(view)
        assert again.to_metadata() == view.to_metadata()
        assert torch.equal(again.view(picture()), view.view(picture()))
        assert torch.equal(again.inverse_map(picture(32)), view.inverse_map(picture(32)))


def test_a_seed_stands_for_a_permutation():
    for name in ("patch_permute", "pixel_permute", "flip+patch_permute"):
        first, second = get_views([name, name], seed=0)
        again, other = get_views([name], seed=0)[0], get_views([name], seed=1)[0]
        seen = first.view(picture())
        assert torch.equal(again.view(picture()), seen)
        assert not torch.equal(other.view(picture()), seen)
        assert not torch.equal(second.view(picture()), seen)  # each view of a list has its own stream
    parts = get_views(["patch_permute+patch_permute"])[0].views
    assert parts[0].seed != parts[1].seed
    fixed = [get_views(["patch_permute"], [{"seed": 4}], seed=seed)[0].seed for seed in (0, 1)]
    assert fixed == [4, 4]
    assert get_views(["jigsaw"], seed=9)[0].seed == 4522
    # Written down once: metadata of older versions must keep its meaning.
    assert drawn_permutation(8, 0) == [3, 7, 5, 2, 4, 1, 6, 0]
    assert get_views(["patch_permute"], seed=0)[0].seed == 93137557639308


def test_no_global_generator_is_touched():
    random.seed(1)
    torch.manual_seed(1)
    before, python_before = torch.get_rng_state(), random.getstate()
    first = [view.view(picture()) for view in get_views(["pixel_permute", "jigsaw", "patch_permute"])]
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(2)
    random.seed(2)
    second = [view.view(picture()) for view in get_views(["pixel_permute", "jigsaw", "patch_permute"])]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_default_device_does_not_matter():
    torch.set_default_device("meta")
    try:
        seen = [view.view(torch.ones(3, 64, 64, device="cpu")) for view in get_views(["jigsaw", "skew"])]
        small = get_views(["pixel_permute"])[0].inverse_map(torch.ones(8, 8, device="cpu"))
        own = PermutationView(IDENTITY_4)
    finally:
        torch.set_default_device(None)
    assert all(x.device.type == "cpu" for x in [*seen, small, own.order])


def test_the_view_in_the_docs_works():
    kind = example()
    blinds = kind(4)
    assert get_views(["identity", blinds])[1] is blinds
    x = picture(16)
    seen = blinds.view(x)
    assert torch.equal(seen[:, :4], x[:, :4])
    assert torch.equal(seen[:, 4:8], x[:, 4:8].flip(-1))
    assert torch.equal(blinds.inverse_view(seen), x)
    assert torch.equal(blinds.inverse_map(x), seen)
    torch.testing.assert_close(blinds.inverse_map(torch.ones(6, 6)), torch.ones(6, 6))
    with pytest.raises(InputError, match="size=6.*'blinds'.*a multiple of 4"):
        blinds.check_size(6)
    metadata = json.loads(json.dumps(blinds.to_metadata()))
    again = view_from_metadata(metadata)
    assert type(again) is kind
    assert again.bands == 4
    with pytest.raises(InputError, match="elsewhere.Blinds.*import"):
        view_from_metadata({**metadata, "class": "elsewhere.Blinds"})


class Thirds(IndexView):
    """Columns in three stripes, the outer two exchanged."""

    name = "thirds"
    sizes = "a multiple of 3"

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra

    def allows(self, size: int) -> bool:
        return size % 3 == 0

    def sources(self, size: int) -> torch.Tensor:
        return torch.cat(pixel_numbers(size).split(size // 3, 1)[::-1], 1)


def test_an_index_view_of_the_users_own():
    view = Thirds()
    x = picture(6)
    assert torch.equal(view.view(x), x[..., [4, 5, 2, 3, 0, 1]])
    assert torch.equal(view.inverse_view(view.view(x)), x)
    with pytest.raises(InputError, match="extra"):  # its arguments() leaves one out
        view.to_metadata()
    with pytest.raises(NotImplementedError, match="move"):
        View().view(x)
    with pytest.raises(NotImplementedError, match="sources"):
        IndexView().view(x)


@pytest.mark.parametrize(
    "names,remedy",
    [
        ("flip", "give a list"),
        (b"flip", "give a list"),
        (None, "give a list"),
        (3, "give a list"),
        ({"flip"}, "give a list"),
        ([], "names no view"),
        ([3], "must be a name"),
        ([None], "must be a name"),
        ([["flip"]], "must be a name"),
        (["rotate"], "did you mean 'rotate_"),
        (["Flip"], "did you mean 'flip'"),
        (["jigsawed"], "did you mean 'jigsaw'"),
        (["zzz"], "identity, flip"),
        ([""], "identity, flip"),
        (["flip+"], "unknown view '' in 'flip\\+'"),
        (["flip++negate"], "unknown view ''"),
        (["flip+negat"], "did you mean 'negate'"),
        (["permutation"], "'permutation' is missing"),
    ],
)
def test_wrong_names(names, remedy):
    with pytest.raises(InputError, match=remedy):
        get_views(names)


@pytest.mark.parametrize(
    "name,given,remedy",
    [
        ("flip", {"factor": 1}, "'factor': 'flip' takes no arguments"),
        ("skew", {"facto": 1}, "'facto': 'skew' takes factor"),
        ("skew", {3: 1}, "unknown view argument 3"),
        ("skew", [1.5], "must be a dict"),
        ("skew", "1.5", "must be a dict"),
        ("skew", 1.5, "must be a dict"),
        ("skew", {"factor": "2"}, "factor='2'"),
        ("skew", {"factor": True}, "factor=True"),
        ("skew", {"factor": None}, "factor=None"),
        ("skew", {"factor": float("nan")}, "factor=nan"),
        ("skew", {"factor": float("inf")}, "factor=inf"),
        ("skew", {"factor": 65}, "-64 to 64"),
        ("patch_permute", {"num_patches": 0}, "num_patches=0"),
        ("patch_permute", {"num_patches": 257}, "from 1 to 256"),
        ("patch_permute", {"num_patches": 8.0}, "num_patches=8.0"),
        ("patch_permute", {"num_patches": True}, "num_patches=True"),
        ("pixel_permute", {"seed": -1}, "seed=-1"),
        ("pixel_permute", {"seed": None}, "seed=None"),
        ("jigsaw", {"seed": 2**63}, "seed=9223372036854775808"),
        ("jigsaw", {"seed": "4522"}, "seed='4522'"),
        ("permutation", {"permutation": [0, 1, 2]}, "no square"),
        ("permutation", {"permutation": []}, "no square"),
        ("permutation", {"permutation": [0, 1, 2, 2]}, "some twice"),
        ("permutation", {"permutation": [0, 1, 2, 4]}, "holds 4"),
        ("permutation", {"permutation": [0, 1, 2, -1]}, "holds -1"),
        ("permutation", {"permutation": [0, 1, 2, True]}, "holds True"),
        ("permutation", {"permutation": [0, 1, 2, 3.0]}, "holds 3.0"),
        ("permutation", {"permutation": [0, 1, 2, "3"]}, "holds '3'"),
        ("permutation", {"permutation": "0123"}, "S\\^2 whole numbers"),
        ("permutation", {"permutation": 4}, "S\\^2 whole numbers"),
        ("permutation", {"permutation": torch.tensor([0, 1, 3, 3])}, "some twice"),
        ("permutation", {"permutation": torch.tensor([0, 1, 2, 7])}, "out of range"),
        ("permutation", {"permutation": torch.arange(4.0)}, "float32"),
        ("permutation", {"permutation": torch.arange(4).view(2, 2)}, "\\(2, 2\\)"),
        ("permutation", {"permutation": torch.ones(1, dtype=torch.bool)}, "bool"),
        ("permutation", {"permutation": {"size": 2, "base64": "AAAA"}}, "base64"),
        ("permutation", {"permutation": {"size": 2, "base64": "?"}}, "base64"),
        ("permutation", {"permutation": {"size": 2, "base64": 5}}, "base64"),
        ("permutation", {"permutation": {"size": 10**9, "base64": ""}}, "size=1000000000"),
        ("permutation", {"permutation": {}}, "base64"),
        ("skew+flip", {"jigsaw": {}}, "components are skew, flip"),
        ("skew+skew", {"skew": {}}, "more than once"),
        ("skew+flip", [None], "list of 2 entries"),
        ("skew+flip", "ab", "list of 2 entries"),
        ("skew+flip", {"skew": 3}, "must be a dict"),
        ("skew+flip", [{"factor": 1}, {"factor": 1}], "'flip' takes no arguments"),
    ],
)
def test_wrong_arguments(name, given, remedy):
    with pytest.raises(InputError, match=remedy):
        get_views(["identity", name], [None, given])


def test_arguments_of_a_composition_by_list_or_name():
    for given in ([{"factor": 0.5}, None], {"skew": {"factor": 0.5}}, ({"factor": 0.5}, {})):
        view = get_views(["skew+flip"], [given])[0]
        assert view.views[0].factor == 0.5


@pytest.mark.parametrize("given", ["ab", {"a": 1, "b": 2}, 5, [None], [None] * 3, []])
def test_wrong_lists_of_arguments(given):
    with pytest.raises(InputError, match="view_args"):
        get_views(["flip", "skew"], given)


def test_a_view_that_is_made_takes_no_arguments():
    view = PermutationView(IDENTITY_4)
    assert get_views([view], [{}]) == [view]
    with pytest.raises(InputError, match="made already"):
        get_views([view], [{"permutation": IDENTITY_4}])


@pytest.mark.parametrize("seed", [True, -1, 1.0, "0", None, 2**63])
def test_wrong_seeds(seed):
    with pytest.raises(InputError, match="seed="):
        get_views(["flip"], seed=seed)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "flip",
        [],
        {},
        {"name": 3},
        {"name": "flop"},
        {"name": "flip", "angle": 3},
        {"name": "flip", "arguments": [1]},
        {"name": "flip", "arguments": {"angle": 3}},
        {"name": "patch_permute", "arguments": {"num_patches": "8"}},
        {"name": "permutation"},
        {"name": "flip", "class": "os.system"},
        {"name": "flip", "class": "mtl_anagram.views.rigid.Flip"},
        {"name": "flip", "class": ["x"]},
        {"name": "a", "views": []},
        {"name": "a", "views": "flip"},
        {"name": "a", "views": ["flip"]},
        {"name": "a", "views": [{"name": "flip"}], "arguments": {}},
        {"name": "a", "views": [{"name": "b", "views": [{"name": "flip"}]}]},
    ],
)
def test_wrong_metadata(metadata):
    with pytest.raises(InputError):
        view_from_metadata(metadata)
