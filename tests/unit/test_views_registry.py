"""Views by name and from metadata; seeds; what a caller may get wrong; a view of the user's own."""

import json
import random
import re

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.views import VIEW_NAMES, IndexView, PermutationView, get_views, view_from_metadata
from mtl_anagram.views.base import pixel_numbers
from mtl_anagram.views.pixels import drawn_permutation
from tests import readme

OWN = next(block for block in readme.python_blocks() if "class Blinds" in block)
exec(OWN, page := {"__name__": "readme_of_views"})
Blinds = page["Blinds"]


def picture(size: int = 64) -> torch.Tensor:
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))


def test_metadata_makes_exactly_the_same_views():
    names = [*VIEW_NAMES, "pixel_permute+jigsaw+negate", "skew+patch_permute"]
    arguments = [None] * len(names)
    arguments[names.index("permutation")] = {"permutation": drawn_permutation(64 * 64, random.Random(5))}
    arguments[names.index("jigsaw")] = {"seed": 8}
    arguments[-1] = [{"factor": 0.3}, {"num_patches": 16}]
    for view in get_views(names, arguments, seed=11):
        text = json.dumps(view.to_metadata())
        assert len(text) < (300 if view.name != "permutation" else 25_000)
        again = view_from_metadata(json.loads(text))
        assert (type(again), again.name) == (type(view), names.pop(0))
        assert again.to_metadata() == view.to_metadata()
        assert torch.equal(again.view(picture()), view.view(picture()))
        assert torch.equal(again.inverse_map(picture(32)), view.inverse_map(picture(32)))


def test_a_seed_stands_for_a_permutation():
    globally = torch.get_rng_state(), random.getstate()
    for name in ("patch_permute", "pixel_permute", " flip + patch_permute "):
        first, second = get_views([name, name], seed=0)
        again, other = get_views([name], seed=0)[0], get_views([name], seed=1)[0]
        seen = first.view(picture())
        assert torch.equal(again.view(picture()), seen)
        assert not torch.equal(other.view(picture()), seen)
        assert not torch.equal(second.view(picture()), seen)  # each view of a list has its own stream
    one, two = get_views(["patch_permute+patch_permute"])[0].views
    assert one.seed != two.seed
    assert get_views(["patch_permute"], [{"seed": 4}], seed=1)[0].seed == 4
    assert get_views(["jigsaw"], seed=9)[0].seed == 4522
    # Written down once: metadata of older versions must keep its meaning.
    assert drawn_permutation(8, random.Random(0)) == [3, 7, 5, 2, 4, 1, 6, 0]
    assert get_views(["patch_permute"], seed=0)[0].seed == 93137557639308
    assert torch.equal(torch.get_rng_state(), globally[0])
    assert random.getstate() == globally[1]


def test_arguments_in_a_views_name():
    words = "skew:2 jigsaw:6 motion:angle=30 rotate:10,circle flip+translate:-0.25,down=0.5 patch_permute:4"
    skew, jigsaw, motion, rotate, both, patches = get_views(words.split(), [{}, {"seed": 1}, *[None] * 4])
    assert (skew.factor, jigsaw.num_pieces, jigsaw.seed) == (2.0, 6, 1)
    assert motion.arguments() == {"length": 7.0, "angle": 30.0}
    assert (rotate.arguments(), both.views[1].down) == ({"angle": 10.0, "circle": True}, 0.5)
    assert patches.seed == get_views(["flip"] * 5 + ["patch_permute"])[5].seed  # is drawn as before


def test_the_hosts_defaults_do_not_matter():
    x, named = picture(), [name for name in VIEW_NAMES if name != "permutation"]

    def results():
        views = [*get_views(named), PermutationView(range(16))]
        return [y for view in views for y in (view.view(x), view.inverse_map(x[:, :30, :30].exp()))]

    wanted = results()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            seen = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_metadata_from_before_still_makes_its_view():
    jigsaw = view_from_metadata({"name": "jigsaw", "arguments": {"seed": 4522}})
    assert jigsaw.arguments() == {"seed": 4522, "num_pieces": 4}
    nested = {"name": "a", "views": [{"name": "flip"}, {"name": "b", "views": [{"name": "negate"}]}]}
    assert view_from_metadata(nested).name == "flip+negate"


