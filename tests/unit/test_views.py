"""Every view is an exact permutation with signs, on pictures of every size, type and batch, and on maps."""

import copy
import pickle

import pytest
import torch

from mtl_anagram.errors import InputError
from mtl_anagram.views import VIEW_NAMES, PermutationView, View, get_views
from mtl_anagram.views.jigsaw import moves, outlines

SIZES = (32, 64, 256, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BUILT = [name for name in VIEW_NAMES if name != "permutation"]


def shuffled(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> View:
    if name == "permutation":
        return PermutationView(shuffled(64 * 64))
    return get_views([name], seed=3)[0]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


EVERY = [*VIEW_NAMES, "rotate_cw+negate", "jigsaw+skew+patch_permute"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EVERY)
def test_inverse_after_view_is_the_identity_bit_for_bit(name, size):
    view = make(name)
    if not view.allows(size):
        assert (name, size) in {("pixel_permute", 32), ("permutation", 32)}
        with pytest.raises(InputError, match="multiple of 64"):
            view.view(noise(1, size, size))
        return
    for dtype in DTYPES:
        x = noise(3, size, size, dtype=dtype)
        before = x.clone()
        seen = view.view(x)
        assert seen.dtype == dtype
        assert seen.shape == x.shape
        assert torch.equal(view.inverse_view(seen), before)
        assert torch.equal(x, before)
        # White noise stays white: the very same values, in other places, perhaps with the other sign.
        if size > 256:
            continue  # the same once more, and slow
        assert torch.equal(view.view(view.inverse_view(x)), before)
        assert torch.equal(seen.abs().flatten().sort().values, x.abs().flatten().sort().values)
        if name != "identity":
            assert not torch.equal(seen, x)


@pytest.mark.parametrize("name", EVERY)
def test_the_matrix_of_every_view_is_orthogonal(name):
    size = 12
    if name == "permutation":
        view = PermutationView(shuffled(16))
    elif name == "pixel_permute":
        view = get_views([name], [{"num_patches": 6}])[0]
    elif name.endswith("patch_permute"):
        small = {"num_patches": 4}
        view = get_views([name], [{"patch_permute": small} if "+" in name else small])[0]
    else:
        view = make(name)
    basis = torch.eye(size * size).unflatten(1, (1, size, size))
    matrix = view.view(basis).flatten(1).T
    assert torch.equal(matrix.T @ matrix, torch.eye(size * size))
    back = view.inverse_view(basis.expand(-1, 3, -1, -1))[:, 0].flatten(1).T
    assert torch.equal(back, matrix.T)


@pytest.mark.parametrize("name", EVERY)
def test_batches_equal_single_pictures(name):
    view = make(name)
    x = noise(2, 3, 6, 64, 64)
    seen, back = view.view(x), view.inverse_view(x)
    for i in range(2):
        for j in range(3):
            assert torch.equal(seen[i, j], view.view(x[i, j]))
            assert torch.equal(back[i, j], view.inverse_view(x[i, j]))
    columns = x[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(view.view(columns), seen[0])


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
    for size in (8, 64):
        maps = noise(2, size, size).requires_grad_()
        weight = noise(2, size, size, seed=1)
        (gradient,) = torch.autograd.grad((view.inverse_map(maps) * weight).sum(), maps)
        torch.testing.assert_close(gradient, view.map(weight))
    half = noise(3, 64, 64, dtype=torch.float16).requires_grad_()
    view.inverse_view(half).sum().backward()
    assert torch.equal(half.grad.abs(), torch.ones(3, 64, 64, dtype=torch.float16))


def test_rigid_views_turn_the_way_they_say():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None]
    wanted = {
        "identity": [[1, 2], [3, 4]],
        "flip": [[3, 4], [1, 2]],
        "rotate_cw": [[3, 1], [4, 2]],
        "rotate_ccw": [[2, 4], [1, 3]],
        "rotate_180": [[4, 3], [2, 1]],
        "negate": [[-1, -2], [-3, -4]],
    }
    for name, picture in wanted.items():
        assert make(name).view(x)[0].tolist() == picture, name


def test_negate_changes_the_sign_of_the_noise_alone_on_the_way_back():
    view = make("negate")
    x = noise(2, 6, 4, 4)
    assert torch.equal(view.view(x), -x)  # stage II's conditioning too
    back = view.inverse_view(x)
    assert torch.equal(back[:, :3], -x[:, :3])
    assert torch.equal(back[:, 3:], x[:, 3:])
    assert torch.equal(view.inverse_view(x[:, :3]), -x[:, :3])
    assert torch.equal(view.inverse_map(x), x)
    with pytest.raises(InputError, match="4 channels"):
        view.inverse_view(x[:, :4])
    with pytest.raises(InputError, match="uint8"):
        view.view(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_the_variance_moves_with_the_noise():
    x = noise(1, 6, 64, 64)
    for name in BUILT:
        back = make(name).inverse_view(x)
        moved = make(name).inverse_map(x)
        assert torch.equal(back[:, 3:], moved[:, 3:])


def test_skew_rolls_columns_as_the_formula_says():
    x = noise(1, 9, 9)
    for factor in (1.5, -0.7, 4):
        seen = get_views(["skew"], [{"factor": factor}])[0].view(x)
        for i in range(9):
            assert torch.equal(seen[0, :, i], x[0, :, i].roll(int(factor * (i - 4)), 0))


@pytest.mark.parametrize("size,radius", [(32, 12), (64, 24), (128, 48), (33, 12.375)])
def test_inner_circle_turns_the_disc_alone(size, radius):
    x = noise(1, size, size)
    seen = make("inner_circle").view(x)[0]
    half = x.flip(1, 2)[0]
    for r in range(size):
        for c in range(size):
            inside = (r - size / 2 + 0.5) ** 2 + (c - size / 2 + 0.5) ** 2 < radius**2
            assert seen[r, c] == (half if inside else x[0])[r, c]


@pytest.mark.parametrize("size,first,side", [(9, 0, 3), (10, 0, 3), (11, 1, 3), (32, 1, 10), (64, 0, 21)])
def test_square_hinge_turns_nine_squares_and_keeps_the_border(size, first, side):
    x = noise(1, size, size)
    wanted = x.clone()
    for a in range(3):
        for b in range(3):
            rows = slice(first + a * side, first + (a + 1) * side)
            columns = slice(first + b * side, first + (b + 1) * side)
            turns = 1 if (a + b) % 2 == 0 else 3
            wanted[0, rows, columns] = torch.rot90(x[0, rows, columns], turns)
    assert torch.equal(make("square_hinge").view(x), wanted)
    with pytest.raises(InputError, match="at least 3"):
        make("square_hinge").check_size(2)


def test_patches_stay_whole_and_upright():
    x = noise(1, 32, 32)
    seen = get_views(["patch_permute"], [{"num_patches": 4, "seed": 1}])[0].view(x)

    def patches(y):
        return {tuple(p.flatten().tolist()) for row in y[0].split(8, 0) for p in row.split(8, 1)}

    assert patches(seen) == patches(x)


@pytest.mark.parametrize("size", [*range(4, 133, 4), 256, 1024])
def test_jigsaw_is_a_permutation_at_every_multiple_of_4(size):
    sources = make("jigsaw").sources(size)
    assert torch.equal(sources.flatten().sort().values, torch.arange(size * size))


@pytest.mark.parametrize("seed", [0, 1, 2, 4522])
def test_jigsaw_moves_whole_pieces_within_their_kind(seed):
    size = 64
    pieces = outlines(size)
    seen = get_views(["jigsaw"], [{"seed": seed}])[0].view(pieces[None].float())[0].long()
    kind = torch.tensor([0, 1, 1, 0, 1, 2, 2, 1, 1, 2, 2, 1, 0, 1, 1, 0])
    came_from = []
    for place in range(16):
        found = seen[pieces == place].unique()
        assert len(found) == 1  # a place is filled by one piece, outline and all
        assert kind[found] == kind[place]
        came_from.append(found.item())
    assert sorted(came_from) == list(range(16))
    assert len(set(moves(seed).values())) == 16


@pytest.mark.parametrize("size", [12, 32, 64])
def test_jigsaw_pieces_interlock(size):
    q = size // 4
    grid = torch.arange(size) // q
    cells = grid[:, None] * 4 + grid
    pieces = outlines(size)
    assert (pieces != cells).any()  # there are tabs,
    for piece in range(16):
        near = {piece, piece - 1, piece + 1, piece - 4, piece + 4}
        assert set(cells[pieces == piece].unique().tolist()) <= near  # into neighbours,
    turned = torch.tensor([cell % 4 * 4 + 3 - cell // 4 for cell in range(16)])
    assert torch.equal(turned[torch.rot90(pieces, -1)], pieces)  # alike on all four sides.


@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 16, 32, 33, 64, 100])
@pytest.mark.parametrize("name", EVERY)
def test_maps_of_any_size_keep_their_mass(name, size):
    view = make(name)
    maps = noise(2, size, size).exp()
    before = maps.clone()
    for moved in (view.map(maps), view.inverse_map(maps)):
        assert moved.shape == maps.shape
        assert moved.min() >= 0
        torch.testing.assert_close(moved.sum((-1, -2)), maps.sum((-1, -2)))
    assert torch.equal(maps, before)
    torch.testing.assert_close(view.inverse_map(maps[0]), view.inverse_map(maps)[0])
    if view.allows(size):
        assert torch.equal(view.inverse_map(view.map(maps)), before)
        x = noise(3, size, size)
        unsigned = x.abs()
        assert torch.equal(view.map(unsigned), view.view(x).abs())
        assert torch.equal(view.inverse_map(unsigned), view.inverse_view(x).abs())


def test_a_small_map_of_a_fine_permutation_is_its_average():
    view = make("pixel_permute")
    maps = noise(32, 32).exp()
    fine = maps.repeat_interleave(2, 0).repeat_interleave(2, 1)
    wanted = torch.nn.functional.avg_pool2d(view.inverse_map(fine)[None], 2)[0]
    torch.testing.assert_close(view.inverse_map(maps), wanted)
    assert view.inverse_map(maps.half()).dtype == torch.float16
    with pytest.raises(InputError, match="floating"):
        view.inverse_map(torch.ones(32, 32, dtype=torch.long))


def test_compositions_apply_the_first_name_first():
    x = noise(1, 3, 8, 8)
    flip, turn = make("flip"), make("rotate_cw")
    both = make("flip+rotate_cw")
    assert both.name == "flip+rotate_cw"
    assert torch.equal(both.view(x), turn.view(flip.view(x)))
    assert not torch.equal(both.view(x), flip.view(turn.view(x)))
    assert torch.equal(both.inverse_view(x), flip.inverse_view(turn.inverse_view(x)))
    assert torch.equal(both.map(x), both.view(x))
    with pytest.raises(InputError, match="'jigsaw'.*multiple of 4"):
        make("flip+jigsaw").check_size(6)


def test_a_users_permutation_moves_patches_at_multiples_of_its_size():
    order = [3, 0, 1, 2]
    for given in (order, tuple(order), torch.tensor(order), torch.tensor(order, dtype=torch.int32)):
        view = PermutationView(given)
        x = noise(1, 2, 2)
        assert torch.equal(view.view(x).flatten(), x.flatten()[order])
    x = noise(1, 4, 4)
    assert torch.equal(view.view(x)[0, :2, :2], x[0, 2:, 2:])
    given = torch.tensor(order)
    view = PermutationView(given)
    given[0] = 0
    assert view.order.tolist() == order


def test_views_pickle_and_copy_without_their_caches():
    x = noise(1, 64, 64)
    for name in EVERY:
        view = make(name)
        seen = view.view(x)
        for other in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view), copy.copy(view)):
            assert torch.equal(other.view(x), seen)
    large = make("skew")
    large.view(noise(1, 512, 512))
    assert len(pickle.dumps(large)) < 1000
    (kept,) = {key[0] for key in large._indices}
    assert kept == 512


def test_pictures_that_are_no_pictures():
    view = make("skew")
    wrong = [noise(1, 4, 6), noise(4, 4), noise(1, 0, 0), [[1.0]], None, "x"]
    for x in wrong:
        for method in (view.view, view.inverse_view):
            with pytest.raises(InputError):
                method(x)
    for maps in [noise(4, 6), noise(4), noise(0, 0), None, [[1.0]]]:
        for method in (view.map, view.inverse_map):
            with pytest.raises(InputError):
                method(maps)
    for size in ("64", 64.0, True, 0, -4, None):
        with pytest.raises(InputError, match="size="):
            view.check_size(size)
