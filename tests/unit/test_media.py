"""Files: pictures' rounding and PNGs, writes that are whole or not there, a seed's folder, what the hub answers."""

import os
import stat

import huggingface_hub
import pytest
import torch
from PIL import Image

from mtl_anagram.errors import InputError, SourceError
from mtl_anagram.files import hub, outputs
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
    path.write_bytes(encode_png(picture)[:60])
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

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(SourceError if error.args else KeyboardInterrupt) as caught:
        write_atomically(tmp_path / "a", b"new")
    assert not error.args or "/a cannot be written ([Errno 28] No space left)" in str(caught.value)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


REQUEST = {"prompts": ["a duck"], "recipe": {"steps": 3}, "size": 16}
ABOUT = {"weights": {"name": "tiny", "files": {}}, "made_with": {"dtype": "float32", "device": "cpu"}}


def finished(folder, request=None, sizes=(16,), dtype="float32", **options):
    return outputs.finished(folder, 9, request or REQUEST, sizes, dtype=dtype, **options)


@pytest.fixture
def made(tmp_path):
    """A finished folder of seed 9 with pictures of 16 px."""
    views = get_views(["identity"])
    outputs.write_pictures(outputs.folder_of(tmp_path, 9), 16, random_picture(16, 16), views)
    assert finished(tmp_path) is None
    return outputs.finish(tmp_path, 9, REQUEST, [16], ABOUT, ("said",))


def test_a_seeds_folder_is_finished_with_its_metadata(made, tmp_path):
    pictures = {16: tmp_path / "0009/sample_16.png"}
    assert made == outputs.Anagram(9, tmp_path / "0009", pictures, False, ("said",))
    names = {path.name for path in made.folder.iterdir()}
    assert names == {"metadata.json", "sample_16.png", "sample_16.views.png"}
    content = outputs.read_metadata(made.folder)
    assert list(content) == ["format", "seed", "sizes", "request", "pictures", "weights", "made_with"]
    assert content["request"] == REQUEST
    assert finished(tmp_path) == outputs.Anagram(9, made.folder, pictures, True)
    assert finished(tmp_path, sizes=[16, 64]) is None  # more is asked for
    made.pictures[16].write_bytes(b"damaged")
    assert finished(tmp_path) is None
    (made.folder / "sample_mine.png").write_bytes(b"")
    outputs.clear(made.folder)
    assert [path.name for path in made.folder.iterdir()] == ["sample_mine.png"]
    with pytest.raises(SourceError, match=r"metadata\.json"):
        outputs.read_metadata(made.folder / "metadata.json")


def test_another_dtype_is_said_and_another_request_refused(made, tmp_path):
    (said,) = finished(tmp_path, dtype="bfloat16").warnings
    assert all(word in said for word in ("float32", "bfloat16", "--overwrite", "overwrite=True"))
    other = {**REQUEST, "recipe": {"steps": 4}}
    with pytest.raises(InputError, match="different: recipe.*--overwrite.*overwrite=True"):
        finished(tmp_path, other)
    assert finished(tmp_path, other, normal=lambda request: {**request, "recipe": None}).skipped
    upscaled = {**REQUEST, "stage_3": {"steps": 5}}  # which comes last and changes nothing before it
    assert finished(tmp_path, upscaled).skipped
    for content in (b"{", b"{}", b'{"request": 3}'):
        (made.folder / "metadata.json").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read.*--overwrite"):
            finished(tmp_path)


def test_places_that_cannot_take_the_files(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in ("", 3, "a\0b", "\ud800", "x" * 300):
        with pytest.raises(InputError, match="save_dir="):
            outputs.check_folder(folder)
    with pytest.raises(SourceError, match="save_dir=.*is a file"):
        outputs.check_folder(tmp_path / "file/a")
    assert outputs.check_folder(str(tmp_path / "a" / "b"), write=True) == tmp_path / "a" / "b"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SourceError, match="cannot be written to"):
        outputs.check_folder(tmp_path / "0009", write=True)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), type("ConnectError", (Exception,), {"__module__": "httpx"})("no route")],
)
def test_a_download_that_fails(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(
        SourceError, match=f"owner/model.*config.json.*{error.args[-1]}.*connection.*give a folder"
    ):
        hub.open_source("owner/model", "unet", "config.json").get("config.json")


@pytest.mark.parametrize("source", ["a--b/c", "../b", "a\0/b", "~no-such-user-0/x", "x" * 300])
def test_sources_that_are_none(source):
    with pytest.raises(SourceError, match="source=.*(check the path|give another)"):
        hub.open_source(source, None, "config.json")
