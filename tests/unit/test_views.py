"""Every view is an exact permutation with signs, on pictures of every size, type and batch, and on maps."""

import copy
import pickle

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.views import View, get_views
from mtl_anagram.views.registry import KINDS
from tests.helpers import noise

EVERY = [kind.name for kind in KINDS if kind.reduce == "mean"]  # components are in test_factorized.py
EVERY += ["rotate:20,circle", "reflect:20,circle", "rotate_cw+negate", "jigsaw+skew+patch_permute"]
SQUARES = ["jigsaw", "inner_circle", "square_hinge", "transpose", "rotate", "reflect"]
SQUARES += ["rotate_cw", "rotate_ccw", *EVERY[-4:]]


def make(name: str, side: int = 64) -> View:
    order = torch.randperm(side**2, generator=torch.Generator().manual_seed(0))
    return get_views([name], [{"permutation": order} if name == "permutation" else None], seed=3)[0]


@pytest.mark.parametrize("size", [32, 64, 256, 1024])
@pytest.mark.parametrize("name", EVERY)
def test_inverse_after_view_is_the_identity_bit_for_bit(name, size):
    view = make(name)
    if not view.allows(size):
        assert (name, size) in {("pixel_permute", 32), ("permutation", 32)}
        with pytest.raises(InputError, match="multiple of 64"):
            view.view(noise(1, size, size))
        return
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = noise(3, size, size, dtype=dtype)
        before = x.clone()
        seen = view.view(x)
        assert (seen.dtype, seen.shape) == (dtype, x.shape)
        assert torch.equal(view.inverse_view(seen), before)
        assert torch.equal(x, before)
        # White noise stays white: the very same values, in other places, perhaps with the other sign.
        if size > 256:
            continue  # the same once more, and slow
        assert torch.equal(view.view(view.inverse_view(x)), before)
        assert torch.equal(seen.abs().flatten().sort().values, x.abs().flatten().sort().values)
        assert torch.equal(seen, x) == (name == "identity")


@pytest.mark.parametrize("name", EVERY)
def test_the_matrix_of_every_view_is_orthogonal(name):
    size, view = 12, make(name, side=4)
    if name.endswith("_permute"):
        small = {"num_patches": 6 if name == "pixel_permute" else 4}
        view = get_views([name], [[None, None, small] if "+" in name else small])[0]
    basis = torch.eye(size * size).unflatten(1, (1, size, size))
    matrix = view.view(basis).flatten(1).T
    assert torch.equal(matrix.T @ matrix, torch.eye(size * size))
    back = view.inverse_view(basis.expand(-1, 3, -1, -1))[:, 0].flatten(1).T
    assert torch.equal(back, matrix.T)