def test_a_users_permutation_moves_patches_at_multiples_of_its_size():
    order, packed = [3, 0, 1, 2], {"size": 2, "base64": "AwAAAAAAAAABAAAAAgAAAA=="}
    for given in (order, tuple(order), torch.tensor(order), torch.tensor(order, dtype=torch.int32), packed):
        view = view_from_metadata({"name": "permutation", "arguments": {"permutation": given}})
        assert view.arguments() == {"permutation": packed}
        assert torch.equal(view.view(picture(2)).flatten(1), picture(2).flatten(1)[:, order])
        assert torch.equal(view.view(picture(4))[:, :2, :2], picture(4)[:, 2:, 2:])


def test_a_view_of_the_users_own():
    blinds, x = Blinds(), picture(16)
    assert get_views(["identity", blinds], [None, {}])[1] is blinds
    seen = blinds.view(x)
    assert torch.equal(seen[:, :2], x[:, :2])
    assert torch.equal(seen[:, 2:4], x[:, 2:4].flip(-1))
    assert torch.equal(blinds.inverse_view(seen), x)
    assert torch.equal(blinds.inverse_map(x), seen)
    for size, needed in {6: "a multiple of 8", (8, 16): "square"}.items():  # unless it says square = False
        with pytest.raises(InputError, match=f"size={re.escape(str(size))} .*'blinds'.*{needed}"):
            blinds.check_size(size)
    metadata = json.loads(json.dumps(blinds.to_metadata()))
    assert type(view_from_metadata(metadata)) is Blinds
    with pytest.raises(InputError, match="elsewhere.Blinds.*import"):
        view_from_metadata({**metadata, "class": "elsewhere.Blinds"})


class Halves(IndexView):
    name, square, multiple = "halves", False, 2

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra

    def sources(self, height: int, width: int) -> torch.Tensor:
        return pixel_numbers(height, width).roll(width // 2, 1)


def test_an_index_view_of_the_users_own():
    view, x = Halves(3), picture(6)[:, :2]
    assert torch.equal(view.view(x), x[:, :, [3, 4, 5, 0, 1, 2]])
    assert torch.equal(view.inverse_view(view.view(x)), x)
    assert view_from_metadata(view.to_metadata()).extra == 3
    with pytest.raises(InputError, match="Halves.arguments.*JSON"):
        Halves(float("nan")).to_metadata()
    del view.extra
    with pytest.raises(InputError, match="Halves.arguments.*all.*extra"):
        view.to_metadata()


@pytest.mark.parametrize(
    "names,view_args,named",
    [
        (["rotat"], None, "'rotat'; did you mean 'rotate.*are identity, flip, "),
        (["rotate:steep"], None, "angle='steep'.*finite number"),
        (["motion:7,30,2"], None, "'motion' takes length, angle"),
        ([Blinds()], [{"bands": 4}], "blinds.*view_args"),
        (["flip+"], None, "unknown view '' in 'flip.'. The views are identity, flip, "),
        (["flip"], [{"factor": 1}], "factor.*'flip' takes no arguments"),
        (["rotate:10,angle=30"], None, "'rotate' takes angle, circle; .*once"),
        (["skew:2"], [0], "view_args=0"),
        (["jigsaw"], [{"num_pieces": 1}], "num_pieces=1.*from 2 to 32"),
        (["skew+flip"], [[{"factor": 1}, {"factor": 1}]], "'flip' takes no arguments"),
    ],
)
def test_wrong_requests(names, view_args, named):
    with pytest.raises(InputError, match=named):
        get_views(names, view_args)
    with pytest.raises(InputError, match="seed="):
        get_views(["flip"], seed=2**63)


def test_no_permutations():
    packed = ({}, {"size": 2, "base64": "AAAA"}, {"size": 10**9, "base64": ""})
    for given in ([], [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3.0], "0123", torch.arange(4.0), *packed):
        with pytest.raises(InputError, match=r"permutation=.*S\^2 whole numbers.*1024"):
            get_views(["permutation"], [{"permutation": given}])


def test_wrong_metadata():
    flip = {"name": "flip"}
    wrong = [None, {}, {"name": "flop"}, {**flip, "arguments": {"angle": 3}}, {**flip, "class": "os.system"}]
    for metadata in wrong:
        with pytest.raises(InputError):
            view_from_metadata(metadata)
