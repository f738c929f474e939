"""Pictures to files: rounding, views side by side, PNGs, and writes that are whole or not there."""

import io
import os
import stat

import pytest
import torch
from PIL import Image

from mtl_anagram.atomic import remove_leftovers, write_atomically
from mtl_anagram.errors import InputError, SourceError
from mtl_anagram.media import encode_png, save_picture, side_by_side, to_uint8
from mtl_anagram.views import get_views


def decoded(content):
    """A PNG's bytes -> (mode, uint8 (3, H, W))."""
    image = Image.open(io.BytesIO(content))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
    return image.mode, pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def random_picture(height=5, width=7):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_to_uint8_rounds_to_the_nearest_level():
    levels = torch.arange(256)
    exact = levels / 255 * 2 - 1
    assert torch.equal(to_uint8(exact), levels.to(torch.uint8))
    for offset in (-0.45, 0.45):  # in levels
        assert torch.equal(to_uint8(exact + offset * 2 / 255), levels.to(torch.uint8))
    assert to_uint8(exact[100] + 0.55 * 2 / 255) == 101
    assert to_uint8(torch.zeros(())) == 128  # 127.5 goes up


def test_to_uint8_clamps_and_takes_any_float():
    values = torch.tensor([-7.0, -1.001, 1.001, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 255, 255]
    picture = random_picture().requires_grad_()
    assert to_uint8(picture).shape == picture.shape
    assert to_uint8(picture).dtype == torch.uint8
    half = to_uint8(picture.bfloat16()).int() - to_uint8(picture).int()
    assert half.abs().max() <= 1


def test_side_by_side_is_every_view_in_order():
    picture = random_picture(8, 8)
    views = get_views(["identity", "rotate_cw", "negate"])
    row = side_by_side(picture, views)
    assert row.shape == (3, 8, 24)
    for i, view in enumerate(views):
        assert torch.equal(row[:, :, 8 * i : 8 * i + 8], view.view(picture))
    assert torch.equal(side_by_side(picture, views[:1]), picture)


def test_a_png_holds_the_pixels():
    picture = random_picture()
    mode, pixels = decoded(encode_png(picture))
    assert mode == "RGB"
    assert torch.equal(pixels, to_uint8(picture))
    turned = random_picture(7, 5).transpose(1, 2)  # not contiguous
    assert torch.equal(decoded(encode_png(turned))[1], to_uint8(turned))


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 4), (4, 4, 3), (1, 4, 4), (4, 4), (6, 4, 4), (), (3, 0, 4), (3, 4, 0)]
)
def test_other_shapes_are_refused(shape, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        encode_png(torch.zeros(shape))
    with pytest.raises(InputError):
        save_picture(tmp_path / "a.png", torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_save_picture(tmp_path):
    picture = random_picture()
    save_picture(tmp_path / "deep" / "er" / "a.png", picture)
    assert (tmp_path / "deep" / "er" / "a.png").read_bytes() == encode_png(picture)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_have_the_umasks_mode(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", b"1")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / "a", b"first, and longer")
    write_atomically(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize(
    "error, raised",
    [(OSError(28, "No space left"), SourceError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "interrupted"],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call, error, raised):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(raised) as caught:
        write_atomically(tmp_path / "a", b"new")
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert str(tmp_path / "a") in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a", b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match="cannot be written"):
        write_atomically(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_leftovers_alone_are_removed(tmp_path):
    for name in (".sample_64.png.x1y2.part", "kept.part", "sample_64.png", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept.part", "sample_64.png"]
    remove_leftovers(tmp_path / "not there")