@pytest.mark.parametrize("name", EVERY)
def test_batches_equal_single_pictures(name):
    view, x = make(name), noise(2, 3, 6, 64, 64)
    seen, back = view.view(x), view.inverse_view(x)
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        assert torch.equal(seen[i, j], view.view(x[i, j]))
        assert torch.equal(back[i, j], view.inverse_view(x[i, j]))
    columns = x[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(view.view(columns), seen[0])
    assert torch.equal(view.show(x), seen)
    assert torch.equal(view.inverse_map(x)[..., 3:, :, :], back[..., 3:, :, :])  # where the noise goes


@pytest.mark.parametrize("name", EVERY)
def test_gradients_flow_through_by_the_transpose(name):
    view = make(name)
    with torch.inference_mode():  # what is cached here must serve a gradient later
        view.view(noise(3, 64, 64))
        view.inverse_map(noise(64, 64))
    x = noise(1, 3, 64, 64).requires_grad_()
    weight = noise(1, 3, 64, 64, seed=1)
    (gradient,) = torch.autograd.grad((view.view(x) * weight).sum(), x)
    assert torch.equal(gradient, view.inverse_view(weight))
    maps, weight = noise(2, 64, 64).requires_grad_(), weight[0].abs()
    (gradient,) = torch.autograd.grad((view.inverse_map(maps) * weight[:2]).sum(), maps)
    torch.testing.assert_close(gradient, view.view(weight).abs()[:2])
    half = noise(3, 64, 64, dtype=torch.float16).requires_grad_()
    view.inverse_view(half).sum().backward()
    assert torch.equal(half.grad.abs(), torch.ones(3, 64, 64, dtype=torch.float16))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_negate_changes_the_sign_of_the_noise_alone_on_the_way_back(channels):
    view, x = make("negate"), noise(2, 2 * channels, 4, 4)
    assert torch.equal(view.view(x), -x)  # stage II's conditioning too
    assert torch.equal(view.inverse_map(x), x)
    back = view.inverse_view(x, channels)
    assert torch.equal(back[:, :channels], -x[:, :channels])
    assert torch.equal(back[:, channels:], x[:, channels:])
    assert torch.equal(view.inverse_view(x[:, :channels], channels), -x[:, :channels])
    with pytest.raises(InputError, match=f"{2 * channels} channels.*channels=5"):
        view.inverse_view(x, 5)


@pytest.mark.parametrize("height,width", [(32, 64), (128, 64), (24, 40)])
@pytest.mark.parametrize("name", EVERY)
def test_rectangles(name, height, width):
    view, x = make(name), noise(6, height, width)
    if name in SQUARES:
        for act in (view.view, view.inverse_view, view.check_size, view.inverse_map):
            with pytest.raises(InputError, match=f"{height}, {width}.*be square"):
                act((height, width) if act == view.check_size else x)
        return
    maps = x.exp()
    assert torch.allclose(view.inverse_map(maps).sum((-1, -2)), maps.sum((-1, -2)))
    if not (view.allows(height) and view.allows(width)):
        with pytest.raises(InputError, match=f"{height}, {width}.*a multiple of"):
            view.view(x)
        return
    view.check_size((height, width))
    assert torch.equal(view.inverse_view(view.view(x), channels=6), x)
    assert torch.equal(view.inverse_map(maps), view.inverse_view(maps, channels=6).abs())
    if name == "skew":  # the square's formula, on these sides, and with other factors
        for factor in (1.5, -0.7, 4):
            seen = get_views(["skew"], [{"factor": factor}])[0].view(x)
            for i in range(width):
                assert torch.equal(seen[..., i], x[..., i].roll(int(factor * (i - height // 2)), -1))


@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 16, 32, 33, 64, 100])
@pytest.mark.parametrize("name", EVERY)
def test_maps_of_any_size_keep_their_mass(name, size):
    view, maps = make(name), noise(2, size, size).exp().requires_grad_()
    before = maps.detach().clone()
    moved = view.inverse_map(maps)
    assert moved.min() >= 0
    torch.testing.assert_close(moved.sum((-1, -2)), maps.sum((-1, -2)))
    (gradient,) = torch.autograd.grad(moved.sum(), maps)  # which is the transpose's, of ones
    torch.testing.assert_close(gradient, torch.ones_like(maps))
    assert torch.equal(maps, before)
    torch.testing.assert_close(view.inverse_map(maps[0]), view.inverse_map(maps)[0])
    if view.allows(size):
        x = noise(3, size, size)
        assert torch.equal(view.inverse_map(view.view(maps).abs()), before)
        assert torch.equal(view.inverse_map(x.abs()), view.inverse_view(x).abs())


def test_a_small_map_of_a_fine_permutation_is_its_average():
    view, maps = make("pixel_permute"), noise(32, 32).exp()
    fine = maps.repeat_interleave(2, 0).repeat_interleave(2, 1)
    wanted = torch.nn.functional.avg_pool2d(view.inverse_map(fine)[None], 2)[0]
    torch.testing.assert_close(view.inverse_map(maps), wanted)
    assert view.inverse_map(maps.half()).dtype == torch.float16


def test_compositions_apply_the_first_name_first():
    x, flip, turn, both = noise(1, 3, 8, 8), make("flip"), make("rotate_cw"), make("flip+rotate_cw")
    assert torch.equal(both.view(x), turn.view(flip.view(x)))
    assert torch.equal(both.inverse_view(x), flip.inverse_view(turn.inverse_view(x)))
    assert torch.equal(both.inverse_map(x), both.inverse_view(x))
    with pytest.raises(InputError, match="'jigsaw'.*multiple of 4"):
        make("flip+jigsaw").check_size(6)


def test_views_pickle_and_copy_without_their_caches():
    x = noise(1, 64, 64)
    for name in EVERY:
        view = make(name)
        before, seen = len(pickle.dumps(view)), view.view(x)
        assert len(pickle.dumps(view)) == before
        for other in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
            assert torch.equal(other.view(x), seen)


def test_pictures_that_are_no_pictures():
    view = make("rotate_cw")
    for x in (noise(1, 4, 6), noise(4), noise(1, 0, 0), torch.ones(3, 4, 4, dtype=torch.uint8), None):
        for method in (view.view, view.inverse_view, view.inverse_map):
            with pytest.raises(InputError):
                method(x)
    for size in ("64", 0, None, (64,)):
        with pytest.raises(InputError, match="size="):
            view.check_size(size)
