"""Files: pictures' rounding and PNGs, writes that are whole or not there, what the hub answers."""

import os
import stat
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from mtl_anagram.errors import InputError, SourceError
from mtl_anagram.files import hub
from mtl_anagram.files.atomic import write_atomically
from mtl_anagram.files.images import encode_png, read_picture, save_picture, to_uint8, views_strip
from mtl_anagram.views import get_views


def random_picture(height=5, width=7):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_to_uint8_rounds_to_the_nearest_level_clamps_and_takes_any_float():
    levels = torch.arange(256)
    exact = levels / 255 * 2 - 1
    for offset in (-0.45, 0, 0.45):  # in levels
        assert torch.equal(to_uint8(exact + offset * 2 / 255), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, -1.001, 0, 1.001])).tolist() == [0, 0, 128, 255]  # 127.5 goes up
    picture = random_picture().requires_grad_()
    assert (to_uint8(picture.bfloat16()).int() - to_uint8(picture).int()).abs().max() <= 1


def test_a_strip_is_every_view_in_order_and_their_names_below():
    picture, views = random_picture(64, 64), get_views(["identity", "rotate_cw", "negate"])
    strip = views_strip(picture, views)
    assert strip.shape[2] == 3 * 64
    for i, view in enumerate(views):
        assert torch.equal(strip[:, :64, 64 * i : 64 * (i + 1)], view.view(picture))
        label = strip[:, 64:, 64 * i : 64 * (i + 1)]
        assert label.max() == 1
        assert label.min() < -0.5  # white with something dark on it
        assert label[:, 0].min() == label[:, :, 0].min() == label[:, :, -1].min() == 1
    assert torch.equal(views_strip(picture.double(), views), strip)


class Shown:
    """A view of a caller's own that is shown otherwise than it is viewed, under a long name."""

    def __init__(self, name):
        self.name = name

    def show(self, x):
        return x[:, :, :20]


@pytest.mark.parametrize("name", ["", "旋转视图", "x" * 1000])
def test_a_strip_of_any_views_and_names(name):
    picture = random_picture(32, 48)
    strip = views_strip(picture, [Shown(name), Shown("i")])
    assert strip.shape[2] == 40
    assert torch.equal(strip[:, :32, :20], picture[:, :, :20])
    assert (strip[:, 32:, :20].min() < 0) == bool(name)


def test_a_png_holds_the_pixels(tmp_path):
    path = tmp_path / "deep" / "er" / "a.png"
    for picture in (random_picture(), random_picture(7, 5).transpose(1, 2)):  # the second is not contiguous
        save_picture(path, picture)
        assert path.read_bytes() == encode_png(picture)
        with torch.device("meta"):  # a host's default device
            assert torch.equal(to_uint8(read_picture(path)), to_uint8(picture))
    assert Image.open(path).tobytes()[3:6] == bytes(to_uint8(picture)[:, 0, 1].tolist())
    for mode, colour, value in (("LA", (0, 0), 1), ("RGBA", (0, 0, 0, 0), 1), ("I;16", 32767, 0)):
        Image.new(mode, (2, 2), colour).save(path)  # white paper below what is not there; 16 bits of grey
        assert (read_picture(path) - value).abs().max() < 0.01
    large = bytearray(encode_png(torch.rand(3, 200, 200) * 2 - 1))
    large[large.rindex(b"IDAT")] = 255  # a SyntaxError of Pillow's
    for damaged in (encode_png(picture)[:60], large):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"a\.png' is no readable picture"):
            read_picture(path)
    for shape in ((1, 3, 4, 4), (4, 4, 3), (3, 0, 4)):
        with pytest.raises(InputError, match="picture has shape"):
            encode_png(torch.zeros(shape))


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_writing_replaces_the_file_with_the_umasks_mode_and_leaves_nothing_else(tmp_path, umask, mode):
    before = os.umask(umask)
    write_atomically(tmp_path / "a", b"first, and longer")
    write_atomically(tmp_path / "a", b"second")
    os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, call, Mock(side_effect=error))
    with pytest.raises(SourceError if error.args else KeyboardInterrupt) as caught:
        write_atomically(tmp_path / "a", b"new")
    assert not error.args or "/a cannot be written ([Errno 28] No space left)" in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("source", ["a--b/c", "../b", "a\0/b", "~no-such-user-0/x", "x" * 300])
def test_sources_that_are_none(source):
    with pytest.raises(SourceError, match="source=.*(check the path|give another)"):
        hub.open_source(source, None, "config.json")
